"""How long threads stood ready and had no processor: what a machine with few of them costs.

The kernel counts it for every thread, in the second figure of ``/proc/PID/task/TID/schedstat``
(Documentation/scheduler/sched-stats.rst). Threads that wait for pages, locks, disks or for
somebody to let them go on do not stand ready, so nothing of that is in it.
"""

from __future__ import annotations

import bisect
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.support.speed import patience

_NS = 1e-9
_LOOK_S = 0.005
_NEW_THREADS_LOOKS = 20  # from one look for threads to the next


class Waits:
    """What some processes and some threads of this process have waited in all, looked at often."""

    def __init__(self, pids: Iterable[int], threads: Iterable[int]) -> None:
        self._pids = list(pids)
        self._threads = [Path(f"/proc/self/task/{each}/schedstat") for each in threads]
        self._began_s: list[float] = []  # of each look
        self._done_s: list[float] = []
        self._waited: list[dict[str, float]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="waits", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join(patience(10))

    def between(self, began_s: float, ended_s: float) -> dict[str, float]:
        """Thread → seconds that it waited between two moments of the monotonic clock, or more.

        More by what it waited in the few milliseconds from and to the nearest looks.
        """
        before = self._waited[max(0, bisect.bisect_right(self._done_s, began_s) - 1)]
        after = self._waited[bisect.bisect_left(self._began_s[:-1], ended_s)]
        return {name: waited - before.get(name, waited) for name, waited in after.items()}

    def _look(self) -> None:
        waited: dict[str, float] = {}
        paths: list[Path] = []
        looks = 0
        while not self._ended.is_set():
            if looks % _NEW_THREADS_LOOKS == 0:
                paths = [*self._threads, *self._threads_of_processes()]
            looks += 1
            self._began_s.append(time.monotonic())
            for path in paths:
                with suppress(OSError):  # a thread that has ended
                    waited[str(path)] = int(path.read_text().split()[1]) * _NS
            self._waited.append(dict(waited))
            self._done_s.append(time.monotonic())
            self._ended.wait(_LOOK_S)

    def _threads_of_processes(self) -> Iterator[Path]:
        for pid in self._pids:
            yield from Path(f"/proc/{pid}/task").glob("*/schedstat")


@contextmanager
def watching(pids: Iterable[int], threads: Iterable[int]) -> Iterator[Waits]:
    """Look at them until the ``with`` block ends."""
    waits = Waits(pids, threads)
    waits.start()
    try:
        yield waits
    finally:
        waits.stop()
