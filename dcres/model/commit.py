"""Two-phase commit of a checkpoint over several hosts: events in, instructions out.

::

    PREPARING ──all SYNCHRONISED──▶ FINISHING ──main FINISHED──▶ SAVING ──all SAVED──▶ PUBLISHING
        │                               │                           │                     │
        └───── a host fails, cancel ────┴──────────┬────────────────┘               published │
                                                   ▼                                       ▼
                                               ABANDONED  ◀──── publishing fails ────  PUBLISHED

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

    SYNCHRONISE = "synchronise"  # every host: ready to save
    FINISH = "finish"  # the main host: VM stopped, core saved, placement frozen
    SAVED = "saved"  # every host: its part is durable; this is the vote


class Phase(StrEnum):
    """Where a checkpoint stands."""

    PREPARING = "preparing"
    FINISHING = "finishing"
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
class Published:
    """The manifest is durable."""


@dataclass(frozen=True, slots=True)
class PublishFailed:
    """The manifest could not be written, and is not there."""

    why: str


Event: TypeAlias = Passed | Failed | Cancelled | Published | PublishFailed


class Instruction(StrEnum):
    """What the coordinator is to do next."""

    PREPARE = "prepare"  # tell every host to make room and pass SYNCHRONISE
    FINISH = "finish"  # tell the main host to stop the VM, save its core, freeze placement
    SAVE = "save"  # tell every host to save its pages and vote
    RESUME = "resume"  # let the VM run
    PUBLISH = "publish"  # write the manifest
    DISCARD = "discard"  # tell every host to remove its part


@dataclass(frozen=True, slots=True)
class Commit:
    """The state of one checkpoint's commit; `step` makes the next one."""

    hosts: frozenset[str]
    main: str
    phase: Phase = Phase.PREPARING
    waiting: frozenset[str] = frozenset()
    failures: dict[str, str] = field(default_factory=dict)

    @classmethod
    def begin(cls, hosts: Iterable[str], main: str) -> tuple[Commit, list[Instruction]]:
        """A checkpoint that starts now."""
        every = frozenset(hosts)
        return cls(every, main, waiting=every), [Instruction.PREPARE]

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
            case Published():
                return replace(self, phase=Phase.PUBLISHED), []
            case PublishFailed(why):
                after = replace(self, phase=Phase.ABANDONED, failures={self.main: why})
                return after, [Instruction.DISCARD]
            case _:
                assert_never(event)

    def _passed(self, host: str, barrier: Barrier) -> tuple[Commit, list[Instruction]]:
        if barrier is not self._barrier or host not in self.waiting:
            return self, []
        waiting = self.waiting - {host}
        if waiting:
            return replace(self, waiting=waiting), []
        match self.phase:
            case Phase.PREPARING:
                after = replace(self, phase=Phase.FINISHING, waiting=frozenset({self.main}))
                return after, [Instruction.FINISH]
            case Phase.FINISHING:
                return replace(self, phase=Phase.SAVING, waiting=self.hosts), [Instruction.SAVE]
            case _:
                after = replace(self, phase=Phase.PUBLISHING, waiting=frozenset())
                return after, [Instruction.RESUME, Instruction.PUBLISH]

    @property
    def _barrier(self) -> Barrier | None:
        match self.phase:
            case Phase.PREPARING:
                return Barrier.SYNCHRONISE
            case Phase.FINISHING:
                return Barrier.FINISH
            case Phase.SAVING:
                return Barrier.SAVED
            case _:
                return None

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
        if self.phase is Phase.PREPARING:
            return after, [Instruction.DISCARD]
        return after, [Instruction.RESUME, Instruction.DISCARD]
