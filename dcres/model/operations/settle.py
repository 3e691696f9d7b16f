"""The end of a change of shares that was not finished: the hosts with their shares in full.

::

    DESCRIBING ─▶ ASKING ─▶ Destroy, Dismiss … ─▶ Resize … ─▶ StopMoves, Reshape, Limit, SetLayout
    the main      which     who was about to      if shares were being changed
    host          host is   join                                          │
                  where                                                   ▼
                                                                       SETTLED

Only hosts that the main host knows are the VM's; others were about to join, and end. Nothing moves
any more. A host that has joined keeps what it was given, since pages may be there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias, assert_never

from dcres.errors import HostFailure
from dcres.model.operations.events import Cancelled, Done, Failed
from dcres.model.pages import pages_of


@dataclass(frozen=True, slots=True)
class Describe:
    """The main host: what do you know of the VM?"""


@dataclass(frozen=True, slots=True)
class AskName:
    """Which host is the one of that index?"""

    index: int


@dataclass(frozen=True, slots=True)
class Destroy:
    """End all of the VM on a host that is not its own."""

    index: int


@dataclass(frozen=True, slots=True)
class Dismiss:
    """Give a host that is not the VM's back."""

    index: int


@dataclass(frozen=True, slots=True)
class Resize:
    """A sub host: hold so many pages, or as many as it was given last."""

    host: str
    pages: int | None


@dataclass(frozen=True, slots=True)
class StopMoves:
    """The main host: leave every page where it is."""


@dataclass(frozen=True, slots=True)
class Reshape:
    """The main host: page with these sub hosts."""

    subs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Limit:
    """The main host: keep so many pages."""

    pages: int


@dataclass(frozen=True, slots=True)
class SetLayout:
    """The main host: keep so much, and sub hosts what they were given."""

    main_share: int
    subs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Described:
    """The VM's hosts and shares, in bytes; `main_share` is None unless they are being changed.

    `limit` is what the main host keeps now.
    """

    main: str
    subs: tuple[str, ...]
    main_share: int | None
    shares: tuple[tuple[str, int], ...]
    limit: int = 0

    @property
    def has_left(self) -> bool:
        """Whether a host that had a share is none of the VM's any more."""
        return not {host for host, _ in self.shares} <= {*self.subs}


@dataclass(frozen=True, slots=True)
class Named:
    """The host of that index."""

    index: int
    host: str


Instruction: TypeAlias = (
    Describe | AskName | Destroy | Dismiss | Resize | StopMoves | Reshape | Limit | SetLayout
)
Event: TypeAlias = Described | Named | Done[Instruction] | Failed[Instruction] | Cancelled


@dataclass(frozen=True, slots=True)
class Settling:
    """The state of one end of a change; `step` makes the next one."""

    indices: tuple[int, ...]
    known: Described | None = None
    names: tuple[tuple[int, str], ...] = ()
    plan: tuple[Instruction, ...] = ()  # what is still to be done, what is under way first
    failure: HostFailure | None = None
    is_settled: bool = False

    @classmethod
    def begin(cls, indices: tuple[int, ...]) -> Step:
        """Of a VM with actors on the hosts of these indices."""
        return cls(indices), [Describe()]

    @property
    def ended(self) -> bool:
        """Whether no further event matters."""
        return self.is_settled or self.failure is not None

    @property
    def main(self) -> str:
        """The main host's name, once it has told it."""
        return "" if self.known is None else self.known.main

    @property
    def hosts(self) -> tuple[str, ...]:
        """The VM's hosts, once the main host has told them."""
        return () if self.known is None else (self.known.main, *self.known.subs)

    def step(self, event: Event) -> Step:
        """What `event` changes and what is to be done about it."""
        if self.ended:
            return self, []
        match event:
            case Described() if self.known is None:
                return replace(self, known=event), [AskName(index) for index in self.indices]
            case Named(index, host):
                return self._named(index, host)
            case Done(instruction) if instruction in self.plan[:1]:
                return self._do(self.plan[1:])
            case Failed(failure=failure):
                return replace(self, failure=failure), []
            case Described() | Done() | Cancelled():
                return self, []
            case _:
                assert_never(event)

    def _named(self, index: int, host: str) -> Step:
        after = replace(self, names=tuple(sorted({**dict(self.names), index: host}.items())))
        if len(after.names) < len(self.indices) or self.known is None:
            return after, []
        strangers = [at for at, name in after.names if name not in self.hosts]
        ends = [each for at in strangers for each in (Destroy(at), Dismiss(at))]
        return after._do((*ends, *_giving_back(self.known)))

    def _do(self, plan: tuple[Instruction, ...]) -> Step:
        return replace(self, plan=plan, is_settled=not plan), [*plan[:1]]


def _giving_back(known: Described) -> tuple[Instruction, ...]:
    if known.main_share is None:
        return ()
    # Once a host has left there is no way back: others could not hold what they were given for it.
    shares = {} if known.has_left else dict(known.shares)
    main_share = known.limit if known.has_left else known.main_share
    resizes = [
        Resize(host, pages_of(shares[host]) if host in shares else None) for host in known.subs
    ]
    limit, layout = Limit(pages_of(main_share)), SetLayout(main_share, known.subs)
    return (*resizes, StopMoves(), Reshape(known.subs), limit, layout)


Step: TypeAlias = tuple[Settling, list[Instruction]]
