"""Work on the pieces of a part: by several threads, at most so fast, and how far it is."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")

THREADS = 4  # each has one piece in memory, and pyarrow a copy of it
_TELL_EVERY_S = 0.25


@dataclass(frozen=True, slots=True)
class PartCopied:
    """How far the copying of one host's part is, and in the end what it took.

    `there_bytes` were at the destination before, whole; `memory_bytes` is how long what the memory
    file holds is, once that is known.
    """

    host: str
    files: int = 0
    total_bytes: int = 0
    sent_bytes: int = 0
    there_bytes: int = 0
    seconds: float = 0.0
    memory_bytes: int = 0

    @property
    def done_bytes(self) -> int:
        """Bytes that need not be looked at again."""
        return self.sent_bytes + self.there_bytes


class Stopped(Exception):
    """The work is to end before all of it is done."""


class Pace:
    """Lets so many bytes through each second, of all threads together; None: as many as come."""

    def __init__(
        self, bytes_per_s: float | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._bytes_per_s = bytes_per_s
        self._clock = clock
        self._lock = threading.Lock()
        self._free_at = 0.0
        self._over = threading.Event()

    def take(self, length_bytes: int) -> None:
        """Wait until these may go. Raises Stopped after `stop`."""
        wait_s = 0.0
        if self._bytes_per_s is not None:
            with self._lock:
                now = self._clock()
                begins = max(self._free_at, now)
                self._free_at = begins + length_bytes / self._bytes_per_s
            wait_s = begins - now
        if self._over.wait(wait_s) if wait_s > 0 else self._over.is_set():
            raise Stopped

    def stop(self) -> None:
        """Let nothing through any more."""
        self._over.set()


class Worker(Generic[T]):
    """Does something to each of many, by several threads; ends at the first error."""

    def __init__(
        self, work: Callable[[T], None], each: Iterable[T], stop: Callable[[], None]
    ) -> None:
        """`stop` makes a `work` that waits raise Stopped."""
        self._work = work
        self._each = iter(each)
        self._stop = stop
        self._lock = threading.Lock()
        self._over = False

    def run(self) -> Generator[None, None, None]:
        """Yields a few times a second until all is done; raises what `work` raised.

        When it is closed before, it returns once no `work` is under way any more.
        """
        with ThreadPoolExecutor(THREADS, "copy") as pool, self._ended():
            left = {pool.submit(self._loop) for _ in range(THREADS)}
            while left:
                done, left = wait(left, _TELL_EVERY_S, FIRST_EXCEPTION)
                for each in done:
                    each.result()
                yield

    @contextmanager
    def _ended(self) -> Iterator[None]:
        try:
            yield
        finally:
            self._over = True
            self._stop()

    def _loop(self) -> None:
        while not self._over:
            with self._lock:
                try:
                    each = next(self._each)
                except StopIteration:
                    return
            self._work(each)
