"""Files that a checkpoint shares with its base: hard links, so that the file system counts.

A file goes when the last checkpoint that has it goes, and each checkpoint's folder is whole.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Self

from dcres.errors import StorageError
from dcres.linux.removal import CheckpointFolder
from dcres.storage.atomic import FULL, store_written

_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV)


class Links:
    """Links in a host's `folder` to files of other checkpoints; unless kept they are gone."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ours = CheckpointFolder(folder.parent)
        self._made: list[Path] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for path in self._made:
            self._ours.remove_file(path)

    def keep(self) -> None:
        """All is well."""
        self._made.clear()

    def add(self, source: Path, length_bytes: int) -> None:
        """Link a file so long, unless that was done before. Raises StorageError, StoreFull."""
        path = self._folder / source.name
        with store_written(path):
            try:
                self._link(source, path)
                found_bytes = path.stat().st_size
            except OSError as error:
                if error.errno in FULL:
                    raise
                raise _cannot(source, path, error) from None
        if found_bytes != length_bytes:
            raise StorageError(
                f"{source} has {found_bytes} bytes instead of {length_bytes}; "
                "take a full checkpoint"
            )

    def _link(self, source: Path, path: Path) -> None:
        if path.exists():
            if path.samefile(source):
                return
            self._ours.remove_file(path)
        os.link(source, path, follow_symlinks=False)
        self._made.append(path)


def _cannot(source: Path, path: Path, error: OSError) -> StorageError:
    why = error.strerror or ""
    if error.errno in _NO_LINKS:
        why += ": there are no hard links between these folders"
    return StorageError(f"{source} cannot be linked to {path} ({why}); take a full checkpoint")
