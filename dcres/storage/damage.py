"""The errors for files of a checkpoint that are not what they should be."""

from __future__ import annotations

from pathlib import Path

from dcres.errors import CheckpointCorrupt, FileMissing


def corrupt(path: Path, what: str) -> CheckpointCorrupt:
    """The error for `path`; `what` says in a clause what is wrong with it."""
    return CheckpointCorrupt(_told(path, what))


def unreadable(path: Path, error: OSError) -> CheckpointCorrupt:
    """The error for a file that is missing or cannot be read."""
    if isinstance(error, FileNotFoundError):
        return FileMissing(_told(path, "it is missing"))
    return corrupt(path, f"it cannot be read ({error.strerror})")


def _told(path: Path, what: str) -> str:
    return f"{path}: {what}; restore another checkpoint or a copy"


def newer(path: Path, version: int, newest: int) -> CheckpointCorrupt:
    """The error for a file of a format `version` above the `newest` that is known here."""
    return CheckpointCorrupt(
        f"{path} has format version {version}: a newer dcres wrote it, and this one reads versions "
        f"up to {newest}; use a dcres that reads version {version}"
    )
