"""The engine under saving, loading and verifying: read → checksum → put, in large pieces.

Pages are moved in *batches*: runs that one read covers, gaps between them included, or, where a
page can be read as well by itself, runs that lie anywhere.
Several threads take batches from one queue, each with one of `BUFFERS`, so while one waits for
the disk another reads or computes. A batch is cut by how much has to be read, so no thread is
left with the long end of the work.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from dcres.errors import StorageError
from dcres.model.pages import PAGE_SIZE, Extents, Pages, count_pages, pages_of_extents
from dcres.storage.digest import Sums
from dcres.storage.engine.buffers import Buffers
from dcres.storage.engine.bulk import WIDEST_GAP, page_sums

Progress = Callable[[int], None]
Read = Callable[[memoryview, Extents], tuple[Pages, Sums]]

BATCH_PAGES = 1024
WIDEST_BATCH = 2 * BATCH_PAGES
_ROWS_AT_ONCE = 1 << 16

BUFFERS = Buffers(WIDEST_BATCH * PAGE_SIZE)


@dataclass(frozen=True, slots=True)
class Reach:
    """How far the pages of a batch may lie apart: the widest gap, and from first to last."""

    gap: int
    span: int


# One read covers a batch: reading a small gap is cheaper than another call to a disk. A sparse
# file whose pages alternate between hosts is read at 350 MB/s this way (ext4, O_DIRECT).
NEAR = Reach(WIDEST_GAP, WIDEST_BATCH)
# Every run is read by itself if need be. The pages that a guest has written since the last round
# may be anywhere, and a batch for a few of them each would cost more than their copying.
ANYWHERE = Reach(1 << 62, 1 << 62)


def batches(extents: Extents, reach: Reach = NEAR) -> Iterator[Extents]:
    """`extents` cut into batches of at most `BATCH_PAGES`, in order, each within `reach`."""
    for row in range(0, len(extents), _ROWS_AT_ONCE):
        yield from _batches(extents[row : row + _ROWS_AT_ONCE], reach)


def _batches(extents: Extents, reach: Reach) -> Iterator[Extents]:
    firsts, stops = extents[:, 0], extents[:, 1]
    before = np.concatenate(([0], np.cumsum(stops - firsts)))  # pages before each extent
    far = np.append(np.flatnonzero(firsts[1:] - stops[:-1] > reach.gap) + 1, len(extents))
    row, done = 0, 0  # the next page is `done` pages into extent `row`
    while row < len(extents):
        first = int(firsts[row]) + done
        full = int(before[row]) + done + BATCH_PAGES
        # The extents up to `end` fit whole, if any does.
        end = min(
            int(far[np.searchsorted(far, row, side="right")]),
            int(np.searchsorted(stops, first + reach.span, side="right")),
            int(np.searchsorted(before, full, side="right")) - 1,
        )
        if end > row:
            batch = extents[row:end].copy()
            batch[0, 0] = first
            row, done = end, 0
        else:
            batch = np.array([[first, first + BATCH_PAGES]])
            done += BATCH_PAGES
        yield batch


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Pages in memory: page number `pages[i]` lies in `data` at page `slots[i]`.

    `sums` are their checksums. `data` is used again as soon as the batch has been put away.
    """

    data: memoryview
    pages: Pages
    slots: Pages
    sums: Sums

    def piece(self, low: int, high: int) -> memoryview:
        """The data of pages `low` to `high` - 1 of the batch, whose slots are neighbours."""
        first = int(self.slots[low])
        return self.data[first * PAGE_SIZE : (first + high - low) * PAGE_SIZE]

    @property
    def together(self) -> bool:
        """Whether the pages lie one after the other."""
        return not (np.diff(self.slots) != 1).any()

    def copied(self, scratch: memoryview) -> Batch:
        """The same with the pages one after the other, in `scratch`."""
        count = len(self.slots)
        source = np.frombuffer(self.data, dtype=np.uint64).reshape(-1, PAGE_SIZE // 8)
        target = np.frombuffer(scratch, dtype=np.uint64).reshape(-1, PAGE_SIZE // 8)[:count]
        np.take(source, self.slots, axis=0, out=target, mode="clip")
        return Batch(scratch[: count * PAGE_SIZE], self.pages, np.arange(count), self.sums)

    def chosen(self, which: Pages) -> Batch:
        """The same with only the pages at the indices `which`."""
        return Batch(self.data, self.pages[which], self.slots[which], self.sums[which])


def spanning(read_at: Callable[[memoryview, int], None]) -> Read:
    """A `Transfer.read` by one call of ``read_at(buffer, offset_bytes)``, gaps included."""

    def read(buffer: memoryview, extents: Extents) -> tuple[Pages, Sums]:
        base, stop = int(extents[0, 0]), int(extents[-1, 1])
        read_at(buffer[: (stop - base) * PAGE_SIZE], base * PAGE_SIZE)
        slots = pages_of_extents(extents) - base
        return slots, page_sums(buffer, slots)

    return read


def _themselves(places: Pages) -> Pages:
    return places


@dataclass(frozen=True, slots=True)
class Transfer:
    """What to do with each batch; every function is called from several threads at once.

    ``read(buffer, extents)`` reads places: which page of the buffer has each, and its checksum.
    ``put(batch)`` checks it, records it and puts it away. What is read may hold the pages in
    another order than that of their numbers: ``pages_at(places)`` then says which page each place
    has.
    """

    read: Read
    put: Callable[[Batch], None]
    pages_at: Callable[[Pages], Pages] = _themselves
    reach: Reach = NEAR

    def run(self, extents: Extents, threads: int, progress: Progress | None) -> None:
        """Move `extents`, places in what is read, with at most so many threads.

        A few pages get one: each takes a thread and a buffer, and the rounds of a live checkpoint
        are many and short. The first error, in the order of `extents`, stops all
        threads and is raised. `progress` gets the number of pages done since its last call, never
        concurrently. When this returns, every page has been put.
        """
        pages = count_pages(extents)
        crew = _Crew(self, batches(extents, self.reach), progress)
        moved = crew.work(min(threads, -(-pages // BATCH_PAGES)))
        if moved != pages:  # it would pass for done, and what is stored would be older
            raise StorageError(f"only {moved} of {pages} pages were moved, without an error")

    def step(self, extents: Extents, buffer: memoryview) -> int:
        """Move one batch through `buffer`; returns its number of pages."""
        slots, sums = self.read(buffer, extents)
        pages = self.pages_at(pages_of_extents(extents))
        self.put(Batch(buffer, pages, slots, sums))
        return len(pages)


class _Crew:
    """Threads that take batches from one queue until it is empty or one of them fails."""

    def __init__(
        self, transfer: Transfer, queue: Iterator[Extents], progress: Progress | None
    ) -> None:
        self._transfer = transfer
        self._queue = queue
        self._progress = progress
        self._lock = threading.Lock()
        self._failures: list[tuple[int, BaseException]] = []
        self._moved = 0
        self._stop = False

    def work(self, threads: int) -> int:
        """Pages moved. Raises the first error."""
        crew = [threading.Thread(target=self._member, daemon=True) for _ in range(threads)]
        try:
            for thread in crew:
                thread.start()
            for thread in crew:
                thread.join()
        finally:
            self._stop = True  # interrupted: the buffers and descriptors are still in use
            for thread in crew:
                if thread.ident is not None:
                    thread.join()
        # Batches are taken in order and every one taken is finished, so the lowest failure is
        # the first bad place of the file, however the threads were scheduled.
        if self._failures:
            raise min(self._failures, key=lambda failure: failure[0])[1]
        return self._moved

    def _member(self) -> None:
        place = 0
        try:
            with BUFFERS.lent() as buffer:
                while (extents := self._take()) is not None:
                    place = int(extents[0, 0])
                    self._report(self._transfer.step(extents, buffer))
        except BaseException as error:  # whatever it is, it must not end this thread unseen
            self._fail(place, error)

    def _take(self) -> Extents | None:
        with self._lock:
            return None if self._stop else next(self._queue, None)

    def _report(self, pages: int) -> None:
        with self._lock:
            self._moved += pages
            if self._progress is not None:
                self._progress(pages)

    def _fail(self, page: int, error: BaseException) -> None:
        with self._lock:
            self._stop = True
            self._failures.append((page, error))
