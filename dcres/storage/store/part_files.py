"""The files of one host's part, as copies carry them: a name, a length, bytes from any offset.

Nobody who copies needs to know more. A memory file's bytes are its pages one after the other,
packed or sparse: an object store has no holes. Each page is compared with its checksum when it is
read to be sent, and when it was received.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dcres.linux.files import opened
from dcres.model.pages import PAGE_SIZE, Pages
from dcres.storage.damage import corrupt, unreadable
from dcres.storage.digest import check_file
from dcres.storage.engine.bulk import (
    EndOfFile,
    page_sums,
    read_fully,
    stretches,
    write_fully,
    write_scattered,
)
from dcres.storage.engine.expected import (
    MemoryFile,
    read_piece,
    require_length,
    require_pages,
    require_sums,
    with_place,
)
from dcres.storage.format.manifest import Manifest
from dcres.storage.store.protocols import CheckpointStore

Read = Callable[[memoryview, int], None]  # fills a buffer from an offset on


@dataclass(frozen=True, slots=True)
class PartFile:
    """A file that is sent. Several threads may `read` it; that raises CheckpointCorrupt."""

    name: str
    length_bytes: int
    read: Read


@contextmanager
def open_part(store: CheckpointStore, manifest: Manifest, host: str) -> Iterator[list[PartFile]]:
    """All files of `host`, those but the memory file checked as a whole.

    Raises CheckpointCorrupt and NotFound.
    """
    expected = store.memory_part(manifest, host)
    with ExitStack() as files:
        found = []
        for part in manifest.hosts:
            for file in part.files if part.host == host else ():
                path = expected.folder / file.name
                check_file(path, file)
                fd = files.enter_context(_readable(path))
                found.append(PartFile(file.name, file.length_bytes, _plain(path, fd)))
        memory = expected.read()
        fd = files.enter_context(_readable(memory.path))
        require_length(memory, fd)
        found.append(_pages_of(memory, fd))
        yield found


@contextmanager
def _readable(path: Path) -> Iterator[int]:
    try:
        with ExitStack() as held:
            fd = held.enter_context(opened(path, os.O_RDONLY))
            held = held.pop_all()
    except OSError as error:
        raise unreadable(path, error) from None
    with held:
        yield fd


def _plain(path: Path, fd: int) -> Read:
    def read(buffer: memoryview, offset_bytes: int) -> None:
        try:
            read_fully(fd, buffer, offset_bytes)
        except EndOfFile:
            raise corrupt(path, "it became shorter") from None
        except OSError as error:
            raise unreadable(path, error) from None

    return read


def stored_pages(memory: MemoryFile) -> Pages:
    """The pages that a copy carries, in their order: those with a place, or of a sparse file all.

    Which pages of a sparse file are holes its tables do not say, so zeros are carried, too.
    Raises CheckpointCorrupt.
    """
    if memory.order is None:
        return np.flatnonzero(memory.mask)
    require_pages(memory, with_place(memory))
    return memory.order


def _pages_of(memory: MemoryFile, fd: int) -> PartFile:
    order = stored_pages(memory)

    def read(buffer: memoryview, offset_bytes: int) -> None:
        first = offset_bytes // PAGE_SIZE
        pages = order[first : first + len(buffer) // PAGE_SIZE]
        for low, high, place in _runs(memory, pages, first):
            piece = buffer[low * PAGE_SIZE : high * PAGE_SIZE]
            read_piece(memory, fd, piece, place * PAGE_SIZE)
        require_sums(memory, pages, page_sums(buffer, np.arange(len(pages))))

    return PartFile(memory.path.name, len(order) * PAGE_SIZE, read)


def _runs(memory: MemoryFile, pages: Pages, first: int) -> list[tuple[int, int, int]]:
    """What to read: ``(low, high, place)``, `low` and `high` counted from the first page."""
    if memory.order is not None:
        return [(0, len(pages), first)]
    return [(low, high, int(pages[low])) for low, high in stretches(pages)]


@dataclass(frozen=True, slots=True)
class ReceivedMemory:
    """A memory file that is being written to `fd` from pieces, by several threads at once."""

    memory: MemoryFile
    order: Pages
    fd: int

    @classmethod
    def begun(cls, memory: MemoryFile, manifest: Manifest, fd: int) -> ReceivedMemory:
        """With the length that it will have. Raises CheckpointCorrupt, OSError."""
        order = stored_pages(memory)
        pages = manifest.page_count if memory.order is None else len(order)
        os.ftruncate(fd, pages * PAGE_SIZE)
        return cls(memory, order, fd)

    def damage(self, data: memoryview, offset_bytes: int) -> int | None:
        """The first page in `data`, which belongs at an offset, that is not what was saved."""
        pages = self._pages(data, offset_bytes)
        found = page_sums(data, np.arange(len(pages)))
        bad = pages[found != self.memory.sums[pages]]
        return int(bad[0]) if bad.size else None

    def write(self, data: memoryview, offset_bytes: int) -> None:
        """Put `data` in its place; of a sparse file pages of zeros stay holes. Raises OSError."""
        if self.memory.order is not None:
            write_fully(self.fd, data, offset_bytes)
            return
        pages = self._pages(data, offset_bytes)
        words = np.frombuffer(data, dtype=np.uint64).reshape(len(pages), -1)
        slots = np.flatnonzero(words.any(axis=1))
        write_scattered(self.fd, data, pages[slots], slots)

    def _pages(self, data: memoryview, offset_bytes: int) -> Pages:
        first = offset_bytes // PAGE_SIZE
        return self.order[first : first + len(data) // PAGE_SIZE]
