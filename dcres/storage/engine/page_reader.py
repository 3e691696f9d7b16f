"""Any page of a memory file at any time, each compared with its checksum: what serves them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Self

import numpy as np

from dcres.model.pages import PAGE_SIZE, Mask, Pages
from dcres.storage.damage import unreadable
from dcres.storage.engine.bulk import page_sums, stretches
from dcres.storage.engine.expected import (
    MemoryFile,
    read_piece,
    require_length,
    require_pages,
    require_sums,
    with_place,
)
from dcres.storage.engine.page_places import NO_PLACE, Places


class PageReader:
    """A memory file, opened to read any of the pages in `mask`.

    Opening looks at nothing but the file's length, so it takes no time however long the file
    is: a page that is a hole, or was altered, is found when it is read. Reads go through the page
    cache, because neighbours of a page that somebody wants are wanted soon. Raises
    CheckpointCorrupt if the file is missing or has another length than its tables say.
    """

    def __init__(self, memory: MemoryFile) -> None:
        self._memory = memory
        self._places = _places(memory)
        try:
            self._fd = os.open(memory.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise unreadable(memory.path, error) from None
        try:
            require_length(memory, self._fd)
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    @property
    def path(self) -> Path:
        """The file."""
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
            read_piece(self._memory, self._fd, piece, place * PAGE_SIZE)
        found = page_sums(data, np.arange(stop - first))
        require_sums(self._memory, np.arange(first, stop), found)
        return data

    def _runs(self, first: int, stop: int) -> list[tuple[int, int, int]]:
        """What to read: ``(low, high, place)``, `low` and `high` counted from `first`."""
        if self._places is None:
            return [(0, stop - first, first)]
        places: Pages = self._places[first:stop].astype(np.int64)
        return [
            (low, high, int(places[low]))
            for low, high in stretches(places)
            if places[low] != NO_PLACE  # zeros, which the data has already
        ]


def _places(memory: MemoryFile) -> Places | None:
    """The place of every page in a packed file. Raises CheckpointCorrupt."""
    if memory.order is None:
        return None
    require_pages(memory, with_place(memory))
    places: Places = np.full(len(memory.mask), NO_PLACE, dtype=np.uint32)
    places[memory.order] = np.arange(len(memory.order))
    return places
