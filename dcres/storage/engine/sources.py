"""What a save reads: a RAM file, or pages of one that were *staged*, read into memory before.

Pages are staged while the VM is paused, so nothing may be slow then: their memory is got
before.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np

from dcres.errors import NoRoom
from dcres.linux.files import aligned_buffer, populate
from dcres.model.pages import (
    PAGE_SIZE,
    Extents,
    Pages,
    count_pages,
    extents_of_pages,
    mib_of,
    pages_of_extents,
)
from dcres.storage.digest import Sums
from dcres.storage.engine.bulk import WIDEST_GAP, EndOfFile, read_gathered
from dcres.storage.engine.transfer import ANYWHERE, NEAR, Reach, Read, spanning


@dataclass(frozen=True, slots=True)
class RamFile:
    """A RAM file, where the place of a page is its number."""

    fd: int
    reach: ClassVar[Reach] = ANYWHERE

    def read(self, buffer: memoryview, extents: Extents) -> tuple[Pages, Sums]:
        """See `Transfer.read`. Raises ValueError if the file is shorter."""
        with _ends_told():
            return read_gathered(self.fd, buffer, extents)

    def extents_of(self, extents: Extents) -> Extents:
        """The places of these pages."""
        return extents

    def pages_at(self, places: Pages) -> Pages:
        """See `Transfer.pages_at`."""
        return places


@dataclass(frozen=True, slots=True, eq=False)
class Staged:
    """Staged pages: `pages`, ascending, one after the other in `data`."""

    data: memoryview
    pages: Pages
    reach: ClassVar[Reach] = NEAR

    @property
    def read(self) -> Read:
        """See `Transfer.read`."""
        return spanning(self._read_at)

    def _read_at(self, buffer: memoryview, offset_bytes: int) -> None:
        buffer[:] = self.data[offset_bytes : offset_bytes + len(buffer)]

    def extents_of(self, extents: Extents) -> Extents:
        """The places of these pages."""
        return extents_of_pages(np.searchsorted(self.pages, pages_of_extents(extents)))

    def pages_at(self, places: Pages) -> Pages:
        """See `Transfer.pages_at`."""
        return self.pages[places]


@dataclass(frozen=True, slots=True)
class Room:
    """Memory for pages that are read into it one after the other, and a little more."""

    pages: int
    memory: memoryview

    @classmethod
    def of(cls, pages: int) -> Self:
        """Room for `pages` that is present already; see `populate`. Raises NoRoom."""
        try:
            buffer = _fresh(pages)
            populate(buffer, len(buffer))
        except OSError as error:
            raise NoRoom(
                f"there is no memory to hold {mib_of(pages)} MiB of pages ({error.strerror}); free "
                "some on this host, or take a checkpoint with --mode stop, which needs none"
            ) from None
        return cls(pages, memoryview(buffer))


NO_ROOM = Room(0, memoryview(b""))


def _fresh(pages: int) -> mmap.mmap:
    return aligned_buffer((pages + WIDEST_GAP) * PAGE_SIZE)


def read_into_memory(source_fd: int, extents: Extents, room: Room = NO_ROOM) -> memoryview:
    """The pages of `extents`, one after the other, in `room` or, where that is short, fresh memory.

    As fast as it goes: their checksums are taken and not used, but a call for each page would
    take Python twice as long. Raises ValueError if the source is shorter, OSError.
    """
    count = count_pages(extents)
    arena = room.memory if count <= room.pages else memoryview(_fresh(count))
    with _ends_told():
        read_gathered(source_fd, arena, extents)
    return arena


@contextmanager
def _ends_told() -> Iterator[None]:
    try:
        yield
    except EndOfFile as end:
        raise ValueError(f"the source ends at byte {end}, before the pages to save") from None
