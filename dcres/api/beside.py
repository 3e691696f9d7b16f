"""Long work on several hosts at the same time, watched, and ended when whoever wants it is."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing, suppress
from typing import Generic, Protocol, TypeVar

from dcres.api.operation import HostProgress, OperationProgress, ProgressOption, shown_progress
from dcres.errors import ClusterError, DcresError, HostFailure, OperationFailed
from dcres.linux.interrupt import OperationInterrupted, ended_by_sigterm

_T = TypeVar("_T")
_Yielded = TypeVar("_Yielded", covariant=True)

_LOOK_EVERY_S = 0.25
_AGAIN_S = 3.0


class Work(Protocol[_Yielded]):
    """What a generator yields, somewhere; it may be ended before its end."""

    def __iter__(self) -> Iterator[_Yielded]: ...

    def cancel(self) -> None:
        """Have it end soon, and raise instead of yielding more; for another thread, repeatable."""


class Going(Protocol):
    """How far a part of the work is."""

    @property
    def total_bytes(self) -> int:
        """All that is to be done, as far as that is known."""

    @property
    def done_bytes(self) -> int:
        """What is done of it."""

    @property
    def sent_bytes(self) -> int:
        """Of these, those that took `seconds`."""

    @property
    def seconds(self) -> float:
        """Since it began."""


_G = TypeVar("_G", bound=Going)


class WorkHere(Generic[_T]):
    """The same in this process, where it ends at the next value."""

    def __init__(self, each: Iterator[_T]) -> None:
        self._each = each
        self._over = False

    def __iter__(self) -> Iterator[_T]:
        with closing(self._each) as each:  # type: ignore[type-var]
            for value in each:
                if self._over:
                    raise ClusterError("it was cancelled")
                yield value

    def cancel(self) -> None:
        """See `Work`."""
        self._over = True


class Beside(Generic[_G]):
    """Parts of one piece of work, such as those of a checkpoint that hosts copy at the same time.

    `title` names it for people, `vm` and `phase` are told as progress; `kept` says what stays of
    it when it is interrupted.
    """

    def __init__(
        self,
        title: str,
        vm: str,
        phase: str,
        kept: str = "what was copied until then stays, and repeated it goes on",
    ) -> None:
        self._title = title
        self._vm = vm
        self._phase = phase
        self._kept = kept
        self._lock = threading.Lock()
        self._works: list[Work[_G]] = []
        self._over = False
        self._now: dict[str, _G] = {}

    def run(
        self, begin: Mapping[str, Callable[[], Work[_G]]], progress: ProgressOption
    ) -> dict[str, _G]:
        """Begin and finish the work of all of these: the last that each yielded, by their names.

        One that fails does not end the others; then raises OperationFailed. An interrupt ends all
        of them, and is raised as an OperationInterrupted when they have ended.
        """
        with ended_by_sigterm(), shown_progress(progress, self._title) as show:
            with ThreadPoolExecutor(max(len(begin), 1), "beside") as pool:
                futures = {name: pool.submit(self._finish, name, w) for name, w in begin.items()}
                try:
                    while wait(futures.values(), timeout=_LOOK_EVERY_S).not_done:
                        if show is not None:
                            show(self._progress())
                except BaseException as error:
                    self._cancel()
                    # Ray's interrupt is lost if it comes to the process between two values.
                    while wait(futures.values(), timeout=_AGAIN_S).not_done:
                        self._cancel()
                    if isinstance(error, KeyboardInterrupt):
                        what = f"cancelled: {self._title}; {self._kept}"
                        raise OperationInterrupted(what) from None
                    raise
            return self._results(futures)

    def _finish(self, name: str, begin: Callable[[], Work[_G]]) -> _G:
        with self._lock:
            if self._over:
                raise ClusterError("it was cancelled")
            work = begin()
            self._works.append(work)
        for each in work:
            self._now[name] = each
        if name not in self._now:
            raise ClusterError(f"{self._title} ended without a word")
        return self._now[name]

    def _cancel(self) -> None:
        with self._lock:
            self._over = True
            for work in self._works:
                with suppress(DcresError):
                    work.cancel()

    def _results(self, futures: Mapping[str, Future[_G]]) -> dict[str, _G]:
        failed = [
            HostFailure.of(name, error)
            for name, future in futures.items()
            if (error := future.exception()) is not None
        ]
        if failed:
            raise OperationFailed.of(f"{self._title} failed", failed)
        return {name: future.result() for name, future in futures.items()}

    def _progress(self) -> OperationProgress:
        hosts = (self._host_progress(name, part) for name, part in sorted(self._now.items()))
        return OperationProgress(self._vm, self._phase, tuple(hosts))

    def _host_progress(self, name: str, part: _G) -> HostProgress:
        rate = part.sent_bytes / part.seconds if part.seconds else 0.0
        return HostProgress(name, self._phase, part.done_bytes, part.total_bytes, rate)
