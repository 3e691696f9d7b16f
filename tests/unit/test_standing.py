"""A checkpoint leaves a VM as it found it, whichever of its steps is the last one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from dcres.actors.host.standing import Standing
from dcres.actors.host.state import StateFile, VmState
from dcres.actors.host.vm_folder import VmFolder
from dcres.actors.messages import Role
from dcres.errors import Conflict
from dcres.model.run_state import SAVED, RunState
from dcres.vm.monitor import Monitor


class Qemu:
    """QEMU's rules of `dcres.model.run_state`, and a monitor; `then` is what a stop meets."""

    def __init__(self, state: RunState, then: RunState | None = None) -> None:
        self.state = state
        self.then = then
        self.ran: list[str] = []

    def status(self) -> RunState:
        return self.state

    settled_status = status

    def stop(self) -> None:
        self.ran.append("stop")
        if self.state is RunState.RUNNING:
            self.state = self.then or RunState.PAUSED

    def save_core(self) -> None:
        assert self.state not in SAVED, "QEMU refuses to migrate"
        self.state = RunState.POSTMIGRATE

    def cont(self) -> None:
        self.ran.append("cont")
        self.state = RunState.RUNNING

    def wake(self) -> None:
        self.ran.append("wake")
        self.state = RunState.RUNNING


class Host:
    """A main host's state file, and what an actor makes of it; a new actor has the same file."""

    def __init__(self, folder: VmFolder, qemu: Qemu) -> None:
        self.qemu = qemu
        self.folder = folder
        StateFile(folder, Role.MAIN).begin(VmState(generation=1))

    @property
    def actor(self) -> Standing:
        return Standing("box", StateFile(self.folder, Role.MAIN))

    @property
    def file(self) -> VmState:
        return StateFile(self.folder, Role.MAIN).require()

    @property
    def is_untouched(self) -> bool:
        return (self.qemu.ran, self.file) == ([], VmState(generation=1))

    @property
    def monitor(self) -> Monitor:
        return cast(Monitor, self.qemu)

    @property
    def told(self) -> RunState:
        return self.actor.told(self.qemu.state)


Make = Callable[..., Host]


@pytest.fixture
def made(tmp_path: Path) -> Make:
    """Makes a host with QEMU in a state."""
    folder = VmFolder(tmp_path / "run", tmp_path / "ram")
    folder.make()
    return lambda *state: Host(folder, Qemu(*state))


STANDING = (
    RunState.PAUSED,
    RunState.PRELAUNCH,
    RunState.IO_ERROR,
    RunState.GUEST_PANICKED,
    RunState.WATCHDOG,
)


@pytest.mark.parametrize("saved", [False, True], ids=["stopped", "saved"])
@pytest.mark.parametrize("state", [RunState.RUNNING, *STANDING])
def test_a_vm_is_left_as_it_was_by_a_new_actor_too(
    made: Make, state: RunState, saved: bool
) -> None:
    host = made(state)
    for _ in range(3):
        assert host.actor.stop(host.monitor).found is state
        if saved and host.qemu.state not in SAVED:
            host.qemu.save_core()
        assert host.actor.is_held(host.qemu.state) is (state is RunState.RUNNING)
        for _ in range(2):
            host.actor.let_go(host.monitor)
            assert host.told is state
            assert not host.actor.is_held(host.qemu.state)
    assert ("cont" in host.qemu.ran) is (state is RunState.RUNNING)
    host.actor.run(host.monitor)
    assert (host.qemu.state, host.told, host.file.found) == (state.RUNNING, state.RUNNING, None)


def test_a_vm_that_no_checkpoint_has_stopped_is_not_let_go(made: Make) -> None:
    """As when an actor died before it stopped it, or somebody paused it since."""
    for state in STANDING:
        host = made(state)
        host.actor.let_go(host.monitor)
        assert host.is_untouched


@pytest.mark.parametrize("then", [RunState.IO_ERROR, RunState.SHUTDOWN, RunState.GUEST_PANICKED])
def test_a_guest_that_came_to_stand_by_itself_in_that_moment_is_not_let_go(
    made: Make, then: RunState
) -> None:
    host = made(RunState.RUNNING, then)
    if then is RunState.SHUTDOWN:
        with pytest.raises(Conflict, match="VM box is off"):
            host.actor.stop(host.monitor)
    else:
        assert host.actor.stop(host.monitor).found is then
        host.qemu.save_core()
    host.actor.let_go(host.monitor)
    assert host.told is then
    assert "cont" not in host.qemu.ran


@pytest.mark.parametrize("state", RunState)
def test_what_cannot_be_saved_is_not_touched(made: Make, state: RunState) -> None:
    host = made(state)
    if state in (RunState.RUNNING, *STANDING):
        host.actor.require_savable(state)
        return
    with pytest.raises(Conflict):
        host.actor.stop(host.monitor)
    assert host.is_untouched


def test_how_long_a_guest_has_stood_still(made: Make) -> None:
    host = made(RunState.RUNNING)
    host.actor.pause(host.monitor)
    paused = host.file.stood
    assert paused is not None
    host.actor.pause(host.monitor)
    for _ in range(2):
        assert host.actor.stop(host.monitor).since == paused
        host.actor.let_go(host.monitor)
    host.actor.run(host.monitor)
    assert host.file.stood is None
    assert host.actor.stop(host.monitor).since > paused
    host.actor.let_go(host.monitor)
    host.qemu.state = RunState.IO_ERROR
    assert host.actor.stop(host.monitor).since == host.actor.stop(host.monitor).since > paused


def test_letting_it_run(made: Make) -> None:
    for state in RunState:
        host = made(state)
        match state:
            case RunState.RUNNING:
                host.actor.run(host.monitor)
                assert host.qemu.ran == []
            case RunState.SUSPENDED:
                host.actor.run(host.monitor)
                assert host.qemu.ran == ["wake"]
            case RunState.INTERNAL_ERROR | RunState.SHUTDOWN:
                with pytest.raises(Conflict, match="`dcres start`"):
                    host.actor.run(host.monitor)
            case (
                RunState.INMIGRATE
                | RunState.FINISH_MIGRATE
                | RunState.SAVE_VM
                | RunState.RESTORE_VM
            ):
                with pytest.raises(Conflict, match="being saved or loaded"):
                    host.actor.run(host.monitor)
            case _:
                host.actor.run(host.monitor)
                assert host.qemu.ran == ["cont"]
