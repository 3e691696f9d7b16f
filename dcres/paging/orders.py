"""What a pager and a memory server are ordered on their control socket, and what they answer.

Each order and each answer is a type; `dcres.paging.control` has them as JSON on the socket.
docs/protocol.md ("The control protocol") says what they mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import Field, asdict, dataclass, fields
from typing import Any, ClassVar, TypeAlias, TypeVar

from dcres import errors

_MOST_PAGES = 1 << 52  # of 4 KiB each, in 64 bits

Json: TypeAlias = dict[str, Any]
"""What a line on the socket holds; nobody but this module and `control` looks into it."""


@dataclass(frozen=True, slots=True)
class Status:
    """Tell how you are."""

    do: ClassVar = "status"


@dataclass(frozen=True, slots=True)
class Quiesce:
    """Send no page out any more; answer when none is on its way."""

    do: ClassVar = "quiesce"


@dataclass(frozen=True, slots=True)
class Freeze:
    """The same, and then answer no fault."""

    do: ClassVar = "freeze"


@dataclass(frozen=True, slots=True)
class Thaw:
    """Go on as if nothing had been ordered."""

    do: ClassVar = "thaw"


@dataclass(frozen=True, slots=True)
class Reload:
    """Take hosts and moves as the settings file has them by now."""

    do: ClassVar = "reload"


@dataclass(frozen=True, slots=True)
class ResizePager:
    """Keep so many pages on the main host."""

    do: ClassVar = "resize"
    limit_pages: int


@dataclass(frozen=True, slots=True)
class ResizeServer:
    """Take so many pages."""

    do: ClassVar = "resize"
    capacity_pages: int


@dataclass(frozen=True, slots=True)
class Track:
    """Mark in this change map what comes, goes and is written."""

    do: ClassVar = "track"
    changes: str


@dataclass(frozen=True, slots=True)
class Scan:
    """Bring this change map up to date."""

    do: ClassVar = "scan"
    changes: str


@dataclass(frozen=True, slots=True)
class Untrack:
    """Stop marking."""

    do: ClassVar = "untrack"


PagerOrder: TypeAlias = (
    Status | Quiesce | Freeze | Thaw | Reload | ResizePager | Track | Scan | Untrack
)
ServerOrder: TypeAlias = Status | ResizeServer | Track | Scan | Untrack

PAGER_ORDERS: tuple[type[PagerOrder], ...] = (
    Status,
    Quiesce,
    Freeze,
    Thaw,
    Reload,
    ResizePager,
    Track,
    Scan,
    Untrack,
)
SERVER_ORDERS: tuple[type[ServerOrder], ...] = (Status, ResizeServer, Track, Scan, Untrack)


@dataclass(frozen=True, slots=True)
class Done:
    """It is done, and there is nothing to tell."""


@dataclass(frozen=True, slots=True)
class Written:
    """How many pages are marked."""

    written: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """What a pager did so far; how much of it during a checkpoint, two answers tell."""

    pages_in: int
    pages_out: int
    zero_pages: int
    taken_back: int
    faults: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Frozen(Counters):
    """The pager answers no faults since this tick of access history."""

    tick: int


@dataclass(frozen=True, slots=True)
class LinkStatus:
    """A pager's link to one host."""

    state: str
    trouble: str
    express: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PagerStatus(Counters):
    """A pager. `pages` are by host, the main host's first; `links` by host."""

    state: str
    lost_why: str
    pid: int
    adopted: bool
    tracking: bool
    native: bool
    limit_pages: int
    pages: list[int]
    leaving: int
    moving: bool
    pages_to_move: int
    page_in_median_us: float
    page_in_p99_us: float
    links: dict[str, LinkStatus]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerStatus:
    """A memory server. `digest` is that of its existence map."""

    port: int
    pid: int
    tracking: bool
    held_pages: int
    capacity_pages: int
    pages_in: int
    pages_out: int
    pages_peeked: int
    pages_fetched: int
    refused: int
    connected: bool
    readers: int
    digest: str


Answer: TypeAlias = Done | Written | Counters | PagerStatus | ServerStatus
Reply: TypeAlias = Callable[[Answer | errors.DcresError], None]
OrderT = TypeVar("OrderT", bound=PagerOrder | ServerOrder)
AnswerT = TypeVar("AnswerT", bound=Answer)


def order_of(who: str, orders: Sequence[type[OrderT]], do: object, arguments: Json) -> OrderT:
    """The order that a line names. Raises ProtocolError for what `who` does not take."""
    for kind in orders:
        if kind.do == do:
            return kind(**{each.name: _argument(each, arguments) for each in fields(kind)})
    raise errors.ProtocolError(f"a {who} cannot {do}")


def _argument(field: Field[Any], arguments: Json) -> Any:
    value = arguments.get(field.name)
    if field.type == "str":
        if not isinstance(value, str):
            raise errors.ProtocolError(f"{value!r} is no {field.name}")
        return value
    if type(value) is not int or not 0 <= value < _MOST_PAGES:  # true and false are int, too
        raise errors.ProtocolError(f"{value!r} is no number of pages")
    return value


def answer_of(kind: type[AnswerT], values: Json) -> AnswerT:
    """The answer that a line holds. Raises ProtocolError when it is another."""
    if "links" in values:
        values = {
            **values,
            "links": {at: LinkStatus(**each) for at, each in values["links"].items()},
        }
    try:
        return kind(**values)
    except TypeError as error:
        raise errors.ProtocolError(f"an answer of another version of dcres: {error}") from None


def json_of(answer: Answer | errors.DcresError) -> Json:
    """The line for an answer; an error is raised again on the other side."""
    if isinstance(answer, errors.DcresError):
        return {"ok": False, "error": type(answer).__name__, "message": str(answer)}
    return {"ok": True, **asdict(answer)}
