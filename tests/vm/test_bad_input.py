"""What cannot be is refused with a sentence that names it, and leaves nothing behind."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dcres.actors.control.coordinator import Coordinator
from dcres.actors.ray.fleet import require_ram_here
from dcres.config import HostSettings, Layout
from dcres.errors import (
    CheckpointCorrupt,
    ConfigError,
    Conflict,
    DcresError,
    NoRoom,
    NotFound,
    OperationFailed,
    PagingError,
    QemuFailed,
    UnsafeDevice,
    UnsupportedHost,
)
from dcres.model.formats import DEFAULT_FORMAT, MemoryFormat
from dcres.storage.format.manifest import Manifest, dumps
from tests.support import sabotage
from tests.support.fleet import real_hosts
from tests.support.guest import create_disk
from tests.support.speed import patience
from tests.support.vm import Rig, await_checks, renamed, rig, spec_of

pytestmark = pytest.mark.vm


@contextmanager
def small_disk(folder: Path, size: str, more: str = "mode=755") -> Iterator[Path]:
    """A file system of its own that is soon full."""
    folder.mkdir()
    options = f"size={size},{more}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "dcres-test", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


# A start


@pytest.fixture(scope="module")
def hosts() -> Iterator[Rig]:
    with rig() as made:
        yield made


@pytest.fixture
def idle(hosts: Rig) -> Iterator[Rig]:
    """Hosts where nothing runs, before and after the test."""
    hosts.require_nothing_left()
    yield hosts
    hosts.require_nothing_left()
    assert hosts.coordinator.status()["phase"] == "absent"
    assert hosts.fleet.reserved == {}


def test_files_that_are_missing(idle: Rig, tmp_path: Path) -> None:
    for values, name in (
        ({"kernel": str(tmp_path / "vmlinuz")}, "the kernel .*/vmlinuz"),
        ({"initrd": str(tmp_path / "initrd.img")}, "the initrd .*/initrd.img"),
        ({"disks": [{"path": str(tmp_path / "none.qcow2")}]}, "the disk .*/none.qcow2"),
    ):
        with pytest.raises(ConfigError, match=f"{name} of VM vm does not exist"):
            idle.coordinator.start(spec_of(fill=8, **values))
        idle.require_nothing_left()


def test_a_disk_with_direct_io_in_the_vm_file(idle: Rig, tmp_path: Path) -> None:
    disk = {"path": str(create_disk(tmp_path / "disk.qcow2")), "cache.direct": True}
    with pytest.raises(ConfigError, match=r"disk\.qcow2 has cache\.direct=on.*remove"):
        idle.coordinator.start(spec_of(fill=8, disks=[disk]))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["-drive", "file={disk},format=qcow2,if=virtio,cache=none"], r"cache\.direct=on"),
        (["-drive", "file={disk},format=qcow2,if=virtio"], r"disk\.qcow2 may be written to and no"),
        (["-device", "virtio-balloon-pci"], "virtio-balloon"),
    ],
    ids=["cache=none", "a disk that is not saved", "balloon"],
)
def test_what_would_be_written_behind_our_back(
    idle: Rig, tmp_path: Path, arguments: list[str], match: str
) -> None:
    disk = create_disk(tmp_path / "disk.qcow2")
    given = [argument.format(disk=disk) for argument in arguments]
    with pytest.raises(UnsafeDevice, match=match):
        idle.coordinator.start(spec_of(fill=8, extra_args=given))


def test_a_qemu_that_ends_at_once_is_quoted(idle: Rig) -> None:
    with pytest.raises(QemuFailed, match=r"ended at once: .*no-such-device"):
        idle.coordinator.start(spec_of(fill=8, extra_args=["-device", "no-such-device"]))


def test_a_disk_that_is_none(idle: Rig, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(b"this is no disk")
    with pytest.raises(ConfigError, match="not in qcow2 format but raw; convert it"):
        idle.coordinator.start(spec_of(fill=8, disks=[{"path": str(path)}]))


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        ("linux 6.1", "userfaultfd lacks WP_UNPOPULATED, WP_ASYNC; dcres needs Linux 6.7 or newer"),
        ("no userfaultfd", "this kernel has no userfaultfd; boot Linux 6.7 or newer"),
    ],
)
def test_a_host_whose_kernel_cannot_do_it(
    idle: Rig, monkeypatch: pytest.MonkeyPatch, kernel: str, said: str
) -> None:
    """The pager of the main host gets the answers of such a kernel, or none."""
    monkeypatch.setenv("PYTHONPATH", str(Path(next(iter(sabotage.__path__)))))
    monkeypatch.setenv("DCRES_TEST_SABOTAGE", kernel)
    with pytest.raises(PagingError, match=f"the pager did not start; .*{said}"):
        idle.coordinator.start(spec_of(fill=8))


def test_a_sub_host_without_room(idle: Rig, tmp_path: Path) -> None:
    with small_disk(tmp_path / "ram", "32m") as ram:
        cramped = HostSettings(
            name="h2", run=idle.settings["h2"].run, ram=ram / "h2", store=idle.store.root
        )
        fleet = real_hosts({**idle.settings, "h2": cramped})
        coordinator = Coordinator("vm", fleet)
        with pytest.raises(NoRoom, match=r"/ram/h2 has 32 MiB free and this host's share is 64"):
            coordinator.start(spec_of(fill=8))
        assert fleet.reserved == {}
        assert [path for path in ram.rglob("*") if path.is_file()] == []
    idle.require_nothing_left()


def test_more_hosts_than_there_are(idle: Rig) -> None:
    with pytest.raises(NoRoom, match="wants 4 hosts"):
        idle.coordinator.start(spec_of(subs=["64MiB"] * 3, fill=8))


# A checkpoint


def test_a_full_disk(tmp_path: Path) -> None:
    """Too small for the main host's part alone, which is seen before; then for all parts."""
    with small_disk(tmp_path / "store", "32m") as store, rig(store=store) as vm:
        vm.boot(spec_of(main="96MiB", fill=64))
        for room, mode in itertools.product(("32m", "112m"), ("stop", "live")):
            subprocess.run(["mount", "-o", f"remount,size={room}", store], check=True)
            with pytest.raises(OperationFailed, match=r"room|free") as caught:
                vm.coordinator.checkpoint(mode)
            assert "the VM goes on" in str(caught.value)
            assert vm.listed() == []
            assert [path for path in store.rglob("*") if path.suffix in (".img", ".arrow")] == []
            await_checks(vm.console, 2)
        subprocess.run(["mount", "-o", "remount,size=1g", store], check=True)
        taken = [vm.coordinator.checkpoint(mode)["checkpoint"] for mode in ("stop", "live")]
        assert all(vm.store.verify(checkpoint).ok for checkpoint in taken)
        assert vm.listed() == taken
        vm.coordinator.stop()


