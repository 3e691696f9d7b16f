"""What is in a checkpoint, against readings of the guest's memory that share no code with it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from dcres.actors.control.restoring import spec_for
from dcres.actors.host.agent import HostAgent
from dcres.actors.host.page_loader import make_plan
from dcres.actors.host.roles import MainRole
from dcres.actors.messages import (
    ClaimOrder,
    Incarnation,
    LoadOrder,
    PlanOrder,
    Reading,
    Resumption,
    Role,
    RunOrder,
)
from dcres.config import Layout
from dcres.errors import CheckpointCorrupt, Conflict, OperationFailed, PagingError
from dcres.model.formats import MemoryFormat
from dcres.storage.format.manifest import Manifest, dumps
from dcres.vm import disk
from tests.support.guest import create_disk
from tests.support.speed import patience
from tests.support.vm import (
    PAGE_BYTES,
    PlainMemory,
    Rig,
    await_checks,
    keeps_checking,
    renamed,
    rig,
    spec_of,
    total_bytes,
)
from tests.support.wait import until
from tests.support.watched import (
    Watched,
    ask,
    require_same,
    require_tables_agree,
    saved_memory,
    watched,
)

pytestmark = pytest.mark.vm

DISK = "/machine/peripheral/virtio-disk0/virtio-backend"
LEGACY = range(0xA0, 0x100)  # pages that QEMU shows as something else than RAM (PC firmware)


@contextmanager
def loaded_on_one_host(rig: Rig, manifest: Manifest) -> Iterator[MainRole]:
    """An ordinary VM with everything in memory that has not run since the checkpoint."""
    spec = spec_for(manifest, Layout(main=manifest.memory_bytes))
    host = HostAgent("vm", Role.MAIN, environ=rig.settings["h0"].environ()).composed
    assert isinstance(host, MainRole)
    incarnation = Incarnation("vm", host.machine.claim(ClaimOrder("test")), "5e" * 32)
    everything = PlanOrder(
        dumps(manifest), (manifest.page_count,), ((True,),) * len(manifest.hosts), masks=True
    )
    planned = make_plan(rig.store, everything)
    load = LoadOrder(
        dumps(manifest),
        tuple(
            Reading(manifest.hosts[part].host, pages) for (part, _), pages in planned.masks.items()
        ),
    )
    resumption = Resumption(dumps(manifest), planned.targets, None, {})
    try:
        order = RunOrder(incarnation, spec, ("h0",), (), load, resumption)
        host.machine.boot(order)
        host.machine.run(order)
        yield host
    finally:
        host.presence.destroy()


def physical(page: int, page_count: int) -> int:
    """The guest physical address of a page: q35 puts what exceeds 2 GiB above 4 GiB.

    (hw/i386/pc_q35.c: with at least 2.75 GiB of memory, 2 GiB of it lie below the PCI hole.)
    """
    address = page * PAGE_BYTES
    below = 2 << 30 if page_count * PAGE_BYTES >= 0xB0000000 else 0xB0000000
    return address if address < below else address - below + (4 << 30)


def runs(pages: list[int], page_count: int) -> Iterator[tuple[int, int]]:
    """Ascending page numbers as (first, stop) without gaps, in physical addresses too."""
    first = previous = pages[0]
    for number in pages[1:]:
        beside = physical(number, page_count) - physical(previous, page_count)
        if beside != PAGE_BYTES:
            yield first, previous + 1
            first = number
        previous = number
    yield first, previous + 1


def require_in_qemu(host: MainRole, memory: PlainMemory, folder: Path) -> int:
    """QEMU's mapping, and what it reads at guest physical addresses, hold `memory`."""
    qemu = host.qemu.process
    pid = qemu.process.pid
    base = _mapping(pid, qemu.files.ram)
    page_count = memory.length_bytes // PAGE_BYTES
    compared = 0
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as mapped:
        for first, stop in runs(sorted(memory.pages), page_count):
            mapped.seek(base + first * PAGE_BYTES)
            data = mapped.read((stop - first) * PAGE_BYTES)
            path = folder / "physical"
            address, length = physical(first, page_count), len(data)
            ask(host.qemu, "pmemsave", val=address, size=length, filename=str(path))
            seen = path.read_bytes()
            for number in range(first, stop):
                at = (number - first) * PAGE_BYTES
                page = memory.at(number)
                assert data[at : at + PAGE_BYTES] == page, f"page {number} in QEMU's mapping"
                if number not in LEGACY:
                    assert seen[at : at + PAGE_BYTES] == page, f"page {number} for the guest"
                compared += 1
    return compared


def _mapping(pid: int, ram: Path) -> int:
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if line.endswith(f" {ram}"):
            return int(line.split("-")[0], 16)
    raise AssertionError(f"QEMU does not map {ram}")


