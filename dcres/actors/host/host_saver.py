"""Saving on one host, as main host and sub hosts have it in common."""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from dcres.actors.host.compactor import Compactor
from dcres.actors.host.page_loader import parse
from dcres.actors.host.part_base import PartBase
from dcres.actors.host.part_saver import (
    Known,
    PartSaver,
    Tracker,
    changes_of,
    everything,
    warm_buffers_after,
)
from dcres.actors.host.site import Site
from dcres.actors.messages import Saved, unpack_mask
from dcres.errors import Conflict, DcresError
from dcres.linux import priority
from dcres.linux.files import data_extents, opened
from dcres.linux.removal import remove_own_file
from dcres.model.formats import MemoryFormat
from dcres.model.live import HostRound
from dcres.model.pages import PAGE_SIZE, Mask, mask_of_extents
from dcres.storage.digest import FileSum
from dcres.storage.engine.memory_file import SavedMemory
from dcres.storage.store.pins import Hold

log = logging.getLogger("dcres.host")

LATE_ORDERS = 64  # checkpoints back that an order may be late
_WARM_AFTER_S = 2.0  # when nothing waits any more for what an actor was started for


class HostSaver:
    """Saves the pages in `source`, whose changes `tracker` marks.

    Orders name the checkpoint that they are for. One that comes late, after that checkpoint was
    halted or when another one is under way, is refused with Conflict and changes nothing. Every
    method may be called again after a failure, once the checkpoint was discarded.

    What is being saved is pinned, from its beginning until it is published or cancelled; on a sub
    host until its vote, after which nothing sweeps its part.

    `patient` is the tracker through a restart, and `tracks` says whether there may be one.
    """

    def __init__(
        self,
        site: Site,
        source: Path,
        tracker: Tracker,
        patient: Tracker,
        tracks: Callable[[], bool],
    ) -> None:
        self._site = site
        self._source = source
        self._tracker = tracker
        self._patient = patient
        self._tracks = tracks
        self._saver: PartSaver | None = None
        self._halted: deque[str] = deque(maxlen=LATE_ORDERS)
        self.saving = threading.RLock()  # what cancels a checkpoint comes before all it, or after
        self.kept = Hold()
        self.compactor = Compactor(site)
        warm_buffers_after(_WARM_AFTER_S)

    def require_wanted(self, checkpoint: str) -> None:
        """Conflict once the checkpoint was halted."""
        if checkpoint in self._halted:
            raise Conflict(f"checkpoint {checkpoint} of VM {self._site.vm} was cancelled")

    def begin(self, checkpoint: str, memory_format: MemoryFormat, base: str = "") -> None:
        """Begin the checkpoint, with this host's folder in it, and track changes from now on.

        Raises BaseUnusable, and then nothing is begun.
        """
        site = self._site
        with self.saving:
            self.require_wanted(checkpoint)
            self.end()
            site.meter.reset()
            site.store.begin(site.vm, checkpoint, self.kept)
            folder = site.store.host_folder(site.vm, checkpoint, site.host)
            part_base = None
            if memory_format is MemoryFormat.SEGMENTED:
                part_base = self._base(checkpoint, folder, base)
            self._saver = PartSaver(
                checkpoint,
                self._source,
                folder,
                memory_format,
                changes_of(self._source),
                self._tracker,
                site.meter,
                part_base,
            )

    def _base(self, checkpoint: str, folder: Path, base: str) -> PartBase:
        site = self._site
        if not base:
            return PartBase.none(self._source.stat().st_size // PAGE_SIZE)
        return PartBase.linked(site.store, parse(base), site.host, folder, checkpoint)

    def end(self) -> None:
        """Whatever is being saved is not saved any more. Repeatable."""
        with self.saving:
            saver, self._saver = self._saver, None
            if saver is not None:
                saver.close()
            self.kept.drop()

    def end_for_good(self) -> None:
        """The same, and nothing is merged any more. Repeatable."""
        self.end()
        self.compactor.end()

    @contextmanager
    def current(self, checkpoint: str) -> Iterator[PartSaver]:
        """What saves the checkpoint, for one call at a time. Raises Conflict."""
        with self.saving:
            if self._saver is None or self._saver.checkpoint != checkpoint:
                raise Conflict(
                    f"host {self._site.host} has no checkpoint {checkpoint} of VM "
                    f"{self._site.vm} under way"
                )
            yield self._saver

    def copy(self, checkpoint: str, known: Known = everything) -> HostRound:
        """A round of checkpoint `checkpoint` while the guest runs; see `PartSaver.copy`."""
        with self.current(checkpoint) as saver:
            return saver.copy(known)

    def synchronise(
        self, checkpoint: str, once_more: bool, most_pages: int, known: Known = everything
    ) -> HostRound | None:
        """The barrier before the stop, with a last quick round if `once_more`: what it did.

        `most_pages` is what `stage` may then hold in memory.
        """
        with self.current(checkpoint) as saver:
            saver.make_room(most_pages)
            return saver.copy(known) if once_more else None

    def stage(self, checkpoint: str, most_pages: int, changed: bytes = b"") -> None:
        """The VM is paused: take the rest; see `PartSaver.stage`."""
        with self.current(checkpoint) as saver:
            saver.stage(most_pages, self.mask(changed))

    def here(self) -> Mask:
        """The pages that are on this host now."""
        with opened(self._source, os.O_RDONLY) as fd:
            count = os.fstat(fd).st_size // PAGE_SIZE
            return mask_of_extents(data_extents(fd, count), count)

    def mask(self, changed: bytes) -> Mask | None:
        """What an order says has changed; None for all."""
        return unpack_mask(changed, self._source.stat().st_size // PAGE_SIZE) if changed else None

    def settle(
        self, checkpoint: str, tables_of: Callable[[SavedMemory], Sequence[FileSum]]
    ) -> Saved:
        """Make the part durable, with these tables: the vote. Raises StoreFull, Conflict."""
        with self.current(checkpoint) as saver, priority.background():
            saved = saver.settle(self._site.host, tables_of)
            self._saver = None
        return replace(saved, store=self._site.store.identity())

    def halt(self, checkpoint: str) -> None:
        """Stop saving and tracking, for good: orders that come later are refused. Repeatable.

        Also what an actor before this one began. Hosts may share a store, so no part is removed
        before all hosts have halted.
        """
        self._halted.append(checkpoint)
        self.compactor.cancel()
        with self._hurrying(checkpoint), self.saving:
            if self._saver is not None and self._saver.checkpoint == checkpoint:
                self.end()
            self.kept.let_go(checkpoint)
        if self._tracks():
            self._end_tracking()

    @contextmanager
    def _hurrying(self, checkpoint: str) -> Iterator[None]:
        """What is being saved for `checkpoint` fails soon, and so frees the lock."""
        saver = self._saver
        if saver is None or saver.checkpoint != checkpoint:
            yield
            return
        self._site.meter.cancel()
        try:
            yield
        finally:
            self._site.meter.reset()

    def _end_tracking(self) -> None:
        """What an actor began that has died: its paging process tracks, and its marks are there."""
        with self.saving:
            if self._saver is None:
                with suppress(DcresError):  # it died as well, and its successor tracks nothing
                    self._patient.untrack()
                remove_own_file(changes_of(self._source))

    def discard(self, checkpoint: str) -> None:
        """Remove what is left of a checkpoint that was halted. Repeatable.

        What another host has pinned, which has not halted or discards it now, stays for that one
        or for a sweep.
        """
        try:
            self._site.store.discard(self._site.vm, checkpoint)
        except Conflict as error:
            log.info("checkpoint %s is left to others: %s", checkpoint, error)