# A restore


@pytest.fixture(scope="module")
def both(hosts: Rig) -> dict[MemoryFormat, Manifest]:
    """A checkpoint in each format of a VM that is gone."""
    hosts.boot(spec_of(main="96MiB", fill=16))
    manifests = {each: hosts.checkpoint(each) for each in MemoryFormat}
    hosts.coordinator.stop()
    return manifests


@pytest.fixture
def taken(both: dict[MemoryFormat, Manifest]) -> Manifest:
    """A checkpoint of a VM that is gone."""
    return both[DEFAULT_FORMAT]


def stamp(manifest: Manifest) -> str:
    """What files of a segmented checkpoint are called by."""
    return manifest.checkpoint.removeprefix("vm-")


def cut(path: Path) -> None:
    """Its end is missing: a page of memory, or most of a table."""
    memory = path.suffix in (".img", ".pack")
    os.truncate(path, path.stat().st_size - 4096 if memory else 100)


def flip(path: Path) -> None:
    """One bit of what is stored, wherever that is in a sparse file."""
    with path.open("r+b") as file:
        at = os.lseek(file.fileno(), 0, os.SEEK_DATA) + path.stat().st_blocks // 2 % 2048 + 64
        byte = os.pread(file.fileno(), 1, at)[0]
        os.pwrite(file.fileno(), bytes([byte ^ 4]), at)