def require_refused_when_late(vm: Rig, checkpoint: str) -> None:
    """Orders of a checkpoint that is over, delivered now, do nothing to the VM."""
    main = vm.main()
    with pytest.raises(Conflict, match="too late"):
        main.machine.finish(checkpoint)
    main.saving.halt("vm-20260101-000000-0000")
    with pytest.raises(Conflict, match="cancelled"):
        main.saving.prepare("vm-20260101-000000-0000", MemoryFormat.PACKED)
    late = renamed(vm.store.get(checkpoint), "vm-20260101-000000-0000")
    with pytest.raises(Conflict, match="cancelled"):
        main.machine.publish(dumps(late), ("h0", "h1", "h2"))
    assert vm.coordinator.status()["hosts"][0]["run_state"] == "running"
    await_checks(vm.console)


def test_the_union_of_the_memory_files_is_the_guests_memory(tmp_path: Path) -> None:
    with watched() as vm:
        vm.boot(spec_of(main="64MiB", subs=["72MiB", "72MiB"], fill=72), checks=3)
        manifests = []
        for memory_format in MemoryFormat:
            manifests.append(vm.checkpoint(memory_format))
            await_checks(vm.console, 2)
        manifests.append(vm.checkpoint(full=False))
        assert manifests[-1].base == manifests[-2].checkpoint
        require_refused_when_late(vm, manifests[0].checkpoint)
        vm.coordinator.stop()
        for manifest, seen in zip(manifests, Watched.seen, strict=True):
            saved = saved_memory(vm, manifest)
            require_same(saved, seen, moved=manifest.base is not None)
            require_tables_agree(vm, manifest, saved)
            assert manifest.pages_moved_for_checkpoint == 0
            assert min(part.pages for part in manifest.hosts) > 1000
            assert vm.store.verify(manifest.checkpoint).ok
        assert 0 < manifests[-1].pages_saved == manifests[-1].pages_changed < manifests[-1].pages
        with loaded_on_one_host(vm, manifests[-1]) as host:
            compared = require_in_qemu(host, Watched.seen[-1], tmp_path)
        print(f"{compared} pages compared: plain reading, memory files, QEMU, guest physical")
        assert compared == manifests[-1].pages


def test_more_than_4_gib_of_mostly_untouched_memory(tmp_path: Path) -> None:
    spec = spec_of(memory="5GiB", main="128MiB", subs=["2500MiB", "2500MiB"], fill=48)
    with watched() as vm:
        vm.boot(spec)
        began = time.monotonic()
        manifest = vm.checkpoint()
        seconds = time.monotonic() - began
        saved, seen = saved_memory(vm, manifest), Watched.seen[0]
        require_same(saved, seen)
        require_tables_agree(vm, manifest, saved)
        above = [number for number in saved.pages if number * PAGE_BYTES >= 4 << 30]
        assert len(above) > 100  # the kernel keeps its own tables at the top of memory
        assert manifest.pages * PAGE_BYTES < 1 << 30
        vm.coordinator.stop()
        with loaded_on_one_host(vm, manifest) as host:
            assert require_in_qemu(host, seen, tmp_path) == manifest.pages
        vm.restore(manifest)
        await_checks(vm.console, 3)
        print(
            f"{manifest.pages} pages of 5 GiB, {len(above)} above 4 GiB; saved in {seconds:.1f} s"
        )


def keeps_a_quarter(vm: Rig) -> bool:
    held: int = vm.coordinator.status()["hosts"][0]["pages"][0]
    return held <= total_bytes("48MiB") // PAGE_BYTES


def moved_in(vm: Rig, seconds: float) -> dict[str, int]:
    """How many pages come and go while the guest checks its memory for so long."""
    before = vm.coordinator.status()["hosts"][0]
    report = keeps_checking(vm.console, seconds)
    after = vm.coordinator.status()["hosts"][0]
    until(lambda: keeps_a_quarter(vm), 30, "the main host has no more than its share")
    return {
        "checks": report.checks,
        **{key: after[key] - before[key] for key in ("pages_in", "pages_out")},
    }


@pytest.mark.slow
@pytest.mark.timeout(patience(600))
def test_a_guest_with_a_quarter_of_its_memory_here_passes_its_own_checks() -> None:
    """For two minutes without a break; a short one of the guest's after each of its checks."""
    times, seconds = 12, 10
    spec = spec_of(memory="192MiB", main="48MiB", subs=["80MiB", "80MiB"], fill=80)
    with rig() as vm:
        vm.boot(spec)
        moved = [moved_in(vm, seconds) for _ in range(times)]
        while min(sum(each[way] for each in moved) for way in ("pages_in", "pages_out")) < 12_000:
            moved.append(moved_in(vm, seconds))  # a slow machine needs longer for as much
        manifest = vm.checkpoint()
        vm.coordinator.stop()
        vm.restore(manifest)
        again = keeps_checking(vm.console, seconds)
        print(f"{times * seconds} s: {moved}; after the restore: {again}")


def write_disk(vm: Rig, pattern: str) -> None:
    """Fill the beginning of the guest's disk, as the guest would, through QEMU."""
    with vm.main().qemu.monitor() as monitor:
        line = f'qemu-io -d {DISK} "write -P {pattern} 0 256k"'
        said = monitor.execute("human-monitor-command", {"command-line": line})
    assert said == "", said


