"""A long call to a VM's coordinator, attended: its progress is shown, and Ctrl-C cancels it.

So does whatever else ends the waiting before the call has ended: SIGTERM, with which Ray stops a
job, `sys.exit` in a handler of the caller's, a function for progress that raises. Nothing goes on
unattended.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, Concatenate, ParamSpec, TypeVar

from dcres.actors.control.coordinator import Coordinator
from dcres.actors.ports import Pending, Port
from dcres.api.show import progress_bars
from dcres.errors import DcresError
from dcres.linux.interrupt import OperationInterrupted, Terminated, ended_by_sigterm

log = logging.getLogger("dcres.api")

P = ParamSpec("P")
R = TypeVar("R")

_BRINGING_UP = (Coordinator.start, Coordinator.restore)
_NO_LIMIT_S = 7 * 24 * 3600.0
_LOOK_EVERY_S = 0.25
_ASK_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class HostProgress:
    """How far one host is with what it does: bytes, and bytes per second since it began that.

    In a live checkpoint also how many pages were marked there after its latest round, and for how
    long the VM would be paused if that host were the slowest; None before its first has ended.
    """

    host: str
    what: str
    done_bytes: int
    total_bytes: int
    bytes_per_s: float = 0.0
    pages_left: int | None = None
    estimated_downtime_s: float | None = None


@dataclass(frozen=True, slots=True)
class OperationProgress:
    """How far an operation is: its phase, and every host's part."""

    vm: str
    phase: str
    hosts: tuple[HostProgress, ...] = ()
    round: int = 0  # of a live checkpoint; 0 before its first has ended
    pages_left: Mapping[str, int] = field(default_factory=dict)  # per host, after that round
    estimated_downtime_s: float | None = None  # if the VM were stopped now
    pages_to_move: int | None = None  # while shares are changed

    @property
    def done_bytes(self) -> int:
        """Bytes done on all hosts."""
        return sum(host.done_bytes for host in self.hosts)

    @property
    def total_bytes(self) -> int:
        """Bytes to do on all hosts, as far as they know yet."""
        return sum(host.total_bytes for host in self.hosts)

    @property
    def bytes_per_s(self) -> float:
        """What all hosts do together: they work at the same time."""
        return sum(host.bytes_per_s for host in self.hosts)


ShowProgress = Callable[[OperationProgress], None]
# None: bars on a terminal or in a notebook, elsewhere a line on standard error for every phase
# and round; False: nothing.
ProgressOption = ShowProgress | bool | None


def shown_progress(
    option: ProgressOption, title: str
) -> AbstractContextManager[ShowProgress | None]:
    """What to call as work goes on: the caller's own, bars, or nothing."""
    if callable(option):
        return nullcontext(option)
    return nullcontext(None) if option is False else progress_bars(title)


@dataclass(frozen=True, slots=True)
class Attended:
    """A call to a VM's coordinator that is waited for; `title` names it for people."""

    coordinator: Port
    title: str
    progress: ProgressOption = None

    def run(
        self, order: Callable[Concatenate[Any, P], R], /, *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """Give the order and wait for its end, however long that takes.

        An exception in the meantime cancels the operation and is raised once that is done: a
        checkpoint is cancelled, what a start or restore had brought up is taken down, and pages
        that were being moved stay where they are. KeyboardInterrupt becomes an
        `OperationInterrupted`, whose text says when it was too late for that: a checkpoint that is
        being published is there in a moment. After SIGTERM the process ends, see
        `ended_by_sigterm`.
        """
        with ended_by_sigterm():
            with shown_progress(self.progress, self.title) as show:
                pending = self.coordinator.within(_NO_LIMIT_S).submit(order, *args, **kwargs)
                future = _in_thread(pending)
                try:
                    while not wait([future], timeout=_LOOK_EVERY_S).done:
                        if show is not None:
                            _look(self.coordinator, show)
                except BaseException as error:
                    _give_up(self.coordinator, order, future)
                    _tell(error, self.title, _what_became(order, self.title, future))
                    raise
            return future.result()


def _tell(error: BaseException, title: str, what_became: str) -> None:
    """Say what became of the operation, as far as its caller can still be told."""
    match error:
        case KeyboardInterrupt():
            raise OperationInterrupted(what_became) from None
        case Terminated():
            log.warning("SIGTERM during %s: %s", title, what_became)


def _what_became(order: Callable[..., object], title: str, future: Future[Any]) -> str:
    """What the user who interrupted an operation has to know, now that it has ended.

    An error says so itself: that it was cancelled, failed before, or that this is not known.
    """
    if (error := future.exception()) is not None:
        return str(error)
    if order in _BRINGING_UP:
        return f"cancelled: {title}"
    if order == Coordinator.checkpoint:
        return f"checkpoint {future.result()['checkpoint']} was published before that"
    return f"{title} was done before that"


def _in_thread(pending: Pending[R]) -> Future[R]:
    """Wait for a call beside the main thread, which stays open to Ctrl-C."""
    future: Future[R] = Future()

    def collect() -> None:
        try:
            future.set_result(pending.result())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=collect, name="dcres-operation", daemon=True).start()
    return future


def _look(coordinator: Port, show: ShowProgress) -> None:
    # While the coordinator is being restarted there is nothing to see, and nothing to say.
    with suppress(DcresError):
        answer = coordinator.within(_ASK_TIMEOUT_S).call(Coordinator.progress)
        hosts = tuple(_host_progress(host) for host in answer["hosts"])
        show(
            OperationProgress(
                answer["vm"],
                answer["phase"],
                hosts,
                answer.get("round", 0),
                answer.get("pages_left", {}),
                answer.get("estimated_downtime_seconds"),
                answer.get("pages_to_move"),
            )
        )


def _host_progress(answer: Mapping[str, Any]) -> HostProgress:
    return HostProgress(
        answer["host"],
        answer["what"],
        answer["done_bytes"],
        answer["total_bytes"],
        answer.get("bytes_per_s", 0.0),
        answer.get("pages_left"),
        answer.get("estimated_downtime_seconds"),
    )


def _give_up(coordinator: Port, order: Callable[..., object], future: Future[Any]) -> None:
    """Cancel until it has ended: the first order may come before the operation has begun."""
    while not future.done():
        with suppress(DcresError):
            coordinator.within(_ASK_TIMEOUT_S).call(Coordinator.cancel)
        wait([future], timeout=1.0)
    if order in _BRINGING_UP and future.exception() is None:
        coordinator.within(_NO_LIMIT_S).call(Coordinator.stop)
