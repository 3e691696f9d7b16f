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
from dcres.storage.digest import Sums, check_file
from dcres.storage.engine.bulk import (
    EndOfFile,
    page_sums,
    read_fully,
    stretches,
    write_fully,
    write_scattered,
)
from dcres.storage.engine.expected import MemoryFile, require_pages, with_place
from dcres.storage.format.manifest import Manifest
from dcres.storage.format.memory_part import MemoryPart
from dcres.storage.format.tables import GONE, SegmentRows
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
    """All files of `host`, those but memory files checked as a whole.

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
        for memory in carried_of(expected):
            fd = files.enter_context(_readable(memory.path))
            memory.require_length(fd)
            found.append(PartFile(memory.path.name, memory.length_bytes, memory.reader(fd)))
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


@dataclass(frozen=True, slots=True, eq=False)
class Carried:
    """A memory file as copies carry it: `pages` one after the other, and the checksum of each.

    `page_count` is that of the VM in a sparse file, whose pages lie at their numbers; else None.
    """

    path: Path
    pages: Pages
    sums: Sums
    page_count: int | None = None

    @property
    def length_bytes(self) -> int:
        """How much is carried."""
        return len(self.pages) * PAGE_SIZE

    @property
    def stored_bytes(self) -> int:
        """How long the file is in a store."""
        return self.length_bytes if self.page_count is None else self.page_count * PAGE_SIZE

    def require_length(self, fd: int) -> None:
        """CheckpointCorrupt unless the file, open as `fd`, is as long as it must be."""
        found = os.fstat(fd).st_size
        if found != self.stored_bytes:
            raise corrupt(self.path, f"it has {found} bytes instead of {self.stored_bytes}")

    def reader(self, fd: int) -> Read:
        """What reads from the file, open as `fd`, and compares each page with its checksum."""
        plain = _plain(self.path, fd)

        def read(buffer: memoryview, offset_bytes: int) -> None:
            for low, high, place in self._runs(len(buffer), offset_bytes):
                plain(buffer[low * PAGE_SIZE : high * PAGE_SIZE], place * PAGE_SIZE)
            page = self.damage(buffer, offset_bytes)
            if page is not None:
                raise corrupt(self.path, f"page {page} was altered: its checksum differs")

        return read

    def damage(self, data: memoryview, offset_bytes: int) -> int | None:
        """The first page in `data`, which belongs at an offset, that is not what was saved."""
        some = self._some(len(data), offset_bytes)
        pages = self.pages[some]
        bad = pages[page_sums(data, np.arange(len(pages))) != self.sums[some]]
        return int(bad[0]) if bad.size else None

    def write(self, fd: int, data: memoryview, offset_bytes: int) -> None:
        """Put `data` in its place in `fd`; of a sparse file zeros stay holes. Raises OSError."""
        if self.page_count is None:
            write_fully(fd, data, offset_bytes)
            return
        pages = self.pages[self._some(len(data), offset_bytes)]
        words = np.frombuffer(data, dtype=np.uint64).reshape(len(pages), -1)
        slots = np.flatnonzero(words.any(axis=1))
        write_scattered(fd, data, pages[slots], slots)

    def _some(self, length_bytes: int, offset_bytes: int) -> slice:
        first = offset_bytes // PAGE_SIZE
        return slice(first, first + length_bytes // PAGE_SIZE)

    def _runs(self, length_bytes: int, offset_bytes: int) -> list[tuple[int, int, int]]:
        """What to read: ``(low, high, place)``, `low` and `high` counted from the first page."""
        some = self._some(length_bytes, offset_bytes)
        if self.page_count is None:
            return [(0, length_bytes // PAGE_SIZE, some.start)]
        pages = self.pages[some]
        return [(low, high, int(pages[low])) for low, high in stretches(pages)]


def carried_of(part: MemoryPart) -> Iterator[Carried]:
    """The memory files of a part: one, or the pack of each segment. Raises CheckpointCorrupt."""
    for segment in part.segments:
        yield carried_pack(part.folder / segment.pack, segment.read(part.folder, part.page_count))
    if not part.segments:
        memory = part.read()
        pages = stored_pages(memory)
        count = part.page_count if memory.order is None else None
        yield Carried(memory.path, pages, memory.sums[pages], count)


def carried_pack(path: Path, rows: SegmentRows) -> Carried:
    """The pack of a segment with these rows: all pages in it, also what a later one has anew."""
    placed = rows.places < GONE
    ascending = np.argsort(rows.places[placed])
    return Carried(path, rows.pages[placed][ascending], rows.sums[placed][ascending])


def stored_pages(memory: MemoryFile) -> Pages:
    """The pages that a copy carries, in their order: those with a place, or of a sparse file all.

    Which pages of a sparse file are holes its tables do not say, so zeros are carried, too.
    Raises CheckpointCorrupt.
    """
    if memory.order is None:
        return np.flatnonzero(memory.mask)
    require_pages(memory, with_place(memory))
    return memory.order
