"""The network page table, access history and page-out journal in one shared file on tmpfs.

The pager writes it, its successor and the host's actor read it. It survives the pager: stores
to a shared mapping are in the file the moment they are made, whatever then kills the process.

Layout: a header page, four bytes of tick per page, one byte of owner per page.
"""

from __future__ import annotations

import mmap
import os
import struct
from enum import IntEnum
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from dcres.errors import PagingError
from dcres.linux.files import open_own
from dcres.model.history import Ticks
from dcres.model.pages import PAGE_SIZE, Pages
from dcres.model.placement import Owners

_MAGIC = b"DCRESTB1"
_HEADER = struct.Struct("<8sQQQII")  # magic, pages, limit pages, pipe inode, journal state, count
_LIMIT, _INODE = 2, 3  # of the header's words of eight bytes
_STATE, _COUNT = 8, 9  # of those of four
_HEADER_BYTES = PAGE_SIZE
_JOURNAL_AT = 64
JOURNAL_PAGES = (_HEADER_BYTES - _JOURNAL_AT) // 8


class JournalState(IntEnum):
    """How far a batch of pages has come on its way; see `dcres.paging.pager.outbox`."""

    EMPTY = 0
    COPYING = 1
    PUNCHING = 2
    REFILLING = 3


class PageTable:
    """One VM's table file, mapped. `owners` and `ticks` are views of the mapping.

    Only the page book writes owners (`dcres.paging.pager.book`).
    """

    def __init__(self, path: Path, page_count: int, *, writable: bool = True) -> None:
        length = _HEADER_BYTES + 5 * page_count
        fd = open_own(path, os.O_RDWR if writable else os.O_RDONLY)
        try:
            if os.fstat(fd).st_size != length:
                raise PagingError(f"{path} is not the page table of {page_count} pages")
            access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
            self._map = mmap.mmap(fd, length, access=access)
        finally:
            os.close(fd)
        if self._map[:8] != _MAGIC:
            raise PagingError(f"{path} is not a page table")
        self.page_count = page_count
        owners_at = _HEADER_BYTES + 4 * page_count
        self.ticks: Ticks = np.frombuffer(self._map, np.uint32, page_count, _HEADER_BYTES)
        self.writable_owners: Owners = np.frombuffer(self._map, np.uint8, page_count, owners_at)
        """For the page book."""
        self.owners = self.writable_owners.view()
        self.owners.flags.writeable = False
        self._journal = np.frombuffer(self._map, np.uint64, JOURNAL_PAGES, _JOURNAL_AT)
        self._words = np.frombuffer(self._map, np.uint64, _JOURNAL_AT // 8)
        self._halves = np.frombuffer(self._map, np.uint32, _JOURNAL_AT // 4)

    @classmethod
    def create(cls, path: Path, owners: Owners, limit_pages: int) -> Self:
        """A new table file (mode 0600) with these owners; replaces one that is there."""
        fresh = path.with_suffix(".new")
        fd = open_own(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        try:
            os.ftruncate(fd, _HEADER_BYTES + 5 * owners.size)
            os.pwrite(fd, _HEADER.pack(_MAGIC, owners.size, limit_pages, 0, 0, 0), 0)
            os.pwrite(fd, owners.tobytes(), _HEADER_BYTES + 4 * owners.size)
        finally:
            os.close(fd)
        fresh.rename(path)
        return cls(path, owners.size)

    def owner_bytes(self) -> memoryview:
        """The owners as bytes: a scalar look-up here costs a third of numpy's."""
        return self.owners.data

    def _set(self, fields: npt.NDArray[np.unsignedinteger[Any]], index: int, value: int) -> None:
        """One aligned store: whoever is killed at it leaves the old value or the new one.

        struct.pack_into would clear the whole header first.
        """
        fields[index] = value

    @property
    def limit_pages(self) -> int:
        """Pages that the main host may keep."""
        return int(self._words[_LIMIT])

    @limit_pages.setter
    def limit_pages(self, value: int) -> None:
        self._set(self._words, _LIMIT, value)

    @property
    def pipe_inode(self) -> int:
        """Which pipe of QEMU's carries page-outs; 0 before it is made."""
        return int(self._words[_INODE])

    @pipe_inode.setter
    def pipe_inode(self, value: int) -> None:
        self._set(self._words, _INODE, value)

    @property
    def journal_state(self) -> JournalState:
        """Where the batch in `journal_pages` stands."""
        return JournalState(int(self._halves[_STATE]))

    @journal_state.setter
    def journal_state(self, value: JournalState) -> None:
        self._set(self._halves, _STATE, value)

    @property
    def journal_pages(self) -> Pages:
        """The pages of the batch under way, ascending."""
        return self._journal[: int(self._halves[_COUNT])].astype(np.int64)

    def begin_batch(self, pages: Pages) -> None:
        """Write a batch down before it is started."""
        self._journal[: pages.size] = pages
        self._set(self._halves, _COUNT, pages.size)
        self.journal_state = JournalState.COPYING
