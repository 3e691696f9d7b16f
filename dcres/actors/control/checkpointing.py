"""One checkpoint, driven over the hosts as `dcres.model.operations.checkpoint` says."""

from __future__ import annotations

from datetime import datetime
from functools import partial
from typing import Any, assert_never

from dcres.actors.control.concurrency import THREADS, Concurrency
from dcres.actors.control.executor import Doing, Executor, Patience, order
from dcres.actors.control.journal import Journal
from dcres.actors.control.publishing import Subject, Taken, manifest_of
from dcres.actors.messages import Finished, Prepared, Saved
from dcres.actors.protocol import Machine, Saving
from dcres.errors import CANCELLED, OperationFailed
from dcres.model.formats import DEFAULT_FORMAT, MemoryFormat
from dcres.model.live import Judgement, Target, estimates_s
from dcres.model.operations import checkpoint_steps as steps
from dcres.model.operations.checkpoint import Checkpoint, Guest, Outcome, Phase
from dcres.model.run_state import RunState
from dcres.storage.format.manifest import Manifest, Mode, dumps

_RESTART_TIMEOUT_S = 30.0  # of an actor whose process died; a host that died takes longer
HALT_TIMEOUT_S = 20.0  # a host whose disk hangs; the VM need not wait for that
# Ray starts an actor again in 1 to 3 s, unless its host is gone; the VM's loss is told after this.
_DISCARD_TIMEOUT_S = 10.0
# 256 MiB a host: what a round leaves when the guest writes about as fast as the disk.
STAGE_PAGES = 65536


