"""Where guest memory may lie: on a tmpfs with small pages, whatever else is mounted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dcres.errors import UnsupportedHost
from dcres.linux import tmpfs
from dcres.linux.tmpfs import Mount, mount_of, require_small_pages, trouble


def test_the_mount_that_holds_a_folder() -> None:
    mounts = (
        "/dev/vda / ext4 rw 0 0\n"
        "tmpfs /dev/shm tmpfs rw,size=4k 0 0\n"
        "tmpfs /dev/shm tmpfs rw,huge=always,size=8k 0 0\n"
        "x /dev/shmother xfs rw 0 0\n"
        "tmpfs /mnt/guest\\040memory tmpfs rw,huge=advise 0 0\n"
    )
    assert mount_of(mounts, Path("/dev/shm/dcres")) == Mount("/dev/shm", "tmpfs", "always")
    assert mount_of(mounts, Path("/dev/shmother/a")) == Mount("/dev/shmother", "xfs")
    assert mount_of(mounts, Path("/srv")) == Mount("/", "ext4")
    found = mount_of(mounts, Path("/mnt/guest memory/a"))
    assert found == Mount("/mnt/guest memory", "tmpfs", "advise")


@pytest.mark.parametrize(
    ("huge", "shmem_enabled", "words"),
    [
        ("", "never", None),
        ("never", "advise", None),
        ("", "", None),
        ("always", "deny", None),
        ("always", "never", r"has huge=always\).*remount,huge=never /mnt/ram"),
        ("within_size", "never", r"has huge=within_size\).*remount"),
        ("advise", "", r"has huge=advise\).*remount"),
        ("never", "force", r"shmem_enabled says force\).*; echo never >/sys.*shmem_enabled"),
    ],
)
def test_huge_pages(huge: str, shmem_enabled: str, words: str | None) -> None:
    said = trouble(Path("/mnt/ram/dcres"), "h1", Mount("/mnt/ram", "tmpfs", huge), shmem_enabled)
    if words is None:
        assert said == ""
    else:
        assert re.search(rf"tmpfs at /mnt/ram of host h1 .*{words}", said), said


def test_a_folder_on_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that is yet to be made, and one that a link leads to."""
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/vda / ext4 rw 0 0\ntmpfs {tmp_path}/shm tmpfs rw 0 0\n")
    monkeypatch.setattr(tmpfs, "_MOUNTS", mounts)
    monkeypatch.setattr(tmpfs, "SHMEM_ENABLED", tmp_path / "none")
    (tmp_path / "shm").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "shm")
    require_small_pages(tmp_path / "link" / "dcres", "h1")
    with pytest.raises(UnsupportedHost, match=r"host h1 .*/ram/dcres, which is on ext4; .*DCRES_R"):
        require_small_pages(tmp_path / "ram" / "dcres", "h1")
