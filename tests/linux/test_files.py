"""Sparse and direct files on real file systems, and disks that are full."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dcres.errors import HostError, NoRoom, StoreFull
from dcres.linux import files
from dcres.linux.marks import Mark
from dcres.linux.removal import OwnFolder
from dcres.model.pages import PAGE_SIZE, Mask, extents_of_mask, mask_of_extents
from dcres.paging.changes import DirtyBitmap
from dcres.storage.atomic import write_durably
from dcres.storage.engine.memory_file import MemoryFileWriter, load
from dcres.storage.format import tables
from tests.support.speed import patience
from tests.support.stored import memory, save

pytestmark = pytest.mark.linux
COUNT = 300


@pytest.fixture(params=["disk", "tmpfs", "ext4-1k"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    match request.param:
        case "disk":
            yield tmp_path
        case "tmpfs":
            yield from mounted(tmp_path / "mnt", "-t", "tmpfs", "-o", "size=16m", "tmpfs")
        case _:
            yield from mounted_image(tmp_path, 16 << 20, "-b", "1024")


@pytest.fixture(params=["tmpfs", "ext4"])
def small(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system with a few MiB."""
    if request.param == "tmpfs":
        yield from mounted(tmp_path / "mnt", "-t", "tmpfs", "-o", "size=4m", "tmpfs")
    else:
        yield from mounted_image(tmp_path, 8 << 20, "-O", "^has_journal")


