"""The coordinator of one VM: the driver of its start, checkpoints, restores and end.

A detached, named actor. It keeps nothing that the hosts do not know as well: started again
after its process died, it asks them, and ends what was half-done: a stopped VM runs again, a
start or restore that was not finished is taken down.

Every method runs where Ray put the coordinator (the head node). One operation at a time:
a second one is refused with Conflict.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from dcres.actors.control.asking import describe
from dcres.actors.control.bringing_up import BringingUp
from dcres.actors.control.checkpointing import Checkpointing
from dcres.actors.control.choosing import Choice, Wish
from dcres.actors.control.coordination import Coordination, VmFacts
from dcres.actors.control.journal import Journal
from dcres.actors.control.placing_restores import choose_hosts, foresee
from dcres.actors.control.publishing import Subject, checkpoint_facts
from dcres.actors.control.recording import catch_up, record_running
from dcres.actors.control.replacing import Checked, Replacing, Shares, settle_shape
from dcres.actors.control.restoring import Restoring, spec_for
from dcres.actors.control.wanting import while_it_lives
from dcres.actors.messages import Description, Foreseen, ForeseenRestore
from dcres.actors.ports import Port
from dcres.actors.protocol import Machine, Presence
from dcres.config import Layout, VmSpec, vm_spec
from dcres.errors import ClusterError, Conflict, DcresError, NotFound, VmLost, VmOff
from dcres.model.formats import DEFAULT_FORMAT, MemoryFormat
from dcres.model.live import DOWNTIME_S, MAX_ROUNDS, Judgement, Target
from dcres.model.operations.start import Start
from dcres.model.phase import HostState, VmPhase
from dcres.model.run_state import RunState, no_save, runs_restored
from dcres.storage.format.manifest import Mode, loads
from dcres.storage.layout import checkpoint_id

log = logging.getLogger("dcres.coordinator")

_T = TypeVar("_T")
_NEXT_TOKEN = timedelta(microseconds=16)


class Coordinator(Coordination):
    """One VM's driver; see the module."""

    _latest = datetime.fromtimestamp(0, UTC)  # when the last checkpoint was begun

    def start(
        self,
        values: dict[str, Any],
        hosts: Sequence[str] | None = None,
        take_over: bool = False,
        driver: str | None = None,
        by: str = "",
    ) -> VmFacts:
        """Boot a VM over the hosts of its layout. Raises Conflict, NoRoom and what hosts raise.

        `take_over` its name in the store from another cluster that may have ended. If the driver
        of the Ray job `driver` ends before, nobody wants the VM, and it is given up. The record of
        what is to run says that `by` did this.
        """
        spec = vm_spec(values)
        with self._exclusively(VmPhase.STARTING):
            self._bring_up(spec, hosts, take_over, driver, by)
        return self.status()

    def _bring_up(
        self,
        spec: VmSpec,
        hosts: Sequence[str] | None,
        take_over: bool,
        driver: str | None,
        by: str,
        restoring: Restoring | None = None,
    ) -> dict[str, float]:
        """Start the VM and put on record that it is to run; what that was spent on, in seconds."""
        name = "start" if restoring is None else f"restore {restoring.manifest.checkpoint}"
        executor = self._executor = self._operation_named(name)
        bringing_up = BringingUp(
            self._vm,
            self._fleet,
            spec,
            executor,
            self._concurrency,
            look=self._look,
            take_down=lambda: self._take_down(executor.journal),
            watch=self._learn_hosts,
            hosts=hosts,
            take_over=take_over,
            restoring=restoring,
        )
        gone = self._fleet.driver_is_gone
        try:
            with while_it_lives(driver, gone, self.cancel, self._concurrency):
                bringing_up.run()
            self._put_on_record(executor.journal, by)
        finally:
            self._executor = None
        self._phase = VmPhase.RUNNING
        return bringing_up.laps.seconds

    def _put_on_record(self, journal: Journal, by: str) -> None:
        """That the VM is to run; one of which that cannot be said is taken down again."""
        main = self._main()
        try:
            record_running(main, describe(main), self._fleet.cluster(), by)
        except BaseException:
            self._take_down(journal)
            raise

    def _look(self) -> tuple[HostState, ...]:
        """What is there of the VM; nothing, if it has no hosts."""
        if not self._fleet.find(self._vm):
            return ()
        return tuple(each.state for each in self._roll.call(self._ports()))

    def _learn_hosts(self, state: Start) -> None:
        self._hosts = state.hosts or self._hosts

    def checkpoint(
        self,
        mode: str = "live",
        checkpoint: str | None = None,
        downtime_s: float = DOWNTIME_S,
        max_rounds: int = MAX_ROUNDS,
        memory_format: MemoryFormat = DEFAULT_FORMAT,
    ) -> dict[str, Any]:
        """Take a checkpoint; its manifest's facts as `dcres checkpoint --json` prints them.

        `downtime_s` is what a live checkpoint aims at, in at most `max_rounds` rounds; then the
        VM is stopped all the same, and ``verdict`` says why. Raises OperationFailed when it was
        given up. A VM that ran runs on in either case, and one that stood still stands as it did.
        """
        with self._exclusively(VmPhase.CHECKPOINTING):
            ports = self._ports()
            if not ports:
                raise NotFound(f"VM {self._vm} does not run; start it or restore a checkpoint")
            run_state = self._savable_state()
            began = time.monotonic()
            # A clock may be set back, and ids are in order. The four digits tell checkpoints of
            # one second apart.
            now = self._latest = max(datetime.now(UTC), self._latest + _NEXT_TOKEN)
            name = checkpoint or checkpoint_id(self._vm, now, f"{now.microsecond // 16:04x}")
            target = Target(downtime_s, max_rounds, self._fixed_s)
            subject = self._subject(ports, run_state)
            running = Checkpointing(subject, name, Mode(mode), target, memory_format, now)
            self._checkpointing = running
            try:
                manifest = running.run()
            finally:
                self._checkpointing = None
                self._recovered = not running.vm_stands
                if running.vm_stands:
                    self._recover()
            if not self._recovered:
                raise VmLost(f"checkpoint {name} was taken, but the VM stands still: {self._why}")
            self._phase = VmPhase.RUNNING
            main = ports[self._hosts[0]]  # whose store may have been there to read only until now
            catch_up(self._vm, main, describe(main), self._fleet.cluster())
            self._last = checkpoint_facts(manifest, time.monotonic() - began)
            self._last["downtime_parts_seconds"] = running.downtime_parts_s
            if running.judgement is not None:
                self._learn(running.judgement, manifest.downtime_seconds)
                self._last["verdict"] = str(running.judgement.verdict)
            return self._last

    def _learn(self, judgement: Judgement, downtime_s: float) -> None:
        """The fixed part of the next downtime is what this one had beyond its staging."""
        staging_s = judgement.estimated_downtime_s - self._fixed_s
        self._fixed_s = max(0.5 * (self._fixed_s + downtime_s - staging_s), 0.005)

    def _savable_state(self) -> RunState:
        """The VM's run state. Raises Conflict if it cannot be saved in that, VmLost, VmOff."""
        try:
            state = RunState(self._main().call(Machine.status)["run_state"])
        except VmLost:
            raise
        except DcresError:  # the checkpoint itself meets that again, and tells it host by host
            return RunState.RUNNING
        if why := no_save(self._vm, state):
            raise Conflict(why)
        return state

    def pause(self) -> VmFacts:
        """Stop the guest until `resume`; all else goes on. Repeatable. Raises Conflict, VmLost."""
        with self._at_rest():
            self._tell_main(Machine.pause)
        return self.status()

    def resume(self) -> VmFacts:
        """Let the guest run, from wherever it stands. Repeatable.

        Raises Conflict where it cannot run any more, VmLost.
        """
        with self._at_rest():
            self._tell_main(Machine.go)
        return self.status()

    def _tell_main(self, order: Callable[[Machine], None]) -> None:
        try:
            self._main().call(order)
        except ClusterError as error:
            raise ClusterError(
                f"host {self._hosts[0]} of VM {self._vm} does not answer ({error}); whether it has "
                f"done this, `dcres status {self._vm}` says once it does"
            ) from None

    @contextmanager
    def _at_rest(self) -> Iterator[None]:
        """Nothing else is done to the VM meanwhile, and nothing is left of what was done before."""
        self._recover_if_due()
        if not self._recovered:
            errors: dict[VmPhase, type[DcresError]] = {VmPhase.LOST: VmLost, VmPhase.OFF: VmOff}
            error = errors.get(self._phase, ClusterError)
            raise error(f"VM {self._vm} is {self._phase}: {self._why}")
        with self._exclusively(VmPhase.RUNNING):
            yield

    def _subject(self, ports: dict[str, Port], run_state: RunState) -> Subject:
        main = ports[self._hosts[0]].call(Presence.describe)
        return Subject(
            vm=self._vm,
            generation=main.generation,
            spec=_spec_of(main),
            accel=main.accel,
            qemu_version=main.qemu_version,
            machine=main.machine,
            hosts=self._hosts,
            ports=ports,
            alive=self._fleet.alive,
            run_state=run_state,
        )

    def restore(
        self,
        manifest_text: str,
        layout: Layout | None = None,
        hosts: Sequence[str] | None = None,
        lazy: bool = False,
        take_over: bool = False,
        driver: str | None = None,
        by: str = "",
    ) -> dict[str, Any]:
        """Bring the VM back from a checkpoint; facts as `dcres restore --json` prints them.

        `layout` None is the checkpoint's own. With `lazy` the guest runs at once, and its
        memory follows. `take_over`, `driver` and `by` as for `start`. Raises Conflict when it runs
        or is being restored, CheckpointCorrupt, NoRoom, NotFound for a part that is nowhere; on an
        error nothing of the VM is left running and the checkpoint is as it was.
        """
        manifest = loads(manifest_text, Path("manifest.json"))
        spec = spec_for(manifest, layout)
        restoring = Restoring(manifest, lazy)
        with self._exclusively(VmPhase.RESTORING):
            laps = self._bring_up(spec, hosts, take_over, driver, by, restoring)
            shares = dict(zip(self._hosts, spec.layout.shares, strict=True))
            if lazy:
                ends = partial(restoring.end, self._fleet)
                self._follow(self._main(), restoring.server_ports, ends)
            else:
                restoring.end(self._fleet)
            self._roll.call(self._ports())  # what they are is known then, even if they are lost
        behind_s = (datetime.now(UTC) - manifest.stopped_at).total_seconds()
        return {
            "vm": self._vm,
            "checkpoint": manifest.checkpoint,
            "run_state": "running" if runs_restored(manifest.run_state) else manifest.run_state,
            "guest_clock_behind_seconds": round(max(behind_s, 0.0), 1),
            "seconds": sum(laps.values()),
            "parts_seconds": laps,
            "lazy": lazy,
            **restoring.facts(self._hosts[0], shares),
        }

    def choose(self, manifest_text: str, wish: Wish) -> Choice:
        """The hosts that a restore with this wish goes to. Changes nothing.

        Raises Conflict when the VM is there, ConfigError, NoRoom and NotFound as `decide` does.
        """
        manifest = loads(manifest_text, Path("manifest.json"))
        return choose_hosts(self._fleet, manifest, wish, lambda: _phase_in(self.status()))

    def plan_restore(
        self, manifest_text: str, wish: Wish, lazy: bool, take_over: bool
    ) -> ForeseenRestore:
        """What a restore with this wish would do as things are now. Changes nothing."""
        manifest, phase = loads(manifest_text, Path("manifest.json")), _phase_in(self.status())
        return foresee(self._fleet, manifest, wish, phase, lazy=lazy, take_over=take_over)

    def resize(
        self, main_bytes: int | None = None, subs_bytes: Sequence[int] | None = None
    ) -> VmFacts:
        """Change how much the hosts keep, while the VM runs.

        More sub hosts than there are join on hosts with room; with fewer the last ones are
        emptied and leave. Raises ConfigError, NoRoom.
        """
        with self._exclusively(VmPhase.RESIZING):
            self._settle_shares()
            spec = self._running_spec()
            self._reshape(spec, Shares.of(spec.layout, main_bytes, subs_bytes))
        return self.status()

    def plan_resize(
        self, main_bytes: int | None = None, subs_bytes: Sequence[int] | None = None
    ) -> Foreseen:
        """What `resize` would do as things are now, or its refusal. Changes nothing.

        Raises Conflict where `resize` does, and NotFound.
        """
        self._require_settled()
        spec = self._running_spec()
        return self._replacing(spec, Shares.of(spec.layout, main_bytes, subs_bytes)).foresee()

    def drain(self, host: str) -> VmFacts:
        """Empty one sub host while the VM runs, then leave it. Raises NotFound, NoRoom."""
        with self._exclusively(VmPhase.RESIZING):
            self._settle_shares()
            spec = self._running_spec()
            self._reshape(spec, self._without(host, spec))
        return self.status()

    def plan_drain(self, host: str) -> Foreseen:
        """What `drain` would do as things are now, or its refusal. Changes nothing.

        Raises Conflict where `drain` does, and NotFound.
        """
        self._require_settled()
        spec = self._running_spec()
        return self._replacing(spec, self._without(host, spec)).foresee()

    def _without(self, host: str, spec: VmSpec) -> Shares:
        """As they are, but none for the sub host `host`. Raises NotFound."""
        shares = dict(zip(self._hosts[1:], spec.layout.subs, strict=True))
        if host not in shares:
            raise NotFound(
                f"{host} is no sub host of VM {self._vm}; it has {', '.join(shares) or 'none'}"
            )
        return Shares(spec.layout.main, tuple({**shares, host: 0}.values()))

    def _require_settled(self) -> None:
        """Conflict where something is done to the VM, or a change of shares was left half-done."""
        self._require_idle()
        if not self._is_settled(describe(self._main())):
            raise Conflict(
                f"the last change of shares of VM {self._vm} was not brought to an end; "
                "the next resize or drain begins with that"
            )

    def _running_spec(self) -> VmSpec:
        description = self._main().call(Presence.describe)
        if description.moving:
            raise Conflict(f"VM {self._vm} is still being restored; wait until its pages are there")
        return _spec_of(description)

    def _replacing(self, spec: VmSpec, shares: Shares) -> Replacing:
        return Replacing(self._vm, self._fleet, spec, self._hosts, shares)

    def _reshape(self, spec: VmSpec, shares: Shares) -> None:
        stopped = self._moves_unwanted = threading.Event()

        def require_wanted() -> None:
            if stopped.is_set():
                raise Conflict(f"moving the pages of VM {self._vm} was cancelled; it runs on")

        replacing = replace(self._replacing(spec, shares), require_wanted=require_wanted)
        try:
            self._replace(replacing, replacing.check())
        finally:
            self._moves_unwanted = None
        self._phase = VmPhase.RUNNING

    def _replace(self, replacing: Replacing, checked: Checked) -> None:
        try:
            self._hosts = replacing.run(checked)
        except BaseException:
            self._hosts = settle_shape(self._vm, self._fleet)
            raise


def _phase_in(facts: VmFacts) -> VmPhase:
    return VmPhase(facts["phase"])


def _spec_of(main: Description) -> VmSpec:
    if main.spec is None:
        raise NotFound(
            f"host {main.host} knows nothing of the VM; start it or restore a checkpoint"
        )
    return main.spec
