"""The witness in a real guest: it works, it notices damage, and it goes on after a restore."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from dcres.errors import MonitorError
from dcres.model.pages import PAGE_SIZE
from dcres.model.run_state import RunState
from dcres.vm.command import VmFiles
from tests.support.guest import Guest, create_disk, folders, guest, witness_spec
from tests.support.speed import patience
from tests.support.wait import until

pytestmark = pytest.mark.vm


@pytest.fixture
def files() -> Iterator[VmFiles]:
    with folders() as made:
        yield made


def witness_pages(ram: Path) -> dict[int, list[int]]:
    """Witness file → page numbers of guest RAM that hold lines of it."""
    found: dict[int, list[int]] = {}
    with ram.open("rb") as file:
        for number in range(ram.stat().st_size // PAGE_SIZE):
            page = os.pread(file.fileno(), PAGE_SIZE, number * PAGE_SIZE)
            names = re.findall(rb"WITNESS file=(\d+) generation=\d+ ", page)
            if len(names) > 2:
                found.setdefault(int(names[0]), []).append(number)
    return found


@pytest.fixture(scope="module")
def filled() -> Iterator[Guest]:
    """One guest for those that look at its memory, and for those that spoil it."""
    with folders() as files, guest(witness_spec(), files) as vm:
        vm.monitor.cont()
        yield vm


def test_it_fills_checks_and_rewrites(filled: Guest) -> None:
    filled.await_checks(40)
    filled.monitor.stop()
    report = filled.report()
    assert report.ready_bytes == 16 << 20
    assert (report.failures, report.ticks_lost, report.boots) == (0, 0, 1)
    assert report.tick < report.checks
    pages = witness_pages(filled.qemu.files.ram)
    filled.monitor.cont()
    assert sorted(pages) == list(range(16))
    assert all(len(numbers) >= 256 for numbers in pages.values())


def test_idle(files: VmFiles) -> None:
    with guest(witness_spec(fill_mib="off"), files) as vm:
        vm.monitor.cont()
        until(lambda: vm.report().tick >= 3, 60, "the guest counts")
        assert vm.report().ready_bytes == 0


def damage(vm: Guest, how: str) -> None:
    """In every file of the witness, spoil one page."""
    fd = os.open(vm.qemu.files.ram, os.O_RDWR)
    try:
        for numbers in witness_pages(vm.qemu.files.ram).values():
            page, other = numbers[100], numbers[101]
            content = bytes(PAGE_SIZE)
            if how == "another place":
                content = os.pread(fd, PAGE_SIZE, other * PAGE_SIZE)
            os.pwrite(fd, content, page * PAGE_SIZE)
    finally:
        os.close(fd)


@pytest.mark.parametrize("how", ["zeros", "another place"])
def test_one_damaged_page_is_noticed(filled: Guest, how: str) -> None:
    """Once every file was written anew, no failure of an earlier damage can come any more."""
    filled.await_checks(40)
    filled.monitor.stop()
    before = filled.report().failures
    damage(filled, how)
    filled.monitor.cont()
    until(lambda: filled.report().failures > before, 60, "the witness noticed")
    said = filled.report().failed[before]
    assert re.match(r"file=\d+ generation=\d+ expected=\w+ got=\w+", said)


def test_three_checkpoints_and_the_middle_one_restored(files: VmFiles, tmp_path: Path) -> None:
    disk = create_disk(tmp_path / "disk.qcow2")
    spec = witness_spec(disks=[{"path": disk}])
    ticks = []
    with guest(spec, files) as vm:
        vm.monitor.cont()
        for number in range(3):
            vm.await_checks(5)
            vm.monitor.stop()
            vm.monitor.snapshot_disks(["disk0"], f"c{number}")
            core_bytes = vm.monitor.save_core(tmp_path / f"core{number}")
            assert vm.monitor.status() is RunState.POSTMIGRATE
            assert 10_000 < core_bytes < 8 << 20
            shutil.copyfile(files.ram, tmp_path / f"ram{number}")
            ticks.append(vm.report().tick)
            vm.monitor.cont()
        vm.monitor.delete_snapshots(["disk0"], "c0")
        vm.monitor.delete_snapshots(["disk0"], "c0")
    assert (tmp_path / "core1").stat().st_mode & 0o777 == 0o600
    listing = subprocess.run(
        ["qemu-img", "snapshot", "-l", disk], capture_output=True, text=True, check=True
    ).stdout
    assert [f"c{n}" in listing for n in range(3)] == [False, True, True]
    subprocess.run(["qemu-img", "snapshot", "-a", "c1", disk], check=True)
    shutil.copyfile(tmp_path / "ram1", files.ram)
    files.console.unlink()
    with guest(spec, files, incoming=True) as vm:
        assert vm.monitor.status() is RunState.INMIGRATE
        vm.monitor.load_core(tmp_path / "core1")
        assert vm.monitor.status() is RunState.PAUSED
        vm.monitor.cont()
        until(lambda: vm.report().tick >= ticks[1] + 20, 60, "the restored guest goes on")
        report = vm.report()
    assert (report.failures, report.boots, report.ticks_lost) == (0, 0, 0)


def test_a_core_of_a_running_vm_is_refused(files: VmFiles, tmp_path: Path) -> None:
    with guest(witness_spec(fill_mib="off"), files) as vm:
        vm.monitor.cont()
        with pytest.raises(MonitorError, match="stop it before"):
            vm.monitor.save_core(tmp_path / "core")


def test_ram_in_the_core_is_noticed(files: VmFiles, tmp_path: Path) -> None:
    spec = witness_spec(
        fill_mib="off",
        extra_args=[
            *("-object", "memory-backend-ram,id=private,size=131072K"),
            *("-machine", "memory-backend=private"),
        ],
    )
    with guest(spec, files) as vm:
        vm.monitor.cont()
        vm.monitor.stop()
        with pytest.raises(MonitorError, match="includes guest RAM"):
            vm.monitor.save_core(tmp_path / "core")


def test_a_damaged_core_is_refused(files: VmFiles, tmp_path: Path) -> None:
    core = tmp_path / "core"
    core.write_bytes(b"no core at all")
    with (
        guest(witness_spec(), files, incoming=True) as vm,
        pytest.raises(MonitorError, match=r"VM core|connection to"),
    ):
        vm.monitor.load_core(core, timeout_s=patience(10))
