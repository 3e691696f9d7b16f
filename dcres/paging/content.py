"""Which pages' *contents* changed since a checkpoint, wherever the pages are by now.

A page's content and its place are different things: a page that only moved between hosts is the
same as in the last checkpoint. So one process keeps account of contents for all hosts, the pager:
only on the main host can a page be written, and the kernel remembers for it which were (WRITTEN,
see `dcres.linux.pagemap`) until a page comes in anew. What the pager is told it keeps here, in a
file beside its table that outlives it.

Two generations, a bit each: changed since the *base*, the last checkpoint that was published, and
since the *cut*, the stop of one under way. Whatever changes is marked in both. When a checkpoint
is published, the second takes the place of the first; when it is given up, the first still has
everything::

    mark                 11 in both
    cut                  01 or 00      what was marked counts as before the cut
    rebase (published)   the cut's bit becomes the base's

The rule that makes this exact was found by trying: the kernel's record of a page survives the
punch of a page-out as a marker, and is erased when the page comes back. So the pager asks *after
the punch*, when nobody can write the page any more, and *before any page-in*.

A record that may be incomplete is never believed: a pager that takes over from another marks all
pages that it cannot vouch for (`distrust`), and a change of generation that was cut short leaves no
base at all.

Layout of the file: a header page (magic, page count, then the ids of base and cut, each of 128
bytes, padded with NUL), and one byte a page.
"""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path
from typing import Protocol, Self

import numpy as np

from dcres.errors import NoRoom, PagingError
from dcres.linux.files import open_own
from dcres.linux.removal import remove_own_file
from dcres.model.pages import PAGE_SIZE, Mask, Pages

_MAGIC = b"DCRESCC1"
_HEADER = struct.Struct("<8sQ")
_NAME_BYTES = 128
_BASE_AT, _CUT_AT = 64, 64 + _NAME_BYTES
_SINCE_BASE, _SINCE_CUT = 1, 2
_BOTH = _SINCE_BASE | _SINCE_CUT


def content_file(table: Path) -> Path:
    """Where the account of the VM with this page table is."""
    return table.with_name("content")


class Content(Protocol):
    """Who keeps account of the contents of pages; see `ContentChanges`."""

    @property
    def kept(self) -> bool:
        """Whether anybody will ask."""

    def mark(self, pages: Pages) -> None:
        """The contents of `pages` changed."""

    def unmarked(self, pages: Pages) -> Pages:
        """Those of `pages` that are not marked in both generations."""

    def distrust(self, pages: Mask) -> None:
        """Whether these changed nobody can tell."""


class _NoAccount:
    kept = False

    def mark(self, pages: Pages) -> None:
        return

    def unmarked(self, pages: Pages) -> Pages:
        return pages[:0]

    def distrust(self, pages: Mask) -> None:
        return


NO_ACCOUNT = _NoAccount()


class ContentChanges:
    """The account of one VM, mapped; the pager writes it, and the main host's actor looks at it."""

    def __init__(self, path: Path, page_count: int, *, writable: bool = True) -> None:
        """The file that is there. Raises PagingError for another one."""
        length = PAGE_SIZE + page_count
        fd = open_own(path, os.O_RDWR if writable else os.O_RDONLY)
        try:
            if os.fstat(fd).st_size != length:
                raise PagingError(f"{path} is not the account of {page_count} pages")
            access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
            self._map = mmap.mmap(fd, length, access=access)
        finally:
            os.close(fd)
        if _HEADER.unpack_from(self._map) != (_MAGIC, page_count):
            raise PagingError(f"{path} is no account of what changed")
        self._marks = np.frombuffer(self._map, np.uint8, page_count, PAGE_SIZE)

    @classmethod
    def fresh(cls, path: Path, page_count: int, base: str = "") -> Self:
        """A new file in place of any that is there. Raises NoRoom.

        Nothing has changed yet since `base`, of a VM that was restored from it.
        """
        remove_own_file(path)
        new = path.with_suffix(".new")
        fd = open_own(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        try:
            # To touch a hole of a full tmpfs in a mapping is SIGBUS.
            os.posix_fallocate(fd, 0, PAGE_SIZE + page_count)
            os.pwrite(fd, _HEADER.pack(_MAGIC, page_count), 0)
            os.pwrite(fd, _named(base), _BASE_AT)
        except OSError as error:
            remove_own_file(new)
            raise NoRoom(
                f"{path.parent} has no room to keep account of what changes ({error.strerror}); "
                "enlarge that tmpfs"
            ) from None
        finally:
            os.close(fd)
        new.rename(path)
        return cls(path, page_count)

    @property
    def base(self) -> str:
        """The checkpoint since which changes are known; empty if there is none."""
        return self._name(_BASE_AT)

    @property
    def cut_for(self) -> str:
        """The checkpoint whose stop was last; empty if it was published."""
        return self._name(_CUT_AT)

    @property
    def kept(self) -> bool:
        """Whether there is a base, or will be."""
        return bool(self._map[_BASE_AT] or self._map[_CUT_AT])

    def changed(self) -> Mask:
        """The pages that changed since the base; a copy."""
        changed: Mask = (self._marks & _SINCE_BASE).astype(np.bool_)
        return changed

    def mark(self, pages: Pages) -> None:
        """See `Content`."""
        self._marks[pages] = _BOTH

    def unmarked(self, pages: Pages) -> Pages:
        """See `Content`."""
        unmarked: Pages = pages[self._marks[pages] != _BOTH]
        return unmarked

    def distrust(self, pages: Mask) -> None:
        """They count as changed."""
        self._marks[pages] = _BOTH

    def cut(self, checkpoint: str) -> None:
        """The guest is stopped for `checkpoint`: what is marked from now on is not in it."""
        self._rename(_CUT_AT, "")
        self._marks &= _SINCE_BASE
        self._rename(_CUT_AT, checkpoint)

    def rebase(self, checkpoint: str) -> None:
        """`checkpoint` is published: it is the base from now on.

        Raises PagingError unless the last cut was its own; then there is no base.
        """
        cut_for = self.cut_for
        if self.base == checkpoint:  # told twice
            return
        self._rename(_BASE_AT, "")
        if cut_for != checkpoint:
            raise PagingError(f"what changed since checkpoint {checkpoint} is not known")
        self._marks >>= 1
        self._rename(_CUT_AT, "")
        self._rename(_BASE_AT, checkpoint)

    def _name(self, at: int) -> str:
        return bytes(self._map[at : at + _NAME_BYTES]).rstrip(b"\0").decode()

    def _rename(self, at: int, name: str) -> None:
        """The first byte goes first and comes last, so one that is killed leaves no name."""
        named = _named(name)
        self._map[at] = 0
        self._map[at + 1 : at + _NAME_BYTES] = named[1:]
        self._map[at] = named[0]


def _named(name: str) -> bytes:
    encoded = name.encode()
    if len(encoded) >= _NAME_BYTES:
        raise PagingError(f"{name!r} is too long for the name of a checkpoint")
    return encoded.ljust(_NAME_BYTES, b"\0")
