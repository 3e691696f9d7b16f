"""Two-phase commit of a checkpoint over several hosts: events in, instructions out.

::

    PREPARING ──all PREPARED──▶ COPYING ──Converged──▶ SYNCHRONISING ──Converged───▶ FINISHING
                  (live)         │   ▲                    ▲  │  (stop: all SYNCHRONISED)  │
                    │            └───┴── AnotherRound ────│──┘                           │
                    └── (stop: no rounds) ────────────────┘                main FINISHED │
                                                                                         ▼
    PUBLISHED ◀──Published── PUBLISHING ◀──all SAVED── SAVING ◀─────all STAGED─────── STAGING
                                 │                  the VM runs again

    Before PUBLISHING any failure, or a cancel, leads to ABANDONED; a manifest that cannot be
    written does, too. There HALT comes before RESUME: a host that still saves would keep the VM
    waiting. When nobody can say whether the manifest is there, nothing is discarded.

A live checkpoint is judged twice: when all hosts have copied, and once more when they have
synchronised, since a guest may begin to write in between, and would stand still for it.

A vote (SAVED) is a promise: the host's part is durable, whatever becomes of the host. So a
host that fails after its vote changes nothing, and once every vote is in there is no way back
but a manifest that cannot be written. That rule matters: with "any failure abandons", a host
that failed after its vote would make others discard their parts while the manifest was being
written (4 of 24 orders of events).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TypeAlias, assert_never


class Barrier(StrEnum):
    """Named barriers that hosts pass."""

    PREPARED = "prepared"  # every host: there is room, and changes are tracked
    COPIED = "copied"  # every host: a round is done
    SYNCHRONISE = "synchronise"  # every host: little is left
    FINISH = "finish"  # the main host: VM stopped, core saved, placement frozen
    STAGED = "staged"  # every host: the rest is in memory or on disk, so the VM may go on
    SAVED = "saved"  # every host: its part is durable; this is the vote


class Phase(StrEnum):
    """Where a checkpoint stands."""

    PREPARING = "preparing"
    COPYING = "copying"
    SYNCHRONISING = "synchronising"
    FINISHING = "finishing"
    STAGING = "staging"
    SAVING = "saving"
    PUBLISHING = "publishing"
    PUBLISHED = "published"
    ABANDONED = "abandoned"


@dataclass(frozen=True, slots=True)
class Passed:
    """A host passed a barrier."""

    host: str
    barrier: Barrier


@dataclass(frozen=True, slots=True)
class Failed:
    """A host failed, or is gone."""

    host: str
    why: str


@dataclass(frozen=True, slots=True)
class Cancelled:
    """Whoever asked for the checkpoint does not want it any more."""

    why: str


@dataclass(frozen=True, slots=True)
class AnotherRound:
    """Too much is left, or again is (see `model.live`)."""


@dataclass(frozen=True, slots=True)
class Converged:
    """Enough is saved, or more rounds would not help."""


@dataclass(frozen=True, slots=True)
class Published:
    """The manifest is durable."""


@dataclass(frozen=True, slots=True)
class PublishFailed:
    """The manifest could not be written, and is not there."""

    why: str


@dataclass(frozen=True, slots=True)
class PublishUnknown:
    """The manifest may be there or not, and the host that knows does not answer."""

    why: str


Event: TypeAlias = (
    Passed
    | Failed
    | Cancelled
    | AnotherRound
    | Converged
    | Published
    | PublishFailed
    | PublishUnknown
)


class Instruction(StrEnum):
    """What the coordinator is to do next."""

    PREPARE = "prepare"  # tell every host to make room and track changes
    COPY = "copy"  # tell every host to save what is marked, while the guest runs
    JUDGE = "judge"  # decide whether another round is worth it
    SYNCHRONISE = "synchronise"  # tell every host to get ready for the stop
    FINISH = "finish"  # tell the main host to stop the VM, save its core, freeze
    STAGE = "stage"  # tell every host to take the rest, all at once
    RESUME = "resume"  # let the VM run
    SAVE = "save"  # tell every host to make its part durable and vote
    PUBLISH = "publish"  # write the manifest
    HALT = "halt"  # tell every host to stop saving, for good; the main host has when this is done
    DISCARD = "discard"  # tell every host to remove its part, once all have stopped saving


# While these last the VM stands still.
_STOPPED = (Phase.FINISHING, Phase.STAGING)

_BARRIERS = {
    Phase.PREPARING: Barrier.PREPARED,
    Phase.COPYING: Barrier.COPIED,
    Phase.SYNCHRONISING: Barrier.SYNCHRONISE,
    Phase.FINISHING: Barrier.FINISH,
    Phase.STAGING: Barrier.STAGED,
    Phase.SAVING: Barrier.SAVED,
}


@dataclass(frozen=True, slots=True)
class Commit:
    """The state of one checkpoint's commit; `step` makes the next one."""

    hosts: frozenset[str]
    main: str
    live: bool
    phase: Phase = Phase.PREPARING
    waiting: frozenset[str] = frozenset()
    failures: dict[str, str] = field(default_factory=dict)

    @classmethod
    def begin(
        cls, hosts: Iterable[str], main: str, *, live: bool
    ) -> tuple[Commit, list[Instruction]]:
        """A checkpoint that starts now."""
        every = frozenset(hosts)
        return cls(every, main, live, waiting=every), [Instruction.PREPARE]

    @property
    def ended(self) -> bool:
        """Whether no further event matters."""
        return self.phase in (Phase.PUBLISHED, Phase.ABANDONED)

    def step(self, event: Event) -> tuple[Commit, list[Instruction]]:
        """What `event` changes and what is to be done about it."""
        if self.ended:
            return self, []
        match event:
            case Passed(host, barrier):
                return self._passed(host, barrier)
            case Failed(host, why):
                return self._failed(host, why)
            case Cancelled(why):
                return self._cancelled(why)
            case AnotherRound():
                return self._another_round()
            case Converged():
                return self._converged()
            case Published():
                return replace(self, phase=Phase.PUBLISHED), []
            case PublishFailed(why):
                return self._abandon({self.main: why})
            case PublishUnknown(why):
                return replace(self, phase=Phase.ABANDONED, failures={self.main: why}), []
            case _:
                assert_never(event)

    def _passed(self, host: str, barrier: Barrier) -> tuple[Commit, list[Instruction]]:
        if barrier is not _BARRIERS.get(self.phase) or host not in self.waiting:
            return self, []
        after = replace(self, waiting=self.waiting - {host})
        return (after, []) if after.waiting else after._everyone_passed()

    def _everyone_passed(self) -> tuple[Commit, list[Instruction]]:
        match self.phase:
            case Phase.PREPARING if self.live:
                return self._enter(Phase.COPYING, self.hosts, Instruction.COPY)
            case Phase.PREPARING:
                return self._enter(Phase.SYNCHRONISING, self.hosts, Instruction.SYNCHRONISE)
            case Phase.COPYING:
                return self, [Instruction.JUDGE]
            case Phase.SYNCHRONISING if self.live:
                return self, [Instruction.JUDGE]
            case Phase.SYNCHRONISING:
                return self._enter(Phase.FINISHING, {self.main}, Instruction.FINISH)
            case Phase.FINISHING:
                return self._enter(Phase.STAGING, self.hosts, Instruction.STAGE)
            case Phase.STAGING:
                return self._enter(Phase.SAVING, self.hosts, Instruction.RESUME, Instruction.SAVE)
            case _:
                return self._enter(Phase.PUBLISHING, (), Instruction.PUBLISH)

    def _enter(
        self, phase: Phase, waiting: Iterable[str], *instructions: Instruction
    ) -> tuple[Commit, list[Instruction]]:
        return replace(self, phase=phase, waiting=frozenset(waiting)), list(instructions)

    @property
    def _is_judged(self) -> bool:
        """Whether a judgement is due: all hosts have done what it is about."""
        return self.phase in (Phase.COPYING, Phase.SYNCHRONISING) and not self.waiting

    def _another_round(self) -> tuple[Commit, list[Instruction]]:
        if not self._is_judged:
            return self, []
        return self._enter(Phase.COPYING, self.hosts, Instruction.COPY)

    def _converged(self) -> tuple[Commit, list[Instruction]]:
        if not self._is_judged:
            return self, []
        if self.phase is Phase.COPYING:
            return self._enter(Phase.SYNCHRONISING, self.hosts, Instruction.SYNCHRONISE)
        return self._enter(Phase.FINISHING, {self.main}, Instruction.FINISH)

    def _failed(self, host: str, why: str) -> tuple[Commit, list[Instruction]]:
        voted = self.phase is Phase.SAVING and host not in self.waiting
        if voted or self.phase is Phase.PUBLISHING:
            return self, []
        return self._abandon({host: why})

    def _cancelled(self, why: str) -> tuple[Commit, list[Instruction]]:
        if self.phase is Phase.PUBLISHING:
            return self, []  # too late: it will be there in a moment
        return self._abandon({"cancelled": why})

    def _abandon(self, failures: dict[str, str]) -> tuple[Commit, list[Instruction]]:
        after = replace(self, phase=Phase.ABANDONED, waiting=frozenset(), failures=failures)
        resume = [Instruction.RESUME] if self.phase in _STOPPED else []
        return after, [Instruction.HALT, *resume, Instruction.DISCARD]
