"""What a pager and a memory server are ordered on their control socket, and what they answer.

Each order and each answer is a type (those of `Status` are in `dcres.paging.status`);
`dcres.paging.control` has them as JSON on the socket.
docs/protocol.md ("The control protocol") says what they mean. They are named tuples, since to make
so many dataclasses takes 6 ms of a process's start.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias, TypeVar

from dcres import errors
from dcres.paging.status import PagerStatus, PartServerStatus, ServerStatus

_MOST_PAGES = 1 << 52  # of 4 KiB each, in 64 bits

Json: TypeAlias = dict[str, Any]
"""What a line on the socket holds; nobody but this module and `control` looks into it."""


class Status(NamedTuple):
    """Tell how you are."""


class Quiesce(NamedTuple):
    """Send no page out any more; answer when none is on its way."""


class Freeze(NamedTuple):
    """The same, and then answer no fault."""


class Thaw(NamedTuple):
    """Go on as if nothing had been ordered."""


class Reload(NamedTuple):
    """Take hosts and moves as the settings file has them by now."""


class ResizePager(NamedTuple):
    """Keep so many pages on the main host."""

    limit_pages: int


class ResizeServer(NamedTuple):
    """Take so many pages."""

    capacity_pages: int


class Track(NamedTuple):
    """Mark in this dirty bitmap what comes, goes and is written."""

    changes: str


class Scan(NamedTuple):
    """Bring this dirty bitmap up to date."""

    changes: str


class Untrack(NamedTuple):
    """Stop marking."""


class Cut(NamedTuple):
    """The guest is stopped for this checkpoint: contents that change from now on are not in it."""

    checkpoint: str


class Rebase(NamedTuple):
    """This checkpoint is published: keep account of what changed since it."""

    checkpoint: str


PagerOrder: TypeAlias = (
    Status | Quiesce | Freeze | Thaw | Reload | ResizePager | Track | Scan | Untrack | Cut | Rebase
)
ServerOrder: TypeAlias = Status | ResizeServer | Track | Scan | Untrack

PAGER_ORDERS: Mapping[str, type[PagerOrder]] = {
    "status": Status,
    "quiesce": Quiesce,
    "freeze": Freeze,
    "thaw": Thaw,
    "reload": Reload,
    "resize": ResizePager,
    "track": Track,
    "scan": Scan,
    "untrack": Untrack,
    "cut": Cut,
    "rebase": Rebase,
}
SERVER_ORDERS: Mapping[str, type[ServerOrder]] = {
    "status": Status,
    "resize": ResizeServer,
    "track": Track,
    "scan": Scan,
    "untrack": Untrack,
}


class Done(NamedTuple):
    """It is done, and there is nothing to tell."""


class Written(NamedTuple):
    """How many pages are marked."""

    written: int


class Counters(NamedTuple):
    """What a pager did so far; how much of it during a checkpoint, two answers tell."""

    pages_in: int
    pages_out: int
    zero_pages: int
    taken_back: int
    faults: int


class Frozen(NamedTuple):
    """The pager answers no faults since this tick of access history."""

    tick: int
    pages_in: int
    pages_out: int
    zero_pages: int
    taken_back: int
    faults: int


Answer: TypeAlias = (
    Done | Written | Counters | Frozen | PagerStatus | ServerStatus | PartServerStatus
)
Reply: TypeAlias = Callable[[Answer | errors.DcresError], None]
OrderT = TypeVar("OrderT", bound=PagerOrder | ServerOrder)
AnswerT = TypeVar("AnswerT", bound=Answer)


def order_of(who: str, orders: Mapping[str, type[OrderT]], do: object, arguments: Json) -> OrderT:
    """The order that a line names. Raises ProtocolError for what `who` does not take."""
    kind = orders.get(do) if isinstance(do, str) else None
    if kind is None:
        raise errors.ProtocolError(f"a {who} cannot {do}")
    if unknown := arguments.keys() - set(kind._fields):
        raise errors.ProtocolError(f"a {who} cannot {do} with {', '.join(sorted(unknown))}")
    return kind(**{name: _argument(kind, name, arguments.get(name)) for name in kind._fields})


def _argument(kind: type[object], name: str, value: object) -> Any:
    if kind.__annotations__[name] is str:  # as it is without annotations from __future__
        if not isinstance(value, str):
            raise errors.ProtocolError(f"{value!r} is no {name}")
        return value
    if type(value) is not int or not 0 <= value < _MOST_PAGES:  # true and false are int, too
        raise errors.ProtocolError(f"{value!r} is no number of pages")
    return value


def name_of(order: PagerOrder | ServerOrder) -> str:
    """What a line calls it."""
    known = [*PAGER_ORDERS.items(), *SERVER_ORDERS.items()]
    return next(name for name, kind in known if kind is type(order))


def answer_of(kind: Callable[..., AnswerT], values: Json) -> AnswerT:
    """The answer that a line holds. Raises ProtocolError when it lacks something.

    What it says more is for a later dcres: a process outlives the actor that has started it.
    """
    names = kind.__annotations__.keys()  # of a named tuple, and of a TypedDict with what it extends
    if lacking := names - values.keys():
        words = ", ".join(sorted(lacking))
        raise errors.ProtocolError(f"an answer of another version of dcres: it lacks {words}")
    return kind(**{name: values[name] for name in names})


def json_of(answer: Answer | errors.DcresError) -> Json:
    """The line for an answer; an error is raised again on the other side."""
    if isinstance(answer, errors.DcresError):
        return {"ok": False, "error": type(answer).__name__, "message": str(answer)}
    return {"ok": True, **(answer if isinstance(answer, dict) else answer._asdict())}
