"""VMs that stand still, and guests that end: left as they are, and told."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dcres.actors.control import asking
from dcres.actors.control.coordinator import Coordinator
from dcres.errors import Conflict, OperationFailed, StoreFull, VmLost
from dcres.model.formats import MemoryFormat
from dcres.model.run_state import RunState
from dcres.storage.format.manifest import Manifest
from dcres.vm import disk, witness
from tests.support.guest import create_disk
from tests.support.sector import POWER_OFF, RESET, disk_with, say, writer
from tests.support.vm import Rig, await_checks, restart_main, rig, spec_of
from tests.support.wait import until

pytestmark = pytest.mark.vm


def run_state(vm: Rig) -> str:
    return str(vm.coordinator.status()["hosts"][0]["run_state"])


def of_qemu(vm: Rig) -> RunState:
    with vm.main().qemu.monitor() as monitor:
        return monitor.status()


def save(vm: Rig, mode: str) -> Manifest:
    return vm.store.get(vm.coordinator.checkpoint(mode)["checkpoint"])


def core_of(vm: Rig, manifest: Manifest) -> bytes:
    return vm.store.vmcore(manifest).read_bytes()


def new_actors(vm: Rig) -> None:
    """As when the main host's actor and the coordinator are killed: others take over."""
    restart_main(vm)
    vm.coordinator = Coordinator("vm", vm.fleet)


def cut_short(vm: Rig, checkpoint: str) -> None:
    """All actors die when a checkpoint has just stopped the VM."""
    main = vm.main()
    main.saving.prepare(checkpoint, MemoryFormat.PACKED)
    with main.qemu.monitor() as monitor:
        main.standing.stop(monitor)
    new_actors(vm)
    main.saver.end()  # what the end of its process would have closed
    assert not (vm.store.root / "vm" / checkpoint).exists()


def tick(vm: Rig) -> int:
    return witness.read(vm.console).tick


def fail_a_checkpoint(vm: Rig) -> None:
    saving = vm.sub().saving

    def fail(*_: object) -> None:
        raise StoreFull("the disk of h1 has burnt")

    saving.save = fail  # type: ignore[method-assign,assignment]
    with pytest.raises(OperationFailed, match=r"the VM is as it was \(paused\).*burnt"):
        vm.coordinator.checkpoint("stop")
    del saving.save


def test_a_paused_vm_is_paused_after_whatever_is_done_to_it(tmp_path: Path) -> None:
    """Checkpoints of both modes, one given up, a resize, new actors, a restore."""
    path = create_disk(tmp_path / "disk.qcow2")
    with rig() as vm:
        vm.boot(spec_of(fill=8, disks=[{"path": str(path)}]))
        cut_short(vm, "vm-20260101-000000-0000")
        assert run_state(vm) == "running"
        await_checks(vm.console)
        vm.coordinator.pause()
        vm.coordinator.pause()
        stood = tick(vm)

        def require_paused() -> None:
            assert (run_state(vm), tick(vm)) == ("paused", stood)

        cut_short(vm, "vm-20260101-000000-0001")
        require_paused()
        first = save(vm, "live")
        require_paused()
        assert of_qemu(vm) is RunState.POSTMIGRATE, "QEMU itself does not tell any more"
        second = save(vm, "stop")
        require_paused()
        assert core_of(vm, first) == core_of(vm, second)
        assert disk.snapshots(path) == [first.checkpoint, second.checkpoint]
        fail_a_checkpoint(vm)
        require_paused()
        assert disk.snapshots(path) == [first.checkpoint, second.checkpoint]
        new_actors(vm)
        require_paused()
        vm.coordinator.resize(80 << 20, [80 << 20, 64 << 20])
        require_paused()
        vm.coordinator.resume()
        await_checks(vm.console, 2)
        third = save(vm, "live")
        assert first.stopped_at == second.stopped_at, (
            "the guest's clock has stood since it was paused"
        )
        assert [each.run_state for each in (first, second, third)] == ["paused"] * 2 + ["running"]
        await_checks(vm.console, 2)
        vm.coordinator.stop()
        assert vm.restore(second)["run_state"] == "paused"
        again = save(vm, "live")
        assert (again.run_state, again.stopped_at) == (RunState.PAUSED, second.stopped_at)
        assert (run_state(vm), tick(vm)) == ("paused", 0), "nothing is on its new console"
        vm.coordinator.resume()
        await_checks(vm.console, 2)
        vm.coordinator.stop()
        assert subprocess.run(["qemu-img", "check", "-q", path]).returncode == 0


