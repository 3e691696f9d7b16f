"""The guest's initramfs, and which kernel package is taken."""

from __future__ import annotations

import gzip
import stat
import subprocess
from pathlib import Path

import pytest

from dcres.errors import UnsupportedHost
from dcres.vm.accel import greeting_program
from dcres.vm.guest import (
    APPLETS,
    Entry,
    build_initrd,
    cpio_newc,
    depends_of,
    find_busybox,
    find_image,
    initramfs,
)


def members(archive: bytes) -> dict[str, tuple[int, bytes]]:
    """Name → mode and data, read by the format's description."""
    found: dict[str, tuple[int, bytes]] = {}
    at = 0
    while True:
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        name = archive[at + 110 : at + 110 + fields[11] - 1].decode()
        data_at = (at + 110 + fields[11] + 3) // 4 * 4
        if name == "TRAILER!!!":
            return found
        found[name] = (fields[1], archive[data_at : data_at + fields[6]])
        at = (data_at + fields[6] + 3) // 4 * 4


def test_cpio_keeps_names_modes_and_data() -> None:
    entries = [
        Entry("a", stat.S_IFDIR | 0o755),
        Entry("a/odd", stat.S_IFREG | 0o644, b"12345"),
        Entry("a/link", stat.S_IFLNK | 0o777, b"odd"),
        Entry("last", stat.S_IFREG | 0o600, b"1"),
    ]
    archive = cpio_newc(entries)
    assert members(archive) == {entry.name: (entry.mode, entry.data) for entry in entries}
    assert len(archive) % 4 == 0


def test_the_initramfs_can_start_and_speak() -> None:
    found = members(gzip.decompress(initramfs(b"#!/bin/sh")))
    assert found["init"] == (stat.S_IFREG | 0o755, b"#!/bin/sh")
    assert found["dev/console"][0] == stat.S_IFCHR | 0o600


def test_initrd_is_built_once_for_the_same_content(tmp_path: Path) -> None:
    busybox, target = tmp_path / "busybox", tmp_path / "initrd.gz"
    busybox.write_bytes(b"program one")
    build_initrd(target, busybox)
    first = target.stat()
    build_initrd(target, busybox)
    assert target.stat().st_ino == first.st_ino
    busybox.write_bytes(b"program two")
    build_initrd(target, busybox)
    found = members(gzip.decompress(target.read_bytes()))
    assert found["bin/busybox"][1] == b"program two"
    assert {f"bin/{applet}" for applet in APPLETS} <= set(found)
    assert found["init"][1].startswith(b"#!/bin/busybox sh\n")


def test_an_image_is_complete_or_not_there(tmp_path: Path) -> None:
    (tmp_path / "vmlinuz").touch()
    assert find_image(tmp_path) is None
    (tmp_path / "initrd.gz").touch()
    assert find_image(tmp_path) is not None


@pytest.mark.parametrize(
    ("answer", "packages"),
    [
        (
            "linux-image-cloud-amd64\n  Depends: linux-image-6.1.0-56-cloud-amd64\n",
            ["linux-image-6.1.0-56-cloud-amd64"],
        ),
        (
            "linux-image-virtual\n  Depends: linux-image-6.8.0-48-generic\n",
            ["linux-image-6.8.0-48-generic"],
        ),
        (
            "x\n |Depends: linux-image-1\n  Depends: linux-image-2\n  Depends: other\n",
            ["linux-image-1", "linux-image-2"],
        ),
        ("linux-image-virtual\n", []),
    ],
)
def test_the_package_behind_a_meta_package(answer: str, packages: list[str]) -> None:
    assert depends_of(answer) == packages


def test_the_probe_s_program_runs(tmp_path: Path) -> None:
    program = tmp_path / "greeting"
    program.write_bytes(greeting_program())
    program.chmod(0o755)
    done = subprocess.run([program], capture_output=True, check=True)
    assert done.stdout == b"dcres: user mode runs\n"


def test_a_dynamic_busybox_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    busybox = tmp_path / "busybox"
    busybox.write_bytes(b"\x7fELF /lib64/ld-linux-x86-64.so.2")
    busybox.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnsupportedHost, match="not static"):
        find_busybox()
    busybox.unlink()
    with pytest.raises(UnsupportedHost, match="busybox is not installed"):
        find_busybox()
