"""QCOW2 files, read and changed by qemu-img: what is refused, and restores that can be undone."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import repeat
from pathlib import Path

import pytest

from dcres.actors.host.agent import HostAgent
from dcres.actors.host.disks import put_disks_back
from dcres.actors.host.state import BegunRevert, write_json
from dcres.actors.host.vm_folder import VmFolder, marker
from dcres.actors.messages import Role
from dcres.config import HostSettings
from dcres.errors import CheckpointCorrupt, ConfigError, MonitorError
from dcres.linux.machine import boot_id
from dcres.linux.process import ProcessId
from dcres.vm import disk
from dcres.vm.command import VmFiles
from dcres.vm.disk import Image, require_usable
from dcres.vm.process import QemuProcess
from dcres.vm.reverting import Reverting, require_settled
from tests.support.disks import in_use, same, sound
from tests.support.guest import create_disk

pytestmark = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="needs qemu-img")
CHECKPOINT = "box-20260301-130000-0000"


def qemu_img(*arguments: str | Path) -> None:
    subprocess.run(["qemu-img", *arguments], check=True, capture_output=True)


def write(path: Path, pattern: int) -> None:
    """Fill the disk's first 256 KiB."""
    command = ["qemu-io", "-c", f"write -q -P {pattern} 0 256k", str(path)]
    subprocess.run(command, check=True, capture_output=True)


# What a start and a restore refuse


def test_ordinary_disks_are_usable(tmp_path: Path) -> None:
    """Among them what looks as if it might do harm, and was tried not to."""
    base = create_disk(tmp_path / "base.qcow2")
    kinds = ("extended_l2=on", "compat=0.10", "lazy_refcounts=on", "compression_type=zstd")
    paths = []
    for number, kind in enumerate(kinds):
        paths.append(tmp_path / f"{number}.qcow2")
        qemu_img("create", "-f", "qcow2", "-o", kind, paths[-1], "16M")
    paths.append(tmp_path / "overlay.qcow2")
    qemu_img("create", "-f", "qcow2", "-b", base, "-F", "qcow2", paths[-1])
    assert [image.path for image in require_usable(paths)] == paths
    for path in paths:
        write(path, 1)
        disk.create(path, "one")
        write(path, 2)
        kept = tmp_path / "kept"
        shutil.copy(path, kept)
        reverting = Reverting(CHECKPOINT, (path,))
        reverting.do("one")
        assert not same(path, kept)
        reverting.undo()
        assert same(path, kept)
        assert sound(path)


def mark_corrupt(path: Path) -> None:
    """Set that bit of the header's incompatible features (QEMU's docs/interop/qcow2.txt)."""
    with path.open("r+b") as file:
        file.seek(79)
        file.write(b"\x02")


def encrypted(path: Path) -> None:
    """With the old format: luks measures how fast the processor is, and takes seconds for it."""
    path.unlink()
    secret = ["--object", "secret,id=s,data=abc", "-o", "encrypt.format=aes,encrypt.key-secret=s"]
    qemu_img("create", "-f", "qcow2", *secret, path, "16M")