def read_disk(vm: Rig, pattern: str) -> None:
    """Have QEMU read it; a difference is told in its log, at the latest when it ends."""
    with vm.main().qemu.monitor() as monitor:
        line = f'qemu-io -d {DISK} "read -P {pattern} 0 256k"'
        assert monitor.execute("human-monitor-command", {"command-line": line}) == ""


def require_on_disk(path: Path, pattern: str) -> None:
    command = f"read -P {pattern} 0 256k"
    done = subprocess.run(["qemu-io", "-r", "-U", "-c", command, path], capture_output=True)
    assert done.returncode == 0, done
    assert b"verification failed" not in done.stdout, done.stdout


@dataclass(frozen=True)
class WithDisk:
    """A VM with a disk, and a checkpoint from when the disk began with 0x41."""

    vm: Rig
    path: Path
    first: Manifest


@pytest.fixture(scope="module")
def disk_rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WithDisk]:
    path = create_disk(tmp_path_factory.mktemp("disk") / "disk.qcow2")
    with rig() as vm:
        vm.boot(spec_of(fill=8, disks=[{"path": str(path)}]))
        write_disk(vm, "0x41")
        first = vm.checkpoint()
        assert [each.snapshot for each in first.disks] == [first.checkpoint]
        assert disk.snapshots(path) == [first.checkpoint]
        yield WithDisk(vm, path, first)


@pytest.fixture
def restored(disk_rig: WithDisk) -> Iterator[WithDisk]:
    """The VM as it was when its first checkpoint was taken; the only one there is."""
    disk_rig.vm.coordinator.stop()
    disk_rig.vm.restore(disk_rig.first)
    yield disk_rig
    for each in disk_rig.vm.store.list():
        if each.checkpoint != disk_rig.first.checkpoint:
            disk_rig.vm.store.delete(each.checkpoint)


def test_a_restore_takes_the_disk_back(restored: WithDisk) -> None:
    vm, path, first = restored.vm, restored.path, restored.first
    write_disk(vm, "0x42")
    second = vm.checkpoint()
    write_disk(vm, "0x43")
    assert disk.snapshots(path) == [first.checkpoint, second.checkpoint]
    for manifest, pattern in ((first, "0x41"), (second, "0x42"), (first, "0x41")):
        vm.coordinator.stop()
        vm.restore(manifest)
        read_disk(vm, pattern)
        await_checks(vm.console, 2)
        write_disk(vm, "0x44")  # with the reverted disk's tables, or the disk is damaged
        vm.coordinator.stop()
        assert subprocess.run(["qemu-img", "check", "-q", path]).returncode == 0
        require_on_disk(path, "0x44")
    log = vm.settings["h0"].run / "vm" / "qemu.log"
    assert "verification failed" not in log.read_text()
    vm.restore(first)
    read_disk(vm, "0x42")
    vm.coordinator.stop()
    assert "verification failed" in log.read_text()
    assert disk.snapshots(path) == [first.checkpoint, second.checkpoint]
    disk.delete(path, second.checkpoint)


def test_a_refused_restore_leaves_the_disk_alone(restored: WithDisk) -> None:
    vm, first = restored.vm, restored.first
    write_disk(vm, "0x45")
    vm.coordinator.stop()
    memory = vm.store.root / "vm" / first.checkpoint / "h0" / first.main.memory_file
    length_bytes = memory.stat().st_size
    os.truncate(memory, length_bytes + PAGE_BYTES)
    with pytest.raises(CheckpointCorrupt, match=memory.name):
        vm.restore(first)
    vm.require_nothing_left()
    require_on_disk(restored.path, "0x45")
    os.truncate(memory, length_bytes)


def test_a_published_checkpoint_keeps_its_disk_snapshot_when_it_is_given_up(
    restored: WithDisk,
) -> None:
    """As after an actor that published, died, and could not say so."""
    restored.vm.main().saving.abandon(restored.first.checkpoint)
    assert disk.snapshots(restored.path) == [restored.first.checkpoint]
    assert restored.vm.store.verify(restored.first.checkpoint).ok


@pytest.mark.parametrize("qemu_dies", [False, True])
def test_a_failed_checkpoint_leaves_no_disk_snapshot(restored: WithDisk, qemu_dies: bool) -> None:
    vm, first = restored.vm, restored.first
    saving = vm.sub().saving
    pid = vm.coordinator.status()["hosts"][0]["qemu_pid"]

    def fail(*_: object) -> None:
        if qemu_dies:
            os.kill(pid, signal.SIGKILL)
        raise PagingError("the disk of h1 has burnt")

    saving.save = fail  # type: ignore[method-assign,assignment]
    with pytest.raises(OperationFailed, match="burnt"):
        vm.coordinator.checkpoint("stop")
    assert vm.listed() == [first.checkpoint]
    assert disk.snapshots(restored.path) == [first.checkpoint]
    assert [path.name for path in (vm.store.root / "vm").iterdir() if path.is_dir()] == vm.listed()
    if qemu_dies:
        assert vm.coordinator.status()["phase"] == "lost"
        vm.restore(first)
    await_checks(vm.console, 2)
