"""Where a VM stands, as its coordinator knows it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dcres.model.phase import VmPhase, is_at_rest


@dataclass(frozen=True, slots=True)
class Situation:
    """A VM's phase, and why it is in it.

    `settled`: nothing of what a coordinator before this one left is still to be ended. `retired`:
    there is no VM, and no order is taken any more.
    """

    phase: VmPhase = VmPhase.ABSENT
    why: str = ""
    settled: bool = False
    retired: bool = False

    def begun(self, phase: VmPhase) -> Situation:
        """An operation is under way."""
        return replace(self, phase=phase)

    def ended(self, phase: VmPhase) -> Situation:
        """An operation has made this of the VM."""
        return replace(self, phase=phase, why="")

    def given_up(self, operation: VmPhase, before: Situation) -> Situation:
        """An operation failed, and unless it has said what became of the VM, it is as before."""
        return replace(self, phase=before.phase) if self.phase is operation else self

    def found(self, before: Situation, phase: VmPhase, why: str) -> Situation:
        """A look at the hosts showed this, unless something else was done meanwhile."""
        return replace(self, phase=phase, why=why) if self.phase is before.phase else self

    def unsettled(self) -> Situation:
        """An operation has left something to be ended."""
        return replace(self, settled=False)

    def gone(self) -> Situation:
        """There is no VM, and there will be none."""
        return replace(self, phase=VmPhase.STOPPING, retired=True)

    def busy(self, vm: str) -> str:
        """Why nothing else can be done now."""
        # In a phase of rest nothing takes long: it is paused, resumed or looked after.
        doing = "just being looked after" if is_at_rest(self.phase) else self.phase
        return f"VM {vm} is {doing}; wait until that is done"
