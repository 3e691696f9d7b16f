"""Saving one host's part of a checkpoint: rounds while the guest runs, the rest at the stop.

::

    begin ──▶ copy ──▶ copy … ──▶ stage ──▶ settle
    track      a round each        the VM     durable,
    changes    while it runs       stands     the vote

The first round saves every page that is here; from before its look on, every page that comes, goes
or is written is marked. A later round takes the marks and lets each page say for itself: it is in
this host's sparse RAM file and is saved, or it is not and vanishes from the memory file.
A stopped checkpoint is the same with no rounds, and with everything written before the VM
goes on rather than held in memory.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from dcres.actors.host.host import Daemon, Meter
from dcres.actors.messages import Progress, Saved
from dcres.errors import Conflict, DcresError
from dcres.linux import priority
from dcres.linux.files import data_extents, data_extents_within
from dcres.linux.removal import CheckpointFolder, remove_own_file
from dcres.model.formats import MemoryFormat
from dcres.model.live import HostRound
from dcres.model.pages import (
    EMPTY,
    PAGE_SIZE,
    Extents,
    count_pages,
    extents_of_pages,
    pages_of_extents,
    split_pages,
)
from dcres.model.placement import digest
from dcres.paging.changes import ChangeMap
from dcres.storage.digest import FileSum
from dcres.storage.engine.memory_file import (
    SAVING_THREADS,
    MemoryFileWriter,
    SavedMemory,
)
from dcres.storage.engine.sources import Room, read_into_memory
from dcres.storage.engine.transfer import BATCH_PAGES, BUFFERS
from dcres.storage.format.host_part import write_memory_tables
from dcres.storage.layout import MEMORY_FILES
from dcres.storage.store.pins import Hold
from dcres.storage.store.store import Store

log = logging.getLogger("dcres.host")

LATE_ORDERS = 64  # checkpoints back that an order may be late
_SAMPLE_PAGES = 2048
_WARM_AFTER_S = 2.0  # when nobody waits any more for what an actor was started for
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


def _warm_buffers_after(seconds: float) -> None:
    """So that a VM that is stopped need not wait for their memory: see `BUFFERS`."""
    arguments = (SAVING_THREADS, BATCH_PAGES * PAGE_SIZE)
    timer = threading.Timer(seconds, BUFFERS.warm, arguments)
    timer.daemon = True
    timer.start()


class PartSaver:
    """One host's part of one checkpoint. Owned by one call at a time; `close` ends it."""

    def __init__(
        self,
        checkpoint: str,
        source: Path,
        folder: Path,
        memory_format: MemoryFormat,
        changes: Path,
        daemon: Daemon,
        meter: Meter,
    ) -> None:
        self.checkpoint = checkpoint
        self.folder = folder
        self._daemon = daemon
        self._meter = meter
        self._changes_path = changes
        self._began = time.monotonic()
        self._gone = EMPTY
        self._rate = 0.0  # at which what is left would be staged; measured in the first round
        self._saved_any = False
        self._left = 0  # pages marked after the latest round
        _warm_buffers_after(0.0)
        with ExitStack() as stack:
            self._source = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, self._source)
            self._pages = os.fstat(self._source).st_size // PAGE_SIZE
            path = folder / MEMORY_FILES[memory_format]
            CheckpointFolder(folder.parent).remove_file(path)
            writer = MemoryFileWriter(path, self._pages, meter.done, memory_format=memory_format)
            self._writer = stack.enter_context(writer)
            self._changes = ChangeMap.fresh(changes, self._pages)
            stack.callback(remove_own_file, changes)
            daemon.call("track", changes=str(changes))
            stack.callback(self._untrack)
            self._stack = stack.pop_all()

    def close(self) -> None:
        """Stop tracking; unless settled, the memory file is gone. Repeatable."""
        self._stack.close()

    def _untrack(self) -> None:
        try:
            self._daemon.call("untrack")
        except DcresError:
            return  # it died, and its successor tracks nothing

    def _scan(self) -> int:
        """Mark what the guest wrote since the last time; how many pages are marked then."""
        return int(self._daemon.call("scan", changes=str(self._changes_path))["written"])

    def _take(self) -> Extents:
        """What is to be saved now: at first all that is here, then what is marked and here.

        Marks of before the first look stay, and cost a few pages one more save. Later, marked
        pages that are not here vanish from the memory file.
        """
        if not self._saved_any:
            self._saved_any = True
            return data_extents(self._source, self._pages)
        marked = self._changes.take()
        here = data_extents_within(self._source, marked, self._pages)
        self._gone = without(marked, here)
        return here

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

    def copy(self) -> HostRound:
        """One round while the guest runs. Raises StoreFull, PagingError, Conflict if cancelled.

        It ends with a scan and does not begin with one: each costs a guest that writes everywhere
        another fault for every page. Only the copying is left to the background. Looking for
        pages is not: SEEK_HOLE holds the lock of the file's inode, for which page-out waits to
        punch its hole, and with it the guest; who holds it must not wait for a processor itself.
        """
        began = time.monotonic()
        here = self._take()
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

    def stage(self, most_pages: int) -> None:
        """The VM stands still: take the rest, at most `most_pages` of it into memory.

        What is more is written at once. Afterwards nothing of the host's memory is needed.
        """
        if self._saved_any:  # else all that is here is taken, whatever was written
            self._scan()
        here = self._take()
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
            self._writer.settle(beside_guest())
        saved = self._writer.seal()
        self.close()
        with ThreadPoolExecutor(1) as beside:
            of_memory = beside.submit(write_memory_tables, self.folder, saved)
            files = (*tables_of(saved), *of_memory.result())
        return Saved(
            host=host,
            pages=saved.pages,
            bytes_written=saved.bytes_written,
            allocated_bytes=saved.allocated_bytes,
            seconds=time.monotonic() - self._began,
            digest=digest(saved.mask),
            files=tuple(asdict(each) for each in files),
        )


