"""One host's saved pages in one file, sparse or packed; each page's checksum is kept beside it.

A page that changes is saved again in its own place, and one that leaves gives its place up, so
the file does not grow however often pages are saved; `page_places` has the two formats. Pages of
zeros take no place: a reader knows them by their checksum.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from dcres.errors import Conflict, NoRoom, StorageError
from dcres.linux.files import data_extents, fs_free_bytes, open_direct
from dcres.model.formats import MemoryFormat
from dcres.model.pages import (
    PAGE_SIZE,
    Extents,
    Mask,
    Pages,
    extents_of_mask,
    mask_of_extents,
    pages_of_extents,
    split,
    split_pages,
)
from dcres.storage.atomic import store_written, sync_folder
from dcres.storage.digest import Sums
from dcres.storage.engine.bulk import write_scattered
from dcres.storage.engine.expected import (
    SUM_OF_ZEROS,
    MemoryFile,
    Opened,
    is_live,
    require_pages,
    require_sums,
    with_place,
)
from dcres.storage.engine.page_places import PackedPlaces, PageFile, PagePlaces, SparsePlaces
from dcres.storage.engine.sources import NO_ROOM, RamFile, Room, Staged, read_into_memory
from dcres.storage.engine.transfer import (
    BATCH_PAGES,
    Batch,
    Progress,
    Transfer,
    spanning,
)

Write = Callable[[memoryview, Pages, Pages], None]  # data, its pages, their slots in it

# While some wait for the disk, others read or compute. A save waits for the disk only, and with
# twice the threads is 6 % faster (1,900 to 2,010 MB/s here); a load waits for tmpfs, and is not.
SAVING_THREADS, LOADING_THREADS = 8, 4
_PLACES: dict[MemoryFormat, Callable[[PageFile, int], PagePlaces]] = {
    MemoryFormat.SPARSE: SparsePlaces,
    MemoryFormat.PACKED: PackedPlaces,
    MemoryFormat.SEGMENTED: PackedPlaces,
}


@dataclass(frozen=True, slots=True, eq=False)
class SavedMemory:
    """A sealed memory file, and what it took.

    `bytes_written` counts every write, `allocated_bytes` what the file takes on disk.
    """

    file: MemoryFile
    pages: int
    bytes_written: int
    allocated_bytes: int
    seconds: float

    @property
    def mask(self) -> Mask:
        """The pages that it has."""
        return self.file.mask


class MemoryFileWriter:
    """Writes a new memory file at `path`; unless sealed, the file is gone when the block ends.

    One call at a time. `progress` gets pages done since its last call. Raises Conflict if the file
    exists, StoreFull if the disk is full.
    """

    def __init__(
        self,
        path: Path,
        page_count: int,
        progress: Progress | None = None,
        clock: Callable[[], float] = time.monotonic,
        memory_format: MemoryFormat = MemoryFormat.SPARSE,
    ) -> None:
        self.path = path
        self._progress = progress
        self._clock = clock
        self._format = memory_format
        self._started = clock()
        self._mask: Mask = np.zeros(page_count, dtype=np.bool_)
        self._sums: Sums = np.zeros(page_count, dtype=np.uint64)
        self._bytes_written = 0
        self._lock = threading.Lock()
        self._whole = True
        self._sealed = False
        self._staged: list[tuple[Extents, memoryview]] = []
        self._room = NO_ROOM
        self._files = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as files, store_written(self.path):
            self._file = PageFile(self.path)
            files.callback(self._file.close)
            files.callback(self._remove_unless_sealed)
            self._places = _PLACES[self._format](self._file, len(self._mask))
            self._files = files.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        # The traceback of an error may keep us for long, and this memory is a guest's.
        self._room, self._staged = NO_ROOM, []
        self._files.close()

    def save(self, source_fd: int, extents: Extents, threads: int = SAVING_THREADS) -> None:
        """Copy `extents` from their places in `source_fd`; pages saved before are replaced.

        The checksum is taken from the copy, so a page that the guest writes meanwhile is saved
        torn but consistent; save it again later. A page that becomes a hole meanwhile is saved
        as zeros; discard it then. Raises StoreFull, ValueError if the source is shorter,
        OSError. After an error the file can only be abandoned.
        """
        self._require_unsealed()
        self._whole = False
        self._write(extents, RamFile(source_fd), threads)
        self._whole = True

    def discard(self, extents: Extents) -> None:
        """These pages are not here any more. Raises OSError, StoreFull: a hole may take a block."""
        self._require_unsealed()
        here = extents_of_mask(self._mask & mask_of_extents(extents, len(self._mask)))
        with store_written(self.path):
            self._places.clear(pages_of_extents(here))
        for first, stop in extents.tolist():
            self._mask[first:stop] = False

    def make_room(self, pages: int) -> None:
        """Get memory for `stage` to read so many pages into, which then need not wait for it.

        It may be given more, and fewer. Raises NoRoom.
        """
        if self._room.pages < pages:
            self._room = NO_ROOM  # given back first
            self._room = Room.of(pages)

    def stage(self, source_fd: int, extents: Extents) -> None:
        """Read `extents` into memory now, as fast as that goes; `settle` saves them later.

        Takes as much memory as the pages. Raises ValueError if the source is shorter, OSError.
        """
        self._require_unsealed()
        room, self._room = self._room, NO_ROOM
        for part in split_pages(extents, room.pages):
            if len(part):
                self._staged.append((part, read_into_memory(source_fd, part, room)))
            room = NO_ROOM

    def settle(self, threads: int = SAVING_THREADS) -> None:
        """Save what was staged, oldest first. Raises StoreFull, OSError."""
        self._require_unsealed()
        self._whole = False
        for extents, arena in self._staged:
            self._write(extents, Staged(arena, pages_of_extents(extents)), threads)
        self._staged.clear()
        self._whole = True

    def take_over(self, memory: MemoryFile, threads: int = SAVING_THREADS) -> None:
        """Copy all pages of a packed `memory`, in its order, so that all copies are alike.

        Each with the checksum that it has, with which it is compared on the way: none is made
        anew. Nothing else is saved before. Raises StoreFull, what `load` raises, and ValueError.
        """
        self._require_unsealed()
        if memory.order is None:
            raise ValueError(f"{memory.path} is not packed")
        self._whole = False
        with store_written(self.path):
            self._places.prepare(extents_of_mask(with_place(memory)))
        self._places.line_up(memory.order[is_live(memory.order)])

        def put(data: memoryview, pages: Pages, slots: Pages) -> None:
            self._put(False, Batch(data, pages, slots, memory.sums[pages]))

        _read_pages(memory, put, self._progress, threads, None)
        self._whole = True

    def _write(self, extents: Extents, source: RamFile | Staged, threads: int) -> None:
        with store_written(self.path):
            passes = self._places.prepare(extents)
        for part, cached in ((passes.direct, False), (passes.cached, True)):
            put = functools.partial(self._put, cached)
            transfer = Transfer(source.read, put, source.pages_at, source.reach)
            transfer.run(source.extents_of(part), threads, self._progress)

    def seal(self) -> SavedMemory:
        """Make the file durable and end the writing.

        Raises StorageError if a save failed, or if the file system does not keep the holes;
        StoreFull if the disk turned out to be full.
        """
        self._require_unsealed()
        if not self._whole or self._staged:
            raise StorageError(
                f"saving to {self.path} failed, so it cannot be part of a checkpoint"
            )
        with store_written(self.path):
            self._places.finish()
            self._file.sync()
            sync_folder(self.path.parent)
        allocated = self._places.check()
        self._sealed = True
        return SavedMemory(
            file=MemoryFile(self.path, self._mask, self._sums, self._places.order),
            pages=int(np.count_nonzero(self._mask)),
            bytes_written=self._bytes_written,
            allocated_bytes=allocated,
            seconds=self._clock() - self._started,
        )

    def _remove_unless_sealed(self) -> None:
        if not self._sealed:
            self._file.created.remove()

    def _require_unsealed(self) -> None:
        if self._sealed:
            raise Conflict(f"{self.path} is sealed; its checkpoint cannot change any more")

    def _put(self, cached: bool, batch: Batch) -> None:
        """Record and write the pages of `batch`; those of zeros only the former."""
        self._sums[batch.pages] = batch.sums
        self._mask[batch.pages] = True
        empty = _zeros(batch)
        with store_written(self.path):
            if empty.any():
                self._places.clear(batch.pages[empty])
                batch = batch.chosen(np.flatnonzero(~empty))
            if len(batch.pages):
                self._places.write(batch, cached)
        with self._lock:
            self._bytes_written += PAGE_SIZE * len(batch.pages)


def _zeros(batch: Batch) -> Mask:
    """Which pages of `batch` are nothing but zeros; a checksum alone would not be proof."""
    likely: Mask = batch.sums == SUM_OF_ZEROS
    for index in np.flatnonzero(likely).tolist():
        likely[index] = not np.frombuffer(batch.piece(index, index + 1), dtype=np.uint64).any()
    return likely


def load(
    memory: MemoryFile,
    target_fd: int,
    progress: Progress | None = None,
    threads: int = LOADING_THREADS,
    wanted: Mask | None = None,
) -> int:
    """Copy the pages of `memory` to their places in `target_fd`.

    With `wanted`, only those that are true there as well. Every page's checksum is compared
    before the page is written; nothing else of the target is touched. Returns the number of
    pages copied. Raises CheckpointCorrupt, which names the file and the first bad page, if the
    file is missing, shorter or longer than it must be, or holds other pages or other contents
    than its tables say; NoRoom if the target's file system is full; ValueError unless the target
    is as long as the VM's memory.
    """
    length_bytes = os.fstat(target_fd).st_size
    if length_bytes != len(memory.mask) * PAGE_SIZE:
        raise ValueError(f"the target has {length_bytes} bytes, not {len(memory.mask)} pages")

    # tmpfs lets one write at a time into a file, and who waits for that spins: a third more of
    # the processors' time with two threads at it.
    turn = threading.Lock()

    def write(data: memoryview, pages: Pages, slots: Pages) -> None:
        with turn:
            _write_target(target_fd, data, pages, slots)

    return _read_pages(memory, write, progress, threads, wanted)


def verify(
    memory: MemoryFile, progress: Progress | None = None, threads: int = LOADING_THREADS
) -> int:
    """Check all that `load` checks, and write nothing. Raises CheckpointCorrupt."""
    return _read_pages(memory, lambda data, pages, slots: None, progress, threads, None)


def _read_pages(
    memory: MemoryFile,
    write: Write,
    progress: Progress | None,
    threads: int,
    wanted: Mask | None,
) -> int:
    mask = memory.mask if wanted is None else memory.mask & wanted

    def put(batch: Batch) -> None:
        require_sums(memory, batch.pages, batch.sums)
        write(batch.data, batch.pages, batch.slots)

    with _opened(memory) as files:
        read = spanning(files.read)
        if memory.order is None:
            Transfer(read, put).run(extents_of_mask(mask), threads, progress)
        else:
            order = memory.order
            places = extents_of_mask(mask[order] & is_live(order))
            Transfer(read, put, lambda at: order[at]).run(places, threads, progress)
            _write_zeros(memory, mask, write, progress)
    return int(np.count_nonzero(mask))


def _write_zeros(
    memory: MemoryFile,
    mask: Mask,
    write: Write,
    progress: Progress | None,
) -> None:
    """The pages of `mask` that have no place, which `_opened` found to be pages of zeros."""
    zeros = memoryview(bytes(BATCH_PAGES * PAGE_SIZE))
    for first, stop in split(extents_of_mask(mask & ~with_place(memory)), BATCH_PAGES):
        write(zeros, np.arange(first, stop), np.arange(stop - first))
        if progress is not None:
            progress(stop - first)


@contextlib.contextmanager
def _opened(memory: MemoryFile) -> Iterator[Opened]:
    """The files of a memory file, once their lengths and what lies where were checked."""
    with Opened(memory, lambda path: open_direct(path, os.O_RDONLY)[0]) as files:
        if memory.order is None:
            here = data_extents(files.first_fd, len(memory.mask))
            require_pages(memory, mask_of_extents(here, len(memory.mask)))
        else:
            require_pages(memory, with_place(memory))
        yield files


def _write_target(fd: int, data: memoryview, pages: Pages, slots: Pages) -> None:
    try:
        write_scattered(fd, data, pages, slots)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        name = os.readlink(f"/proc/self/fd/{fd}")
        raise NoRoom(
            f"no room for guest memory in {name} ({fs_free_bytes(f'/proc/self/fd/{fd}')} bytes "
            "are free); enlarge that tmpfs or give this host a smaller share"
        ) from None
