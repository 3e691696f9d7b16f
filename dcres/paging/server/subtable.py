"""The page sub-table of a sub host: which pages are here, and their data.

Both live in one sparse file on tmpfs, as long as the VM's memory: offset = page number ×
4096, a hole where the page is not here. So it survives the memory server, and has the very
shape of the memory file that a checkpoint makes of it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Self

from dcres.errors import NoRoom, PagesLost
from dcres.linux import files
from dcres.model.pages import (
    PAGE_SIZE,
    Extents,
    Mask,
    count_pages,
    extents_of_mask,
    extents_within,
    mask_of_extents,
)
from dcres.paging.changes import DirtyBitmap

ATTEND_EVERY = 2  # runs: some 20 µs


def _nobody_waits() -> None:
    return


class SubTable:
    """The pages that one sub host holds for one VM. Not for several threads."""

    def __init__(self, path: Path, page_count: int, capacity_pages: int) -> None:
        self._fd = files.open_own(path, os.O_RDWR | os.O_CREAT)
        os.ftruncate(self._fd, page_count * PAGE_SIZE)
        self.page_count = page_count
        self.capacity_pages = capacity_pages
        self.changes: DirtyBitmap | None = None  # who wants to know what comes and goes
        self.attend: Callable[[], None] = _nobody_waits  # called now and then in the middle of work
        here = files.data_extents(self._fd, page_count)
        self._here: Mask = mask_of_extents(here, page_count)
        self.held_pages = count_pages(here)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    @property
    def store(self) -> tuple[int, Mask]:
        """The file's descriptor, and which pages are in it; both as they are at any time."""
        return self._fd, self._here

    def existence(self, first: int, count: int) -> Mask:
        """Which of `count` pages from `first` are here."""
        return self._here[first : first + count]

    def read(self, extents: Extents) -> list[bytes]:
        """The data of `extents`, one piece each. Raises PagesLost if one page is not here."""
        pieces = []
        for first, stop in extents.tolist():
            here = self._here[first:stop]
            if not (here[0] if stop == first + 1 else here.all()):
                raise PagesLost(f"pages {first} to {stop - 1} are not all on this sub host")
            pieces.append(os.pread(self._fd, (stop - first) * PAGE_SIZE, first * PAGE_SIZE))
        return pieces

    def peek(self, extents: Extents) -> tuple[Extents, list[bytes]]:
        """Those pages of `extents` that are here, and their data, one piece for each row."""
        here = extents_within(extents, self._here)
        return here, self.read(here)

    def write(self, extents: Extents, data: memoryview) -> None:
        """Take pages in. Raises NoRoom before anything changed, when they do not fit.

        Also when the tmpfs is full: then runs before the one that failed are here.
        """
        added = sum(
            stop - first - int(self._here[first:stop].sum()) for first, stop in extents.tolist()
        )
        if added and self.held_pages + added > self.capacity_pages:
            raise NoRoom(
                f"this sub host holds {self.held_pages} of {self.capacity_pages} pages and "
                f"cannot take {added} more"
            )
        at = 0
        for count, (first, stop) in enumerate(extents.tolist()):
            length = (stop - first) * PAGE_SIZE
            self._write_run(first, stop, data[at : at + length])
            at += length
            if count % ATTEND_EVERY == 0:
                self.attend()

    def _write_run(self, first: int, stop: int, data: memoryview) -> None:
        written = 0
        try:
            written = os.pwrite(self._fd, data, first * PAGE_SIZE)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
        finally:
            if written != len(data):
                self._undo(first, stop)
        if written != len(data):
            raise NoRoom("the tmpfs that holds this sub host's pages is full; give it more room")
        self.held_pages += stop - first - int(self._here[first:stop].sum())
        self._here[first:stop] = True
        if self.changes is not None:
            self.changes.mark(first, stop)

    def _undo(self, first: int, stop: int) -> None:
        """Take the pages out again that a write cut short has left, and were not here before.

        A full tmpfs takes what it has room for. Whoever saves this host's pages, or opens this
        file after us, finds them in the file; so none may be there that is not here.
        """
        for low, high in (extents_of_mask(~self._here[first:stop]) + first).tolist():
            files.punch_hole(self._fd, low * PAGE_SIZE, (high - low) * PAGE_SIZE)
        if self.changes is not None:
            self.changes.mark(first, stop)

    def release(self, extents: Extents | Iterable[tuple[int, int]]) -> None:
        """Forget pages; those that are not here are holes afterwards, too."""
        for count, (first, stop) in enumerate(extents):
            if count % ATTEND_EVERY == 0:
                self.attend()
            files.punch_hole(self._fd, int(first) * PAGE_SIZE, int(stop - first) * PAGE_SIZE)
            here = int(self._here[first:stop].sum())
            self._here[first:stop] = False
            self.held_pages -= here
            if here and self.changes is not None:
                self.changes.mark(int(first), int(stop))
