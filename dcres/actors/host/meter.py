"""How far a long operation of a host is."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from dcres.actors.messages import Progress
from dcres.errors import Conflict
from dcres.model.pages import PAGE_SIZE


class Meter:
    """Counts pages as they are done, lets others look, and stops the work when it is cancelled."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._progress = Progress()
        self._cancelled = threading.Event()
        self._clock = clock
        self._began_s = self._ended_s = 0.0

    @contextmanager
    def measuring(self, what: str, pages: int) -> Iterator[None]:
        """The work inside the ``with`` block is `what`, and calls `done` as it goes."""
        self._began_s = self._ended_s = self._clock()
        self._progress = Progress(what, 0, pages * PAGE_SIZE)
        yield

    def done(self, pages: int) -> None:
        """Pages done since the last call. Raises Conflict once the work is cancelled."""
        now = self._progress
        if self._cancelled.is_set():
            raise Conflict(f"{now.what} was cancelled")
        self._ended_s = self._clock()
        self._progress = replace(now, done_bytes=now.done_bytes + pages * PAGE_SIZE)

    def cancel(self) -> None:
        """Make the work under way fail soon."""
        self._cancelled.set()

    def reset(self) -> None:
        """Allow new work."""
        self._cancelled.clear()
        self._progress = Progress()

    @property
    def progress(self) -> Progress:
        """How far it is, and its rate from the beginning to the last page done."""
        now, seconds = self._progress, self._ended_s - self._began_s
        return replace(now, bytes_per_s=now.done_bytes / seconds if seconds > 0 else 0.0)