def with_option(option: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        qemu_img("create", "-f", "qcow2", "-o", option.format(folder=path.parent), path, "16M")

    return make


def with_content(content: bytes) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.write_bytes(content)

    return make


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "bitmap": (
        lambda path: qemu_img("bitmap", "--add", path, "backup0"),
        r"persistent dirty bitmaps \(backup0\).*remove them with qemu-img bitmap --remove",
    ),
    "data file": (with_option("data_file={folder}/data.raw"), r"another file .*data\.raw"),
    "refcounts": (with_option("refcount_bits=1"), "refcounts of 1 bits, too few for snapshots"),
    "encrypted": (encrypted, "is encrypted, and dcres has no key"),
    "corrupt": (mark_corrupt, "is marked as corrupt; repair it with qemu-img check"),
    "raw": (with_content(bytes(4096)), "not in qcow2 format but raw"),
    "damaged": (with_content(b"QFI\xfb\0\0\0\x03" + bytes(500)), "cannot be read"),
    "missing": (lambda path: path.unlink(), "does not exist"),
    "folder": (folder_instead, "neither a file nor a device"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_could_not_be_gone_back_to_is_refused(tmp_path: Path, name: str) -> None:
    good, path = create_disk(tmp_path / "good.qcow2"), create_disk(tmp_path / "d.qcow2")
    damage, words = REFUSED[name]
    damage(path)
    with pytest.raises(ConfigError, match=rf"d\.qcow2 .*{words}"):
        require_usable([good, path])


def test_every_problem_of_every_disk_is_told(tmp_path: Path) -> None:
    paths = [create_disk(tmp_path / name) for name in ("a.qcow2", "b.qcow2")]
    for path in paths:
        qemu_img("bitmap", "--add", path, "backup0")
    with pytest.raises(ConfigError, match=r"a\.qcow2 has persistent.*; disk .*b\.qcow2 has pers"):
        require_usable(paths)


def test_a_disk_in_use_named_twice_or_read_only(tmp_path: Path) -> None:
    path = create_disk(tmp_path / "a.qcow2")
    (tmp_path / "b.qcow2").symlink_to(path)
    with pytest.raises(ConfigError, match=r"b\.qcow2 is named twice"):
        require_usable([path, tmp_path / "b.qcow2"])
    with in_use(path), pytest.raises(ConfigError, match=r"a\.qcow2 is in use by another process"):
        require_usable([path])
    require_usable([path])


def test_a_snapshot_that_is_not_there_or_twice(tmp_path: Path) -> None:
    path = create_disk(tmp_path / "a.qcow2")
    with pytest.raises(CheckpointCorrupt, match="has no snapshot one; it was replaced"):
        Image.of(path).require_snapshot("one")
    disk.create(path, "one")
    Image.of(path).require_snapshot("one")
    disk.create(path, "one")
    with pytest.raises(CheckpointCorrupt, match="has 2 snapshots one; delete those"):
        Image.of(path).require_snapshot("one")


# Going back to a checkpoint, and undoing that


class Disks:
    """Two disks with a checkpoint of when they held 0x11, and later work in them (0x22)."""

    def __init__(self, folder: Path) -> None:
        self.paths = tuple(create_disk(folder / name) for name in ("a.qcow2", "b.qcow2"))
        for path in self.paths:
            write(path, 0x11)
            disk.create(path, CHECKPOINT)
        self.then = self._copies(folder / "then")
        for path in self.paths:
            write(path, 0x22)
        qemu_img("resize", self.paths[1], "24M")  # and goes back to 16M
        self.before = self._copies(folder / "before")
        self.reverting = Reverting(CHECKPOINT, self.paths)

    def _copies(self, folder: Path) -> list[Path]:
        folder.mkdir()
        return [Path(shutil.copy(path, folder)) for path in self.paths]

    def are(self, others: list[Path]) -> bool:
        return all(same(*pair) and sound(pair[0]) for pair in zip(self.paths, others, strict=True))

    def require_as_before(self) -> None:
        """In every byte that a guest can read, and with no snapshot more."""
        assert self.are(self.before)
        assert [disk.snapshots(path) for path in self.paths] == [[CHECKPOINT]] * 2


@pytest.fixture
def disks(tmp_path: Path) -> Disks:
    return Disks(tmp_path)


def test_disks_go_back_and_back_again(disks: Disks) -> None:
    disks.reverting.do(CHECKPOINT)
    assert disks.are(disks.then)
    disks.reverting.undo()
    disks.require_as_before()
    disks.reverting.undo()  # as by an actor that was started again
    disks.require_as_before()


def test_disks_that_the_guest_runs_on_stay(disks: Disks) -> None:
    disks.reverting.do(CHECKPOINT)
    assert disks.reverting.settle(lambda at, name: disk.delete(disks.paths[at], name)) == []
    disks.reverting.undo()
    assert disks.are(disks.then)
    assert [disk.snapshots(path) for path in disks.paths] == [[CHECKPOINT]] * 2


@pytest.mark.parametrize("failing", [0, 1])
def test_the_first_kept_state_decides(disks: Disks, failing: int) -> None:
    def drop(at: int, name: str) -> None:
        if at == failing:
            raise MonitorError("no answer")
        disk.delete(disks.paths[at], name)

    disks.reverting.do(CHECKPOINT)
    if failing == 0:
        with pytest.raises(MonitorError, match="no answer"):
            disks.reverting.settle(drop)
        disks.reverting.undo()
        disks.require_as_before()
        return
    assert disks.reverting.settle(drop) == ["no answer"]
    require_settled(require_usable(disks.paths))
    assert disks.are(disks.then)
    assert [disk.snapshots(path) for path in disks.paths] == [[CHECKPOINT]] * 2


@pytest.mark.parametrize("locked", [0, 1])
def test_a_disk_that_is_in_use_keeps_all_as_they_are(disks: Disks, locked: int) -> None:
    with in_use(disks.paths[locked]):
        with pytest.raises(ConfigError, match=r"\.qcow2 takes no snapshot: .*lock"):
            disks.reverting.do(CHECKPOINT)
        disks.reverting.undo()
    disks.require_as_before()


def test_a_disk_without_the_snapshot_keeps_all_as_they_are(disks: Disks) -> None:
    disk.delete(disks.paths[1], CHECKPOINT)
    with pytest.raises(ConfigError, match=r"b\.qcow2 cannot be reverted to"):
        disks.reverting.do(CHECKPOINT)
    disks.reverting.undo()
    assert disks.are(disks.before)
    assert [disk.snapshots(path) for path in disks.paths] == [[CHECKPOINT], []]


@pytest.mark.parametrize("done", range(4))
def test_a_restore_that_was_killed_in_the_middle(disks: Disks, done: int) -> None:
    """After each of the four calls of qemu-img: whoever comes next puts the disks back."""
    steps = [
        *map(partial, repeat(disk.create), disks.paths, disks.reverting.kept),
        *(partial(disk.revert, path, CHECKPOINT) for path in disks.paths),
    ]
    for step in steps[: done + 1]:
        step()
    again = Reverting.from_dict(disks.reverting.to_dict())
    again.undo()
    disks.require_as_before()


@pytest.mark.parametrize("dropped", [[0], [1], []])
def test_a_start_that_finds_an_interrupted_restore(disks: Disks, dropped: list[int]) -> None:
    """It may be long ago, so nothing is taken back; who has lost some is where it belongs."""
    disks.reverting.do(CHECKPOINT)
    for at in dropped:
        disk.delete(disks.paths[at], disks.reverting.kept[at])
    if dropped:
        require_settled(require_usable(disks.paths))
        assert disks.are(disks.then)
        assert [disk.snapshots(path) for path in disks.paths] == [[CHECKPOINT]] * 2
        return
    with pytest.raises(
        ConfigError, match="a restore was interrupted; to take every disk"
    ) as caught:
        require_settled(require_usable(disks.paths))
    assert disks.are(disks.then)
    commands = str(caught.value).partition(", run: ")[2].partition("; then delete")[0].split("; ")
    assert len(commands) == 2
    for command in commands:
        subprocess.run(command.split(), check=True)
    assert disks.are(disks.before)


def test_one_of_two_disks_says_nothing_about_the_other(disks: Disks) -> None:
    disks.reverting.do(CHECKPOINT)
    with pytest.raises(ConfigError, match=rf"snapshot -a {disks.reverting.kept[1]} .*b\.qcow2"):
        require_settled(require_usable(disks.paths[1:]))
    disks.reverting.undo()
    disks.require_as_before()


def test_qemu_img_killed_while_it_reverts(disks: Disks) -> None:
    """At moments that nobody chose: whatever it left, the kept states are whole."""
    for delay_ms in range(0, 30, 3):
        disks.reverting.do(CHECKPOINT)
        command = ["qemu-img", "snapshot", "-a", disks.reverting.kept[0], str(disks.paths[0])]
        with subprocess.Popen(command) as process, suppress(subprocess.TimeoutExpired):
            try:
                process.wait(delay_ms / 1000)
            finally:
                process.kill()
        disks.reverting.undo()
        assert all(map(same, disks.paths, disks.before))


@pytest.fixture
def settings(tmp_path: Path) -> HostSettings:
    run, ram, store = (tmp_path / name for name in ("run", "ram", "store"))
    return HostSettings(name="h0", run=run, ram=ram, store=store)


def clear(settings: HostSettings, role: Role) -> None:
    HostAgent("vm", role, environ=settings.environ()).composed.presence.clear()


@pytest.mark.parametrize("role", [Role.MAIN, Role.SUB])
@pytest.mark.parametrize("there", [True, False], ids=["qemu is there", "qemu is gone"])
def test_a_start_puts_disks_back_only_if_nobody_can_have_used_them_since(
    disks: Disks, settings: HostSettings, role: Role, there: bool
) -> None:
    """A power failure in a restore: the folder for sockets and records may outlive it for long."""
    disks.reverting.do(CHECKPOINT)
    folder = VmFolder.of(settings, "vm")
    folder.make()
    with subprocess.Popen(["sleep", "600"], env={**os.environ, **marker(folder)}) as qemu:
        process = ProcessId.of(qemu.pid)
        assert process is not None
        files = VmFiles(*(folder.run / name for name in ("ram", "qmp.sock", "console", "log")))
        state = {"reverting": BegunRevert(disks.reverting, boot_id()).to_dict()}
        write_json(folder.state, {**state, "qemu": QemuProcess(process, files).to_dict()})
        if not there:
            process.end()
            for path in disks.paths:
                write(path, 9)  # by another QEMU
        before = [shutil.copy(path, path.with_suffix(".was")) for path in disks.paths]
        clear(settings, role)
        assert qemu.wait(10) < 0
    if there:
        disks.require_as_before()
        return
    assert all(map(same, disks.paths, map(Path, before)))
    with pytest.raises(ConfigError, match="interrupted"):
        require_settled([Image.of(path) for path in disks.paths])


def test_an_end_leaves_disks_of_before_the_machine_was_started_again(
    disks: Disks, settings: HostSettings
) -> None:
    disks.reverting.do(CHECKPOINT)
    folder = VmFolder.of(settings, "vm")
    folder.make()
    for boot, others in (("an earlier one", disks.then), (None, disks.before)):
        state = {"reverting": BegunRevert(disks.reverting, boot or boot_id()).to_dict()}
        write_json(folder.state, state)
        clear(settings, Role.SUB)
        assert disks.are(disks.then), "no QEMU is there"
        write_json(folder.state, state)
        put_disks_back(folder)
        assert disks.are(others)
