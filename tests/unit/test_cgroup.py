"""Groups that limit a disk's rate, on made-up control groups and devices of both versions."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dcres.errors import UnsupportedHost
from dcres.linux.cgroup import DiskGroup, disk_group, disk_under


def made_up(root: Path, **files: str) -> None:
    """Files below `root` with contents; ``__`` in a name is a slash."""
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def device(path: Path) -> str:
    number = os.stat(path).st_dev
    return f"{os.major(number)}:{os.minor(number)}"


@pytest.fixture
def removed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The groups that were removed; rmdir(2) of a real one takes the kernel's files along."""
    folders: list[Path] = []
    monkeypatch.setattr(DiskGroup, "remove", lambda group: folders.append(group.folder))
    return folders


def test_a_disk_is_found(tmp_path: Path) -> None:
    (tmp_path / device(tmp_path)).mkdir()
    made_up(tmp_path / device(tmp_path), dev="254:0\n")
    assert disk_under(tmp_path, tmp_path) == "254:0"


def test_a_partition_stands_for_its_disk(tmp_path: Path) -> None:
    made_up(tmp_path, sda__dev="8:0\n", sda__sda1__dev="8:1\n", sda__sda1__partition="1\n")
    (tmp_path / device(tmp_path)).symlink_to(tmp_path / "sda/sda1")
    assert disk_under(tmp_path, tmp_path) == "8:0"


def test_a_folder_on_no_disk(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedHost, match="is not on a disk whose rate can be limited"):
        disk_under(tmp_path, tmp_path)


def test_version_1_has_a_file_for_each_way(tmp_path: Path, removed: list[Path]) -> None:
    made_up(tmp_path, blkio__blkio_DOT_throttle_DOT_write_bps_device="")
    with disk_group("mine", "254:0", tmp_path) as group:
        assert group.entrance == tmp_path / "blkio/mine/cgroup.procs"
        files = [group.folder / f"blkio.throttle.{way}_bps_device" for way in ("read", "write")]
        group.limit(150_000_000)
        assert [file.read_text() for file in files] == ["254:0 150000000"] * 2
        group.limit(None)
        assert [file.read_text() for file in files] == ["254:0 0"] * 2, "0 is no limit"
    assert removed == [tmp_path / "blkio/mine"]


def test_version_2_has_one_file_and_a_controller(tmp_path: Path, removed: list[Path]) -> None:
    made_up(tmp_path, cgroup_DOT_controllers="cpu io pids", cgroup_DOT_subtree_control="cpu")
    control = tmp_path / "cgroup.subtree_control"
    with disk_group("mine", "8:0", tmp_path) as group:
        assert control.read_text() == "+io"
        group.limit(150_000_000)
        assert (group.folder / "io.max").read_text() == "8:0 rbps=150000000 wbps=150000000"
        group.limit(None)
        assert (group.folder / "io.max").read_text() == "8:0 rbps=max wbps=max"
    assert removed == [tmp_path / "mine"]
    assert control.read_text() == "-io", "as it was before"


def test_a_controller_that_is_handed_down_already_stays(
    tmp_path: Path, removed: list[Path]
) -> None:
    made_up(tmp_path, cgroup_DOT_controllers="io", cgroup_DOT_subtree_control="io memory")
    with disk_group("mine", "8:0", tmp_path):
        pass
    assert (tmp_path / "cgroup.subtree_control").read_text() == "io memory"


def test_a_machine_without_either(tmp_path: Path) -> None:
    with (
        pytest.raises(UnsupportedHost, match=r"neither blkio\.throttle nor the io controller"),
        disk_group("mine", "8:0", tmp_path),
    ):
        pass