def mounted(place: Path, *arguments: str) -> Iterator[Path]:
    place.mkdir()
    subprocess.run(["mount", *arguments, str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def mounted_image(tmp_path: Path, length_bytes: int, *options: str) -> Iterator[Path]:
    if shutil.which("mkfs.ext4") is None or not Path("/dev/loop-control").exists():
        pytest.skip("needs mkfs.ext4 and loop devices")
    image = tmp_path / "image"
    image.touch()
    os.truncate(image, length_bytes)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", *options, str(image)], check=True)
    yield from mounted(tmp_path / "mnt", "-o", "loop", str(image))


def random_mask() -> Mask:
    return np.random.default_rng(4).random(COUNT) < 0.5


def test_data_extents_are_the_written_pages(folder: Path) -> None:
    mask = random_mask()
    with files.opened(memory(folder / "f", mask), os.O_RDWR) as fd:
        assert np.array_equal(files.data_extents(fd, COUNT), extents_of_mask(mask))


@pytest.mark.parametrize("mask", [np.zeros(9, np.bool_), np.ones(9, np.bool_)])
def test_data_extents_of_nothing_and_all(folder: Path, mask: Mask) -> None:
    with files.opened(memory(folder / "f", mask), os.O_RDONLY) as fd:
        assert np.array_equal(files.data_extents(fd, 9), extents_of_mask(mask))


def test_data_extents_leave_the_position_alone(folder: Path) -> None:
    with files.opened(memory(folder / "f", random_mask()), os.O_RDONLY) as fd:
        os.lseek(fd, 123, os.SEEK_SET)
        files.data_extents(fd, COUNT)
        assert os.lseek(fd, 0, os.SEEK_CUR) == 123


def test_data_extents_know_the_length(folder: Path) -> None:
    with (
        files.opened(memory(folder / "f", random_mask()), os.O_RDONLY) as fd,
        pytest.raises(ValueError, match="not 301 pages"),
    ):
        files.data_extents(fd, COUNT + 1)


def test_more_extents_than_one_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_FORGET_EXTENTS_AT", 3)
    mask = random_mask()
    with files.opened(memory(tmp_path / "f", mask), os.O_RDONLY) as fd:
        assert np.array_equal(files.data_extents(fd, COUNT), extents_of_mask(mask))


def test_punched_pages_are_gone_and_give_back_their_memory(folder: Path) -> None:
    with files.opened(memory(folder / "f", np.ones(COUNT, np.bool_)), os.O_RDWR) as fd:
        before = files.allocated_bytes(fd)
        files.punch_hole(fd, 10 * PAGE_SIZE, 200 * PAGE_SIZE)
        os.fsync(fd)
        assert files.data_extents(fd, COUNT).tolist() == [[0, 10], [210, COUNT]]
        assert files.allocated_bytes(fd) <= before - 190 * PAGE_SIZE
        assert os.fstat(fd).st_size == COUNT * PAGE_SIZE
        assert not any(os.pread(fd, PAGE_SIZE, 50 * PAGE_SIZE))


def test_punching_a_read_only_descriptor_fails(tmp_path: Path) -> None:
    with (
        files.opened(memory(tmp_path / "f", random_mask()), os.O_RDONLY) as fd,
        pytest.raises(OSError, match="Bad file descriptor"),
    ):
        files.punch_hole(fd, 0, PAGE_SIZE)


def test_open_direct_takes_the_flag_where_it_can(tmp_path: Path) -> None:
    fd, direct = files.open_direct(tmp_path / "f", os.O_RDWR | os.O_CREAT | os.O_EXCL)
    with os.fdopen(fd, "rb", buffering=0), files.aligned_buffer(PAGE_SIZE) as buffer:
        buffer[:4] = b"page"
        assert os.pwrite(fd, buffer, 0) == PAGE_SIZE
        assert direct == bool(fcntl_flags(fd) & os.O_DIRECT)
    assert (tmp_path / "f").read_bytes()[:4] == b"page"
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o600


def test_open_direct_does_without_where_it_cannot() -> None:
    fd, direct = files.open_direct("/proc/self/status", os.O_RDONLY)
    with os.fdopen(fd, "rb", buffering=0):
        assert not direct
        assert os.read(fd, 5) == b"Name:"


def fcntl_flags(fd: int) -> int:
    info = Path(f"/proc/self/fdinfo/{fd}").read_text()
    return int(info.split("flags:")[1].split()[0], 8)


def test_a_lock_that_another_keeps_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with files.held(lock, 0.0):
        with pytest.raises(BlockingIOError), files.held(lock, 0.05):
            pass
        waiting = threading.Thread(target=files.held(lock, 10.0).__enter__, daemon=True)
        waiting.start()
    waiting.join(patience(5.0))
    assert not waiting.is_alive()
    assert lock.stat().st_mode & 0o077 == 0


def test_a_lock_is_held_by_one(tmp_path: Path) -> None:
    inside, most = 0, 0

    def work() -> None:
        nonlocal inside, most
        for _ in range(50):
            with files.locked(tmp_path / "lock"):
                inside += 1
                most = max(most, inside)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def test_memory_files_on_every_file_system(folder: Path) -> None:
    mask = random_mask()
    mask[100:280] = True
    source = memory(folder / "ram", mask)
    saved = save(folder / "m", source, mask)
    with files.opened(folder / "back", os.O_RDWR | os.O_CREAT) as fd:
        os.ftruncate(fd, COUNT * PAGE_SIZE)
        assert load(saved.file, fd) == saved.pages
    assert (folder / "back").read_bytes() == source.read_bytes()


@pytest.mark.parametrize("step", [1, 2])
def test_a_full_disk_while_saving(small: Path, tmp_path: Path, step: int) -> None:
    mask = np.zeros(5000, np.bool_)
    mask[::step] = True
    source = memory(tmp_path / "ram", mask)
    free = files.fs_free_bytes(small)
    with (
        files.opened(source, os.O_RDONLY) as fd,
        MemoryFileWriter(small / "memory.img", 5000) as writer,
        pytest.raises(StoreFull) as caught,
    ):
        writer.save(fd, extents_of_mask(mask))
    assert str(small / "memory.img") in str(caught.value)
    assert "delete old checkpoints" in str(caught.value)
    assert not (small / "memory.img").exists()
    assert files.fs_free_bytes(small) >= free - 16 * PAGE_SIZE


def test_a_full_disk_while_writing_tables(small: Path) -> None:
    write_durably(small / "manifest.json", b"old")
    with pytest.raises(StoreFull, match=r"history\.arrow"):
        tables.write_history(small / "history.arrow", np.ones(4 << 20, np.uint32), 1)
    assert set(os.listdir(small)) - {"lost+found"} == {"manifest.json"}


def test_a_full_target_while_loading(small: Path, tmp_path: Path) -> None:
    mask = np.ones(5000, np.bool_)
    saved = save(tmp_path / "m", memory(tmp_path / "ram", mask), mask)
    with files.opened(small / "ram", os.O_RDWR | os.O_CREAT) as fd:
        os.ftruncate(fd, 5000 * PAGE_SIZE)
        with pytest.raises(NoRoom, match=r"no room for guest memory in .*/ram"):
            load(saved.file, fd)


@pytest.mark.parametrize("few", [0, 1 << 20])
def test_data_within_extents_is_the_data_that_lies_there(
    tmp_path: Path, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_FEW_PAGES", few)
    rng = np.random.default_rng(5)
    here = rng.random(300) < 0.6
    asked = extents_of_mask(rng.random(300) < 0.4)
    with files.opened(tmp_path / "sparse", os.O_RDWR | os.O_CREAT) as fd:
        os.ftruncate(fd, 300 * PAGE_SIZE)
        for page in np.flatnonzero(here).tolist():
            os.pwrite(fd, b"x" * PAGE_SIZE, page * PAGE_SIZE)
        found = files.data_extents_within(fd, asked, 300)
    expected = extents_of_mask(here & mask_of_extents(asked, 300))
    assert found.tolist() == expected.tolist()


def test_a_folder_where_others_could_put_files_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "ram"
    folder.mkdir(mode=0o700)
    files.require_own(folder)
    files.require_own(Path("/dev/shm"))  # others write there, and cannot rename what is ours
    folder.chmod(0o770)
    with pytest.raises(HostError, match="others may write to it"):
        files.require_own(folder)
    folder.chmod(0o700)
    os.chown(folder, 12345, 12345)
    with pytest.raises(HostError, match="belongs to another user"):
        files.require_own(folder)
    link = tmp_path / "link"
    link.symlink_to("/dev/shm")
    with pytest.raises(HostError):
        files.require_own(link)


def test_marks_are_allocated_before_anybody_sets_one(small: Path) -> None:
    """A hole of a full tmpfs that is touched in a mapping ends the process (SIGBUS)."""
    DirtyBitmap.fresh(small / "changes", 1 << 20)
    assert (small / "changes").stat().st_blocks * 512 >= 1 << 20
    with pytest.raises(NoRoom, match="no room to mark what changes"):
        DirtyBitmap.fresh(small / "more", 1 << 24)


def test_what_is_mounted_below_a_folder_of_ours_stays(small: Path, tmp_path: Path) -> None:
    mark = Mark("RAM", "cluster ab12")
    mark.put(tmp_path)
    (small / "thesis").write_text("mine")
    (tmp_path / "ours").touch()
    with pytest.raises(HostError, match=f"{small} is mounted below .*; unmount it"):
        OwnFolder(tmp_path, mark).remove()
    assert (small / "thesis").read_text() == "mine"
    assert (tmp_path / "ours").exists(), "nothing is done by halves"


def test_a_folder_of_ours_that_is_a_mount_point_is_emptied(small: Path) -> None:
    for path in small.iterdir():  # lost+found
        path.rmdir()
    folder = OwnFolder.made(small, Mark("RAM", "cluster ab12"))
    (small / "guest.ram").touch()
    folder.remove()
    assert small.is_dir()
    assert list(small.iterdir()) == []
