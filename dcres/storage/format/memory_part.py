"""What to expect of the memory file of one host's part, as plain values: all that reading takes.

Whoever has the manifest makes it; a process that only reads pages need not know manifests.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dcres.model.pages import Mask, Pages
from dcres.storage import layout
from dcres.storage.damage import corrupt
from dcres.storage.digest import FileSum, Sums
from dcres.storage.engine.expected import SUPERSEDED, MemoryFile, Piece
from dcres.storage.format import tables


@dataclass(frozen=True, slots=True)
class SegmentPart:
    """What to expect of one segment: rows of its table, places in its pack, the table's sum."""

    pack: str
    pages: int
    gone: int
    places: int
    table: FileSum

    def read(self, folder: Path, page_count: int) -> tables.SegmentRows:
        """Its table. Raises CheckpointCorrupt."""
        path = folder / self.table.name
        rows = tables.read_segment(path, page_count, self.table)
        found = (len(rows.pages) - rows.gone, rows.gone, rows.placed)
        wanted = (self.pages, self.gone, self.places)
        if found != wanted:
            raise corrupt(path, f"it has {found} pages, gone ones and places, not {wanted}")
        return rows


@dataclass(frozen=True, slots=True)
class MemoryPart:
    """Memory files with `pages` of a VM's `page_count` pages, and their tables' checksums.

    `sums` and `index` are those of a sparse or packed file's tables; a sparse one has no index.
    A segmented part has `segments` in their place, oldest first.
    """

    folder: Path
    memory_file: str
    page_count: int
    pages: int
    sums: FileSum | None = None
    index: FileSum | None = None
    segments: tuple[SegmentPart, ...] = ()

    def read(self) -> MemoryFile:
        """The memory file as its tables describe it. Raises CheckpointCorrupt."""
        if self.sums is None:
            return self._read_segments()
        mask, sums = self._read_table(self.sums)
        order = None
        if self.index is not None:
            order = tables.read_index(self.folder / layout.INDEX, self.page_count, self.index)
        return MemoryFile(self.folder / self.memory_file, mask, sums, order)

    def read_sums(self) -> tuple[Mask, Sums]:
        """Mask and checksums of the pages here. Raises CheckpointCorrupt."""
        if self.sums is None:
            memory = self._read_segments()
            return memory.mask, memory.sums
        return self._read_table(self.sums)

    def _read_table(self, expected: FileSum) -> tuple[Mask, Sums]:
        path = self.folder / layout.SUMS
        mask, sums = tables.read_sums(path, self.page_count, expected)
        self._require_pages(path, mask)
        return mask, sums

    def _read_segments(self) -> MemoryFile:
        """All segments as one file: the newest that lists a page decides."""
        mask: Mask = np.zeros(self.page_count, dtype=np.bool_)
        sums: Sums = np.zeros(self.page_count, dtype=np.uint64)
        decided = mask.copy()
        stop = sum(segment.places for segment in self.segments)
        order: Pages = np.full(stop, SUPERSEDED, dtype=np.int64)
        for segment in reversed(self.segments):
            rows = segment.read(self.folder, self.page_count)
            newest = ~decided[rows.pages]
            decided[rows.pages] = True
            here = newest & (rows.places != tables.GONE)
            mask[rows.pages[here]] = True
            sums[rows.pages[here]] = rows.sums[here]
            stop -= segment.places
            placed = newest & (rows.places < tables.GONE)
            order[stop:][rows.places[placed]] = rows.pages[placed]
        self._require_pages(self.folder / self.segments[-1].table.name, mask)
        *more, own = (Piece(self.folder / each.pack, each.places) for each in self.segments)
        return MemoryFile(own.path, mask, sums, order, tuple(more))

    def read_segment(self, segment: SegmentPart) -> MemoryFile:
        """The pack of one segment by itself: all pages in it, also what a later one has anew."""
        rows = segment.read(self.folder, self.page_count)
        mask: Mask = np.zeros(self.page_count, dtype=np.bool_)
        sums: Sums = np.zeros(self.page_count, dtype=np.uint64)
        order: Pages = np.full(segment.places, SUPERSEDED, dtype=np.int64)
        placed = rows.places < tables.GONE
        mask[rows.pages[placed]] = True
        sums[rows.pages[placed]] = rows.sums[placed]
        order[rows.places[placed]] = rows.pages[placed]
        return MemoryFile(self.folder / segment.pack, mask, sums, order)

    def _require_pages(self, path: Path, mask: Mask) -> None:
        count = int(np.count_nonzero(mask))
        if count != self.pages:
            raise corrupt(path, f"it lists {count} pages and the manifest {self.pages}")
