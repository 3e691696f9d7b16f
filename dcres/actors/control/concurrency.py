"""Time and threads as the control of VMs sees them.

Whatever drives operations waits, sleeps and works side by side through a `Concurrency`, never by
itself: in a cluster that is `Threads`, and in the simulation (tests/simulation) a virtual clock
that runs one thing at a time, in an order that a seed decides.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from functools import partial
from typing import Generic, Protocol, TypeVar, cast

T = TypeVar("T")


class Task(Protocol):
    """Work under way."""

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait for its end; whether it has ended."""


class Signal(Protocol):
    """Something that happens once."""

    def set(self) -> None:
        """It has happened."""

    def is_set(self) -> bool:
        """Whether it has."""

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for it; whether it has happened."""


class Mailbox(Protocol[T]):
    """Values in the order in which they came, from any thread."""

    def put(self, value: T) -> None:
        """Add one."""

    def get(self, timeout_s: float | None = None) -> T | None:
        """Take the oldest one, waiting for it; None when time is over."""


class Lock(AbstractContextManager[object], Protocol):
    """At most one holder at a time."""

    def acquire(self, timeout_s: float = 0.0) -> bool:
        """Take it within that time; whether it was taken."""

    def release(self) -> None:
        """Give it back."""

    def locked(self) -> bool:
        """Whether it is held."""


class Concurrency(Protocol):
    """Time, and work side by side."""

    def now_s(self) -> float:
        """A clock that only goes forward."""

    def utc(self) -> datetime:
        """The time of day."""

    def sleep(self, seconds: float) -> None:
        """Wait."""

    def spawn(self, work: Callable[[], None], name: str) -> Task:
        """Begin `work` beside the caller. It handles its own errors."""

    def signal(self) -> Signal:
        """One that has not happened."""

    def mailbox(self) -> Mailbox[T]:
        """An empty one."""

    def lock(self) -> Lock:
        """One that is free."""


class _Thread:
    def __init__(self, work: Callable[[], None], name: str) -> None:
        self._thread = threading.Thread(target=work, name=name, daemon=True)
        self._thread.start()

    def join(self, timeout_s: float | None = None) -> bool:
        self._thread.join(timeout_s)
        return not self._thread.is_alive()


class _Signal:
    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        self._event.set()

    def is_set(self) -> bool:
        return self._event.is_set()

    def wait(self, timeout_s: float | None = None) -> bool:
        return self._event.wait(timeout_s)


class _Mailbox(Generic[T]):
    def __init__(self) -> None:
        self._queue: queue.Queue[T] = queue.Queue()

    def put(self, value: T) -> None:
        self._queue.put(value)

    def get(self, timeout_s: float | None = None) -> T | None:
        try:
            return self._queue.get(timeout=timeout_s)
        except queue.Empty:
            return None


class _Lock:
    def __init__(self) -> None:
        self._lock = threading.Lock()

    def acquire(self, timeout_s: float = 0.0) -> bool:
        return self._lock.acquire(timeout=timeout_s) if timeout_s else self._lock.acquire(False)

    def release(self) -> None:
        self._lock.release()

    def locked(self) -> bool:
        return self._lock.locked()

    def __enter__(self) -> _Lock:
        self._lock.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()


class Threads:
    """The real thing: see `Concurrency`."""

    def now_s(self) -> float:
        """As the kernel's monotonic clock has it."""
        return time.monotonic()

    def utc(self) -> datetime:
        """As this host's clock has it."""
        return datetime.now(UTC)

    def sleep(self, seconds: float) -> None:
        """Wait."""
        time.sleep(seconds)

    def spawn(self, work: Callable[[], None], name: str) -> Task:
        """In a thread that does not keep the process alive."""
        return _Thread(work, name)

    def signal(self) -> Signal:
        """A `threading.Event`."""
        return _Signal()

    def mailbox(self) -> Mailbox[T]:
        """A `queue.Queue`."""
        return _Mailbox()

    def lock(self) -> Lock:
        """A `threading.Lock`."""
        return _Lock()


THREADS: Concurrency = Threads()


def side_by_side(concurrency: Concurrency, works: Sequence[Callable[[], T]], name: str) -> list[T]:
    """What all of `works` return, in their order, done at the same time. Raises what one raised."""
    done: list[T | BaseException | None] = [None] * len(works)

    def do(index: int) -> None:
        try:
            done[index] = works[index]()
        except BaseException as error:
            done[index] = error

    tasks = [concurrency.spawn(partial(do, index), name) for index in range(len(works))]
    for task in tasks:
        task.join()
    results = []
    for each in done:
        if isinstance(each, BaseException):
            raise each
        results.append(cast(T, each))
    return results
