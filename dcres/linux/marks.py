"""The marks that say what a folder is and whose: before anything is removed, one has to be seen.

`dcres.linux.removal` has what may be removed below each of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path

MARK = ".dcres-folder"
HOME_MARK = ".dcres-home"
STORE_MARK = ".dcres-store"  # made by dcres.storage

_LONGEST_MARK_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Mark:
    """What a folder is, and whose: the id of a cluster, the name of a VM."""

    what: str
    whose: str

    def __str__(self) -> str:
        return f"the {self.what} of {self.whose}"

    @classmethod
    def of(cls, folder: Path) -> Mark | None:
        """The mark that `folder` itself carries; None without one, and for a symbolic link."""
        try:
            if not stat.S_ISDIR(folder.lstat().st_mode):
                return None
            fd = os.open(folder / MARK, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            return None
        with open(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                return None
            try:
                values = json.loads(file.read(_LONGEST_MARK_BYTES))
                return cls(str(values["what"]), str(values["whose"]))
            except (ValueError, KeyError, TypeError):
                return None

    def put(self, folder: Path) -> None:
        """Mark `folder`, durably: after a power failure it is to be known still."""
        fd = os.open(folder / MARK, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with open(fd, "w") as file:
            json.dump({"note": "dcres made this folder and removes it", **asdict(self)}, file)
            file.flush()
            os.fsync(fd)
        above = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(above)
        finally:
            os.close(above)


def may_be_marked(folder: Path, earlier: Callable[[Collection[str]], bool] | None = None) -> bool:
    """Whether there is nothing in `folder` but what `earlier` knows, so that it may be ours."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    names = set(os.listdir(folder))
    with contextlib.suppress(FileNotFoundError):
        # We were killed while we marked it.
        if names == {MARK} and (folder / MARK).lstat().st_size == 0:
            return True
    return not names or (earlier is not None and earlier(names))
