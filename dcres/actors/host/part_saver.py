"""Saving one host's part of a checkpoint: rounds while the guest runs, the rest at the stop.

::

    begin ──▶ copy ──▶ copy … ──▶ stage ──▶ settle
    track      a round each        the VM     durable,
    changes    while it runs       is paused  the vote

The first round saves every page that is here; from before its look on, every page that comes, goes
or is written is marked. A later round takes the marks and lets each page say for itself: it is in
this host's sparse RAM file and is saved, or it is not and vanishes from the memory file.
An increment is the same with fewer pages: at first those that are known to have changed since the
base; and when the VM is paused all are known, and what has come meanwhile unchanged vanishes.
A stopped checkpoint is the same with no rounds, and with everything written before the VM
goes on rather than held in memory.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np

from dcres.actors.host.meter import Meter
from dcres.actors.host.part_base import PartBase
from dcres.actors.messages import Saved
from dcres.errors import DcresError
from dcres.linux import priority
from dcres.linux.files import data_extents, data_extents_within
from dcres.linux.removal import CheckpointFolder, remove_own_file
from dcres.model.formats import MemoryFormat
from dcres.model.live import HostRound
from dcres.model.pages import (
    EMPTY,
    PAGE_SIZE,
    Extents,
    Mask,
    count_pages,
    extents_of_mask,
    extents_of_pages,
    mask_of_extents,
    pages_of_extents,
    split_pages,
)
from dcres.model.placement import digest
from dcres.paging.changes import DirtyBitmap
from dcres.storage.digest import FileSum
from dcres.storage.engine.memory_file import (
    SAVING_THREADS,
    MemoryFileWriter,
    SavedMemory,
)
from dcres.storage.engine.sources import Room, read_into_memory
from dcres.storage.engine.transfer import BATCH_PAGES, BUFFERS
from dcres.storage.format.host_part import segment_of, write_memory_tables, write_segment
from dcres.storage.format.manifest import Segment
from dcres.storage.layout import memory_file

_SAMPLE_PAGES = 2048
_ANY_RATE = 1e9  # bytes per second; for a host that has no page to try it with


def without(extents: Extents, taken: Extents) -> Extents:
    """The pages of `extents` that are not in `taken`, which lies within them."""
    pages = pages_of_extents(extents)
    return extents_of_pages(np.setdiff1d(pages, pages_of_extents(taken), assume_unique=True))


def beside_guest() -> int:
    """How many threads copy while the guest runs: they leave it half of the processors.

    With two processors, one thread took an eighth longer than four, and a busy guest lost three
    tenths of its throughput rather than four (docs/decisions/missed-aims.md).
    """
    return min(SAVING_THREADS, max(1, len(os.sched_getaffinity(0)) // 2))


def warm_buffers_after(seconds: float) -> None:
    """So that a paused VM need not wait for their memory: see `BUFFERS`."""
    arguments = (SAVING_THREADS, BATCH_PAGES * PAGE_SIZE)
    timer = threading.Timer(seconds, BUFFERS.warm, arguments)
    timer.daemon = True
    timer.start()


Known: TypeAlias = Callable[[], Mask | None]
"""Which pages are known to have changed since the base; None for all."""


def everything() -> None:
    """What a full checkpoint saves."""
    return


class Tracker(Protocol):
    """A pager or memory server, which marks changes."""

    def track(self, changes: Path) -> None:
        """Mark changes in this file from now on."""

    def scan(self, changes: Path) -> int:
        """Bring the marks up to date; how many there are."""

    def untrack(self) -> None:
        """Mark nothing any more."""


class PartSaver:
    """One host's part of one checkpoint. Owned by one call at a time; `close` ends it."""

    def __init__(
        self,
        checkpoint: str,
        source: Path,
        folder: Path,
        memory_format: MemoryFormat,
        changes: Path,
        tracker: Tracker,
        meter: Meter,
        base: PartBase | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.folder = folder
        self.base = base
        self._tracker = tracker
        self._meter = meter
        self._changes_path = changes
        self._began = time.monotonic()
        self._gone = EMPTY
        self._changed: Mask | None = None
        self._rate = 0.0  # at which what is left would be staged; measured in the first round
        self._saved_any = False
        self._left = 0  # pages marked after the latest round
        warm_buffers_after(0.0)
        with ExitStack() as stack:
            self._source = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, self._source)
            self._pages = os.fstat(self._source).st_size // PAGE_SIZE
            path = folder / memory_file(memory_format, checkpoint)
            CheckpointFolder(folder.parent).remove_file(path)
            writer = MemoryFileWriter(path, self._pages, meter.done, memory_format=memory_format)
            self._writer = stack.enter_context(writer)
            self._changes = DirtyBitmap.fresh(changes, self._pages)
            stack.callback(remove_own_file, changes)
            tracker.track(changes)
            stack.callback(self._untrack)
            self._stack = stack.pop_all()

    def close(self) -> None:
        """Stop tracking; unless settled, the memory file is gone. Repeatable."""
        self._stack.close()

    def _untrack(self) -> None:
        try:
            self._tracker.untrack()
        except DcresError:
            return  # it died, and its successor tracks nothing

    def _scan(self) -> int:
        """Mark what the guest wrote since the last time; how many pages are marked then."""
        return self._tracker.scan(self._changes_path)

    def _take(self, known: Known) -> Extents:
        """What is to be saved now: at first all that is here, then what is marked and here.

        Of an increment only what has changed, as far as that is `known` after the marks are taken:
        what is marked later comes with its mark.

        Marks of before the first look stay, and cost a few pages one more save. Later, marked
        pages that are not here vanish from the memory file.
        """
        if not self._saved_any:
            self._saved_any = True
            here = data_extents(self._source, self._pages)
        else:
            marked = self._changes.take()
            here = data_extents_within(self._source, marked, self._pages)
            self._gone = without(marked, here)
        changed = known()
        if changed is None:
            return here
        return extents_of_mask(mask_of_extents(here, self._pages) & changed)

    def _measure_rate(self, here: Extents) -> float:
        """Bytes per second at which single pages are staged, from a sample of `here`.

        What is left for the stop lies scattered, and goes to memory that is there, as here.
        """
        pages = pages_of_extents(here)
        sample = extents_of_pages(pages[:: max(1, pages.size // _SAMPLE_PAGES)])
        if not len(sample):
            return _ANY_RATE
        room = Room.of(count_pages(sample))
        began = time.perf_counter()
        read_into_memory(self._source, sample, room)
        return room.pages * PAGE_SIZE / (time.perf_counter() - began)

    def copy(self, known: Known = everything) -> HostRound:
        """One round while the guest runs. Raises StoreFull, PagingError, Conflict if cancelled.

        It ends with a scan and does not begin with one: each costs a guest that writes everywhere
        another fault for every page. Only the copying is left to the background. Looking for
        pages is not: SEEK_HOLE holds the lock of the file's inode, for which page-out waits to
        punch its hole, and with it the guest; what holds it must not wait for a processor itself.
        """
        began = time.monotonic()
        here = self._take(known)
        self._rate = self._rate or self._measure_rate(here)
        with self._meter.measuring("copy", count_pages(here)), priority.background():
            self._writer.discard(self._gone)
            self._writer.save(self._source, here, beside_guest())
        self._left = self._scan()
        seconds = time.monotonic() - began
        return HostRound(self._left, seconds, self._rate)

    def make_room(self, most_pages: int) -> None:
        """Have memory for `stage` ready while the guest still runs. Raises NoRoom.

        For what the latest round left and a quarter more, since the guest goes on writing; so
        this is not left to the background either.
        """
        self._writer.make_room(min(self._left + self._left // 4, most_pages))

    def stage(self, most_pages: int, changed: Mask | None = None) -> None:
        """The VM is paused: take the rest, at most `most_pages` of it into memory.

        What is more is written at once. Afterwards nothing of the host's memory is needed.
        Of an increment no page is in it in the end that has not `changed`.
        """
        self._changed = changed
        if self._saved_any:  # else all that is here is taken, whatever was written
            self._scan()
        here = self._take(lambda: changed)
        at_once, later = split_pages(here, max(0, count_pages(here) - most_pages))
        if len(at_once):
            with self._meter.measuring("save", count_pages(at_once)):
                self._writer.save(self._source, at_once)
        self._writer.stage(self._source, later)
        self._untrack()

    def settle(self, host: str, tables_of: Callable[[SavedMemory], Sequence[FileSum]]) -> Saved:
        """Write what was staged and make the part durable, with the tables of `tables_of`."""
        with self._meter.measuring("save", 0):
            self._writer.discard(self._gone)
            if self._changed is not None:
                self._writer.discard(extents_of_mask(~self._changed))
            self._writer.settle(beside_guest())
        saved = self._writer.seal()
        self.close()
        if self.base is None:
            with ThreadPoolExecutor(1) as beside:
                of_memory = beside.submit(write_memory_tables, self.folder, saved)
                files = (*tables_of(saved), *of_memory.result())
        else:
            files = (*self.base.files, *tables_of(saved), self._write_segment(self.base, saved))
        pages, segments = saved.mask, tuple[Segment, ...]()
        if self.base is not None:
            pages = self.base.kept(saved.mask, self.changed)
            gone = self.base.gone(saved.mask, self.changed)
            segments = (*self.base.segments, segment_of(self.checkpoint, saved, gone))
        return Saved(
            host=host,
            pages=int(np.count_nonzero(pages)),
            bytes_written=saved.bytes_written,
            allocated_bytes=saved.allocated_bytes,
            seconds=time.monotonic() - self._began,
            digest=digest(pages),
            files=tuple(asdict(each) for each in files),
            pages_saved=saved.pages,
            segments=tuple(each.model_dump(mode="json") for each in segments),
        )

    @property
    def changed(self) -> Mask:
        """What has changed since the base, when the VM was paused; everything without one."""
        if self._changed is None:
            return np.ones(self._pages, dtype=np.bool_)
        return self._changed

    def _write_segment(self, base: PartBase, saved: SavedMemory) -> FileSum:
        """The last of the part's files: with it, it is whole."""
        gone = base.gone(saved.mask, self.changed)
        return write_segment(self.folder, self.checkpoint, saved, gone, self._pages)


def changes_of(source: Path) -> Path:
    """Where a host's marks are: beside its RAM file or store file."""
    return source.with_name("changes")
