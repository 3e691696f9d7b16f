"""Which pages of a host changed since somebody looked: one byte a page, shared on tmpfs.

A pager or memory server marks, the host's actor takes the marks while it saves a live
checkpoint. No lock: whoever changes a page marks it *after* the change; whoever saves clears
the mark *before* it looks at the page. So a change that the saving misses leaves its mark, and
the page is looked at again. What a mark means is for the page itself to say: it is in the
host's sparse file and is saved again, or it is not and vanishes from the memory file.
"""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path
from typing import Protocol, Self

import numpy as np

from dcres.errors import NoRoom, PagingError
from dcres.linux.files import open_own
from dcres.linux.removal import remove_own_file
from dcres.model.pages import Extents, Pages, extents_of_pages


class Changes(Protocol):
    """Who wants to know which pages came, left or were written."""

    def mark(self, first: int, stop: int) -> None:
        """Pages ``[first, stop)`` have just changed."""

    def mark_pages(self, pages: Pages) -> None:
        """The same for page numbers."""


class _NobodyLooks:
    def mark(self, first: int, stop: int) -> None:
        return

    def mark_pages(self, pages: Pages) -> None:
        return


NOBODY_LOOKS = _NobodyLooks()


class DirtyBitmap:
    """The marks of one host, in a file that both sides map."""

    def __init__(self, path: Path, page_count: int) -> None:
        fd = open_own(path, os.O_RDWR | os.O_CREAT)
        try:
            # To touch a hole of a full tmpfs in a mapping is SIGBUS, for whoever marks as well.
            os.posix_fallocate(fd, 0, page_count)
            self._map = mmap.mmap(fd, page_count)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise NoRoom(f"{path.parent} is full: no room to mark what changes") from None
        finally:
            os.close(fd)
        self._marks = np.frombuffer(self._map, dtype=np.bool_)

    @classmethod
    def fresh(cls, path: Path, page_count: int) -> Self:
        """A new file without marks in place of any that is there. Raises NoRoom."""
        remove_own_file(path)
        return cls(path, page_count)

    @classmethod
    def shared(cls, path: Path, page_count: int) -> Self:
        """The file that whoever saves has made. Raises NoRoom, or PagingError without it."""
        try:
            return cls(path, page_count)
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            raise PagingError(f"cannot mark what changes in {str(path)!r}: {error}") from None

    def mark(self, first: int, stop: int) -> None:
        """Pages ``[first, stop)`` have just changed."""
        self._marks[first:stop] = True

    def mark_pages(self, pages: Pages) -> None:
        """The same for page numbers."""
        self._marks[pages] = True

    def count(self) -> int:
        """How many pages are marked."""
        return int(np.count_nonzero(self._marks))

    def take(self) -> Extents:
        """The marked pages; their marks are cleared. Look at the pages after this, not before."""
        # Of a copy: numpy counts first and then fills, and marks come in between.
        pages = np.flatnonzero(self._marks.copy())
        self._marks[pages] = False
        return extents_of_pages(pages)
