"""One checkpoint, driven over the hosts: carries out what `model.commit` decides."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar

from dcres.actors.control.asking import await_ready
from dcres.actors.control.publishing import Subject, Taken, manifest_of
from dcres.actors.messages import Finished, PagingCounters, Saved
from dcres.actors.ports import Port
from dcres.actors.protocol import Machine, Saving
from dcres.errors import ActorGone, ClusterError, DcresError, OperationFailed, VmLost, VmOff
from dcres.model.commit import (
    AnotherRound,
    Barrier,
    Cancelled,
    Commit,
    Converged,
    Event,
    Failed,
    Instruction,
    Passed,
    Phase,
    Published,
    PublishFailed,
    PublishUnknown,
)
from dcres.model.formats import DEFAULT_FORMAT, MemoryFormat
from dcres.model.live import HostRound, Judgement, Target, Verdict, estimates_s, judge
from dcres.model.run_state import RunState
from dcres.storage.format.manifest import (
    Manifest,
    Mode,
    dumps,
)

log = logging.getLogger("dcres.coordinator")

R = TypeVar("R")

_RESTART_TIMEOUT_S = 30.0  # of an actor whose process died; a host that died takes longer
HALT_TIMEOUT_S = 20.0  # a host whose disk hangs; the VM need not wait for that
# Ray starts an actor again in 1 to 3 s, unless its host is gone; the VM's loss is told after this.
_DISCARD_TIMEOUT_S = 10.0
_TRIES = 3
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
    ) -> None:
        self.checkpoint = checkpoint
        self.phase = Phase.PREPARING
        self._subject = subject
        self._mode = mode
        self._target = target
        self._format = memory_format
        self.rounds: list[dict[str, HostRound]] = []
        self.judgement: Judgement | None = None
        self.downtime_parts_s: dict[str, float] = {}
        self._created = created or datetime.now(UTC)
        self._events: queue.Queue[Event] = queue.Queue()
        self._began = time.monotonic()
        self._before = PagingCounters()
        self._finished: Finished | None = None
        self._saved: dict[str, Saved] = {}
        self._downtime_s = 0.0
        self._manifest: Manifest | None = None
        self._stuck = ""
        self._ended = ""  # what the VM has become meanwhile: off or lost
        self.vm_stands = False  # it was stopped, and could not be told to go on
        self._halting: dict[str, threading.Thread] = {}
        self._gone: set[str] = set()  # hosts whose actor is not there any more

    @property
    def pages_left(self) -> dict[str, int]:
        """Pages marked on each host after its latest round."""
        return {host: done.left_pages for host, done in self._latest().items()}

    def forecasts(self) -> dict[str, dict[str, Any]]:
        """For each host that has done a round: what is left there, and the downtime it means."""
        latest = self._latest()
        estimates = estimates_s(latest, self._target.fixed_s)
        return {
            host: {
                "pages_left": done.left_pages,
                "estimated_downtime_seconds": estimates[host],
            }
            for host, done in latest.items()
        }

    def _latest(self) -> dict[str, HostRound]:
        # Copies: hosts that end a round are entered by threads of their own.
        return {host: done for each in list(self.rounds) for host, done in dict(each).items()}

    def cancel(self, why: str) -> None:
        """Give it up, unless it is being published already."""
        self._events.put(Cancelled(why))

    def run(self) -> Manifest:
        """Take the checkpoint. Raises OperationFailed; the VM is then as it was, if it can be."""
        live = self._mode is Mode.LIVE
        commit, instructions = Commit.begin(self._subject.hosts, self._subject.main, live=live)
        while True:
            self.phase = commit.phase
            for instruction in instructions:
                self._obey(instruction)
            if commit.ended:
                break
            commit, instructions = commit.step(self._events.get())
        if commit.phase is Phase.ABANDONED or self._manifest is None:
            raise OperationFailed(
                f"the checkpoint of VM {self._subject.vm} was given up; "
                f"{self._what_now()} and earlier checkpoints are as they were",
                commit.failures,
            )
        return self._manifest

    def _what_now(self) -> str:
        """What has become of the VM whose checkpoint was given up."""
        if self._ended:
            return f"the VM is {self._ended},"
        if self._stuck or not self._gone:
            state = self._subject.run_state
            as_before = "goes on" if state is RunState.RUNNING else f"is as it was ({state})"
            return self._stuck or f"the VM {as_before}"
        names = ", ".join(sorted(self._gone))
        return f"{names} of its hosts does not answer, and the VM may be lost with it"

    def _obey(self, instruction: Instruction) -> None:
        subject = self._subject
        match instruction:
            case Instruction.PREPARE:
                self._tell(subject.hosts, self._prepare)
            case Instruction.COPY:
                self.rounds.append({})
                self._tell(subject.hosts, self._copy)
            case Instruction.JUDGE:
                self._judge()
            case Instruction.SYNCHRONISE:
                self._synchronise_all()
            case Instruction.FINISH:
                self._tell(subject.hosts[:1], self._finish)
            case Instruction.STAGE:
                self._tell(subject.hosts, self._stage)
            case Instruction.RESUME:
                self._resume()
            case Instruction.SAVE:
                self._tell(subject.hosts, self._save)
            case Instruction.PUBLISH:
                self._publish()
            case Instruction.HALT:
                self._halt()
            case Instruction.DISCARD:
                self._discard()

    def _tell(self, hosts: Iterable[str], work: Callable[[str], Barrier]) -> None:
        for host in hosts:
            self._submit(host, work)

    def _submit(self, host: str, work: Callable[[str], Barrier]) -> None:
        def attempt() -> None:
            try:
                self._events.put(Passed(host, work(host)))
            except DcresError as error:
                if isinstance(error, VmLost):
                    self._ended = "off" if isinstance(error, VmOff) else "lost"
                self._events.put(Failed(host, str(error)))
            except Exception as error:
                log.exception("checkpoint %s on %s", self.checkpoint, host)
                self._events.put(Failed(host, f"{type(error).__name__}: {error}"))

        threading.Thread(target=attempt, name=f"checkpoint-{host}", daemon=True).start()

    def _prepare(self, host: str) -> Barrier:
        answer = self._subject.ports[host].call(Saving.prepare, self.checkpoint, self._format)
        if host == self._subject.main:
            self._before = answer
        return Barrier.PREPARED

    def _copy(self, host: str) -> Barrier:
        this_round = self.rounds[-1]
        port = self._subject.ports[host]
        this_round[host] = port.call(Saving.copy, self.checkpoint)
        return Barrier.COPIED

    def _judge(self) -> None:
        self.judgement = judge(self._target, self.rounds)
        log.info("checkpoint %s, round %d: %s", self.checkpoint, len(self.rounds), self.judgement)
        self._events.put(AnotherRound() if self.judgement.go_on else Converged())

    def _synchronise_all(self) -> None:
        # Hosts that were done early have gathered changes since. Where rounds do not help, not.
        fits = self.judgement is not None and self.judgement.verdict is Verdict.FITS
        once_more = fits and len(self.rounds) < self._target.max_rounds
        if once_more:
            self.rounds.append({})
        self._tell(self._subject.hosts, partial(self._synchronise, once_more))

    def _synchronise(self, once_more: bool, host: str) -> Barrier:
        port = self._subject.ports[host]
        done = port.call(Saving.synchronise, self.checkpoint, once_more, self._stage_pages)
        if done is not None:
            self.rounds[-1][host] = done
        return Barrier.SYNCHRONISE

    @property
    def _stage_pages(self) -> int:
        """What a host may hold in memory so that the VM need not wait for the disk."""
        return STAGE_PAGES if self._mode is Mode.LIVE else 0

    def _finish(self, host: str) -> Barrier:
        self._finished = self._subject.ports[host].call(Machine.finish, self.checkpoint)
        return Barrier.FINISH

    def _stage(self, host: str) -> Barrier:
        port = self._subject.ports[host]
        port.call(Saving.stage, self.checkpoint, self._stage_pages)
        return Barrier.STAGED

    def _save(self, host: str) -> Barrier:
        port, tick = self._subject.ports[host], self._require_finished().tick
        self._saved[host] = port.call(Saving.save, self.checkpoint, tick)
        return Barrier.SAVED

    def _require_finished(self) -> Finished:
        if self._finished is None:
            raise OperationFailed("the main host did not finish", {})
        return self._finished

    def _resume(self) -> None:
        """Let the VM go on, through a restart of the main host's actor if need be."""
        try:
            resumed_at = self._main_persists(
                lambda main: main.call(Machine.resume, self.checkpoint)
            )
        except Exception as error:  # whatever it is, the coordinator must try again
            log.error("VM %s cannot go on: %s", self._subject.vm, error)
            self._stuck = f"the VM could not be told to go on ({error}) and is told again,"
            self.vm_stands = True
            return
        if self._finished is not None:
            self._downtime_s = resumed_at - self._finished.stopped_at
            parts = dict(self._finished.parts_s)
            self.downtime_parts_s = {**parts, "hosts": self._downtime_s - sum(parts.values())}

    def _main_persists(self, give: Callable[[Port], R]) -> R:
        return self._persist(self._subject.main, give)

    def _persist(
        self, host: str, give: Callable[[Port], R], patience_s: float = _RESTART_TIMEOUT_S
    ) -> R:
        """Give an order that may be repeated, again when the actor dies in it: it is soon back.

        Raises ActorGone when it is not back after `patience_s`.
        """
        port = self._subject.ports[host]
        for tries_left in reversed(range(_TRIES)):
            try:
                await_ready(port, partial(self._subject.alive, host), patience_s)
            except ClusterError as error:
                raise ActorGone(f"{host} does not answer any more ({error})") from None
            try:
                return give(port)
            except ActorGone:
                if not tries_left:
                    raise
        raise AssertionError("unreachable")

    def _publish(self) -> None:
        try:
            self._manifest = manifest_of(self._subject, self._taken())
            text, here = dumps(self._manifest), self._in_store_of_main()
            self._main_persists(lambda main: main.call(Machine.publish, text, here))
        except Exception as error:
            self._events.put(self._after_publishing_failed(str(error)))
        else:
            self._events.put(Published())

    def _in_store_of_main(self) -> tuple[str, ...]:
        """The hosts that have saved to the same store as the main host."""
        store = self._saved[self._subject.main].store
        return tuple(host for host, saved in self._saved.items() if saved.store == store)

    def _after_publishing_failed(self, why: str) -> Event:
        """An answer may be lost on its way after the manifest was written: so ask for it."""
        if self._manifest is None:
            return PublishFailed(why)
        try:
            # A publishing that is still under way ends first, or is refused; then it is certain.
            self._main_persists(lambda main: main.call(Saving.halt, self.checkpoint))
            published = self._main_persists(
                lambda main: main.call(Machine.published, self.checkpoint)
            )
        except DcresError as error:
            self._stuck = (
                "whether it was published, its main host cannot tell now (see `dcres checkpoints` "
                "once it answers again), so its parts are kept"
            )
            return PublishUnknown(f"{why}; {error}")
        return Published() if published else PublishFailed(why)

    def _halt(self) -> None:
        """Every host stops saving; returns when the main host has, for the VM waits for it.

        Or when it cannot for now: what it still saves is refused later and never published.
        """

        def halt(port: Port) -> None:
            port.within(HALT_TIMEOUT_S).call(Saving.halt, self.checkpoint)

        self._halting = {host: self._in_thread(host, "halt", halt) for host in self._subject.hosts}
        self._halting[self._subject.main].join()

    def _discard(self) -> None:
        # Hosts may share a store, so no part is removed before all have stopped saving. One that
        # is gone saves nothing any more.
        for thread in self._halting.values():
            thread.join()
        # A main host whose VM stands still keeps in mind why, for whoever asks it next.
        hosts = self._subject.hosts[1:] if self.vm_stands else self._subject.hosts
        left = [host for host in hosts if host not in self._gone]

        def abandon(port: Port) -> None:
            port.call(Saving.abandon, self.checkpoint)

        discarding = [self._in_thread(host, "abandon", abandon) for host in left]
        for thread in discarding:
            thread.join()

    def _in_thread(self, host: str, step: str, give: Callable[[Port], None]) -> threading.Thread:
        def attempt() -> None:
            try:
                self._persist(host, give, _DISCARD_TIMEOUT_S)
            except DcresError as error:
                # It is not listed, and swept before the next checkpoint.
                log.warning("%s keeps an unfinished part of %s: %s", host, self.checkpoint, error)
                if isinstance(error, ActorGone):
                    self._gone.add(host)

        thread = threading.Thread(target=attempt, name=f"{step}-{host}", daemon=True)
        thread.start()
        return thread

    def _taken(self) -> Taken:
        return Taken(
            checkpoint=self.checkpoint,
            created=self._created,
            mode=self._mode,
            memory_format=self._format,
            paging_before=self._before,
            finished=self._require_finished(),
            saved=self._saved,
            rounds=len(self.rounds),
            seconds=time.monotonic() - self._began,
            downtime_s=self._downtime_s,
        )
