"""Where a memory file that is being written has its pages: the two ways, behind one face.

*Sparse*: a page lies at its page number, and what is not here is a hole. *Packed*: pages lie
close together in the order in which they came; a page saved again overwrites its place, and the
place of one that left goes to the next that comes. When the file is finished, the last pages
move into the places that are still free, so it is exactly as long as its pages.

A packed file is written in long runs however the pages are scattered. A sparse file that takes
every second page of memory is made of single blocks, at a fifth of the disk's speed.

Long runs are written with O_DIRECT: 1,400 MB/s on ext4 here against 400 through the page cache.
For short runs it is the other way round, since ext4 fills a hole under the inode's lock, one
write at a time: runs of 16 pages 500 against 1,000 MB/s, single pages 70 against 285, with
writeback started after every batch.

Both touch one file, but never at the same time: `PagePlaces.prepare` sorts pages into those to
write directly, and those to write through the cache when that is done. ext4 and XFS make a cached
write wait until no direct one is under way, and the other way round; and open(2) warns of file
systems where the two do not agree about neighbours that share a folio of the cache.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from dcres.errors import Conflict, StorageError
from dcres.linux.files import (
    allocate,
    allocated_bytes,
    data_extents,
    open_direct,
    open_own,
    punch_hole,
)
from dcres.linux.removal import created
from dcres.model.pages import (
    EMPTY,
    PAGE_SIZE,
    Extents,
    Mask,
    Pages,
    count_pages,
    extents_of_mask,
    extents_of_pages,
    pages_of_extents,
)
from dcres.storage.engine.bulk import read_fully, stretches, write_scattered
from dcres.storage.engine.transfer import BATCH_PAGES, BUFFERS, Batch

Places = npt.NDArray[np.uint32]

NO_PLACE = 0xFFFFFFFF
_SHORTEST_DIRECT = 128
# ext4 needs a block of extents for 340 runs, or 170 after splits: 0.6 % of a file whose pages
# lie apart, and a few blocks at least. Other file systems need less.
_BOOKKEEPING_SHARE = 0.01
_BOOKKEEPING_BYTES = 64 << 10


class PageFile:
    """A new file, mode 0600: long runs go past the page cache, short ones through it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
            self._direct_fd, self._direct = open_direct(path, flags)
            self.created = created(path, self._direct_fd, flags)
        except FileExistsError:
            raise Conflict(f"{path} exists already; discard that checkpoint first") from None
        try:
            self.fd = open_own(path, os.O_RDWR)
        except BaseException:
            os.close(self._direct_fd)
            raise

    def close(self) -> None:
        """Close its descriptors."""
        os.close(self.fd)
        os.close(self._direct_fd)

    def write(self, batch: Batch, places: Pages, cached: bool, again: bool) -> None:
        """Write the pages of `batch` at ascending `places`, one for each. Raises OSError.

        What was written there before is likely to be written once more, so if `again` the cache
        keeps it until `sync`: a guest writes to the same pages in every round, and single pages
        are what a disk is slowest at.
        """
        fd = self.fd if cached else self._direct_fd
        write_scattered(fd, batch.data, places, batch.slots)
        if (cached or not self._direct) and not again:
            # posix_fadvise(2): starts writing back, which fsync would do all at the end.
            first, last = int(places[0]), int(places[-1])
            length = (last + 1 - first) * PAGE_SIZE
            os.posix_fadvise(self.fd, first * PAGE_SIZE, length, os.POSIX_FADV_DONTNEED)

    def sync(self) -> None:
        """Make it durable, whichever descriptor wrote it. Raises OSError."""
        os.fsync(self.fd)


@dataclass(frozen=True, slots=True, eq=False)
class Passes:
    """What is written past the page cache, and then what is written through it."""

    direct: Extents
    cached: Extents


