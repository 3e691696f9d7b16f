"""QCOW2 disks while no QEMU has them open: qemu-img's internal snapshots."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from dcres.errors import CheckpointCorrupt, ConfigError, UnsupportedHost

QEMU_IMG = "qemu-img"


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run([QEMU_IMG, *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UnsupportedHost("qemu-img is not installed; install qemu-utils") from None


def snapshots(disk: Path) -> list[str]:
    """Names of the internal snapshots of `disk`, oldest first. Raises ConfigError."""
    done = _run("info", "--output=json", "--force-share", str(disk))
    if done.returncode:
        raise ConfigError(f"disk {disk} cannot be read: {done.stderr.strip()}")
    return [each["name"] for each in json.loads(done.stdout).get("snapshots", [])]


def require_snapshot(disk: Path, name: str) -> None:
    """CheckpointCorrupt unless `disk` has the internal snapshot `name`."""
    if not disk.is_file():
        raise CheckpointCorrupt(f"disk {disk} of the checkpoint does not exist")
    if name not in snapshots(disk):
        raise CheckpointCorrupt(f"disk {disk} has no snapshot {name}; it was replaced or reverted")


def revert(disk: Path, name: str) -> None:
    """Put `disk` back to its internal snapshot `name`; what was written since is given up.

    Raises ConfigError when QEMU still has the disk open, or qemu-img fails.
    """
    done = _run("snapshot", "-a", name, str(disk))
    if done.returncode:
        raise ConfigError(f"disk {disk} cannot be reverted to {name}: {done.stderr.strip()}")


def delete(disk: Path, name: str) -> None:
    """Delete the internal snapshot `name` of `disk`, if it has one.

    Raises ConfigError when QEMU still has the disk open, or qemu-img fails.
    """
    if name not in snapshots(disk):
        return
    done = _run("snapshot", "-d", name, str(disk))
    if done.returncode:
        raise ConfigError(f"snapshot {name} of disk {disk} stays: {done.stderr.strip()}")
