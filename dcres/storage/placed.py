"""Where a memory file that is being written has its pages: the two formats, behind one face.

*Sparse*: a page lies at its page number, and what is not here is a hole. *Packed*: pages lie
close together in the order in which they came; a page saved again overwrites its place, and the
place of one that left goes to the next that comes. When the file is finished, the last pages
move into the places that are still free, so it is exactly as long as its pages.

A packed file is written in long runs however the pages are scattered. A sparse file that takes
every second page of memory is made of single blocks, at a fifth of the disk's speed.

Long runs are written with O_DIRECT: 1,400 MB/s on ext4 here against 400 through the page cache.
For short runs it is the other way round, since ext4 fills a hole under the inode's lock, one
write at a time: runs of 16 pages 500 against 1,000 MB/s, single pages 70 against 285, with
writeback started after every batch. Both may touch one file: a direct write first writes back
and drops the cached pages it covers.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from dcres.errors import Conflict, StorageError
from dcres.linux.files import (
    aligned_buffer,
    allocate,
    allocated_bytes,
    data_extents,
    open_direct,
    punch_hole,
)
from dcres.model.pages import (
    PAGE_SIZE,
    Extents,
    Mask,
    Pages,
    extents_of_mask,
    extents_of_pages,
    mask_of_extents,
)
from dcres.storage.transfer import (
    BATCH_PAGES,
    Batch,
    read_fully,
    stretches,
    write_fully,
)

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
            self._direct_fd, _ = open_direct(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        except FileExistsError:
            raise Conflict(f"{path} exists already; discard that checkpoint first") from None
        try:
            self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except BaseException:
            os.close(self._direct_fd)
            raise

    def close(self) -> None:
        """Close its descriptors."""
        os.close(self.fd)
        os.close(self._direct_fd)

    def write(self, batch: Batch, places: Pages) -> None:
        """Write the pages of `batch` at `places`, one for each; neighbours among the places
        are neighbours in the batch's data. Raises OSError.
        """
        cached = False
        for low, high in stretches(places):
            short = high - low < _SHORTEST_DIRECT
            fd = self.fd if short else self._direct_fd
            write_fully(fd, batch.piece(low, high), int(places[low]) * PAGE_SIZE)
            cached |= short
        if cached:  # posix_fadvise(2): starts writing back, which fsync would do all at the end
            first, last = int(places.min()), int(places.max())
            length = (last + 1 - first) * PAGE_SIZE
            os.posix_fadvise(self.fd, first * PAGE_SIZE, length, os.POSIX_FADV_DONTNEED)

    def sync(self) -> None:
        """Make it durable. Raises OSError."""
        os.fsync(self.fd)
        os.fsync(self._direct_fd)


class Placed(Protocol):
    """How a format places pages. `write` and `clear` are called from several threads."""

    def reserve(self, extents: Extents) -> None:
        """Pages that will be written next: make room on the disk. Raises OSError if it is full."""

    def write(self, batch: Batch) -> None:
        """Put pages in their places, for the first time or again. Raises OSError."""

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

    def reserve(self, extents: Extents) -> None:
        """Blocks for long runs at once: ext4 then need not find them write by write."""
        for first, stop in extents[extents[:, 1] - extents[:, 0] >= _SHORTEST_DIRECT].tolist():
            if allocate(self._file.fd, first * PAGE_SIZE, (stop - first) * PAGE_SIZE):
                self._taken[first:stop] = True

    def write(self, batch: Batch) -> None:
        """See `Placed`."""
        self._file.write(batch, batch.pages)
        self._taken[batch.pages] = True

    def clear(self, pages: Pages) -> None:
        """See `Placed`."""
        there = pages[self._taken[pages]]
        for first, stop in extents_of_pages(there).tolist():
            punch_hole(self._file.fd, first * PAGE_SIZE, (stop - first) * PAGE_SIZE)
        self._taken[there] = False

    def finish(self) -> None:
        """See `Placed`."""

    def check(self) -> int:
        """See `Placed`."""
        found = data_extents(self._file.fd, len(self._taken))
        wrong = not np.array_equal(found, extents_of_mask(self._taken))
        return _checked_size(self._file, int(np.count_nonzero(self._taken)), wrong)

    @property
    def order(self) -> Pages | None:
        """See `Placed`."""
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
        self._local = threading.local()

    def reserve(self, extents: Extents) -> None:
        """See `Placed`."""
        lacking = mask_of_extents(extents, len(self._place)) & (self._place == NO_PLACE)
        more = int(np.count_nonzero(lacking)) - len(self._free)
        if more > 0:
            allocate(self._file.fd, self._end * PAGE_SIZE, more * PAGE_SIZE)

    def write(self, batch: Batch) -> None:
        """See `Placed`."""
        self._file.write(batch.together(self._scratch), self._places_for(batch.pages))

    @property
    def _scratch(self) -> memoryview:
        """This thread's buffer; untouched it costs nothing."""
        if not hasattr(self._local, "scratch"):
            self._local.scratch = memoryview(aligned_buffer(BATCH_PAGES * PAGE_SIZE))
        found: memoryview = self._local.scratch
        return found

    def _places_for(self, pages: Pages) -> Pages:
        with self._lock:
            lacking = pages[self._place[pages] == NO_PLACE]
            self._give(lacking)
            return self._place[pages].astype(np.int64)

    def _give(self, pages: Pages) -> None:
        """A place for each of `pages`: free ones first, then new ones at the end."""
        free = self._free[: len(pages)]
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
        """See `Placed`."""
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
        for source, target in zip(last.tolist(), self._free[: len(last)].tolist(), strict=True):
            self._move(source, target)
        self._free, self._end = np.empty(0, dtype=np.int64), count
        os.ftruncate(self._file.fd, count * PAGE_SIZE)

    def _move(self, source: int, target: int) -> None:
        data = memoryview(bytearray(PAGE_SIZE))
        read_fully(self._file.fd, data, source * PAGE_SIZE)
        write_fully(self._file.fd, data, target * PAGE_SIZE)
        page = self._page[source]
        self._page[target] = page
        self._place[page] = target

    def check(self) -> int:
        """See `Placed`."""
        wrong = os.fstat(self._file.fd).st_size != self._end * PAGE_SIZE
        return _checked_size(self._file, self._end, wrong)

    @property
    def order(self) -> Pages | None:
        """See `Placed`."""
        return self._page[: self._end].astype(np.int64)


def _checked_size(file: PageFile, pages: int, wrong: bool) -> int:
    allocated = allocated_bytes(file.fd)
    held = pages * PAGE_SIZE
    if wrong or allocated > held * (1 + _BOOKKEEPING_SHARE) + _BOOKKEEPING_BYTES:
        raise StorageError(
            f"{file.path} holds {held} bytes in pages and takes {allocated}, or has its holes "
            "elsewhere: the file system does not keep holes page by page; put the store on "
            "ext4, XFS, btrfs or tmpfs, or take packed checkpoints (--format packed)"
        )
    return allocated
