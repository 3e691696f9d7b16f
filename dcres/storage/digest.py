"""Checksums: XXH3 (64 bits, seed 0) of every page, SHA-256 of every small file."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dcres.storage.damage import corrupt, unreadable
from dcres.storage.manifest import FileSum

Sums = npt.NDArray[np.uint64]


def bytes_sum(name: str, data: bytes) -> FileSum:
    """The checksum of `data`, to be stored as `name`."""
    return FileSum(name=name, length_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def file_sum(path: Path) -> FileSum:
    """Length and checksum of a file as it is now. Raises CheckpointCorrupt if unreadable."""
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
            return FileSum(name=path.name, length_bytes=file.tell(), sha256=digest.hexdigest())
    except OSError as error:
        raise unreadable(path, error) from None


def read_checked(path: Path, expected: FileSum | None) -> bytes:
    """The content of `path`; CheckpointCorrupt unless it is what `expected` says."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from None
    if expected is not None:
        _compare(path, bytes_sum(path.name, data), expected)
    return data


def check_file(path: Path, expected: FileSum) -> None:
    """CheckpointCorrupt unless `path` is what `expected` says; reads it piece by piece."""
    _compare(path, file_sum(path), expected)


def _compare(path: Path, found: FileSum, expected: FileSum) -> None:
    if found.length_bytes != expected.length_bytes:
        what = f"it has {found.length_bytes} bytes instead of {expected.length_bytes}"
        raise corrupt(path, what)
    if found.sha256 != expected.sha256:
        raise corrupt(path, "it was altered: its SHA-256 is not the manifest's")
