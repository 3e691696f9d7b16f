"""Calls on sparse files and files that bypass the page cache.

A file's pages here are `PAGE_SIZE` pieces of it, and a hole is what lseek(2) calls one. tmpfs,
ext4, XFS and btrfs report holes page by page; a file system that does not know holes reports
the whole file as data.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import signal
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dcres.errors import HostError
from dcres.linux import libc
from dcres.model.pages import (
    EMPTY,
    PAGE_SIZE,
    Extents,
    count_pages,
    extents_of_mask,
    extents_of_pages,
    join,
    mask_of_extents,
)

# linux/falloc.h
FALLOC_FL_KEEP_SIZE = 1
FALLOC_FL_PUNCH_HOLE = 2

_MADV_POPULATE_WRITE = 23  # Linux 5.14
_HUGE_PAGE_BYTES = 2 << 20
_FORGET_EXTENTS_AT = 1 << 16
_FEW_PAGES = 8192
_POLL_S = 0.02


def punch_hole(fd: int, offset_bytes: int, length_bytes: int) -> None:
    """Make a hole; the file keeps its length and whole pages of it give their memory back.

    fallocate(2): works on tmpfs, ext4, XFS and btrfs. Raises OSError.
    """
    libc.fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset_bytes, length_bytes)


def allocate(fd: int, offset_bytes: int, length_bytes: int) -> bool:
    """Take disk blocks for a part of the file, which grows if it ends before; read as zeros.

    fallocate(2). Whether the file system can: without, nothing was done. Raises OSError, with
    ENOSPC when the blocks are not there.
    """
    try:
        libc.fallocate(fd, 0, offset_bytes, length_bytes)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.ENOSYS):
            return False
        raise
    return True


def data_extents(fd: int, page_count: int) -> Extents:
    """The pages of `fd` that are not holes, as extents.

    lseek(2) with SEEK_DATA and SEEK_HOLE moves the file position, which duplicated descriptors
    share, so the file is opened once more for it. Pages that come or go meanwhile may be
    reported or not. Raises ValueError unless the file is `page_count` pages long, and OSError.
    """
    with opened(f"/proc/self/fd/{fd}", os.O_RDONLY) as private_fd:
        length_bytes = os.fstat(private_fd).st_size
        if length_bytes != page_count * PAGE_SIZE:
            raise ValueError(f"the file has {length_bytes} bytes, not {page_count} pages")
        blocks = [_as_extents(block) for block in _data_ranges(private_fd, length_bytes)]
    return join(np.concatenate(blocks)) if blocks else EMPTY


def data_extents_within(fd: int, extents: Extents, page_count: int) -> Extents:
    """The pages of `extents` that are not holes in `fd`; see `data_extents`.

    SEEK_HOLE walks to the end of the data that it starts in, however far that is, so many
    small extents inside long data would take seconds (16 s for 20,000 in 400 MB). Few pages
    are therefore asked for one by one, and many by looking at the whole file once.
    """
    if count_pages(extents) > _FEW_PAGES:
        whole = mask_of_extents(data_extents(fd, page_count), page_count)
        return extents_of_mask(whole & mask_of_extents(extents, page_count))
    with opened(f"/proc/self/fd/{fd}", os.O_RDONLY) as private_fd:
        here = [
            page
            for first, stop in extents.tolist()
            for page in _data_pages(private_fd, first, stop)
        ]
    return extents_of_pages(np.array(here, dtype=np.int64))


def _data_pages(fd: int, first: int, stop: int) -> Iterator[int]:
    page = first
    while page < stop:
        try:
            page = os.lseek(fd, page * PAGE_SIZE, os.SEEK_DATA) // PAGE_SIZE
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data from here to the end
                return
            raise
        if page < stop:
            yield page
        page += 1


def _data_ranges(fd: int, length_bytes: int) -> Iterator[list[tuple[int, int]]]:
    """Byte ranges of data, in blocks: a tuple in Python takes ten times a row in numpy."""
    ranges: list[tuple[int, int]] = []
    position = 0
    while position < length_bytes:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data from here to the end
                break
            raise
        position = os.lseek(fd, start, os.SEEK_HOLE)
        ranges.append((start, position))
        if len(ranges) == _FORGET_EXTENTS_AT:
            yield ranges
            ranges = []
    if ranges:
        yield ranges


def _as_extents(ranges: list[tuple[int, int]]) -> Extents:
    """Byte ranges as page ranges; a file system of smaller blocks may have parts of pages."""
    pages = np.array(ranges, dtype=np.int64)
    pages[:, 0] //= PAGE_SIZE
    pages[:, 1] = -(-pages[:, 1] // PAGE_SIZE)
    np.maximum(pages[1:, 0], pages[:-1, 1], out=pages[1:, 0])
    return pages[pages[:, 0] < pages[:, 1]]


def aligned_buffer(length_bytes: int) -> mmap.mmap:
    """Anonymous memory that starts on a page, as O_DIRECT demands; untouched pages cost none.

    Long ones ask for huge pages: a request to the disk then has few segments and is not cut into
    several (writing 4 MiB pieces with O_DIRECT goes from 1,500 to 2,000 MB/s here).
    """
    buffer = mmap.mmap(-1, length_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if length_bytes >= _HUGE_PAGE_BYTES:
        with contextlib.suppress(OSError):  # a kernel without them
            buffer.madvise(mmap.MADV_HUGEPAGE)
    return buffer


def populate(buffer: mmap.mmap, length_bytes: int) -> None:
    """Have the start of an anonymous `buffer` present, to be written at once. Raises OSError.

    Memory that nobody has used for long comes from the kernel, and in a virtual machine from the
    hypervisor, which may take ten times as long as to fill it. Other threads run meanwhile, as
    they would not with `mmap.madvise`.
    """
    libc.madvise(buffer, length_bytes, _MADV_POPULATE_WRITE)


def open_direct(path: str | os.PathLike[str], flags: int, mode: int = 0o600) -> tuple[int, bool]:
    """Open `path`, with O_DIRECT if its file system takes that: ``(descriptor, direct)``.

    The flag is added after opening: open(2) with O_CREAT | O_DIRECT can create the file and
    then fail. The caller closes the descriptor. Raises OSError.
    """
    fd = os.open(path, flags | os.O_CLOEXEC, mode)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return fd, False
        os.close(fd)
        raise
    return fd, True


def open_own(path: str | os.PathLike[str], flags: int, mode: int = 0o600) -> int:
    """Open a file of dcres's own to write to it; the caller closes the descriptor.

    It is a file and no symbolic link: who could put one there would have us write elsewhere. Our
    folders are private, so that this is a second lock. Raises HostError for a link, OSError.
    """
    try:
        return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    except OSError as error:
        if error.errno != errno.ELOOP or not os.path.islink(path):
            raise
        raise HostError(
            f"{path} is a symbolic link where dcres writes a file of its own; find out what made "
            "it, and remove it"
        ) from None


@contextlib.contextmanager
def opened(path: str | os.PathLike[str], flags: int) -> Iterator[int]:
    """os.open(3) that closes the descriptor in the end."""
    fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def opened_own(path: str | os.PathLike[str], flags: int, mode: int = 0o600) -> Iterator[int]:
    """`open_own` that closes the descriptor in the end."""
    fd = open_own(path, flags, mode)
    try:
        yield fd
    finally:
        os.close(fd)


def forget_cached(path: Path) -> None:
    """Have the next reader of a file read what is on the disk, not in memory. Raises OSError.

    posix_fadvise(2): pages that are being written, or mapped, stay.
    """
    with opened(path, os.O_RDONLY) as fd:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive flock(2) on the file `path`, which is created and stays."""
    with opened_own(path, os.O_RDWR | os.O_CREAT) as fd:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def held(path: Path, timeout_s: float) -> Iterator[None]:
    """The same, but BlockingIOError when somebody else has it for `timeout_s`.

    The kernel lets go of it when the process ends, however it ends.
    """
    deadline = time.monotonic() + timeout_s
    with opened_own(path, os.O_RDWR | os.O_CREAT) as fd:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(_POLL_S)
        yield