class PagePlaces(Protocol):
    """How a format places pages. `write` and `clear` are called from several threads."""

    def prepare(self, extents: Extents) -> Passes:
        """Pages that will be written next: make room on the disk. Raises OSError if it is full.

        All pages of the first pass are written, or cleared, before any of the second.
        """

    def line_up(self, pages: Pages) -> None:
        """New pages, whose places are to be in this order whichever is written first."""

    def write(self, batch: Batch, cached: bool) -> None:
        """Put pages of one pass in their places, for the first time or again. Raises OSError."""

    def clear(self, pages: Pages) -> None:
        """Ascending pages need no place any more, if they had one. Raises OSError."""

    def finish(self) -> None:
        """Nothing will be written any more. Raises OSError."""

    def check(self) -> int:
        """Bytes that the file takes; StorageError unless it holds its pages and only them."""

    @property
    def order(self) -> Pages | None:
        """The page at every place, or None where a page's place is its number."""


class SparsePlaces:
    """The place of a page is its number."""

    def __init__(self, file: PageFile, page_count: int) -> None:
        self._file = file
        self._taken: Mask = np.zeros(page_count, dtype=np.bool_)  # blocks, written or reserved
        os.ftruncate(file.fd, page_count * PAGE_SIZE)

    def prepare(self, extents: Extents) -> Passes:
        """Blocks for long runs at once: ext4 then need not find them write by write."""
        long = extents[:, 1] - extents[:, 0] >= _SHORTEST_DIRECT
        for first, stop in extents[long].tolist():
            if allocate(self._file.fd, first * PAGE_SIZE, (stop - first) * PAGE_SIZE):
                self._taken[first:stop] = True
        return Passes(extents[long], extents[~long])

    def line_up(self, pages: Pages) -> None:
        """See `PagePlaces`: their places are their numbers."""

    def write(self, batch: Batch, cached: bool) -> None:
        """See `PagePlaces`."""
        mostly_again = 2 * np.count_nonzero(self._taken[batch.pages]) > len(batch.pages)
        self._file.write(batch, batch.pages, cached, again=cached and bool(mostly_again))
        self._taken[batch.pages] = True

    def clear(self, pages: Pages) -> None:
        """See `PagePlaces`."""
        there = pages[self._taken[pages]]
        for first, stop in extents_of_pages(there).tolist():
            punch_hole(self._file.fd, first * PAGE_SIZE, (stop - first) * PAGE_SIZE)
        self._taken[there] = False

    def finish(self) -> None:
        """See `PagePlaces`."""

    def check(self) -> int:
        """See `PagePlaces`."""
        found = data_extents(self._file.fd, len(self._taken))
        held = int(np.count_nonzero(self._taken)) * PAGE_SIZE
        allocated = allocated_bytes(self._file.fd)
        wrong = not np.array_equal(found, extents_of_mask(self._taken))
        if wrong or allocated > held * (1 + _BOOKKEEPING_SHARE) + _BOOKKEEPING_BYTES:
            raise StorageError(
                f"{self._file.path} holds {held} bytes in pages and takes {allocated}, or has its "
                "holes elsewhere: the file system does not keep holes page by page; put the store "
                "on ext4, XFS, btrfs or tmpfs, or take packed checkpoints (--format packed)"
            )
        return allocated

    @property
    def order(self) -> Pages | None:
        """See `PagePlaces`."""
        return None


