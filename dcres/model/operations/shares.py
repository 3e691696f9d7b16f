"""Other shares for a running VM: hosts that keep more or less, sub hosts that join, or leave.

::

    BeginReshape ─▶ Extend … ─▶ Resize …, Join, Serve … ─▶ Reshape ─▶ MoveInto ─▶ Reshape ─▶ Destroy
    a successor     set more    new capacities             the pager  until no    the pager  Dismiss
    sees it         aside                                  is told    host has    forgets    leavers
                                                                      too much    leavers       │
                                                                                                ▼
    Limit: before all that if the main host keeps more, after it if less ──────────────▶ SetLayout

Until the second Reshape every host still serves, so that a failure leaves a VM that runs over the
hosts it has; `dcres.model.operations.settle` then gives everybody the share that it had. A cancel
does the same as long as pages still move, once the order under way is over.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias, assert_never

from dcres.errors import HostFailure, PagingError
from dcres.model.operations.events import Cancelled, Done, Failed
from dcres.model.pages import pages_of

_MOST_MOVES = 20


@dataclass(frozen=True, slots=True)
class BeginReshape:
    """The main host: remember that shares are being changed."""

    host: str


@dataclass(frozen=True, slots=True)
class Extend:
    """Set so much more aside on the host of that index."""

    index: int
    extra_bytes: int


@dataclass(frozen=True, slots=True)
class Limit:
    """The main host: keep so many pages."""

    host: str
    pages: int


@dataclass(frozen=True, slots=True)
class Resize:
    """A sub host: hold so many pages; what is there stays."""

    host: str
    pages: int


@dataclass(frozen=True, slots=True)
class Join:
    """Set memory aside on a host that is not the VM's yet, and start its actor."""

    host: str
    share_bytes: int


@dataclass(frozen=True, slots=True)
class Serve:
    """A host that joins: start the memory server."""

    host: str
    pages: int


@dataclass(frozen=True, slots=True)
class Reshape:
    """The main host: page with these sub hosts from now on."""

    host: str
    subs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class MoveInto:
    """The main host: begin to move pages so that no sub host has more than this."""

    host: str
    capacities: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class LookAtMoves:
    """The main host: do pages still move? In a moment, if it was asked before."""

    host: str
    again: bool = False


@dataclass(frozen=True, slots=True)
class Destroy:
    """A sub host that leaves: end all of the VM there."""

    host: str


@dataclass(frozen=True, slots=True)
class Dismiss:
    """Give a host that leaves back."""

    host: str


@dataclass(frozen=True, slots=True)
class SetLayout:
    """The main host: this is what the hosts may keep from now on."""

    host: str


@dataclass(frozen=True, slots=True)
class Settle:
    """Give everybody the share that it had."""


@dataclass(frozen=True, slots=True)
class Moving:
    """So many pages begin to move."""

    pages: int


@dataclass(frozen=True, slots=True)
class LookedAtMoves:
    """Whether pages still move."""

    moving: bool


@dataclass(frozen=True, slots=True)
class Settled:
    """Everybody has the share that it had; the VM has these hosts."""

    hosts: tuple[str, ...]


ToMain: TypeAlias = BeginReshape | Limit | Reshape | MoveInto | LookAtMoves | SetLayout
ToSub: TypeAlias = Resize | Serve | Destroy
Calling: TypeAlias = Extend | Join | Dismiss | Settle
Instruction: TypeAlias = ToMain | ToSub | Calling
Event: TypeAlias = (
    Done[Instruction] | Moving | LookedAtMoves | Settled | Failed[Instruction] | Cancelled
)


