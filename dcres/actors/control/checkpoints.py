"""The checkpoints of one VM, one after the other: what each is made upon, and what is learned.

One that cannot be an increment after all is taken anew, with all pages.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from dcres.actors.control.basing import Upon, choose_base
from dcres.actors.control.changing_shares import spec_of
from dcres.actors.control.checkpointing import Checkpointing
from dcres.actors.control.publishing import Subject, checkpoint_facts
from dcres.actors.control.recording import catch_up
from dcres.actors.control.turn import Turn
from dcres.actors.control.vm_handle import VmHandle
from dcres.actors.ports import Port
from dcres.actors.protocol import Machine, Presence, Saving
from dcres.errors import Conflict, DcresError, OperationFailed, VmLost
from dcres.model.formats import MemoryFormat
from dcres.model.live import FIXED_S, Judgement, Target
from dcres.model.phase import VmPhase
from dcres.model.run_state import RunState, no_save
from dcres.storage.format.manifest import Manifest, Mode, dumps
from dcres.storage.layout import checkpoint_id

log = logging.getLogger("dcres.coordinator")

_NEXT_TOKEN = timedelta(microseconds=16)


@dataclass(frozen=True, slots=True)
class Wanting:
    """How a checkpoint is to be taken; see `Coordinator.checkpoint`."""

    downtime_s: float
    max_rounds: int
    memory_format: MemoryFormat
    full: bool


class Checkpoints:
    """Takes them; the coordinator's turn is the caller's."""

    def __init__(self, vm: VmHandle, turn: Turn) -> None:
        self._vm = vm
        self._turn = turn
        self._concurrency = vm.concurrency
        self._latest = datetime.fromtimestamp(0, UTC)  # when the last one was begun
        self._fixed_s = FIXED_S
        self.under_way: Checkpointing | None = None
        self.last: dict[str, Any] = {}

    def take(self, mode: Mode, how: Wanting, checkpoint: str | None) -> dict[str, Any]:
        """Take one; its facts. Raises OperationFailed when it was given up, Conflict, VmLost."""
        _ = self._vm.main  # NotFound without one
        upon = choose_base(self._vm, how.memory_format, full=how.full)
        try:
            return self._take(mode, how, checkpoint, upon)
        except OperationFailed as error:
            return self._take(mode, how, None, upon.after(error))

    def _take(self, mode: Mode, how: Wanting, checkpoint: str | None, upon: Upon) -> dict[str, Any]:
        subject = self._subject(_savable_state(self._vm))
        began_s = self._concurrency.now_s()
        now = self._latest = self._next_time()
        name = checkpoint or checkpoint_id(self._vm.name, now, f"{now.microsecond // 16:04x}")
        running = Checkpointing(
            subject,
            name,
            mode,
            Target(how.downtime_s, how.max_rounds, self._fixed_s),
            how.memory_format,
            now,
            self._turn.executor(f"checkpoint {name}"),
            self._concurrency,
            upon.base,
        )
        manifest = self._run(running)
        catch_up(self._vm)  # its store may have been there to read only until now
        _compact(manifest, subject.ports)
        seconds = self._concurrency.now_s() - began_s
        self.last = checkpoint_facts(manifest, seconds)
        self.last["full_because"] = upon.why_full
        self.last["downtime_parts_seconds"] = running.downtime_parts_s
        if running.judgement is not None:
            stopped_s = manifest.downtime_seconds
            self._fixed_s = _learned(self._fixed_s, running.judgement, stopped_s)
            self.last["verdict"] = str(running.judgement.verdict)
        return self.last

    def _next_time(self) -> datetime:
        """A clock may be set back, and ids are in order; they tell 16 µs apart."""
        return max(self._concurrency.utc(), self._latest + _NEXT_TOKEN)

    def _run(self, running: Checkpointing) -> Manifest:
        """Take it; a VM that was left standing still is told again in any case."""
        self.under_way = running
        try:
            manifest = running.run()
        finally:
            self.under_way = None
            if not running.settled:
                self._turn.unsettle()
            if running.vm_stands:
                self._turn.recover()
        now = self._turn.situation
        if running.vm_stands and not now.settled:
            raise VmLost(
                f"checkpoint {running.checkpoint} was taken, but the VM is stopped: {now.why}"
            )
        self._turn.become(now.ended(VmPhase.RUNNING))
        return manifest

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


def _compact(manifest: Manifest, ports: Mapping[str, Port]) -> None:
    """Hosts may merge segments from now on. Who does not hear of it will after the next one."""
    if manifest.memory_format is not MemoryFormat.SEGMENTED:
        return
    for host, port in ports.items():
        try:
            port.submit(Saving.compact, dumps(manifest))
        except DcresError as error:
            log.info("%s is not told to merge segments: %s", host, error)


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