class PackedPlaces:
    """Pages lie one after the other; `order` says which."""

    def __init__(self, file: PageFile, page_count: int) -> None:
        self._file = file
        self._place: Places = np.full(page_count, NO_PLACE, dtype=np.uint32)
        self._page: Places = np.zeros(0, dtype=np.uint32)  # at every place; may be longer
        self._free: Pages = np.empty(0, dtype=np.int64)
        self._end = 0
        self._lock = threading.Lock()

    def prepare(self, extents: Extents) -> Passes:
        """New pages take what places are free, and the others lie one after the other at the end.

        So the file never has more places than memory has pages, and a first save is one long run.
        """
        if len(extents) and not self._end:  # the first save; what follows takes 25 ns a page
            allocate(self._file.fd, 0, count_pages(extents) * PAGE_SIZE)
            return Passes(extents, EMPTY)
        pages = pages_of_extents(extents)
        places = self._place[pages].astype(np.int64)
        is_new = places == NO_PLACE
        direct: Mask = np.zeros(len(pages), dtype=np.bool_)
        direct[np.flatnonzero(is_new)[len(self._free) :]] = True
        if direct.any():
            count = int(np.count_nonzero(direct))
            allocate(self._file.fd, self._end * PAGE_SIZE, count * PAGE_SIZE)
        direct[np.flatnonzero(~is_new)[_in_long_runs(places[~is_new])]] = True
        return Passes(extents_of_pages(pages[direct]), extents_of_pages(pages[~direct]))

    def write(self, batch: Batch, cached: bool) -> None:
        """See `PagePlaces`."""
        places = self._places_for(batch.pages, at_the_end=not cached)
        if (places[1:] < places[:-1]).any():  # new pages between others that have their places
            ascending = np.argsort(places)
            batch, places = batch.chosen(ascending), places[ascending]
        # Short runs are pages saved again, or new ones in places that were written before.
        if batch.together:
            self._file.write(batch, places, cached, again=cached)
            return
        # Copying costs a tenth of what a request of many small segments does to the disk.
        with BUFFERS.lent() as scratch:
            self._file.write(batch.copied(scratch), places, cached, again=cached)

    def line_up(self, pages: Pages) -> None:
        """See `PagePlaces`."""
        with self._lock:
            self._give(pages, self._free[:0])

    def _places_for(self, pages: Pages, at_the_end: bool) -> Pages:
        with self._lock:
            lacking = pages[self._place[pages] == NO_PLACE]
            self._give(lacking, self._free[: 0 if at_the_end else len(lacking)])
            return self._place[pages].astype(np.int64)

    def _give(self, pages: Pages, free: Pages) -> None:
        """A place for each of `pages`: the first `free` ones, and then new ones at the end."""
        self._free = self._free[len(free) :]
        stop = self._end + len(pages) - len(free)
        places = np.concatenate((free, np.arange(self._end, stop)))
        self._end = stop
        if stop > len(self._page):
            longer = np.zeros(max(stop, 2 * len(self._page)), dtype=np.uint32)
            longer[: len(self._page)] = self._page
            self._page = longer
        self._place[pages] = places
        self._page[places] = pages

    def clear(self, pages: Pages) -> None:
        """See `PagePlaces`."""
        with self._lock:
            there = pages[self._place[pages] != NO_PLACE]
            self._free = np.union1d(self._free, self._place[there].astype(np.int64))
            self._place[there] = NO_PLACE

    def finish(self) -> None:
        """Fill the places that are free with the last pages, and cut the file there."""
        count = self._end - len(self._free)
        is_free = np.zeros(self._end, dtype=np.bool_)
        is_free[self._free] = True
        last = count + np.flatnonzero(~is_free[count:])
        with BUFFERS.lent() as scratch:
            for at in range(0, len(last), BATCH_PAGES):
                some = slice(at, at + BATCH_PAGES)
                self._move(last[some], self._free[: len(last)][some], scratch)
        self._free, self._end = np.empty(0, dtype=np.int64), count
        os.ftruncate(self._file.fd, count * PAGE_SIZE)

    def _move(self, sources: Pages, targets: Pages, scratch: memoryview) -> None:
        data = scratch[: len(sources) * PAGE_SIZE]
        pages = self._page[sources].astype(np.int64)
        batch = Batch(data, pages, np.arange(len(pages)), np.zeros(len(pages), dtype=np.uint64))
        for low, high in stretches(sources):
            read_fully(self._file.fd, batch.piece(low, high), int(sources[low]) * PAGE_SIZE)
        self._file.write(batch, targets, cached=True, again=True)
        self._page[targets] = pages

    def check(self) -> int:
        """See `PagePlaces`."""
        length_bytes = os.fstat(self._file.fd).st_size
        if length_bytes != self._end * PAGE_SIZE:
            what = f"has {length_bytes} bytes instead of {self._end * PAGE_SIZE}"
            raise StorageError(f"{self._file.path} {what}: another program wrote to it")
        return allocated_bytes(self._file.fd)

    @property
    def order(self) -> Pages | None:
        """See `PagePlaces`."""
        return self._page[: self._end].astype(np.int64)


def _in_long_runs(places: Pages) -> Mask:
    """Which of `places` lie in runs that are worth a direct write."""
    runs = np.array(stretches(places), dtype=np.int64).reshape(-1, 2)
    lengths = runs[:, 1] - runs[:, 0]
    found: Mask = np.repeat(lengths >= _SHORTEST_DIRECT, lengths)
    return found
