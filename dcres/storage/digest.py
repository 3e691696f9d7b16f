"""Checksums: XXH3 (64 bits, seed 0) of every page, SHA-256 of every small file."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dcres.storage.atomic import write_whole
from dcres.storage.damage import corrupt, unreadable
from dcres.storage.layout import FILE_PATTERN

Sums = npt.NDArray[np.uint64]

_SHA256_PATTERN = "[0-9a-f]{64}"


@dataclass(frozen=True, slots=True)
class FileSum:
    """One small file of a host's folder, as it must be. Raises ValueError for what none can be."""

    name: str
    length_bytes: int
    sha256: str

    def __post_init__(self) -> None:
        if re.fullmatch(FILE_PATTERN, self.name) is None:
            raise ValueError(f"{self.name!r} cannot be the name of a file of a checkpoint")
        if self.length_bytes < 0:
            raise ValueError(f"a file cannot have {self.length_bytes} bytes")
        if re.fullmatch(_SHA256_PATTERN, self.sha256) is None:
            raise ValueError(f"{self.sha256!r} is not a SHA-256")


def bytes_sum(name: str, data: bytes) -> FileSum:
    """The checksum of `data`, to be stored as `name`."""
    return FileSum(name=name, length_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


class SummedFile:
    """A descriptor that is written to, with the checksum of it all: a file as pyarrow wants one.

    Tables have megabytes, and memory that is fresh is slow: they are kept nowhere in between.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._sha256 = hashlib.sha256()
        self._length_bytes = 0
        self.closed = False

    def write(self, data: bytes | memoryview) -> int:
        """All of `data`; its length. Raises OSError."""
        view = memoryview(data)
        write_whole(self._fd, view)
        self._sha256.update(view)
        self._length_bytes += view.nbytes
        return view.nbytes

    def flush(self) -> None:
        """Nothing is kept back."""

    def close(self) -> None:
        """The descriptor stays open: it is its opener's."""
        self.closed = True

    def sum(self, name: str) -> FileSum:
        """The checksum of what was written, to be stored as `name`."""
        return FileSum(name, self._length_bytes, self._sha256.hexdigest())


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
