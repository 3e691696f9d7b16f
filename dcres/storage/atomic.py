"""Files and folders that are there after a power failure.

A new file needs fsync of itself and then of the folder that names it (fsync(2)); a rename in
one folder is atomic (rename(2)), so readers see the old content or the new, never a part.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from dcres.errors import StoreFull, StoreReadOnly
from dcres.linux.files import fs_free_bytes, opened
from dcres.linux.removal import create

FULL = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM)


@contextlib.contextmanager
def store_written(path: Path) -> Iterator[None]:
    """Turn what hinders writing `path` into `StoreFull` or `StoreReadOnly`; the rest stays."""
    try:
        yield
    except OSError as error:
        if error.errno in _REFUSED:
            raise StoreReadOnly(
                f"{error.filename or path} cannot be written ({os.strerror(error.errno)}); "
                "make the store writable"
            ) from None
        if error.errno not in FULL:
            raise
        free = fs_free_bytes(path.parent)
        raise StoreFull(
            f"no room to write {path} ({os.strerror(error.errno)}, {free} bytes are free); delete "
            "old checkpoints or put the store on a larger disk"
        ) from None


def sync_folder(path: Path) -> None:
    """Make the names in folder `path` durable."""
    with opened(path, os.O_RDONLY | os.O_DIRECTORY) as fd:
        os.fsync(fd)


def make_private_dirs(path: Path) -> None:
    """Create folder `path` and its missing parents, mode 0700, durably; existing ones stay."""
    missing = [path]
    while not missing[-1].exists() and missing[-1].parent != missing[-1]:
        missing.append(missing[-1].parent)
    for folder in reversed(missing):
        with contextlib.suppress(FileExistsError), store_written(folder):
            folder.mkdir(mode=0o700)
            sync_folder(folder.parent)
    if not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))


def write_durably(path: Path, data: bytes | memoryview, mode: int = 0o600) -> None:
    """Give `path` the content `data`, all of it or none; durable on return.

    An existing file is replaced. Two writers of one path need a lock. Raises StoreFull.
    """
    with replaced(path, mode) as fd:
        write_whole(fd, data)


@contextlib.contextmanager
def replaced(path: Path, mode: int = 0o600) -> Iterator[int]:
    """The same for what the block writes to the descriptor; if that fails nothing has changed.

    If the folder cannot be made durable at last, the file is there and may be lost with the power.
    """
    # By chance, not by pid: in two containers the same pids write into one store.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with store_written(path):
        fd, ours = create(temporary, os.O_WRONLY, mode)
        try:
            try:
                yield fd
                os.fsync(fd)
            finally:
                os.close(fd)
            os.rename(temporary, path)
            sync_folder(path.parent)
        except BaseException:
            ours.remove()
            raise


def write_whole(fd: int, data: bytes | memoryview) -> None:
    """write(2) as often as it takes. Raises OSError."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]
