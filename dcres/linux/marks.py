"""The marks that say what a folder is and whose: before anything is removed, one has to be seen.

`dcres.linux.removal` has what may be removed below each of them.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path

from dcres.linux.holding import hold

MARK = ".dcres-folder"
HOME_MARK = ".dcres-home"
STORE_MARK = ".dcres-store"  # made by dcres.storage

_LONGEST_MARK_BYTES = 4096
_MARK_BYTES = 1024
_NO_TMPFILE = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL)  # open(2): NFS, for one
_BUSY_S = 10.0
_POLL_S = 0.01


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
        """Mark `folder`, durably: after a power failure it is to be known still.

        A mark that is there already stays, whoever was faster; nobody ever sees half of one.
        """
        values = {"note": "dcres made this folder and removes it", **asdict(self)}
        above = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # With blanks: it keeps its length when its owner is written to it.
            _put_whole(above, json.dumps(values).encode().ljust(_MARK_BYTES))
            os.fsync(above)
        finally:
            os.close(above)


def _put_whole(folder: int, data: bytes) -> None:
    """Make the mark with `data` in one step, or fill an empty one: its writer was killed."""
    try:
        fd = os.open(".", os.O_WRONLY | os.O_TMPFILE | os.O_CLOEXEC, 0o600, dir_fd=folder)
    except OSError as error:
        if error.errno not in _NO_TMPFILE:
            raise
        _fill(folder, data)
        return
    try:
        os.write(fd, data)
        os.fsync(fd)
        # With a descriptor of a folder it is linkat(2), which alone can follow this link.
        os.link(f"/proc/self/fd/{fd}", MARK, src_dir_fd=folder, dst_dir_fd=folder)
    except FileExistsError:
        _fill(folder, data)
    finally:
        os.close(fd)


def _fill(folder: int, data: bytes) -> None:
    """In one write, by one writer at a time; what has content stays."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(MARK, flags, 0o600, dir_fd=folder)
    try:
        deadline = time.monotonic() + _BUSY_S
        while os.fstat(fd).st_size == 0:
            if hold(fd, alone=True):
                if os.fstat(fd).st_size == 0:
                    os.write(fd, data)
                    os.fsync(fd)
                return
            if time.monotonic() > deadline:
                raise BlockingIOError(errno.EAGAIN, "somebody else keeps it locked", MARK)
            time.sleep(_POLL_S)
    finally:
        os.close(fd)


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
