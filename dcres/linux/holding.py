"""Locks that tell whether something lives, wherever it is looked at from.

They are those of open file descriptions (fcntl(2), F_OFD_SETLK): every process that inherits the
descriptor holds the lock, and the kernel lets go of it when the last of them has ended, however
that was. Who looks takes nothing (F_OFD_GETLK), so that looking disturbs nobody. The answer is the
same from every namespace, and over NFS from every machine.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from pathlib import Path

_FLOCK = "hhqqi4x"  # struct flock: type, whence, start, length (0: all of it), pid
_TAKEN = (errno.EAGAIN, errno.EACCES)


def hold(fd: int, *, alone: bool = False) -> bool:
    """Lock the open file `fd`, or change the lock that it has; False if others' is in the way.

    With `alone` nobody else may hold it; without, nobody may hold it alone. Raises OSError.
    """
    kind = fcntl.F_WRLCK if alone else fcntl.F_RDLCK
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, kind, os.SEEK_SET, 0, 0, 0))
    except OSError as error:
        if error.errno in _TAKEN:
            return False
        raise
    return True


def is_held(path: Path) -> bool:
    """Whether anybody holds the file `path`; False if there is none. Raises OSError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return False
    try:
        question = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, question)
    finally:
        os.close(fd)
    return bool(struct.unpack(_FLOCK, answer)[0] != fcntl.F_UNLCK)
