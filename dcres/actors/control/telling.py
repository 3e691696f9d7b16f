"""What a coordinator tells of its VM: to whoever asks for its status, and while it works."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from dcres.actors.control.asking import Heard, ask_progress, why_of
from dcres.actors.control.checkpointing import Checkpointing
from dcres.actors.control.turn import Turn
from dcres.actors.control.vm_handle import VmHandle
from dcres.actors.protocol import Machine
from dcres.errors import DcresError
from dcres.model.phase import HostState, VmPhase, is_at_rest, judged
from dcres.model.picture import Picture
from dcres.model.situation import Situation

VmFacts = dict[str, Any]  # a VM as its coordinator tells of it, for people

# While hosts come or go they are not asked.
_CHANGING = (VmPhase.STARTING, VmPhase.RESTORING, VmPhase.STOPPING)


class Telling:
    """The VM as its hosts see it."""

    def __init__(self, vm: VmHandle, turn: Turn) -> None:
        self._vm, self._turn = vm, turn

    def status(self, last_checkpoint: Mapping[str, Any] | None) -> VmFacts:
        """What is proven of it, and who does not answer."""
        self._turn.recover_if_due()
        before = self._turn.situation
        heard = self._hear(before.phase)
        phase, why = before.phase, before.why
        if is_at_rest(before.phase):
            phase, why = self._judge(before, heard)
        elif heard:
            why = "; ".join(each.why for each in heard if each.why)
        self._turn.found(before, phase, why)
        return {
            "vm": self._vm.name,
            "phase": str(phase),
            "why": why,
            "generation": max((each.generation for each in heard), default=0) or None,
            "hosts": [each.to_dict() for each in heard],
            "last_checkpoint": last_checkpoint,
            **self._turn.operations(),
        }

    def _hear(self, phase: VmPhase) -> list[Heard]:
        if phase in _CHANGING:
            return self._vm.roll.named(self._vm.names)
        return self._vm.roll.call(self._vm.hosts.ports)

    def _judge(self, before: Situation, heard: Sequence[Heard]) -> tuple[VmPhase, str]:
        """The phase of a VM at rest, and why."""
        if not heard:
            # Its last host may have gone with its reservation: that is for who knew it.
            running = before.phase is VmPhase.RUNNING
            return (VmPhase.ABSENT if running else before.phase), before.why
        match judged([each.state for each in heard]):
            case VmPhase.OFF:
                return VmPhase.OFF, heard[0].why
            case VmPhase.LOST:
                return VmPhase.LOST, why_of(heard, HostState.LOST)
            case VmPhase.UNKNOWN:
                return VmPhase.UNKNOWN, why_of(heard, HostState.SILENT)
            case phase if before.settled:
                troubles = [why_of(heard, HostState.TROUBLED), self._vm.trouble]
                return phase, "; ".join(filter(None, troubles))
            case _:
                return before.phase, before.why

    def placement(self, buckets: int) -> Picture:
        """Where memory is, as `Machine.picture` has it. Raises NotFound, Conflict, VmLost."""
        if self._turn.situation.phase in _CHANGING:
            raise self._turn.busy()
        return self._vm.main.call(Machine.picture, buckets)

    def progress(self, checkpointing: Checkpointing | None) -> dict[str, Any]:
        """How far the operation under way is: its phase, and bytes, rate and rest per host."""
        now = self._turn.situation.phase
        forecasts = checkpointing.forecasts() if checkpointing else {}
        hosts = [
            {**each, **forecasts.get(each["host"], {})}
            for each in ask_progress(self._vm.hosts.ports)
        ]
        phase = str(checkpointing.phase if checkpointing else now)
        facts: dict[str, Any] = {"vm": self._vm.name, "phase": phase, "hosts": hosts}
        if checkpointing is not None and checkpointing.judgement is not None:
            facts["round"] = checkpointing.rounds
            facts["estimated_downtime_seconds"] = checkpointing.judgement.estimated_downtime_s
            facts["pages_left"] = checkpointing.pages_left
        if now is VmPhase.RESIZING:
            with suppress(DcresError):
                facts["pages_to_move"] = self._vm.main.call(Machine.status)["pages_to_move"]
        return facts
