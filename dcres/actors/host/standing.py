"""How a checkpoint stops a VM and leaves it as it found it, whatever dies meanwhile.

What the VM was before is in the main host's state file, as `found`, before it is stopped, and since
when it is paused as `stood`, if it is. See `dcres.model.run_state`, which decides.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from dcres.actors.host.state import StateFile
from dcres.errors import Conflict
from dcres.model.run_state import HELD, RunState, is_held, kept, no_run, no_save, told
from dcres.vm.monitor import Monitor


@dataclass(frozen=True, slots=True)
class Stopped:
    """A VM that a checkpoint has stopped, and what it was `found` in."""

    found: RunState
    began: float  # on this host's monotonic clock, just before
    since: datetime  # UTC: when the guest was paused, as far as is known


class Standing:
    """One VM's run state: QEMU's, and what a checkpoint has made of it.

    Both are in the state file.
    """

    def __init__(self, vm: str, state: StateFile) -> None:
        self._vm = vm
        self._state = state

    @property
    def found(self) -> RunState | None:
        """What a checkpoint found the VM in, until QEMU tells that itself again."""
        now = self._state.now
        return None if now is None else now.found

    def told(self, now: RunState) -> RunState:
        """The run state for people."""
        return told(now, self.found)

    def is_held(self, now: RunState) -> bool:
        """Whether a checkpoint has stopped the VM and not let it go on."""
        return is_held(now, self.found)

    def require_savable(self, state: RunState) -> None:
        """Conflict for a VM that cannot be saved and left as it is."""
        if why := no_save(self._vm, state):
            raise Conflict(why)

    def pause(self, monitor: Monitor) -> None:
        """Stop the guest; one that is paused already stays as it is."""
        if monitor.settled_status() is RunState.RUNNING:
            monitor.stop()
            self._state.change(lambda now: replace(now, stood=_now()))

    def stop(self, monitor: Monitor) -> Stopped:
        """Stop the VM for a checkpoint, once it is written down what it was.

        Raises Conflict for one that cannot be saved; it is as it was then.
        """
        state = self.told(monitor.settled_status())
        self.require_savable(state)
        ran = state is RunState.RUNNING
        since = _now() if ran else self._state.require().stood or _now()
        self._note(state, None if ran else since)
        began = time.monotonic()
        monitor.stop()
        stopped = monitor.status()
        if ran and stopped not in HELD:
            # It was stopped by something else in that moment: its disk failed, or the guest ended.
            state = stopped
            self._note(state, since)
            self.require_savable(state)
        return Stopped(state, began, since)

    def let_go(self, monitor: Monitor) -> None:
        """After a checkpoint, at any step: the VM runs if that had stopped it. Repeatable."""
        now, found = monitor.settled_status(), self.found
        if is_held(now, found):
            monitor.cont()
        if found is not None:
            left = kept(now, found)
            self._state.change(lambda state: replace(state, found=left))

    def run(self, monitor: Monitor) -> None:
        """Let the guest run, from wherever it stands. Repeatable.

        Raises Conflict where it cannot, MonitorError when QEMU refuses.
        """
        now = monitor.settled_status()
        if why := no_run(self._vm, now):
            raise Conflict(why)
        if now is RunState.SUSPENDED:
            monitor.wake()
        elif now is not RunState.RUNNING:
            monitor.cont()
        self._note(None, None)

    def _note(self, found: RunState | None, stood: datetime | None) -> None:
        self._state.change(lambda now: replace(now, found=found, stood=stood))


def _now() -> datetime:
    return datetime.now(UTC)
