"""The disk by itself: O_DIRECT in large aligned pieces from two threads, as memory files are.

The yardstick for checkpoint and restore, so it shares no code with them.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from dcres.errors import StorageError
from dcres.linux.files import aligned_buffer, open_direct

PIECE_BYTES = 4 << 20
THREADS = 2


def write(path: Path, length_bytes: int) -> float:
    """Seconds to write a new file of `length_bytes` at `path`, until it is durable."""
    path.unlink(missing_ok=True)
    fd = _open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        started = time.perf_counter()
        _in_pieces(length_bytes, lambda piece, at: os.pwrite(fd, piece, at))
        os.fsync(fd)
        return time.perf_counter() - started
    finally:
        os.close(fd)


def read(path: Path) -> float:
    """Seconds to read all of `path` from the disk."""
    fd = _open(path, os.O_RDONLY)
    try:
        started = time.perf_counter()
        _in_pieces(os.fstat(fd).st_size, lambda piece, at: os.preadv(fd, [piece], at))
        return time.perf_counter() - started
    finally:
        os.close(fd)


def _open(path: Path, flags: int) -> int:
    fd, direct = open_direct(path, flags)
    if not direct:
        os.close(fd)
        raise StorageError(f"the file system of {path} knows no O_DIRECT; choose another folder")
    return fd


def _in_pieces(length_bytes: int, move: Callable[[memoryview, int], int]) -> None:
    """Call ``move(piece, offset)`` for every piece, from `THREADS` threads."""
    failures: list[BaseException] = []

    def work(first: int) -> None:
        buffer = aligned_buffer(PIECE_BYTES)
        buffer[:] = os.urandom(PIECE_BYTES)
        try:
            for at in range(first * PIECE_BYTES, length_bytes, THREADS * PIECE_BYTES):
                length = min(PIECE_BYTES, length_bytes - at)
                if move(memoryview(buffer)[:length], at) != length:
                    raise StorageError("the disk moved less than it was told to")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
