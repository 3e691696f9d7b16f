"""The coordinator of one VM: the driver of its start, checkpoints, restores and end.

A detached, named actor. It keeps nothing that the hosts do not know as well: started again
after its process died, it asks them, and ends what was half-done: a stopped VM runs again, a
start or restore that was not finished is taken down.

Every method runs where Ray put the coordinator (the head node). One operation at a time:
a second one is refused with Conflict. What an operation does is decided by its machine in
`dcres.model.operations`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

from dcres.actors.control.bringing_up import BringingUp
from dcres.actors.control.changing_shares import ChangingShares, Wanted, spec_of
from dcres.actors.control.checkpointing import Checkpointing
from dcres.actors.control.choosing import Choice, Wish
from dcres.actors.control.concurrency import THREADS, Concurrency
from dcres.actors.control.placing_restores import choose_hosts, foresee
from dcres.actors.control.publishing import Subject, checkpoint_facts
from dcres.actors.control.recording import catch_up, record_running, record_stopped
from dcres.actors.control.recovering import recover
from dcres.actors.control.replacing import Shares
from dcres.actors.control.restoring import Restoring, spec_for
from dcres.actors.control.telling import Telling, VmFacts
from dcres.actors.control.turn import Turn
from dcres.actors.control.vm_handle import VmHandle
from dcres.actors.control.wanting import while_it_lives
from dcres.actors.messages import Foreseen, ForeseenRestore
from dcres.actors.ports import Fleet
from dcres.actors.protocol import Machine, Presence
from dcres.config import Layout, VmSpec, vm_spec
from dcres.errors import ClusterError, Conflict, DcresError, VmLost
from dcres.linux import priority
from dcres.model.formats import DEFAULT_FORMAT, MemoryFormat
from dcres.model.live import DOWNTIME_S, FIXED_S, MAX_ROUNDS, Judgement, Target
from dcres.model.phase import VmPhase
from dcres.model.picture import Picture
from dcres.model.run_state import RunState, no_save, runs_restored
from dcres.storage.format.manifest import Manifest, Mode, loads
from dcres.storage.layout import checkpoint_id

_NEXT_TOKEN = timedelta(microseconds=16)
_CANCEL_TIMEOUT_S = 45.0
_CANCELLED = "cancelled by the user"


class Coordinator:
    """One VM's driver; see the module."""

    def __init__(self, vm: str, fleet: Fleet, concurrency: Concurrency = THREADS) -> None:
        priority.take_normal()
        self._concurrency = concurrency
        self._vm = VmHandle(vm, fleet, concurrency)
        self._turn = Turn(vm, concurrency, partial(recover, self._vm))
        self._telling = Telling(self._vm, self._turn)
        self._shares = ChangingShares(self._vm, self._turn.unsettle)
        self._checkpointing: Checkpointing | None = None
        self._last: dict[str, Any] = {}
        self._latest = datetime.fromtimestamp(0, UTC)  # when the last checkpoint was begun
        self._fixed_s = FIXED_S
        self._turn.recover_if_due()

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
        with self._turn.taken(VmPhase.STARTING):
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
        executor = self._turn.executor(name)
        bringing_up = BringingUp(
            self._vm, spec, executor, hosts=hosts, take_over=take_over, restoring=restoring
        )
        gone = self._vm.fleet.driver_is_gone
        with while_it_lives(driver, gone, self.cancel, self._concurrency):
            error = bringing_up.run()
        if not bringing_up.settled:
            self._turn.unsettle()
        if bringing_up.torn_down:
            self._become(VmPhase.ABSENT)
        if error is not None:
            raise error
        try:
            record_running(self._vm, by)
        except Conflict:  # its name went to a later life
            self._vm.take_down(executor.journal)
            self._become(VmPhase.ABSENT)
            raise
        self._become(VmPhase.RUNNING)
        return bringing_up.laps.seconds

    def _become(self, phase: VmPhase) -> None:
        self._turn.become(self._turn.situation.ended(phase))

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
        given up. A VM that ran runs on in either case, and one that was paused stays paused.
        """
        with self._turn.taken(VmPhase.CHECKPOINTING, settled=True):
            _ = self._vm.main  # NotFound without one
            run_state = _savable_state(self._vm)
            began_s = self._concurrency.now_s()
            now = self._latest = self._next_time()
            name = checkpoint or checkpoint_id(self._vm.name, now, f"{now.microsecond // 16:04x}")
            running = Checkpointing(
                self._subject(run_state),
                name,
                Mode(mode),
                Target(downtime_s, max_rounds, self._fixed_s),
                memory_format,
                now,
                self._turn.executor(f"checkpoint {name}"),
                self._concurrency,
            )
            manifest = self._run(running)
            catch_up(self._vm)  # its store may have been there to read only until now
            seconds = self._concurrency.now_s() - began_s
            self._last = checkpoint_facts(manifest, seconds)
            self._last["downtime_parts_seconds"] = running.downtime_parts_s
            if running.judgement is not None:
                stopped_s = manifest.downtime_seconds
                self._fixed_s = _learned(self._fixed_s, running.judgement, stopped_s)
                self._last["verdict"] = str(running.judgement.verdict)
            return self._last

    def _next_time(self) -> datetime:
        """A clock may be set back, and ids are in order; they tell 16 µs apart."""
        return max(self._concurrency.utc(), self._latest + _NEXT_TOKEN)

    def _run(self, running: Checkpointing) -> Manifest:
        """Take it; a VM that was left standing still is told again in any case."""
        self._checkpointing = running
        try:
            manifest = running.run()
        finally:
            self._checkpointing = None
            if not running.settled:
                self._turn.unsettle()
            if running.vm_stands:
                self._turn.recover()
        now = self._turn.situation
        if running.vm_stands and not now.settled:
            raise VmLost(
                f"checkpoint {running.checkpoint} was taken, but the VM is stopped: {now.why}"
            )
        self._become(VmPhase.RUNNING)
        return manifest

    def pause(self) -> VmFacts:
        """Stop the guest until `resume`; all else goes on. Repeatable. Raises Conflict, VmLost."""
        with self._turn.taken(VmPhase.RUNNING, settled=True):
            self._tell_main(Machine.pause)
        return self.status()

    def resume(self) -> VmFacts:
        """Let the guest run, from wherever it stands. Repeatable.

        Raises Conflict where it cannot run any more, VmLost.
        """
        with self._turn.taken(VmPhase.RUNNING, settled=True):
            self._tell_main(Machine.go)
        return self.status()

    def _tell_main(self, order: Callable[[Machine], None]) -> None:
        try:
            self._vm.main.call(order)
        except ClusterError as error:
            vm = self._vm.name
            raise ClusterError(
                f"host {self._vm.hosts.main} of VM {vm} does not answer ({error}); whether it has "
                f"done this, `dcres status {vm}` says once it does"
            ) from None

    def _subject(self, run_state: RunState) -> Subject:
        hosts = self._vm.hosts
        main = hosts.ports[hosts.main].call(Presence.describe)
        return Subject(
            vm=self._vm.name,
            generation=main.generation,
            spec=spec_of(main),
            accel=main.accel,
            qemu_version=main.qemu_version,
            machine=main.machine,
            hosts=hosts.names,
            ports=hosts.ports,
            alive=self._vm.fleet.alive,
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
        with self._turn.taken(VmPhase.RESTORING):
            laps = self._bring_up(spec, hosts, take_over, driver, by, restoring)
            found = self._vm.hosts
            shares = dict(zip(found.names, spec.layout.shares, strict=True))
            if lazy or not self._vm.end_serving():
                self._vm.follow(restoring.server_ports, moving=lazy)
            self._vm.roll.call(found.ports)  # what they are is known then, even if they are lost
        behind_s = (self._concurrency.utc() - manifest.stopped_at).total_seconds()
        return {
            "vm": self._vm.name,
            "checkpoint": manifest.checkpoint,
            "run_state": "running" if runs_restored(manifest.run_state) else manifest.run_state,
            "guest_clock_behind_seconds": round(max(behind_s, 0.0), 1),
            "seconds": sum(laps.values()),
            "parts_seconds": laps,
            "lazy": lazy,
            **restoring.facts(found.main, shares),
        }

    def choose(self, manifest_text: str, wish: Wish) -> Choice:
        """The hosts that a restore with this wish goes to. Changes nothing.

        Raises Conflict when the VM is there, ConfigError, NoRoom and NotFound as `decide` does.
        """
        manifest = loads(manifest_text, Path("manifest.json"))
        fleet = self._vm.fleet
        return choose_hosts(fleet, manifest, wish, lambda: _phase_in(self.status()))

    def plan_restore(
        self, manifest_text: str, wish: Wish, lazy: bool, take_over: bool
    ) -> ForeseenRestore:
        """What a restore with this wish would do as things are now. Changes nothing."""
        manifest, phase = loads(manifest_text, Path("manifest.json")), _phase_in(self.status())
        return foresee(self._vm.fleet, manifest, wish, phase, lazy=lazy, take_over=take_over)

    def resize(
        self, main_bytes: int | None = None, subs_bytes: Sequence[int] | None = None
    ) -> VmFacts:
        """Change how much the hosts keep, while the VM runs.

        More sub hosts than there are join on hosts with room; with fewer the last ones are
        emptied and leave. Raises ConfigError, NoRoom.
        """
        return self._reshape("resize", lambda spec: Shares.of(spec.layout, main_bytes, subs_bytes))

    def plan_resize(
        self, main_bytes: int | None = None, subs_bytes: Sequence[int] | None = None
    ) -> Foreseen:
        """What `resize` would do as things are now, or its refusal. Changes nothing.

        Raises Conflict where `resize` does, and NotFound.
        """
        self._turn.require_idle()
        return self._shares.foresee(lambda spec: Shares.of(spec.layout, main_bytes, subs_bytes))

    def drain(self, host: str) -> VmFacts:
        """Empty one sub host while the VM runs, then leave it. Raises NotFound, NoRoom."""
        return self._reshape(f"drain {host}", partial(self._shares.without, host))

    def plan_drain(self, host: str) -> Foreseen:
        """What `drain` would do as things are now, or its refusal. Changes nothing.

        Raises Conflict where `drain` does, and NotFound.
        """
        self._turn.require_idle()
        return self._shares.foresee(partial(self._shares.without, host))

    def _reshape(self, name: str, wanted: Wanted) -> VmFacts:
        with self._turn.taken(VmPhase.RESIZING, settled=True):
            self._shares.run(wanted, self._turn.executor(name))
            self._become(VmPhase.RUNNING)
        return self.status()

    def status(self) -> VmFacts:
        """The VM as its hosts see it: what is proven of it, and who does not answer."""
        return self._telling.status(self._last or None)

    def placement(self, buckets: int) -> Picture:
        """Where memory is, as `Machine.picture` has it. Raises NotFound, Conflict, VmLost."""
        return self._telling.placement(buckets)

    def progress(self) -> dict[str, Any]:
        """How far the operation under way is: its phase, and bytes, rate and rest per host."""
        return self._telling.progress(self._checkpointing)

    def cancel(self) -> bool:
        """Give up the checkpoint, start, restore or change of shares under way, if there is one.

        A start's hosts are told to end what they have, so that long loading ends at once.
        """
        return self._turn.cancel(_CANCELLED)

    def stop(self, by: str = "") -> None:
        """End the VM and give back all it used; its checkpoints stay. Repeatable.

        First of all it is put on record that `by` wants it stopped, so that nobody brings it back.
        Raises StoreFull where that cannot be; the VM runs on then.
        """
        self.cancel()
        with self._turn.taken(VmPhase.STOPPING, _CANCEL_TIMEOUT_S):
            record_stopped(self._vm, by)
            self._vm.take_down(self._turn.journal("stop"))
            self._become(VmPhase.ABSENT)

    def retire(self) -> bool:
        """Take no more orders if there is no VM, and whoever asked ends this actor. Repeatable."""
        return self._turn.retire(lambda: bool(self._vm.fleet.find(self._vm.name)))


def _phase_in(facts: VmFacts) -> VmPhase:
    return VmPhase(facts["phase"])


def _learned(fixed_s: float, judgement: Judgement, downtime_s: float) -> float:
    """The fixed part of the next downtime is what this one had beyond its staging."""
    staging_s = judgement.estimated_downtime_s - fixed_s
    return max(0.5 * (fixed_s + downtime_s - staging_s), 0.005)


def _savable_state(vm: VmHandle) -> RunState:
    """The VM's run state. Raises Conflict if it cannot be saved in that, VmLost, VmOff."""
    try:
        state = RunState(vm.main.call(Machine.status)["run_state"])
    except VmLost:
        raise
    except DcresError:  # the checkpoint itself meets that again, and tells it host by host
        return RunState.RUNNING
    if why := no_save(vm.name, state):
        raise Conflict(why)
    return state
