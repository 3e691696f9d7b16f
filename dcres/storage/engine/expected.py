"""What a memory file must hold, and that it does: its tables against what is found in it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from xxhash import xxh3_64_intdigest

from dcres.model.pages import PAGE_SIZE, Mask, Pages
from dcres.storage.damage import corrupt
from dcres.storage.digest import Sums
from dcres.storage.engine.bulk import EndOfFile, read_fully

SUM_OF_ZEROS = np.uint64(xxh3_64_intdigest(bytes(PAGE_SIZE)))


@dataclass(frozen=True, slots=True, eq=False)
class MemoryFile:
    """A memory file as its tables describe it.

    `mask` and `sums` have one entry per page of the VM; `sums` means something where `mask` is
    true. `order` is the page at every place of a packed file, None for a sparse one.
    """

    path: Path
    mask: Mask
    sums: Sums
    order: Pages | None = None

    @property
    def length_bytes(self) -> int:
        """How long it must be."""
        return (len(self.mask) if self.order is None else len(self.order)) * PAGE_SIZE


def with_place(memory: MemoryFile) -> Mask:
    """Which pages have a place in a packed file."""
    found: Mask = np.zeros(len(memory.mask), dtype=np.bool_)
    found[memory.order] = True
    return found


def require_pages(memory: MemoryFile, found: Mask) -> None:
    """CheckpointCorrupt for a page that is present but should not be, or the other way round.

    A page of zeros needs no place. Copying can also turn one into a hole: cp(1) does that to
    copies of sparse files.
    """
    wrong = found != memory.mask
    if wrong.any():
        wrong &= ~memory.mask | (memory.sums != SUM_OF_ZEROS)
        for page in np.flatnonzero(wrong)[:1].tolist():
            what = "is missing (a hole)" if memory.mask[page] else "is present but should not be"
            raise corrupt(memory.path, f"page {page} {what}")


def require_length(memory: MemoryFile, fd: int) -> None:
    """CheckpointCorrupt unless `memory`, open as `fd`, is as long as it must be."""
    length_bytes = os.fstat(fd).st_size
    if length_bytes != memory.length_bytes:
        what = f"it has {length_bytes} bytes instead of {memory.length_bytes}"
        raise corrupt(memory.path, what)


def require_sums(memory: MemoryFile, pages: Pages, found: Sums) -> None:
    """CheckpointCorrupt for the first of `pages` whose checksum `found` is not the right one."""
    bad = pages[found != memory.sums[pages]]
    if bad.size:
        raise corrupt(memory.path, f"page {bad[0]} was altered: its checksum differs")


def read_piece(memory: MemoryFile, fd: int, buffer: memoryview, offset_bytes: int) -> None:
    """Fill `buffer` from `memory`, open as `fd`. Raises CheckpointCorrupt."""
    place = offset_bytes // PAGE_SIZE
    where = f"page {place if memory.order is None else memory.order[place]}"
    try:
        read_fully(fd, buffer, offset_bytes)
    except EndOfFile:
        raise corrupt(memory.path, f"it ends at or after {where}") from None
    except OSError as error:
        what = f"it cannot be read from {where} on ({error.strerror})"
        raise corrupt(memory.path, what) from None