@contextlib.contextmanager
def shared_lock(path: Path) -> Iterator[int]:
    """Hold a shared flock(2) on the file or folder `path`, which exists; its descriptor.

    Taken at once or not at all: BlockingIOError while somebody has it exclusively. The kernel
    lets go of it when the process ends, however it ends.
    """
    with _lock_now(path, fcntl.LOCK_SH) as fd:
        yield fd


@contextlib.contextmanager
def sole_lock(path: Path) -> Iterator[int]:
    """The same, but exclusive: BlockingIOError while anybody else has it."""
    with _lock_now(path, fcntl.LOCK_EX) as fd:
        yield fd


@contextlib.contextmanager
def _lock_now(path: Path, how: int) -> Iterator[int]:
    with opened(path, os.O_RDONLY) as fd:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
        try:
            yield fd
        finally:
            # A process that is being started has a copy of the descriptor for a moment.
            fcntl.flock(fd, fcntl.LOCK_UN)


def lock_for_good(fd: int) -> None:
    """Take an exclusive flock(2) on an open file, at once, until the last copy of `fd` is closed.

    Whoever was given a copy, by a fork or over a socket, holds it, too. Raises BlockingIOError.
    """
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def is_locked(path: Path) -> bool:
    """Whether anybody has an exclusive flock(2) on the file `path`. Raises OSError."""
    try:
        with shared_lock(path):
            return False
    except BlockingIOError:
        return True


def is_open_for_writing(path: Path) -> bool:
    """Whether any process has the file open for writing, or mapped so, whoever can see it.

    fcntl(2): the kernel grants a lease for reading only if not. True where it grants none at all.
    """
    with opened(path, os.O_RDONLY | os.O_NOFOLLOW) as fd:
        try:
            # Who opens it meanwhile waits until we close it, and we are told; not by SIGIO.
            fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        except OSError:
            return True
        return False


def allocated_bytes(fd: int) -> int:
    """What the file takes on its file system, including its own bookkeeping (`st_blocks`)."""
    return os.fstat(fd).st_blocks * 512


def require_own(folder: Path) -> None:
    """HostError for a folder where another user could put files, or files in place of ours.

    Anybody may make a folder in /dev/shm before we do. Where a folder is sticky, as /dev/shm is
    itself, nobody can put another in place of ours.
    """
    status = folder.lstat()
    shared = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    reachable = shared and not status.st_mode & stat.S_ISVTX
    ours = stat.S_ISDIR(status.st_mode) and status.st_uid in (0, os.geteuid())
    if reachable or not ours:
        raise HostError(
            f"{folder} belongs to another user, or others may write to it, so it is not safe for "
            "guest memory; remove it, or choose another folder with DCRES_RAM or DCRES_RUN"
        )


def fs_free_bytes(path: str | os.PathLike[str]) -> int:
    """What the file system of `path` has left for this user."""
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


def free_in(folder: Path) -> int:
    """The same for a folder that need not exist yet."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    return fs_free_bytes(there)