def remove(path: Path) -> None:
    path.unlink()


# Each file of the main host's part and of a sub host's. pages.arrow is the page placement file
# of the one and the page existence file of the other.
FILES = {
    MemoryFormat.PACKED: (
        *("h0/memory.pack", "h0/index.arrow", "h0/sums.arrow", "h0/pages.arrow"),
        *("h0/history.arrow", "h0/vmcore"),
        *("h1/memory.pack", "h1/index.arrow", "h1/sums.arrow", "h1/pages.arrow"),
    ),
    # The tables are those of the packed format, but that there is no index.
    MemoryFormat.SPARSE: ("h0/memory.img", "h0/sums.arrow", "h1/memory.img", "h1/sums.arrow"),
    # These are called by their checkpoint, and there is no page existence file.
    MemoryFormat.SEGMENTED: (
        *("h0/{}.pack", "h0/{}.segment.arrow", "h0/{}.pages.arrow", "h0/{}.history.arrow"),
        *("h1/{}.pack", "h1/{}.segment.arrow"),
    ),
}
DAMAGES = [
    *((each, damage, name) for each in FILES for damage in (flip, cut) for name in FILES[each]),
    *((MemoryFormat.PACKED, remove, name) for name in ("h1/memory.pack", "h0/pages.arrow")),
]


def test_every_file_of_a_checkpoint_is_damaged_below(both: dict[MemoryFormat, Manifest]) -> None:
    for each, manifest in both.items():
        files = {name.format(stamp(manifest)) for name in FILES[each]}
        named = {
            f"h{index}/{file}"
            for index, part in enumerate(manifest.hosts[:2])
            for file in (part.memory_file, *(entry.name for entry in part.files))
        }
        assert files <= named
        alike = {f"h0/{name}" for name in ("pages.arrow", "history.arrow", "vmcore")}
        assert named - files <= {*alike, "h1/pages.arrow"}
        assert each is not MemoryFormat.PACKED or named == files


@pytest.mark.parametrize(("memory_format", "damage", "name"), DAMAGES)
def test_a_damaged_file_is_named_and_refused(
    idle: Rig,
    both: dict[MemoryFormat, Manifest],
    memory_format: MemoryFormat,
    damage: Callable[[Path], None],
    name: str,
) -> None:
    manifest = both[memory_format]
    path = idle.store.root / "vm" / manifest.checkpoint / name.format(stamp(manifest))
    kept = path.with_name("kept")
    subprocess.run(["cp", "-p", "--sparse=always", path, kept], check=True)
    try:
        damage(path)
        with pytest.raises(CheckpointCorrupt, match=str(path)):
            idle.restore(manifest)
        idle.require_nothing_left()
        assert manifest.checkpoint in idle.listed()
    finally:
        kept.replace(path)


@pytest.mark.parametrize("damage", [cut, flip])
def test_a_damaged_manifest_is_named_and_refused(
    idle: Rig, taken: Manifest, damage: Callable[[Path], None]
) -> None:
    path = idle.store.root / "vm" / taken.checkpoint / "manifest.json"
    text = path.read_bytes()
    try:
        damage(path)
        with pytest.raises(CheckpointCorrupt, match=str(path)):
            idle.store.get(taken.checkpoint)
        damaged = [each.checkpoint for each in idle.store.list("vm") if each.error is not None]
        assert damaged == [taken.checkpoint]
        with pytest.raises(CheckpointCorrupt, match=r"manifest\.json"):
            idle.coordinator.restore(path.read_text(errors="replace"))
    finally:
        path.write_bytes(text)


