"""What a memory file must hold, and that it does: its tables against what is found in it.

It may be made of several files: their places are counted on from one to the next, and what a later
file has anew is *superseded* in the earlier one.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Self

import numpy as np
from xxhash import xxh3_64_intdigest

from dcres.model.pages import PAGE_SIZE, Mask, Pages
from dcres.storage.damage import corrupt, unreadable
from dcres.storage.digest import Sums
from dcres.storage.engine.bulk import EndOfFile, read_fully

SUM_OF_ZEROS = np.uint64(xxh3_64_intdigest(bytes(PAGE_SIZE)))
SUPERSEDED = -1  # in place of the page at a place that nobody is to read


@dataclass(frozen=True, slots=True)
class Piece:
    """One of the files that a memory file is made of, and how many places it has."""

    path: Path
    places: int


@dataclass(frozen=True, slots=True, eq=False)
class MemoryFile:
    """A memory file as its tables describe it.

    `mask` and `sums` have one entry per page of the VM; `sums` means something where `mask` is
    true. `order` is the page at every place of a packed file or `SUPERSEDED`, None for a sparse
    one. `more` are files whose places come before those of the one at `path`, oldest first.
    """

    path: Path
    mask: Mask
    sums: Sums
    order: Pages | None = None
    more: tuple[Piece, ...] = ()

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """Its files, in the order of their places."""
        places = len(self.mask) if self.order is None else len(self.order)
        before = sum(piece.places for piece in self.more)
        return (*self.more, Piece(self.path, places - before))

    def each(self) -> Iterator[MemoryFile]:
        """What is to be read of each file, as if it were one by itself; the last has the zeros."""
        if self.order is None or not self.more:
            yield self
            return
        stop = 0
        for piece in self.pieces:
            start, stop = stop, stop + piece.places
            order = self.order[start:stop]
            mask: Mask = np.zeros(len(self.mask), dtype=np.bool_)
            mask[order[is_live(order)]] = True
            if piece.path == self.path:
                mask |= self.mask & ~with_place(self)
            yield MemoryFile(piece.path, mask, self.sums, order)

    def path_of(self, page: int) -> Path:
        """The file that has `page`; the last one if it has no place."""
        if self.order is not None and self.more:
            stops = [*accumulate(piece.places for piece in self.more)]
            for place in np.flatnonzero(self.order == page).tolist():
                return self.pieces[bisect_right(stops, place)].path
        return self.path


def is_live(order: Pages) -> Mask:
    """Which places have a page that is to be read."""
    live: Mask = order != SUPERSEDED
    return live


def with_place(memory: MemoryFile) -> Mask:
    """Which pages have a place in a packed file."""
    found: Mask = np.zeros(len(memory.mask), dtype=np.bool_)
    if memory.order is not None:
        found[memory.order[is_live(memory.order)]] = True
    return found


def require_pages(memory: MemoryFile, found: Mask) -> None:
    """CheckpointCorrupt for a page that is present but should not be, or the other way round.

    A page of zeros needs no place. Copying can also turn one into a hole: cp(1) does that to
    copies of sparse files.
    """
    wrong = found != memory.mask
    if wrong.any():
        wrong &= ~memory.mask | (memory.sums != SUM_OF_ZEROS)
        for page in np.flatnonzero(wrong)[:1].tolist():
            what = "is missing (a hole)" if memory.mask[page] else "is present but should not be"
            raise corrupt(memory.path_of(page), f"page {page} {what}")


def require_sums(memory: MemoryFile, pages: Pages, found: Sums) -> None:
    """CheckpointCorrupt for the first of `pages` whose checksum `found` is not the right one."""
    bad = pages[found != memory.sums[pages]]
    if bad.size:
        path = memory.path_of(int(bad[0]))
        raise corrupt(path, f"page {bad[0]} was altered: its checksum differs")


class Opened:
    """The files of `memory`, open to be read as if they were one; for any number of threads.

    Raises CheckpointCorrupt for one that is missing or not as long as it must be.
    """

    def __init__(self, memory: MemoryFile, open_file: Callable[[Path], int]) -> None:
        self._memory = memory
        self._pieces = memory.pieces
        self._stops = [*accumulate(piece.places * PAGE_SIZE for piece in self._pieces)]
        with ExitStack() as files:
            self._fds = []
            for piece in self._pieces:
                try:
                    self._fds.append(open_file(piece.path))
                except OSError as error:
                    raise unreadable(piece.path, error) from None
                files.callback(os.close, self._fds[-1])
                _require_length(piece, self._fds[-1])
            self._files = files.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close them. Repeatable."""
        self._files.close()

    @property
    def first_fd(self) -> int:
        """The descriptor of the first file; a sparse one has no other."""
        return self._fds[0]

    def read(self, buffer: memoryview, offset_bytes: int) -> None:
        """Fill `buffer` from there on, across their borders. Raises CheckpointCorrupt."""
        while len(buffer):
            at = bisect_right(self._stops, offset_bytes)
            length_bytes = min(len(buffer), self._stops[at] - offset_bytes)
            self._read_one(at, buffer[:length_bytes], offset_bytes)
            buffer, offset_bytes = buffer[length_bytes:], offset_bytes + length_bytes

    def _read_one(self, at: int, buffer: memoryview, offset_bytes: int) -> None:
        piece = self._pieces[at]
        start_bytes = self._stops[at] - piece.places * PAGE_SIZE
        try:
            read_fully(self._fds[at], buffer, offset_bytes - start_bytes)
        except EndOfFile:
            where = self._name_of(offset_bytes // PAGE_SIZE)
            raise corrupt(piece.path, f"it ends at or after {where}") from None
        except OSError as error:
            where = self._name_of(offset_bytes // PAGE_SIZE)
            what = f"it cannot be read from {where} on ({error.strerror})"
            raise corrupt(piece.path, what) from None

    def _name_of(self, place: int) -> str:
        order = self._memory.order
        page = place if order is None else int(order[place])
        return "a page of before" if page == SUPERSEDED else f"page {page}"


def _require_length(piece: Piece, fd: int) -> None:
    length_bytes = os.fstat(fd).st_size
    if length_bytes != piece.places * PAGE_SIZE:
        what = f"it has {length_bytes} bytes instead of {piece.places * PAGE_SIZE}"
        raise corrupt(piece.path, what)