def _changes_of(source: Path) -> Path:
    """Where a host's marks are: beside its RAM file or store file."""
    return source.with_name("changes")


class SavingHost:
    """The part of a host's actor that saves: what main host and sub hosts do alike.

    Orders name the checkpoint that they are for. One that comes late, after that checkpoint was
    halted or when another one is under way, is refused with Conflict and changes nothing. Every
    method may be called again after a failure, once `abandon` was.

    What is being saved is pinned, from its beginning until it is published or given up; on a sub
    host until its vote, after which nobody sweeps its part.
    """

    def __init__(self, store: Store, vm: str, host: str, meter: Meter) -> None:
        self._store = store
        self._vm = vm
        self._host = host
        self._meter = meter
        self._saving = threading.RLock()
        self._saver: PartSaver | None = None
        self._halted: deque[str] = deque(maxlen=LATE_ORDERS)
        self._kept = Hold()
        _warm_buffers_after(_WARM_AFTER_S)

    def _require_wanted(self, checkpoint: str) -> None:
        if checkpoint in self._halted:
            raise Conflict(f"checkpoint {checkpoint} of VM {self._vm} was given up")

    def _begin_saving(
        self, checkpoint: str, memory_format: MemoryFormat, source: Path, daemon: Daemon
    ) -> None:
        """Begin the checkpoint, with this host's folder in it, and track changes from now on."""
        with self._saving:
            self._require_wanted(checkpoint)
            self._end_saving()
            self._meter.reset()
            self._store.begin(self._vm, checkpoint, self._kept)
            folder = self._store.host_folder(self._vm, checkpoint, self._host)
            changes = _changes_of(source)
            self._saver = PartSaver(
                checkpoint, source, folder, memory_format, changes, daemon, self._meter
            )

    def _end_saving(self) -> None:
        saver, self._saver = self._saver, None
        if saver is not None:
            saver.close()
        self._kept.drop()

    @contextmanager
    def _current(self, checkpoint: str) -> Iterator[PartSaver]:
        with self._saving:
            if self._saver is None or self._saver.checkpoint != checkpoint:
                raise Conflict(
                    f"host {self._host} has no checkpoint {checkpoint} of VM {self._vm} under way"
                )
            yield self._saver

    def copy(self, checkpoint: str) -> HostRound:
        """A round of checkpoint `checkpoint` while the guest runs; see `PartSaver.copy`."""
        with self._current(checkpoint) as saver:
            return saver.copy()

    def synchronise(self, checkpoint: str, once_more: bool, most_pages: int) -> HostRound | None:
        """The barrier before the stop, with a last quick round if `once_more`: what it did.

        `most_pages` is what `stage` may then hold in memory.
        """
        with self._current(checkpoint) as saver:
            saver.make_room(most_pages)
            return saver.copy() if once_more else None

    def stage(self, checkpoint: str, most_pages: int) -> None:
        """The VM stands still: take the rest; see `PartSaver.stage`."""
        with self._current(checkpoint) as saver:
            saver.stage(most_pages)

    def _settle(
        self, checkpoint: str, tables_of: Callable[[SavedMemory], Sequence[FileSum]]
    ) -> Saved:
        with self._current(checkpoint) as saver, priority.background():
            saved = saver.settle(self._host, tables_of)
            self._saver = None
        return replace(saved, store=self._store.identity())

    def halt(self, checkpoint: str) -> None:
        """Stop saving and tracking, for good: orders that come later are refused. Repeatable.

        Hosts may share a store, so no part is removed before all hosts have halted.
        """
        self._halted.append(checkpoint)
        with self._hurrying(checkpoint), self._saving:
            if self._saver is not None and self._saver.checkpoint == checkpoint:
                self._end_saving()
            self._kept.let_go(checkpoint)

    @contextmanager
    def _hurrying(self, checkpoint: str) -> Iterator[None]:
        """What is being saved for `checkpoint` fails soon, and so frees the lock."""
        saver = self._saver
        if saver is None or saver.checkpoint != checkpoint:
            yield
            return
        self._meter.cancel()
        try:
            yield
        finally:
            self._meter.reset()

    def _end_tracking(self, source: Path, daemon: Daemon) -> None:
        """What an actor began that has died: its paging process tracks, and its marks are there."""
        with self._saving:
            if self._saver is None:
                with suppress(DcresError):  # it died as well, and its successor tracks nothing
                    daemon.call_patiently("untrack")
                remove_own_file(_changes_of(source))

    def abandon(self, checkpoint: str) -> None:
        """Halt, and remove what is left of the checkpoint. Repeatable.

        What another host has pinned, which has not halted or discards it now, stays for that one
        or for a sweep.
        """
        self.halt(checkpoint)
        try:
            self._store.discard(self._vm, checkpoint)
        except Conflict as error:
            log.info("checkpoint %s is left to others: %s", checkpoint, error)

    def progress(self) -> Progress:
        """How far a long operation here is."""
        return self._meter.progress
