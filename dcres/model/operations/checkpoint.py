"""Two-phase commit of a checkpoint over several hosts.

::

    PREPARING ──all Prepared──▶ COPYING ──enough──▶ SYNCHRONISING ──enough──────▶ FINISHING
                  (live)         │   ▲                 ▲  │  (stop: all have)         │
                    │            └───┴── another round ┴──┘                  Finished │
                    └── (stop: no rounds) ───────────────┘                            ▼
    PUBLISHED ◀── PUBLISHING ◀──all Saved── SAVING ◀──Resumed── RESUMING ◀───────── STAGING
        ▲             │ Failed                the VM runs again     all have Staged
        │             ▼
        │◀─there── ENDING, LOOKING ──nobody knows──▶ ABANDONED, every part is kept
                      │ not there
                      ▼
                  GIVING_UP ──all Halted, VM resumed──▶ DISCARDING ──▶ ABANDONED

    Before PUBLISHING any failure, or a cancel, leads to GIVING_UP. There the main host's Halt comes
    before Resume: a host that still saves would keep the VM waiting. Nothing is discarded before
    all hosts have halted, since they may share a store.

A live checkpoint is judged twice: when all hosts have copied, and once more when they have
synchronised, since a guest may begin to write in between, and would be paused for it.

A vote (Saved) is a promise: the host's part is durable, whatever becomes of the host. So a
host that fails after its vote changes nothing, and once every vote is in there is no way back
but a manifest that cannot be written. That rule matters: with "any failure abandons", a host
that failed after its vote would make others discard their parts while the manifest was being
written (4 of 24 orders of events).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from operator import itemgetter
from typing import TypeAlias, assert_never

from dcres.errors import ActorGone, HostFailure, VmLost, VmOff
from dcres.model.live import HostRound, Judgement, Target, Verdict, judge
from dcres.model.operations.checkpoint_steps import (
    Copied,
    Copy,
    Discard,
    Discarded,
    EndPublishing,
    Event,
    Finish,
    Finished,
    Halt,
    Halted,
    Instruction,
    Looked,
    LookForManifest,
    OfHost,
    OnHost,
    Plain,
    Prepare,
    Prepared,
    Publish,
    Published,
    PublishingEnded,
    Resume,
    Resumed,
    Save,
    Saved,
    Stage,
    Staged,
    Synchronise,
    Synchronised,
)
from dcres.model.operations.events import Cancelled, Failed


class Phase(StrEnum):
    """Where a checkpoint stands."""

    PREPARING = "preparing"
    COPYING = "copying"
    SYNCHRONISING = "synchronising"
    FINISHING = "finishing"
    STAGING = "staging"
    RESUMING = "resuming"
    SAVING = "saving"
    PUBLISHING = "publishing"
    ENDING = "ending"  # the manifest may be there or not: publishing is ended first
    LOOKING = "looking"  # and then it is looked for
    GIVING_UP = "giving up"
    DISCARDING = "discarding"
    PUBLISHED = "published"
    ABANDONED = "abandoned"


class Guest(StrEnum):
    """What the checkpoint has made of the guest."""

    UNTOUCHED = "untouched"
    STOPPED = "stopped"
    RESUMING = "resuming"
    RESUMED = "resumed"  # it is as it was found
    STANDS = "stands"  # it could not be told to go on


Round: TypeAlias = tuple[tuple[str, HostRound], ...]  # what hosts did in it, by host

# What is done in a phase, and the event that says that a host has done it.
_DONE_IN: dict[Phase, tuple[type[OnHost], type[OfHost]]] = {
    Phase.PREPARING: (Prepare, Prepared),
    Phase.COPYING: (Copy, Copied),
    Phase.SYNCHRONISING: (Synchronise, Synchronised),
    Phase.FINISHING: (Finish, Finished),
    Phase.STAGING: (Stage, Staged),
    Phase.RESUMING: (Resume, Resumed),
    Phase.SAVING: (Save, Saved),
    Phase.PUBLISHING: (Publish, Published),
    Phase.ENDING: (EndPublishing, PublishingEnded),
    Phase.LOOKING: (LookForManifest, Looked),
    Phase.GIVING_UP: (Halt, Halted),
    Phase.DISCARDING: (Discard, Discarded),
}
_TOO_LATE_TO_CANCEL = (
    Phase.PUBLISHING,
    Phase.ENDING,
    Phase.LOOKING,
    Phase.GIVING_UP,
    Phase.DISCARDING,
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of it.

    `failures` are why it was given up, or `cancelled` is. `stuck` is why the VM could not be told
    to go on, so that it stands. `lost` is what the VM has become meanwhile: "off", "lost" or
    nothing. `gone` hosts do not answer any more. `unsure`: it may be published, nobody can say.
    """

    published: bool
    failures: tuple[HostFailure, ...]
    cancelled: str
    stuck: str
    lost: str
    gone: frozenset[str]
    unsure: bool
    settled: bool


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The state of one checkpoint; `step` makes the next one. `target` is a live one's."""

    checkpoint: str
    hosts: tuple[str, ...]
    main: str
    target: Target | None
    phase: Phase = Phase.PREPARING
    waiting: frozenset[str] = frozenset()  # hosts that have not yet done what the phase is about
    rounds: tuple[Round, ...] = ()
    judgement: Judgement | None = None
    guest: Guest = Guest.UNTOUCHED
    tick: int = 0
    stopped_at_s: float = 0.0
    downtime_s: float = 0.0
    failures: tuple[HostFailure, ...] = ()
    cancelled: str = ""
    stuck: str = ""
    lost: str = ""
    gone: frozenset[str] = frozenset()
    left: frozenset[str] = frozenset()  # hosts that may still have something of it
    unsure: bool = False

    @classmethod
    def begin(cls, checkpoint: str, hosts: Iterable[str], main: str, target: Target | None) -> Step:
        """A checkpoint that starts now; a live one with a `target`."""
        return cls(checkpoint, tuple(hosts), main, target)._everywhere(Phase.PREPARING, Prepare)

    @property
    def ended(self) -> bool:
        """Whether no further event matters."""
        return self.phase in (Phase.PUBLISHED, Phase.ABANDONED)

    @property
    def outcome(self) -> Outcome | None:
        """What came of it, once it has ended."""
        if not self.ended:
            return None
        published = self.phase is Phase.PUBLISHED
        why = self.failures, self.cancelled, self.stuck, self.lost, self.gone
        settled = published or not (self.unsure or self.main in self.left)
        return Outcome(published, *why, self.unsure, settled)

    @property
    def latest(self) -> dict[str, HostRound]:
        """By host, the latest round that it has done."""
        return {host: done for each in self.rounds for host, done in each}

    def step(self, event: Event) -> Step:
        """What `event` changes and what is to be done about it."""
        if self.ended:
            return self, []
        match event:
            case Cancelled(why):
                return self._cancelled(why)
            case Failed(instruction, failure):
                return self._failed(instruction, failure)
            case Resumed(_, at_s):
                return self._let_go(at_s)
            case _ if not self._is_due(type(event), event.host):
                return self, []
            case Copied(host, done) | Synchronised(host, HostRound() as done):
                latest = tuple(sorted((*self.rounds[-1], (host, done)), key=itemgetter(0)))
                return replace(self, rounds=(*self.rounds[:-1], latest))._without(host)
            case Finished(host, tick, stopped_at_s):
                return replace(self, tick=tick, stopped_at_s=stopped_at_s)._without(host)
            case Looked(host, there):
                return replace(self, failures=() if there else self.failures)._without(host)
            case (
                Prepared()
                | Synchronised()
                | Staged()
                | Saved()
                | Published()
                | PublishingEnded()
                | Halted()
                | Discarded()
            ):
                return self._without(event.host)
            case _:
                assert_never(event)

    def _is_due(self, what: type[OnHost | OfHost], host: str) -> bool:
        return what in _DONE_IN[self.phase] and host in self.waiting

    def _without(self, host: str) -> Step:
        """`host` has done what the phase is about, or never will."""
        after = replace(self, waiting=self.waiting - {host})
        if self.phase is Phase.GIVING_UP:
            return after._given_up()
        return (after, []) if after.waiting else after._everyone_is_done()

    def _everyone_is_done(self) -> Step:
        match self.phase:
            case Phase.PREPARING if self.target is not None:
                return self._another_round()
            case Phase.PREPARING:
                return self._synchronise()
            case Phase.COPYING | Phase.SYNCHRONISING if self.target is not None:
                return self._judged(self.target)
            case Phase.SYNCHRONISING:
                return self._stop()
            case Phase.FINISHING:
                return self._everywhere(Phase.STAGING, Stage)
            case Phase.STAGING:
                return replace(self, guest=Guest.RESUMING)._on_main(Phase.RESUMING, Resume)
            case Phase.SAVING:
                return self._on_main(Phase.PUBLISHING, Publish)
            case Phase.ENDING:
                return self._on_main(Phase.LOOKING, LookForManifest)
            case Phase.LOOKING if self.failures:
                return self._give_up()
            case Phase.PUBLISHING | Phase.LOOKING:
                return replace(self, phase=Phase.PUBLISHED), []
            case _:
                return replace(self, phase=Phase.ABANDONED), []

    def _everywhere(self, phase: Phase, order: type[Plain]) -> Step:
        after = replace(self, phase=phase, waiting=frozenset(self.hosts))
        return after, [order(host, self.checkpoint) for host in self.hosts]

    def _on_main(self, phase: Phase, order: type[Plain]) -> Step:
        after = replace(self, phase=phase, waiting=frozenset({self.main}))
        return after, [order(self.main, self.checkpoint)]

    def _another_round(self) -> Step:
        return replace(self, rounds=(*self.rounds, ()))._everywhere(Phase.COPYING, Copy)

    def _judged(self, target: Target) -> Step:
        judgement = judge(target, [dict(each) for each in self.rounds])
        after = replace(self, judgement=judgement)
        if judgement.go_on:
            return after._another_round()
        return after._synchronise() if self.phase is Phase.COPYING else after._stop()

    def _synchronise(self) -> Step:
        """Hosts that were done early have gathered changes since. Where rounds do not help, not."""
        fits = self.judgement is not None and self.judgement.verdict is Verdict.FITS
        once_more = fits and self.target is not None and len(self.rounds) < self.target.max_rounds
        after = replace(
            self,
            phase=Phase.SYNCHRONISING,
            waiting=frozenset(self.hosts),
            rounds=(*self.rounds, ()) if once_more else self.rounds,
        )
        return after, [Synchronise(host, self.checkpoint, once_more) for host in self.hosts]

    def _stop(self) -> Step:
        return replace(self, guest=Guest.STOPPED)._on_main(Phase.FINISHING, Finish)

    def _let_go(self, at_s: float | None, stuck: str = "") -> Step:
        """The VM is as it was found since `at_s`, or could not be told to be."""
        if self.guest is not Guest.RESUMING:
            return self, []
        guest = Guest.STANDS if at_s is None else Guest.RESUMED
        downtime_s = 0.0 if at_s is None else at_s - self.stopped_at_s
        after = replace(self, guest=guest, downtime_s=downtime_s, stuck=stuck)
        if self.phase is Phase.GIVING_UP:
            return after._given_up()
        if self.cancelled:
            return after._give_up()
        after = replace(after, phase=Phase.SAVING, waiting=frozenset(self.hosts))
        return after, [Save(host, self.checkpoint, self.tick) for host in self.hosts]

    def _cancelled(self, why: str) -> Step:
        if self.phase in _TOO_LATE_TO_CANCEL:
            return self, []
        after = replace(self, cancelled=why)
        return (after, []) if self.phase is Phase.RESUMING else after._give_up()

    def _failed(self, instruction: Instruction, failure: HostFailure) -> Step:
        if isinstance(instruction, Resume):
            return self._let_go(None, failure.message)
        after = self._with_loss(failure)
        if not self._is_due(type(instruction), instruction.host):
            return after, []
        match instruction:
            case Publish():
                return replace(after, failures=(failure,))._on_main(Phase.ENDING, EndPublishing)
            case EndPublishing() | LookForManifest():
                both = f"{self.failures[0].message}; {failure.message}"
                why = replace(failure, message=both)
                after = replace(after, phase=Phase.ABANDONED, failures=(why,), unsure=True)
                return after, []
            case Halt() | Discard():
                # What it keeps is not listed, and swept before the next checkpoint.
                gone = {instruction.host} if failure.is_a(ActorGone) else set()
                left = {instruction.host} if isinstance(instruction, Discard) else set()
                after = replace(self, gone=self.gone | gone, left=self.left | left)
                return after._without(instruction.host)
            case _:
                return replace(after, failures=(failure,))._give_up()

    def _with_loss(self, failure: HostFailure) -> Checkpoint:
        if not failure.is_a(VmLost):
            return self
        return replace(self, lost="off" if failure.is_a(VmOff) else "lost")

    def _give_up(self) -> Step:
        return self._everywhere(Phase.GIVING_UP, Halt)

    def _given_up(self) -> Step:
        """As far as the hosts have halted: let the VM go, and when all have, discard."""
        if self.guest is Guest.STOPPED and self.main not in self.waiting:
            return replace(self, guest=Guest.RESUMING), [Resume(self.main, self.checkpoint)]
        if self.waiting or self.guest is Guest.RESUMING:
            return self, []
        # A main host whose VM is paused keeps in mind why, for whoever asks it next. A host
        # that is gone saves nothing any more.
        keeping = {*self.gone, *({self.main} if self.guest is Guest.STANDS else ())}
        hosts = [host for host in self.hosts if host not in keeping]
        left = replace(self, left=self.left | keeping)
        if not hosts:
            return replace(left, phase=Phase.ABANDONED, waiting=frozenset()), []
        after = replace(left, phase=Phase.DISCARDING, waiting=frozenset(hosts))
        return after, [Discard(host, self.checkpoint) for host in hosts]


Step: TypeAlias = tuple[Checkpoint, list[Instruction]]
