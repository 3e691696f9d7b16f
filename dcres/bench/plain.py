"""A plain file of a host's pages, one after the other: the yardstick for the memory formats.

No checksums, no index and no second save of a page: what it takes at least to bring pages from
tmpfs to the disk and back. It uses the disk as the formats do (O_DIRECT in pieces of 4 MiB, by as
many threads, buffers that are kept, blocks taken at once, reads through small gaps) and shares
nothing else with them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dcres.errors import StorageError
from dcres.linux.files import allocate, open_direct
from dcres.model.pages import PAGE_SIZE, Pages
from dcres.storage.engine.buffers import Buffers

_SAVING_THREADS, _LOADING_THREADS = 8, 4
_PIECE_PAGES = 1024
_WIDEST_PAGES = 4096
_PIECES, _WIDE = Buffers(_PIECE_PAGES * PAGE_SIZE), Buffers(_WIDEST_PAGES * PAGE_SIZE)

Move = Callable[[memoryview, memoryview, int, Pages], None]


def save(path: Path, ram_fd: int, pages: Pages) -> None:
    """Write `pages` (ascending) of a RAM file to the new file `path`: durable on return."""
    fd, _ = open_direct(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        allocate(fd, 0, len(pages) * PAGE_SIZE)

        def move(piece: memoryview, wide: memoryview, at: int, some: Pages) -> None:
            _gather(ram_fd, piece, wide, some)
            _whole(os.pwrite(fd, piece, at * PAGE_SIZE), piece)

        _in_pieces(pages, move, _SAVING_THREADS)
        os.fsync(fd)
        _sync_folder(path.parent)
    finally:
        os.close(fd)


def load(path: Path, ram_fd: int, pages: Pages) -> None:
    """Put the pages that `save` wrote back in their places."""
    fd, _ = open_direct(path, os.O_RDONLY)
    try:

        def move(piece: memoryview, _: memoryview, at: int, some: Pages) -> None:
            _whole(os.preadv(fd, [piece], at * PAGE_SIZE), piece)
            cuts = np.flatnonzero(np.diff(some) != 1) + 1
            lows, highs = [0, *cuts.tolist()], [*cuts.tolist(), len(some)]
            for low, high in zip(lows, highs, strict=True):
                run = piece[low * PAGE_SIZE : high * PAGE_SIZE]
                _whole(os.pwrite(ram_fd, run, int(some[low]) * PAGE_SIZE), run)

        _in_pieces(pages, move, _LOADING_THREADS)
    finally:
        os.close(fd)


def _gather(ram_fd: int, piece: memoryview, wide: memoryview, pages: Pages) -> None:
    """Fill `piece` with `pages`: by one read if they are near each other, else one by one."""
    first, span = int(pages[0]), int(pages[-1]) - int(pages[0]) + 1
    if span == len(pages):
        _whole(os.preadv(ram_fd, [piece], first * PAGE_SIZE), piece)
    elif span <= _WIDEST_PAGES:
        read = wide[: span * PAGE_SIZE]
        _whole(os.preadv(ram_fd, [read], first * PAGE_SIZE), read)
        rows = np.frombuffer(read, dtype=np.uint64).reshape(span, -1)
        target = np.frombuffer(piece, dtype=np.uint64).reshape(len(pages), -1)
        np.take(rows, pages - first, axis=0, out=target, mode="clip")
    else:
        for at, page in enumerate(pages.tolist()):
            one = piece[at * PAGE_SIZE : (at + 1) * PAGE_SIZE]
            _whole(os.preadv(ram_fd, [one], page * PAGE_SIZE), one)


def _whole(moved: int, data: memoryview) -> None:
    if moved != len(data):
        raise StorageError(f"{moved} of {len(data)} bytes were moved")


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _in_pieces(pages: Pages, move: Move, threads: int) -> None:
    """Call ``move(piece, wide, at, pages)`` for every piece, from so many threads."""
    starts = iter(range(0, len(pages), _PIECE_PAGES))
    turn = threading.Lock()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            with _PIECES.lent() as piece, _WIDE.lent() as wide:
                while True:
                    with turn:
                        at = next(starts, None)
                    if at is None or failures:
                        return
                    some = pages[at : at + _PIECE_PAGES]
                    move(piece[: len(some) * PAGE_SIZE], wide, at, some)
        except BaseException as error:
            failures.append(error)

    crew = [threading.Thread(target=work) for _ in range(threads)]
    for thread in crew:
        thread.start()
    for thread in crew:
        thread.join()
    if failures:
        raise failures[0]
