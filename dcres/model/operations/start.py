"""A VM's start over its hosts, from nothing or from a checkpoint.

::

    LOOKING ─▶ MAKING_ROOM ─▶ MAKING_WAY ─▶ RESERVING ─▶ REQUIRING ─▶ CLEARING ─▶ CLAIMING
       │      (something is left of one)                                            │
       ▼ may run                                              start │       restore │
    REFUSED                                                         │               ▼
                                                                    │    FINDING ─▶ SEEKING
       UP ◀── GOING ◀── RUNNING ◀── BOOTING ◀───────────────────────┘       │  parts  │
                                       ▲  ▲                                 ▼  missed ▼
                                       │  └─────── (lazy) ──────────────────┤◀──── VISITING
                                       └──────────────────── PLANNING ◀─────┘

    From RESERVING on any failure, or a cancel, leads to TAKING_DOWN and DOWN. Before it nothing
    was begun, and the VM is as it was: REFUSED.

All hosts look before the first is changed. An eager restore loads nothing from a checkpoint that
cannot be resumed, so its plan comes first; hosts that need no other one's pages boot at once, the
others when those are served. A lazy restore loads nothing: its hosts boot while the plan is made.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TypeAlias, assert_never

from dcres.errors import CheckpointCorrupt, Conflict, HostFailure, NotFound
from dcres.model.operations.events import Cancelled, Done, Failed
from dcres.model.operations.start_steps import (
    Boot,
    Claim,
    Clear,
    Event,
    FindHolders,
    FindParts,
    Found,
    FoundHolders,
    Go,
    Instruction,
    KeepParts,
    LookAround,
    Looked,
    MakeWay,
    Plan,
    Planned,
    ReadMainPart,
    RequireFree,
    RequireRoom,
    Reserve,
    Reserved,
    Run,
    Serve,
    ServeParts,
    TakeDown,
    Visit,
)
from dcres.model.parts import Names, Where
from dcres.model.phase import HostState, in_the_way, judged


class Phase(StrEnum):
    """Where a start stands."""

    LOOKING = "looking"
    MAKING_ROOM = "making room"
    MAKING_WAY = "making way"
    RESERVING = "reserving"
    REQUIRING = "requiring"
    CLEARING = "clearing"
    CLAIMING = "claiming"
    FINDING = "finding"
    SEEKING = "seeking"
    VISITING = "visiting"
    PLANNING = "planning"
    BOOTING = "booting"
    RUNNING = "running"
    GOING = "going"
    TAKING_DOWN = "taking down"
    UP = "up"
    REFUSED = "refused"
    DOWN = "down"
    STUCK = "stuck"  # what was begun, or was left of an earlier life, could not be taken down


_ENDED = (Phase.UP, Phase.REFUSED, Phase.DOWN, Phase.STUCK)
# The fleet starts or ends actors, so that it is not known before its answer what is to be ended.
_NOT_BROKEN_OFF = (Phase.MAKING_WAY, Phase.RESERVING, Phase.VISITING)


@dataclass(frozen=True, slots=True)
class Restore:
    """The checkpoint that a start begins from: its parts by name, the main host's first."""

    checkpoint: str
    parts: Names
    filled: Names  # parts with pages
    lazy: bool


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of it: the VM is `up`, or why not.

    `torn_down`: nothing of it is left. `settled`: nobody has to look what is.
    """

    up: bool
    failure: HostFailure | None = None
    cancelled: str = ""
    torn_down: bool = False
    settled: bool = True


@dataclass(frozen=True, slots=True)
class Start:
    """The state of one start; `step` makes the next one."""

    vm: str
    restore: Restore | None
    phase: Phase = Phase.LOOKING
    waiting: frozenset[Instruction] = frozenset()
    booted: frozenset[str] = frozenset()  # hosts that were told to boot or serve
    main: str = ""
    subs: tuple[str, ...] = ()
    here: tuple[tuple[str, Names], ...] = ()  # parts by host, as far as was asked
    flow: tuple[tuple[int, ...], ...] = ()
    failure: HostFailure | None = None
    cancelled: str = ""

    @classmethod
    def begin(cls, vm: str, restore: Restore | None = None) -> Step:
        """From nothing, or from a checkpoint."""
        return cls(vm, restore)._enter(Phase.LOOKING, LookAround())

    @property
    def ended(self) -> bool:
        """Whether no further event matters."""
        return self.phase in _ENDED

    @property
    def outcome(self) -> Outcome | None:
        """What came of it, once it has ended."""
        if not self.ended:
            return None
        up, down = self.phase is Phase.UP, self.phase is Phase.DOWN
        return Outcome(up, self.failure, self.cancelled, down, self.phase is not Phase.STUCK)

    @property
    def hosts(self) -> tuple[str, ...]:
        """The VM's hosts, as soon as there are any."""
        return (self.main, *self.subs) if self.main else ()

    @property
    def where(self) -> Where:
        """Who has which part, as far as was asked: the main host's word counts first."""
        parts = () if self.restore is None else self.restore.parts
        told = dict(self.here)
        own = {host: told[host] for host in self.hosts if host in told}
        return Where(parts, self.hosts, {**own, **told})

    @property
    def boots(self) -> bool:
        """Whether hosts still start what they run."""
        return any(isinstance(each, Boot | Serve) for each in self.waiting)

    def step(self, event: Event) -> Step:
        """What `event` changes and what is to be done about it."""
        if self.ended:
            return self, []
        match event:
            case Cancelled(why):
                return self._cancelled(why)
            case _ if (answered := _answered(event)) not in self.waiting:
                return self, []
            case Failed(failure=failure):
                return replace(self, waiting=self.waiting - {answered})._failed(failure)
            case Looked(states):
                return self._looked(states)
            case Reserved(main, subs):
                after = replace(self, main=main, subs=subs)
            case Found(host, parts):
                after = replace(self, here=tuple(sorted({**dict(self.here), host: parts}.items())))
            case FoundHolders(holders):
                return self._helped(dict(holders))
            case Planned(flow=flow):
                after = replace(self, flow=flow)
            case Done():
                after = self
            case _:
                assert_never(event)
        return replace(after, waiting=self.waiting - {answered})._further()

    def _enter(self, phase: Phase, *instructions: Instruction) -> Step:
        return replace(self, phase=phase, waiting=frozenset(instructions)), [*instructions]

    def _everywhere(self, phase: Phase, what: type[RequireFree | Clear | FindParts]) -> Step:
        return self._enter(phase, *(what(host) for host in self.hosts))

    def _further(self) -> Step:
        """On, as far as all is done that the phase is about."""
        if self.phase is Phase.BOOTING:
            return self._booted()
        if self.waiting:
            return self, []
        if (self.cancelled or self.failure) and self.phase in _NOT_BROKEN_OFF:
            way = self.phase is Phase.MAKING_WAY
            return (replace(self, phase=Phase.DOWN), []) if way else self._take_down()
        return self._entered_next()

    def _entered_next(self) -> Step:
        match self.phase:
            case Phase.MAKING_ROOM:
                return self._enter(Phase.MAKING_WAY, MakeWay())
            case Phase.MAKING_WAY:
                return self._enter(Phase.RESERVING, Reserve())
            case Phase.RESERVING:
                return self._everywhere(Phase.REQUIRING, RequireFree)
            case Phase.REQUIRING:
                return self._everywhere(Phase.CLEARING, Clear)
            case Phase.CLEARING:
                return self._enter(Phase.CLAIMING, Claim(self.main))
            case Phase.CLAIMING if self.restore is None:
                return self._boot(self.hosts)
            case Phase.CLAIMING:
                return self._everywhere(Phase.FINDING, FindParts)
            case Phase.FINDING if self.where.missing:
                return self._enter(Phase.SEEKING, FindHolders())
            case Phase.FINDING | Phase.VISITING:
                return self._plan()
            case Phase.PLANNING:
                return self._load()
            case Phase.RUNNING:
                return self._enter(Phase.GOING, Go(self.main))
            case Phase.GOING:
                return self._enter(Phase.UP)
            case _:
                return self._enter(Phase.DOWN)

    def _looked(self, states: tuple[HostState, ...]) -> Step:
        if not states:  # a reservation may be left all the same
            return self._enter(Phase.MAKING_WAY, MakeWay())
        if why := in_the_way(self.vm, judged(states)):
            return self._refuse(HostFailure("", Conflict.__name__, why))
        return self._enter(Phase.MAKING_ROOM, RequireRoom())

    def _helped(self, holders: dict[str, Names]) -> Step:
        """By hosts outside the VM."""
        where = self.where.helped_by(holders)
        if where.missing and self.restore is not None:
            lack = where.lack(self.restore.checkpoint)
            return self._failed(HostFailure("", NotFound.__name__, lack))
        after = replace(self, here=tuple(sorted(where.here.items())))
        return after._enter(Phase.VISITING, *(Visit(host) for host in where.helpers))

    def _plan(self) -> Step:
        restore, where = self.restore, self.where
        if restore is None:
            return self, []
        planner = where.holder(where.parts[0])
        order: list[Instruction] = [*map(KeepParts, where.helpers), Plan(planner)]
        if not where.holds[0][0]:
            order.append(ReadMainPart(planner))
        if not restore.lazy:
            return self._enter(Phase.PLANNING, *order)
        return self._boot(self.hosts, *order, *_servers(where, restore.filled))

    def _load(self) -> Step:
        """The plan is there: who needs no other host's pages boots at once."""
        where = self.where
        servers = _servers(where, where.from_afar(self.flow))
        ready = tuple(host for host in self.hosts if not where.waits(host, self.flow))
        return self._boot(ready, *servers)

    def _boot(self, hosts: tuple[str, ...], *others: Instruction) -> Step:
        boots = [Boot(host) if host == self.main else Serve(host) for host in hosts]
        after = replace(self, booted=self.booted | set(hosts))
        after, told = after._enter(Phase.BOOTING, *others, *boots)
        return replace(after, waiting=self.waiting | after.waiting), told

    def _booted(self) -> Step:
        left = tuple(host for host in self.hosts if host not in self.booted)
        if left and not any(isinstance(each, ServeParts) for each in self.waiting):
            return self._boot(left)
        if self.waiting:
            return self, []
        if failure := self._unserved():
            return self._failed(failure)
        return self._enter(Phase.RUNNING, Run(self.main))

    def _unserved(self) -> HostFailure | None:
        """Why a lazy restore cannot be: the guest would read zeros for pages that nobody serves."""
        if self.restore is None or not self.restore.lazy:
            return None
        for part, flow in zip(self.restore.parts, self.flow, strict=True):
            if any(flow) and part not in self.restore.filled:
                why = (
                    f"page placement gives {part} pages that it did not save according to the "
                    f"manifest of {self.restore.checkpoint}"
                )
                return HostFailure("", CheckpointCorrupt.__name__, why)
        return None

    def _cancelled(self, why: str) -> Step:
        if self.phase is Phase.TAKING_DOWN or self.cancelled:
            return self, []
        after = replace(self, cancelled=why)
        if self.phase in (Phase.LOOKING, Phase.MAKING_ROOM):
            return after._refuse(None)
        return (after, []) if self.phase in _NOT_BROKEN_OFF else after._take_down()

    def _failed(self, failure: HostFailure) -> Step:
        if self.phase in (Phase.MAKING_WAY, Phase.TAKING_DOWN):
            return replace(self, phase=Phase.STUCK, failure=failure, waiting=frozenset()), []
        if self.phase in (Phase.LOOKING, Phase.MAKING_ROOM):
            return self._refuse(failure)
        after = replace(self, failure=self.failure or failure)
        return (after, []) if self.phase is Phase.VISITING and self.waiting else after._take_down()

    def _refuse(self, failure: HostFailure | None) -> Step:
        return replace(self, phase=Phase.REFUSED, failure=failure, waiting=frozenset()), []

    def _take_down(self) -> Step:
        return self._enter(Phase.TAKING_DOWN, TakeDown())


def _answered(event: Event) -> Instruction | None:
    """The instruction that `event` answers."""
    match event:
        case Done(instruction) | Failed(instruction):
            return instruction
        case Looked():
            return LookAround()
        case Reserved():
            return Reserve()
        case Found(host):
            return FindParts(host)
        case FoundHolders():
            return FindHolders()
        case Planned(host):
            return Plan(host)
        case Cancelled():
            return None
        case _:
            assert_never(event)


def _servers(where: Where, parts: Names) -> list[ServeParts]:
    return [ServeParts(host, served) for host, served in where.served(parts).items()]


Step: TypeAlias = tuple[Start, list[Instruction]]