class Checkpointing:
    """A checkpoint under way. `run` returns its manifest; `cancel` may be called meanwhile."""

    def __init__(
        self,
        subject: Subject,
        checkpoint: str,
        mode: Mode,
        target: Target,
        memory_format: MemoryFormat = DEFAULT_FORMAT,
        created: datetime | None = None,
        executor: Executor | None = None,
        concurrency: Concurrency = THREADS,
        base: Manifest | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self._subject = subject
        self._mode = mode
        self._target = target
        self._format = memory_format
        self._created = created or concurrency.utc()
        self._concurrency = concurrency
        journal = Journal(f"checkpoint {checkpoint}", concurrency)
        self._executor = executor or Executor(journal, concurrency)
        self._began_s = concurrency.now_s()
        self._base = base  # of an increment
        self._ready = Prepared()  # the main host
        self._finished: Finished | None = None
        self._saved: dict[str, Saved] = {}
        self._manifest: Manifest | None = None
        self._begun = Checkpoint.begin(
            checkpoint, subject.hosts, subject.main, target if mode is Mode.LIVE else None
        )
        self._state, _ = self._begun

    @property
    def phase(self) -> Phase:
        """Where it stands."""
        return self._state.phase

    @property
    def rounds(self) -> int:
        """How many there were, with the one under way."""
        return len(self._state.rounds)

    @property
    def judgement(self) -> Judgement | None:
        """The latest, of a live checkpoint."""
        return self._state.judgement

    @property
    def vm_stands(self) -> bool:
        """Whether the VM was stopped and could not be told to go on."""
        return self._state.guest is Guest.STANDS

    @property
    def settled(self) -> bool:
        """Whether nothing of it is left to be ended."""
        outcome = self._state.outcome
        return outcome is not None and outcome.settled

    @property
    def downtime_parts_s(self) -> dict[str, float]:
        """What the stop was spent on."""
        if self._finished is None or self._state.guest is not Guest.RESUMED:
            return {}
        parts = dict(self._finished.parts_s)
        return {**parts, "hosts": self._state.downtime_s - sum(parts.values())}

    @property
    def pages_left(self) -> dict[str, int]:
        """Pages marked on each host after its latest round."""
        return {host: done.left_pages for host, done in self._state.latest.items()}

    def forecasts(self) -> dict[str, dict[str, Any]]:
        """For each host that has done a round: what is left there, and the downtime it means."""
        latest = self._state.latest
        estimates = estimates_s(latest, self._target.fixed_s)
        return {
            host: {
                "pages_left": done.left_pages,
                "estimated_downtime_seconds": estimates[host],
            }
            for host, done in latest.items()
        }

    def cancel(self, why: str) -> bool:
        """Give it up, unless it is being published already."""
        return self._executor.cancel(why)

    def run(self) -> Manifest:
        """Take the checkpoint. Raises OperationFailed; the VM is then as it was, if it can be."""
        outcome = self._executor.run(self, self._begun, self._watch).outcome
        assert outcome is not None, "it has ended"
        if not outcome.published or self._manifest is None:
            raise self._given_up(outcome)
        return self._manifest

    def _watch(self, state: Checkpoint) -> None:
        self._state = state

    def _given_up(self, outcome: Outcome) -> OperationFailed:
        message = (
            f"the checkpoint of VM {self._subject.vm} was given up; "
            f"{self._what_now(outcome)} and earlier checkpoints are as they were"
        )
        if outcome.cancelled:
            return OperationFailed(message, {CANCELLED: outcome.cancelled})
        return OperationFailed.of(message, outcome.failures)

    def _what_now(self, outcome: Outcome) -> str:
        """What has become of the VM whose checkpoint was given up."""
        if outcome.lost:
            return f"the VM is {outcome.lost},"
        if outcome.unsure:
            return (
                "whether it was published, its main host cannot tell now (see `dcres checkpoints` "
                "once it answers again), so its parts are kept"
            )
        if outcome.stuck:
            return f"the VM could not be told to go on ({outcome.stuck}) and is told again,"
        if outcome.gone:
            names = ", ".join(sorted(outcome.gone))
            return f"{names} of its hosts does not answer, and the VM may be lost with it"
        state = self._subject.run_state
        return "the VM goes on" if state is RunState.RUNNING else f"the VM is as it was ({state})"

    def doing(self, instruction: steps.Instruction) -> Doing:
        """How `instruction` is carried out."""
        host, name, pages = instruction.host, self.checkpoint, self._stage_pages
        to = host, self._subject.ports[host]
        match instruction:
            case steps.Prepare():
                prepare = order(*to, Saving.prepare, name, self._format, self._base_text)
                return prepare.then(partial(self._prepared, host))
            case steps.Copy():
                copy = order(*to, Saving.copy, name, self._known_to_change(host))
                return copy.then(partial(steps.Copied, host))
            case steps.Synchronise(once_more=once_more):
                synchronise = order(*to, Saving.synchronise, name, once_more, pages)
                return synchronise.then(partial(steps.Synchronised, host))
            case steps.Finish():
                return order(*to, Machine.finish, name).then(partial(self._stopped, host))
            case steps.Stage():
                stage = order(*to, Saving.stage, name, pages, self._stopped_with.changed)
                return stage.then(lambda _: steps.Staged(host))
            case steps.Save(tick=tick):
                return order(*to, Saving.save, name, tick).then(partial(self._voted, host))
            case _:
                return self._repeatable(instruction)

    def _repeatable(self, instruction: steps.Repeatable) -> Doing:
        host, name = instruction.host, self.checkpoint
        to = host, self._subject.ports[host]
        alive = partial(self._subject.alive, host)
        patient, hasty = Patience(_RESTART_TIMEOUT_S, alive), Patience(_DISCARD_TIMEOUT_S, alive)
        match instruction:
            case steps.Resume():
                resume = order(*to, Machine.resume, name).then(partial(steps.Resumed, host))
                return resume.repeated(patient)
            case steps.Publish():
                self._manifest = manifest_of(self._subject, self._taken())
                publish = order(*to, Machine.publish, dumps(self._manifest), self._with_main())
                return publish.then(lambda _: steps.Published(host)).repeated(patient)
            case steps.EndPublishing():
                halt = order(*to, Saving.halt, name).then(lambda _: steps.PublishingEnded(host))
                return halt.repeated(patient)
            case steps.LookForManifest():
                published = order(*to, Machine.published, name)
                return published.then(partial(steps.Looked, host)).repeated(patient)
            case steps.Halt():
                halt = order(*to, Saving.halt, name).then(lambda _: steps.Halted(host))
                return halt.within(HALT_TIMEOUT_S).repeated(hasty)
            case steps.Discard():
                discard = order(*to, Saving.abandon, name).then(lambda _: steps.Discarded(host))
                return discard.repeated(hasty)
            case _:
                assert_never(instruction)

    def _prepared(self, host: str, ready: Prepared) -> steps.Prepared:
        if host == self._subject.main:
            self._ready = ready
        return steps.Prepared(host)

    @property
    def _base_text(self) -> str:
        return "" if self._base is None else dumps(self._base)

    def _known_to_change(self, host: str) -> bytes:
        """What a host saves of an increment in its first round. Then what comes there is saved.

        Whether that has changed, it is told when all is known, at the stop.
        """
        return self._ready.changed if host not in self._state.latest else b""

    def _stopped(self, host: str, finished: Finished) -> steps.Finished:
        self._finished = finished
        return steps.Finished(host, finished.tick, finished.stopped_at)

    def _voted(self, host: str, saved: Saved) -> steps.Saved:
        self._saved[host] = saved
        return steps.Saved(host)

    @property
    def _stage_pages(self) -> int:
        """What a host may hold in memory so that the VM need not wait for the disk."""
        return STAGE_PAGES if self._mode is Mode.LIVE else 0

    def _with_main(self) -> tuple[str, ...]:
        """The hosts that have saved to the same store as the main host."""
        store = self._saved[self._subject.main].store
        return tuple(host for host, saved in self._saved.items() if saved.store == store)

    @property
    def _stopped_with(self) -> Finished:
        assert self._finished is not None, "the VM was stopped"
        return self._finished

    def _taken(self) -> Taken:
        return Taken(
            checkpoint=self.checkpoint,
            created=self._created,
            mode=self._mode,
            memory_format=self._format,
            paging_before=self._ready.paging,
            finished=self._stopped_with,
            base=self._base,
            saved=self._saved,
            rounds=self.rounds,
            seconds=self._concurrency.now_s() - self._began_s,
            downtime_s=self._state.downtime_s,
        )