def test_a_checkpoint_that_does_not_exist(idle: Rig, taken: Manifest) -> None:
    wrong = taken.checkpoint[:-4] + "0000"
    with pytest.raises(
        NotFound, match=f"no checkpoint '{wrong}'.*did you mean .*{taken.checkpoint}"
    ):
        idle.store.get(wrong)
    gone = renamed(taken, wrong)
    with pytest.raises(NotFound, match=f"of checkpoint {wrong} is on no host"):
        idle.restore(gone)


@pytest.mark.parametrize("subs", [[], ["64MiB"]])
def test_a_layout_that_is_too_small(idle: Rig, taken: Manifest, subs: list[str]) -> None:
    layout = Layout.model_validate({"main": "64MiB", "subs": subs})
    with pytest.raises(ConfigError, match=f"give the hosts {128 - 64 * len(subs)} MiB more"):
        idle.restore(taken, layout=layout)


def test_two_restores_at_once(hosts: Rig, taken: Manifest) -> None:
    outcomes: list[object] = []
    ready = threading.Barrier(2)

    def restore() -> None:
        ready.wait()
        try:
            outcomes.append(hosts.restore(taken)["checkpoint"])
        except DcresError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=restore) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(patience(100))
    refused = [each for each in outcomes if isinstance(each, Conflict)]
    assert len(refused) == 1
    assert "restoring; wait" in str(refused[0]) or "runs already" in str(refused[0])
    assert taken.checkpoint in outcomes
    await_checks(hosts.console, 2)
    hosts.coordinator.stop()


def test_a_restore_of_what_runs(hosts: Rig, taken: Manifest) -> None:
    hosts.restore(taken)
    with pytest.raises(Conflict, match="runs already; stop it first"):
        hosts.restore(taken)
    await_checks(hosts.console, 2)
    hosts.coordinator.stop()


def test_a_restore_where_the_main_host_has_no_room(
    idle: Rig, taken: Manifest, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "ram", "32m") as ram:
        settings = idle.settings["h0"].model_copy(update={"ram": ram / "h0"})
        fleet = real_hosts({**idle.settings, "h0": settings})
        with pytest.raises(NoRoom, match="/ram/h0 has 32 MiB free"):
            Coordinator("vm", fleet).restore(dumps(taken))
        assert fleet.reserved == {}


@pytest.mark.parametrize(
    ("host", "huge"), [("h0", "always"), ("h1", "within_size"), ("h2", "advise")]
)
def test_a_host_whose_memory_would_be_in_huge_pages(
    idle: Rig,
    taken: Manifest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    host: str,
    huge: str,
) -> None:
    """By a start, by a restore, and before another host is asked to join a VM."""
    with small_disk(tmp_path / "ram", "512m", f"huge={huge}") as ram:
        settings = idle.settings[host].model_copy(update={"ram": ram / host})
        fleet = real_hosts({**idle.settings, host: settings})
        coordinator = Coordinator("vm", fleet)
        refused = rf"tmpfs at {ram} of host {host} .*huge={huge}.*remount,huge=never {ram}"
        begins: list[Callable[[], object]] = [
            lambda: coordinator.start(spec_of(fill=8)),
            lambda: coordinator.restore(dumps(taken)),
        ]
        for begin in begins:
            with pytest.raises(UnsupportedHost, match=refused):
                begin()
            assert fleet.reserved == {}
            idle.require_nothing_left()
        for name, value in settings.environ().items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UnsupportedHost, match=refused):
            require_ram_here(1 << 20)
        assert [path for path in ram.rglob("*") if path.is_file()] == []


def test_a_store_that_lost_a_host(idle: Rig, taken: Manifest) -> None:
    folder = idle.store.root / "vm" / taken.checkpoint / "h1"
    aside = idle.store.root / "aside"
    shutil.move(folder, aside)
    try:
        with pytest.raises(NotFound, match=r"the part that h1 saved .* is on no host"):
            idle.restore(taken)
    finally:
        shutil.move(aside, folder)
