"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from dcres.errors import StoreFull
from dcres.storage import atomic


def test_replaces_the_content_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    atomic.write_durably(path, b"old")
    atomic.write_durably(path, b"new")
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("call", ["fsync", "rename", "write"])
def test_a_failed_write_leaves_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "file"
    atomic.write_durably(path, b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(StoreFull, match=r"file .*No space left.*delete old checkpoints"):
        atomic.write_durably(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_syncs_the_file_before_its_name_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    fsync, rename = os.fsync, os.rename

    def noted_fsync(fd: int) -> None:
        steps.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file")
        fsync(fd)

    def noted_rename(source: Path, target: Path) -> None:
        steps.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted_rename)
    atomic.write_durably(tmp_path / "file", b"data")
    assert steps == ["file", "rename", "folder"]


def test_private_dirs_are_private_and_may_exist(tmp_path: Path) -> None:
    deep = tmp_path / "a" / "b"
    atomic.make_private_dirs(deep)
    atomic.make_private_dirs(deep)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (deep, deep.parent)] == [0o700] * 2


def test_a_file_in_the_way_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    with pytest.raises(NotADirectoryError):
        atomic.make_private_dirs(tmp_path / "a")


def test_several_files_have_their_folder_made_durable_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    fsync, rename = os.fsync, os.rename

    def noted_fsync(fd: int) -> None:
        steps.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file")
        fsync(fd)

    def noted_rename(source: Path, target: Path) -> None:
        steps.append(target.name)
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted_rename)
    atomic.write_all_durably(tmp_path, {"one": b"1", "two": b"2"})
    assert steps == ["file", "file", "one", "two", "folder"]
    assert [(tmp_path / name).read_bytes() for name in ("one", "two")] == [b"1", b"2"]
    assert sorted(os.listdir(tmp_path)) == ["one", "two"]


def test_of_several_files_that_do_not_fit_none_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    atomic.write_all_durably(tmp_path, {"one": b"old", "two": b"old"})
    write = os.write

    def full_at_the_second(fd: int, data: memoryview) -> int:
        if bytes(data) == b"2":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, data)

    monkeypatch.setattr(os, "write", full_at_the_second)
    with pytest.raises(StoreFull, match="two"):
        atomic.write_all_durably(tmp_path, {"one": b"1", "two": b"2"})
    assert {(tmp_path / name).read_bytes() for name in ("one", "two")} == {b"old"}
    assert sorted(os.listdir(tmp_path)) == ["one", "two"]