@dataclass(frozen=True, slots=True)
class Change:
    """What is to become of a VM's shares, in bytes; `before` begins with the main host's.

    `wanted` are those of its sub hosts, 0 for one that leaves, and `joining` those of others.
    `growth` is what to set aside beyond what was set aside first, by index.
    """

    main: str
    subs: tuple[str, ...]
    before: tuple[int, ...]
    main_share: int
    wanted: tuple[int, ...]
    joining: tuple[tuple[str, int], ...] = ()
    growth: tuple[tuple[int, int], ...] = ()

    @property
    def shares(self) -> tuple[tuple[str, int], ...]:
        """Of all sub hosts, those that leave and those that join among them."""
        return (*zip(self.subs, self.wanted, strict=True), *self.joining)

    @property
    def hosts(self) -> tuple[str, ...]:
        """The VM's hosts afterwards."""
        return (self.main, *(host for host, share in self.shares if share))

    @property
    def plan(self) -> tuple[Instruction, ...]:
        """All that is to be done, in order."""
        limit = Limit(self.main, pages_of(self.main_share))
        keeps = self.main_share - self.before[0]
        replaced = (*self.wanted, *(share for _, share in self.joining)) != self.before[1:]
        return (
            BeginReshape(self.main),
            *(Extend(index, extra) for index, extra in self.growth),
            *([limit] if keeps > 0 else []),
            *(self._replacing() if replaced else []),
            *([limit] if keeps < 0 else []),
            SetLayout(self.main),
        )

    def _replacing(self) -> list[Instruction]:
        staying = tuple(host for host, share in self.shares if share)
        leaving = [host for host, share in self.shares if not share]
        pages = tuple((host, pages_of(share)) for host, share in self.shares)
        plan: list[Instruction] = [Resize(*each) for each in pages[: len(self.subs)]]
        for host, share in self.joining:
            plan += [Join(host, share), Serve(host, pages_of(share))]
        plan.append(Reshape(self.main, tuple(host for host, _ in pages)))
        plan.append(MoveInto(self.main, pages))
        if leaving:
            plan.append(Reshape(self.main, staying))
        for host in leaving:
            plan += [Destroy(host), Dismiss(host)]
        return plan


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of it: the VM's hosts, and why their shares are as they were, if they are."""

    hosts: tuple[str, ...]
    failure: HostFailure | None = None
    cancelled: str = ""


@dataclass(frozen=True, slots=True)
class ChangeOfShares:
    """The state of one change of shares; `step` makes the next one."""

    vm: str
    change: Change
    at: int = 0  # in the plan
    now: Instruction | None = None  # what is under way
    moves_left: int = _MOST_MOVES
    failure: HostFailure | None = None
    cancelled: str = ""
    outcome: Outcome | None = None

    @classmethod
    def begin(cls, vm: str, change: Change) -> Step:
        """The first step of the plan."""
        return cls(vm, change)._do(change.plan[0])

    @property
    def ended(self) -> bool:
        """Whether no further event matters."""
        return self.outcome is not None

    def step(self, event: Event) -> Step:
        """What `event` changes and what is to be done about it."""
        if self.ended:
            return self, []
        match event:
            case Cancelled(why):
                return (replace(self, cancelled=why) if self._can_be_cancelled else self), []
            case Settled(hosts) if isinstance(self.now, Settle):
                return self._end(Outcome(hosts, self.failure, self.cancelled))
            case Failed(instruction, failure) if instruction == self.now:
                return self._failed(failure)
            case Moving() | LookedAtMoves() | Done() if self.cancelled:
                return self._do(Settle()) if self.now != Settle() else (self, [])
            case Moving(pages) if isinstance(self.now, MoveInto):
                return self._do(LookAtMoves(self.change.main)) if pages else self._go_on()
            case LookedAtMoves(moving) if isinstance(self.now, LookAtMoves):
                return self._moved(moving)
            case Done(instruction) if instruction == self.now:
                return self._go_on()
            case Settled() | Failed() | Moving() | LookedAtMoves() | Done():
                return self, []
            case _:
                assert_never(event)

    @property
    def _can_be_cancelled(self) -> bool:
        """Nothing has been taken from anybody yet."""
        plan = self.change.plan
        moves = [at for at, each in enumerate(plan) if isinstance(each, MoveInto)]
        return self.now != Settle() and self.at <= (moves[0] if moves else len(plan) - 2)

    def _do(self, instruction: Instruction) -> Step:
        return replace(self, now=instruction), [instruction]

    def _go_on(self) -> Step:
        plan = self.change.plan
        if self.at + 1 == len(plan):
            return self._end(Outcome(self.change.hosts))
        return replace(self, at=self.at + 1)._do(plan[self.at + 1])

    def _end(self, outcome: Outcome) -> Step:
        return replace(self, now=None, outcome=outcome), []

    def _moved(self, moving: bool) -> Step:
        """The guest pages out meanwhile, so somebody may hold too much again."""
        if moving:
            return self._do(LookAtMoves(self.change.main, again=True))
        if self.moves_left == 1:
            why = f"the pages of VM {self.vm} do not come to rest; try again"
            return self._failed(HostFailure("", PagingError.__name__, why))
        return replace(self, moves_left=self.moves_left - 1)._do(self.change.plan[self.at])

    def _failed(self, failure: HostFailure) -> Step:
        if self.now == Settle():  # it is brought to an end before the next change
            first = self.failure or failure
            if first != failure:
                first = replace(first, message=f"{first.message}; {failure.message}")
            return self._end(Outcome((), first, self.cancelled))
        return replace(self, failure=failure)._do(Settle())


Step: TypeAlias = tuple[ChangeOfShares, list[Instruction]]
