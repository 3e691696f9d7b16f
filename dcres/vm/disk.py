"""QCOW2 disks while no QEMU writes to them: what can be said of them, and their snapshots.

Facts about qemu-img 7.2, all tried: a persistent dirty bitmap lets a snapshot be taken and not be
gone back to; with an external data file or refcounts of one bit none can be taken; a disk that
was resized since takes back its size with the snapshot. Extended L2 tables, a backing file, lazy
refcounts, zstd and compat 0.10 do no harm. A lock of another process is met by whoever opens the
image without ``--force-share``; a QEMU that waits for a VM core has none, since its images are open
but inactive.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcres.errors import CheckpointCorrupt, ConfigError, UnsupportedHost

QEMU_IMG = "qemu-img"
_LOCKED = "Is another process using the image"
_LEAST_REFCOUNT_BITS = 8  # 255 snapshots


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run([QEMU_IMG, *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UnsupportedHost("qemu-img is not installed; install qemu-utils") from None


def _said(done: subprocess.CompletedProcess[str]) -> str:
    """QEMU's words in one line, without its own name before them."""
    return " ".join(done.stderr.split()).removeprefix(f"{QEMU_IMG}: ")


@dataclass(frozen=True, slots=True)
class Image:
    """A disk and what ``qemu-img info`` says of it."""

    path: Path
    info: Mapping[str, Any]

    @classmethod
    def of(cls, disk: Path, *, shared: bool = False) -> Image:
        """Raises ConfigError; also when another process writes to it, unless `shared`."""
        share = ["--force-share"] if shared else []
        done = _run("info", "--output=json", *share, str(disk))
        if done.returncode:
            if _LOCKED in done.stderr:
                raise ConfigError(f"disk {disk} is in use by another process; end that first")
            raise ConfigError(f"disk {disk} cannot be read: {_said(done)}")
        return cls(disk, json.loads(done.stdout))

    @property
    def snapshots(self) -> list[str]:
        """Names of its internal snapshots, oldest first."""
        return [each["name"] for each in self.info.get("snapshots", [])]

    def problems(self) -> list[str]:
        """One sentence for each reason why no snapshot could be taken, or gone back to; pure."""
        name, form = f"disk {self.path}", self.info["format"]
        if form != "qcow2":
            return [f"{name} is not in qcow2 format but {form}; convert it with qemu-img convert"]
        return [f"{name} {problem}" for problem in _qcow2_problems(self.info)]

    def require_snapshot(self, name: str) -> None:
        """CheckpointCorrupt unless it has exactly one internal snapshot `name`."""
        count = self.snapshots.count(name)
        if count == 0:
            raise CheckpointCorrupt(
                f"disk {self.path} has no snapshot {name}; it was replaced or reverted"
            )
        if count > 1:
            raise CheckpointCorrupt(
                f"disk {self.path} has {count} snapshots {name}; delete those that are not the "
                "checkpoint's by their IDs (qemu-img snapshot -l, -d)"
            )


def _qcow2_problems(info: Mapping[str, Any]) -> list[str]:
    data = info["format-specific"]["data"]
    problems = []
    if data.get("corrupt"):
        problems.append("is marked as corrupt; repair it with qemu-img check -r all")
    if "encrypt" in data:
        problems.append("is encrypted, and dcres has no key for it; use one that is not")
    if "data-file" in data:
        problems.append(
            f"keeps its data in another file ({data['data-file']}), so it can have no snapshots; "
            "convert it with qemu-img convert"
        )
    if data["refcount-bits"] < _LEAST_REFCOUNT_BITS:
        problems.append(
            f"has refcounts of {data['refcount-bits']} bits, too few for snapshots; convert it "
            "with qemu-img convert"
        )
    if names := [each["name"] for each in data.get("bitmaps", [])]:
        problems.append(
            f"has persistent dirty bitmaps ({', '.join(names)}), so QEMU cannot revert it to a "
            "snapshot; remove them with qemu-img bitmap --remove"
        )
    return problems


def _require_writable(disk: Path) -> None:
    try:
        os.close(os.open(disk, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        raise ConfigError(f"disk {disk} cannot be written to ({error.strerror})") from None


def require_usable(disks: Sequence[Path]) -> list[Image]:
    """What is known of the disks of a VM that is to be started or restored; changes nothing.

    Raises ConfigError when one is missing, named twice, in use, read-only, or can have no
    snapshots that a restore could go back to.
    """
    images = []
    for index, disk in enumerate(disks):
        if not (disk.is_file() or disk.is_block_device()):
            raise ConfigError(f"disk {disk} does not exist, or is neither a file nor a device")
        if any(disk.samefile(other) for other in disks[:index]):
            raise ConfigError(f"disk {disk} is named twice; give the VM each disk once")
        _require_writable(disk)
        images.append(Image.of(disk))
    if problems := [problem for image in images for problem in image.problems()]:
        raise ConfigError("; ".join(problems))
    return images


def snapshots(disk: Path) -> list[str]:
    """Names of the internal snapshots of `disk`, oldest first. Raises ConfigError."""
    return Image.of(disk, shared=True).snapshots


def create(disk: Path, name: str) -> None:
    """Take an internal snapshot. Raises ConfigError when the disk is in use, or is full."""
    done = _run("snapshot", "-c", name, str(disk))
    if done.returncode:
        raise ConfigError(f"disk {disk} takes no snapshot: {_said(done)}")


def take(disk: Path, name: str) -> None:
    """Make the internal snapshot `name` of `disk`, which no QEMU has open, or has inactive.

    Raises ConfigError when QEMU uses the disk, or qemu-img fails.
    """
    done = _run("snapshot", "-c", name, str(disk))
    if done.returncode:
        raise ConfigError(f"disk {disk} takes no snapshot {name}: {done.stderr.strip()}")


def revert(disk: Path, name: str) -> None:
    """Put `disk` back to its internal snapshot `name`; what was written since is given up.

    Raises ConfigError when QEMU still has the disk open, or qemu-img fails.
    """
    done = _run("snapshot", "-a", name, str(disk))
    if done.returncode:
        raise ConfigError(f"disk {disk} cannot be reverted to {name}: {_said(done)}")


def delete(disk: Path, name: str) -> None:
    """Delete the internal snapshot `name` of `disk`, if it has one.

    Raises ConfigError when QEMU still has the disk open, or qemu-img fails.
    """
    if name not in snapshots(disk):
        return
    done = _run("snapshot", "-d", name, str(disk))
    if done.returncode:
        raise ConfigError(f"snapshot {name} of disk {disk} stays: {_said(done)}")
