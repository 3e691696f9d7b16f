"""Disks and devices: a restore that fails leaves them alone, and no checkpoint is taken in vain."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from dcres.actors.host.checkpoint_stop import CheckpointStop
from dcres.actors.host.core_load import CoreLoad
from dcres.actors.host.main_machine import MainMachine
from dcres.errors import (
    CheckpointCorrupt,
    ConfigError,
    DcresError,
    OperationFailed,
    PagingError,
    QemuFailed,
    UnsafeDevice,
)
from dcres.storage.digest import bytes_sum
from dcres.storage.format.manifest import Manifest
from dcres.vm import disk
from dcres.vm.monitor import Monitor
from tests.support.disks import in_use, same, sound
from tests.support.guest import create_disk
from tests.support.vm import Rig, await_checks, restart_main, rig, spec_of
from tests.support.wait import until

pytestmark = pytest.mark.vm


class Hindered:
    """What happens to a main host on the way."""

    before_core: ClassVar[list[Callable[[], None]]] = []
    before_go: ClassVar[list[Callable[[], None]]] = []
    settled: ClassVar[list[Callable[[], None]]] = []


@contextmanager
def hindered() -> Iterator[None]:
    give, go, settle_disks = CoreLoad._give, MainMachine.go, CoreLoad.settle_disks

    def giving(core_load: CoreLoad, core: Path) -> None:
        for hindrance in Hindered.before_core:
            hindrance()
        give(core_load, core)

    def going(machine: MainMachine, paused: bool = False) -> None:
        for hindrance in Hindered.before_go:
            hindrance()
        go(machine, paused)

    def settling(core_load: CoreLoad, monitor: Monitor) -> None:
        settle_disks(core_load, monitor)
        while Hindered.settled:
            Hindered.settled.pop()()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CoreLoad, "_give", giving)
        patch.setattr(MainMachine, "go", going)
        patch.setattr(CoreLoad, "settle_disks", settling)
        yield


def small(**values: Any) -> dict[str, Any]:
    return spec_of(memory="128MiB", main="128MiB", subs=[], fill=8, **values)


@dataclass
class World:
    """A VM with two disks and a monitor of the user's own, and its only checkpoint."""

    vm: Rig
    disks: list[Path]
    monitor: Path
    taken: Manifest

    def ask(self, command: str, **arguments: object) -> Any:
        """One QMP command, as the user gives it."""
        with socket.socket(socket.AF_UNIX) as line, ExitStack() as stack:
            line.connect(str(self.monitor))
            lines = stack.enter_context(line.makefile("rw"))
            lines.readline()  # the greeting
            for each in ("qmp_capabilities", command):
                given = arguments if each == command else {}
                lines.write(json.dumps({"execute": each, "arguments": given}) + "\n")
                lines.flush()
                while "event" in (answer := json.loads(lines.readline())):
                    pass
        assert "return" in answer, answer
        return answer["return"]

    def plugged(self) -> bool:
        folder = self.ask("qom-list", path="/machine/peripheral")
        return any(each["name"] == "r1" for each in folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("disks")
    disks = [create_disk(folder / name) for name in ("a.qcow2", "b.qcow2")]
    monitor = folder / "q"
    with rig(hosts=1) as vm, hindered():
        (iso := folder / "cd.iso").write_bytes(bytes(1 << 20))
        arguments = ["-device", "pcie-root-port,id=rp1,chassis=1", "-device", "ide-cd,drive=cd"]
        arguments += ["-drive", f"if=none,id=cd,file={iso},format=raw,readonly=on"]
        arguments += ["-qmp", f"unix:{monitor},server=on,wait=off"]
        values: dict[str, Any] = {
            "disks": [{"path": str(path)} for path in disks],
            "extra_args": arguments,
        }
        vm.boot(spec_of(memory="128MiB", main="128MiB", subs=[], fill=8, **values))
        taken = vm.checkpoint()
        vm.coordinator.stop()
        yield World(vm, disks, monitor, taken)


@pytest.fixture
def world(made: World) -> Iterator[World]:
    """Nothing runs, before and after, and the disks are as the checkpoint has them."""
    with rig_of(made):
        yield made


@contextmanager
def rig_of(made: World) -> Iterator[None]:
    kept = [path.with_suffix(".kept") for path in made.disks]
    for path, copy in zip(made.disks, kept, strict=True):
        shutil.copy(path, copy)
    try:
        yield
    finally:
        Hindered.before_core.clear()
        Hindered.before_go.clear()
        Hindered.settled.clear()
        made.vm.coordinator.stop()
        made.vm.require_nothing_left()
        for path, copy in zip(made.disks, kept, strict=True):
            path.unlink(missing_ok=True)
            copy.replace(path)


@pytest.fixture
def running(world: World) -> World:
    world.vm.restore(world.taken)
    return world


# A restore that fails leaves every disk as it was


def work_on(path: Path) -> None:
    """What was done after the checkpoint, and is not to be lost."""
    command = ["qemu-io", "-c", "write -q -P 0x77 0 1M", str(path)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


@contextmanager
def without_its_snapshot(world: World) -> Iterator[None]:
    disk.delete(world.disks[1], world.taken.checkpoint)
    yield


@contextmanager
def gone(world: World) -> Iterator[None]:
    aside = world.disks[1].rename(world.disks[1].with_suffix(".aside"))
    yield
    aside.rename(world.disks[1])


@contextmanager
def no_disk(world: World) -> Iterator[None]:
    with gone(world):
        world.disks[1].write_bytes(bytes(1 << 20))
        yield


@contextmanager
def read_only(world: World) -> Iterator[None]:
    path = world.disks[1]
    subprocess.run(["mount", "--bind", path, path], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", path], check=True)
        yield
    finally:
        subprocess.run(["umount", path], check=True)


@contextmanager
def locked(world: World) -> Iterator[None]:
    with in_use(world.disks[1]):
        yield


@contextmanager
def locked_late(world: World) -> Iterator[None]:
    """By somebody who came after the disks were looked at."""
    with ExitStack() as stack:
        real = CoreLoad.load

        def load(core_load: CoreLoad, resumption: Any) -> None:
            stack.enter_context(in_use(world.disks[1]))
            real(core_load, resumption)

        patch = pytest.MonkeyPatch()
        stack.callback(patch.undo)
        patch.setattr(CoreLoad, "load", load)
        yield


@contextmanager
def with_a_bitmap(world: World) -> Iterator[None]:
    subprocess.run(["qemu-img", "bitmap", "--add", world.disks[1], "backup0"], check=True)
    yield
    subprocess.run(["qemu-img", "bitmap", "--remove", world.disks[1], "backup0"], check=True)


@contextmanager
def qemu_killed(world: World) -> Iterator[None]:
    def kill() -> None:
        qemu = world.vm.main().qemu.process.process
        qemu.kill()
        assert qemu.wait_gone(10)

    Hindered.before_core.append(kill)
    yield


@contextmanager
def given_up(world: World) -> Iterator[None]:
    """After the VM core was loaded, and before the guest ran."""

    def fail() -> None:
        raise PagingError("it was given up")

    Hindered.before_go.append(fail)
    yield


Hindrance = Callable[[World], AbstractContextManager[None]]
HINDRANCES: dict[Hindrance, tuple[type[DcresError], str]] = {
    locked: (ConfigError, r"b\.qcow2 is in use by another process; end"),
    locked_late: (ConfigError, r"b\.qcow2 takes no snapshot: .*lock"),
    without_its_snapshot: (CheckpointCorrupt, r"b\.qcow2 has no snapshot"),
    gone: (ConfigError, r"b\.qcow2 of VM vm does not exist"),
    no_disk: (ConfigError, r"b\.qcow2 is not in qcow2 format but raw"),
    read_only: (ConfigError, r"b\.qcow2 cannot be written to \(Read-only file system\)"),
    with_a_bitmap: (ConfigError, r"b\.qcow2 has persistent dirty bitmaps \(backup0\).*--remove"),
    qemu_killed: (QemuFailed, "has ended"),
    given_up: (PagingError, "it was given up"),
}


@pytest.mark.parametrize("hindrance", HINDRANCES, ids=lambda each: each.__name__)
def test_a_restore_that_fails_leaves_the_disks(
    world: World, tmp_path: Path, hindrance: Hindrance
) -> None:
    kind, words = HINDRANCES[hindrance]
    for path in world.disks:
        work_on(path)
    with hindrance(world):
        before = [Path(shutil.copy(path, tmp_path)) for path in world.disks if path.exists()]
        with pytest.raises(kind, match=words):
            world.vm.restore(world.taken)
        world.vm.require_nothing_left()
        require_as(world, before)


def require_as(world: World, before: list[Path]) -> None:
    """In what a guest reads, and with no snapshot more or less."""
    for was in before:
        path = next(each for each in world.disks if each.name == was.name)
        if was.read_bytes() == path.read_bytes():
            continue
        assert same(path, was)
        assert sound(path)
        assert disk.snapshots(path) == disk.snapshots(was)


def test_a_vm_core_that_qemu_cannot_load_leaves_the_disks(world: World, tmp_path: Path) -> None:
    """With the right checksum, as if it were another QEMU's."""
    vm, taken = world.vm, world.taken
    path = vm.store.root / "vm" / taken.checkpoint / "h0" / "vmcore"
    core = path.read_bytes()
    for each in world.disks:
        work_on(each)
    before = [Path(shutil.copy(each, tmp_path)) for each in world.disks]
    wrong = core[:2000] + bytes(len(core) - 2000)
    total = bytes_sum("vmcore", wrong)
    main = taken.hosts[0]
    files = tuple(total if file.name == "vmcore" else file for file in main.files)
    part = main.model_copy(update={"files": files})
    altered = taken.model_copy(update={"vmcore": total, "hosts": (part, *taken.hosts[1:])})
    try:
        path.write_bytes(wrong)
        with pytest.raises((CheckpointCorrupt, QemuFailed), match="load"):
            vm.restore(altered)
    finally:
        path.write_bytes(core)
    vm.require_nothing_left()
    require_as(world, before)
    vm.restore(taken)
    await_checks(vm.console, 1)
    assert [disk.snapshots(each) for each in world.disks] == [[taken.checkpoint]] * 2


def test_an_actor_that_dies_before_the_guest_runs_leaves_the_disks(
    world: World, tmp_path: Path
) -> None:
    """Its successor, told to end what is there, finds in the state file what to put back."""
    vm = world.vm
    for each in world.disks:
        work_on(each)
    before = [Path(shutil.copy(each, tmp_path)) for each in world.disks]

    def die() -> None:
        restart_main(vm)
        raise PagingError("this process has died")

    Hindered.before_go.append(die)
    with pytest.raises(DcresError):
        vm.restore(world.taken)
    vm.require_nothing_left()
    require_as(world, before)


def test_an_actor_that_dies_when_the_disks_are_settled_does_not_end_the_restore(
    world: World,
) -> None:
    """What they were before is gone by then, and the VM is to be there for it."""
    vm = world.vm

    def die() -> None:
        restart_main(vm)
        raise PagingError("this process has died")

    Hindered.settled.append(die)
    vm.restore(world.taken)
    assert Hindered.settled == []
    await_checks(vm.console, 1)
    assert [disk.snapshots(each) for each in world.disks] == [[world.taken.checkpoint]] * 2


def test_a_start_after_an_interrupted_restore_says_so(world: World) -> None:
    disk.create(world.disks[0], f"dcres-before-{world.taken.checkpoint}-disk1of2")
    disk.create(world.disks[1], f"dcres-before-{world.taken.checkpoint}-disk2of2")
    with pytest.raises(ConfigError, match=r"interrupted.*qemu-img snapshot -a dcres-before-"):
        world.vm.restore(world.taken)
    disk.delete(world.disks[1], f"dcres-before-{world.taken.checkpoint}-disk2of2")
    world.vm.restore(world.taken)
    assert [disk.snapshots(each) for each in world.disks] == [[world.taken.checkpoint]] * 2


# What is no longer as at the start is in no checkpoint


def require_refused(world: World, words: str) -> None:
    vm = world.vm
    with pytest.raises(OperationFailed, match=words) as caught:
        vm.coordinator.checkpoint("live")
    assert "the VM goes on" in str(caught.value)
    assert vm.listed() == [world.taken.checkpoint]
    await_checks(vm.console, 1)


def test_a_device_that_was_plugged_in(running: World) -> None:
    vm = running.vm
    running.ask("device_add", driver="virtio-rng-pci", id="r1", bus="rp1")
    refused = r"device /machine/peripheral/r1 \(virtio-rng-pci .*\) was added since the start"
    require_refused(running, refused)
    restart_main(vm)
    require_refused(running, refused)
    # Unplugged by the guest: it is asked to, and has done it when the device is gone.
    running.ask("device_del", id="r1")
    until(lambda: not running.plugged(), 60, "the guest has given the device up")
    second = vm.checkpoint()
    vm.coordinator.stop()
    vm.restore(second)
    await_checks(vm.console, 1)
    vm.store.delete(second.checkpoint)


def test_a_device_that_comes_while_the_guest_stands_still(
    running: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is seen before the checkpoint is published."""
    real = CheckpointStop._finish

    def finish(stop: CheckpointStop, checkpoint: str) -> Any:
        running.ask("netdev_add", type="user", id="late")
        return real(stop, checkpoint)

    monkeypatch.setattr(CheckpointStop, "_finish", finish)
    require_refused(running, r"network late \(user\) was added")
    running.ask("netdev_del", id="late")
    assert [disk.snapshots(each) for each in running.disks] == [[running.taken.checkpoint]] * 2


def test_a_disk_that_writes_to_another_file(running: World, tmp_path: Path) -> None:
    running.ask(
        "blockdev-snapshot-sync",
        **{"node-name": "disk1", "snapshot-file": str(tmp_path / "overlay.qcow2")},
        **{"snapshot-node-name": "overlay"},
    )
    require_refused(running, r"block node overlay \(qcow2, .*overlay.qcow2, writable\) was added")


def test_a_medium_that_was_taken_out(running: World) -> None:
    running.ask("eject", device="cd", force=True)
    require_refused(running, r"medium of .* was of .*/cd\.iso \(raw\) at the start and is none")
    iso = str(running.disks[0].with_name("cd.iso"))
    running.ask("blockdev-change-medium", device="cd", filename=iso, format="raw")
    second = running.vm.checkpoint()
    running.vm.store.delete(second.checkpoint)


def test_a_persistent_bitmap_that_was_added(running: World) -> None:
    bitmap = {"node": "disk0", "name": "backup0"}
    running.ask("block-dirty-bitmap-add", **bitmap)
    second = running.vm.checkpoint()
    running.vm.store.delete(second.checkpoint)
    running.ask("block-dirty-bitmap-remove", **bitmap)
    running.ask("block-dirty-bitmap-add", **bitmap, persistent=True)
    require_refused(running, r"bitmaps \(disk0 backup0\).*block-dirty-bitmap-remove")
    running.ask("block-dirty-bitmap-remove", **bitmap)
    second = running.vm.checkpoint()
    running.vm.store.delete(second.checkpoint)


# Starts


def refused_start(world: World, **values: Any) -> str:
    with pytest.raises((UnsafeDevice, ConfigError)) as caught:
        world.vm.coordinator.start(small(**values))
    world.vm.require_nothing_left()
    return str(caught.value)


def test_what_qemu_could_not_save_is_refused_at_the_start(world: World) -> None:
    said = refused_start(world, extra_args=["-device", "nvme,serial=n1"])
    assert "QEMU cannot save this VM (non-migratable device: " in said
    assert "/nvme); remove what it names from the VM" in said


def test_a_relative_path_is_refused_at_the_start(world: World) -> None:
    said = refused_start(world, extra_args=["-cdrom", "seed.iso"])
    assert "seed.iso is a relative path (-cdrom seed.iso)" in said


def test_a_bitmap_is_refused_at_the_start(world: World) -> None:
    with with_a_bitmap(world):
        said = refused_start(world, disks=[{"path": str(world.disks[1])}])
    assert "b.qcow2 has persistent dirty bitmaps (backup0)" in said


def test_a_qcow2_on_a_block_device(world: World, tmp_path: Path) -> None:
    backing = tmp_path / "device"
    os.truncate(create_disk(backing), 32 << 20)
    command = ["losetup", "--find", "--show", str(backing)]
    device = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    vm = world.vm
    try:
        disks = [{"path": device}]
        vm.boot(small(disks=disks))
        second = vm.checkpoint()
        vm.coordinator.stop()
        work_on(Path(device))
        vm.restore(second)
        await_checks(vm.console, 1)
        vm.coordinator.stop()
        said = subprocess.run(
            ["qemu-io", "-r", "-c", "read -P 0 0 1M", device], capture_output=True, text=True
        )
        assert "verification failed" not in said.stdout
        assert disk.snapshots(Path(device)) == [second.checkpoint]
        vm.store.delete(second.checkpoint)
    finally:
        vm.coordinator.stop()
        subprocess.run(["losetup", "-d", device], check=True)