@contextmanager
def small_filesystem(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own that can be filled, and given more room."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "small", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def booting(path: Path) -> dict[str, Any]:
    """A VM that boots from this disk."""
    layout = {"main": "24MiB", "subs": ["24MiB"]}
    return {
        "name": "vm",
        "memory": "48MiB",
        "accel": "tcg",
        "disks": [{"path": str(path)}],
        "layout": layout,
    }


def written(vm: Rig) -> int:
    return vm.console.read_bytes().count(b"w")


def test_a_full_file_system_under_a_disk_is_told_and_the_guest_goes_on_afterwards(
    tmp_path: Path,
) -> None:
    with small_filesystem(tmp_path / "small", "2m") as small, rig() as vm:
        path = disk_with(small / "disk.qcow2", writer(), size_bytes=1 << 30)
        vm.coordinator.start(booting(path))
        until(lambda: run_state(vm) == "io-error", 60, "the file system is full")
        status = vm.coordinator.status()
        assert status["hosts"][0]["failed_disks"] == [f"{path}: nospace"]
        before = written(vm)
        # A snapshot needs a little room, which is not enough for the guest.
        subprocess.run(["mount", "-o", "remount,size=4m", small], check=True)
        manifest = save(vm, "live")
        assert manifest.run_state is RunState.IO_ERROR
        new_actors(vm)
        assert (run_state(vm), written(vm)) == ("io-error", before), "nobody has let it go on"
        subprocess.run(["mount", "-o", "remount,size=32m", small], check=True)
        vm.coordinator.resume()
        until(lambda: written(vm) > before + 50, 60, "the guest writes on")
        assert b"!" not in vm.console.read_bytes(), "it has seen no error"
        vm.coordinator.stop()
        vm.restore(manifest)
        until(lambda: written(vm) > 50, 60, "the restored guest writes on")
        assert b"!" not in vm.console.read_bytes()


def test_a_guest_that_powers_itself_off_is_off(tmp_path: Path) -> None:
    """Nobody has to look at the moment: also a new actor and a new coordinator know it."""
    path = disk_with(tmp_path / "off.qcow2", say("x") + POWER_OFF)
    with rig() as vm:
        vm.coordinator.start(booting(path))
        until(lambda: vm.coordinator.status()["phase"] == "off", 60, "the guest powers off")
        new_actors(vm)
        status = vm.coordinator.status()
        assert status["phase"] == "off"
        assert "its guest has shut down; `dcres start` boots it again" in status["why"]
        assert vm.console.read_bytes().endswith(b"x")
        for refused in (vm.coordinator.checkpoint, vm.coordinator.resume):
            with pytest.raises(Conflict, match="VM vm is off"):
                refused()
        vm.coordinator.start(booting(path))
        until(lambda: vm.coordinator.status()["phase"] == "off", 60, "it powers off again")
        assert vm.coordinator.status()["generation"] == 2


def test_how_a_vm_came_to_its_end_is_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guest that resets itself goes on; a QEMU that is told to end is off; one killed, lost.

    With an actor that does not answer on a host that is there, nobody knows.
    """
    monkeypatch.setattr(asking, "_STATUS_TIMEOUT_S", 0.5)
    path = disk_with(tmp_path / "reset.qcow2", say("r") + RESET)
    with rig() as vm:
        for number, phase in ((signal.SIGTERM, "off"), (signal.SIGKILL, "lost")):
            vm.coordinator.start(booting(path))
            until(lambda: vm.console.read_bytes().count(b"r") > 1, 60, "the guest resets itself")
            status = vm.coordinator.status()
            assert (status["phase"], run_state(vm)) == ("running", "running")
            vm.sub().server.daemon._wanted = False  # its thread goes with it
            vm.fleet.actor("vm", 1).die()
            unknown = vm.coordinator.status()
            assert (unknown["phase"], unknown["hosts"][1]["host_state"]) == ("unknown", "silent")
            with pytest.raises(Conflict, match="no answer from a host of VM vm"):
                vm.coordinator.start(booting(path))
            vm.fleet.actor("vm", 1).restart()
            assert vm.coordinator.status()["phase"] == "running"
            os.kill(status["hosts"][0]["qemu_pid"], number)
            until(lambda: vm.coordinator.status()["phase"] != "running", 30, "it has ended")
            vm.coordinator = Coordinator("vm", vm.fleet)
            status = vm.coordinator.status()
            assert (status["phase"], status["generation"]) == (phase, 1 + (phase == "lost"))
            assert [each["host"] for each in status["hosts"]] == ["h0", "h1"]
        assert "restore a checkpoint" in vm.coordinator.status()["why"]
        machine = vm.main().machine
        for call in (vm.coordinator.pause, machine.pause, machine.go):
            with pytest.raises(VmLost, match=r"QEMU of VM vm (has ended|was ended by a signal)"):
                call()
        with pytest.raises(VmLost, match="QEMU of VM vm"):
            vm.coordinator.checkpoint()
