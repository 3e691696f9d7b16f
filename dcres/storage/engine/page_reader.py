"""Any page of a memory file at any time, each compared with its checksum: what serves them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from dcres.model.pages import PAGE_SIZE, Mask, Pages
from dcres.storage.engine.bulk import page_sums, stretches
from dcres.storage.engine.expected import (
    MemoryFile,
    Opened,
    is_live,
    require_pages,
    require_sums,
    with_place,
)
from dcres.storage.engine.page_places import NO_PLACE


class PageReader:
    """A memory file, opened to read any of the pages in `mask`.

    Opening looks at nothing but the length of each file, so it takes no time however long they
    are: a page that is a hole, or was altered, is found when it is read. Reads go through the page
    cache, because neighbours of a page that somebody wants are wanted soon. Raises
    CheckpointCorrupt if a file is missing or has another length than its tables say.
    """

    def __init__(self, memory: MemoryFile) -> None:
        self._memory = memory
        self._places = _places(memory)
        self._files = Opened(memory, lambda path: os.open(path, os.O_RDONLY | os.O_CLOEXEC))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    @property
    def path(self) -> Path:
        """The file, or the newest of several."""
        return self._memory.path

    @property
    def mask(self) -> Mask:
        """The pages that it has."""
        return self._memory.mask

    def read(self, first: int, stop: int) -> memoryview:
        """The data of pages ``[first, stop)``, all of which `mask` must have.

        Raises CheckpointCorrupt, which names the file and the first bad page.
        """
        data = memoryview(bytearray((stop - first) * PAGE_SIZE))
        for low, high, place in self._runs(first, stop):
            piece = data[low * PAGE_SIZE : high * PAGE_SIZE]
            self._files.read(piece, place * PAGE_SIZE)
        found = page_sums(data, np.arange(stop - first))
        require_sums(self._memory, np.arange(first, stop), found)
        return data

    def _runs(self, first: int, stop: int) -> list[tuple[int, int, int]]:
        """What to read: ``(low, high, place)``, `low` and `high` counted from `first`."""
        if self._places is None:
            return [(0, stop - first, first)]
        places: Pages = self._places[first:stop].astype(np.int64)
        nowhere = np.iinfo(self._places.dtype).max
        return [
            (low, high, int(places[low]))
            for low, high in stretches(places)
            if places[low] != nowhere  # zeros, which the data has already
        ]


def _places(memory: MemoryFile) -> npt.NDArray[np.uint32 | np.int64] | None:
    """The place of every page in a packed file. Raises CheckpointCorrupt."""
    if memory.order is None:
        return None
    require_pages(memory, with_place(memory))
    # Several files may have more places than a VM has pages, and more than 32 bits can name.
    kind: type[np.uint32 | np.int64] = np.uint32 if len(memory.order) < NO_PLACE else np.int64
    places = np.full(len(memory.mask), np.iinfo(kind).max, dtype=kind)
    live = np.flatnonzero(is_live(memory.order))
    places[memory.order[live]] = live
    return places
