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
from functools import partial
from pathlib import Path
from typing import Any

from dcres.actors.control.bringing_up import BringingUp
from dcres.actors.control.changing_shares import ChangingShares, Wanted
from dcres.actors.control.checkpoints import Checkpoints, Wanting
from dcres.actors.control.choosing import Choice, Wish
from dcres.actors.control.concurrency import THREADS, Concurrency
from dcres.actors.control.placing_restores import choose_hosts, foresee
from dcres.actors.control.recording import record_running, record_stopped
from dcres.actors.control.recovering import recover
from dcres.actors.control.replacing import Shares
from dcres.actors.control.restoring import Restoring, spec_for
from dcres.actors.control.telling import Telling, VmFacts
from dcres.actors.control.turn import Turn
from dcres.actors.control.vm_handle import VmHandle
from dcres.actors.control.wanting import while_it_lives
from dcres.actors.messages import Foreseen, ForeseenRestore
from dcres.actors.ports import Fleet
from dcres.actors.protocol import Machine
from dcres.config import Layout, VmSpec, vm_spec
from dcres.errors import ClusterError, Conflict
from dcres.linux import priority
from dcres.model.formats import DEFAULT_FORMAT, MemoryFormat
from dcres.model.live import DOWNTIME_S, MAX_ROUNDS
from dcres.model.phase import VmPhase
from dcres.model.picture import Picture
from dcres.model.run_state import runs_restored
from dcres.storage.format.manifest import Mode, loads

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
        self._checkpoints = Checkpoints(self._vm, self._turn)
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
        full: bool = False,
    ) -> dict[str, Any]:
        """Take a checkpoint; its manifest's facts as `dcres checkpoint --json` prints them.

        It is an increment upon the VM's last one if that can be, unless it is to be `full`;
        ``full_because`` says why not.

        `downtime_s` is what a live checkpoint aims at, in at most `max_rounds` rounds; then the
        VM is stopped all the same, and ``verdict`` says why. Raises OperationFailed when it was
        given up. A VM that ran runs on in either case, and one that was paused stays paused.
        """
        with self._turn.taken(VmPhase.CHECKPOINTING, settled=True):
            return self._checkpoints.take(
                Mode(mode), Wanting(downtime_s, max_rounds, memory_format, full), checkpoint
            )

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
        return self._telling.status(self._checkpoints.last or None)

    def placement(self, buckets: int) -> Picture:
        """Where memory is, as `Machine.picture` has it. Raises NotFound, Conflict, VmLost."""
        return self._telling.placement(buckets)

    def progress(self) -> dict[str, Any]:
        """How far the operation under way is: its phase, and bytes, rate and rest per host."""
        return self._telling.progress(self._checkpoints.under_way)

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
