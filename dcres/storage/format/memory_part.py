"""What to expect of the memory file of one host's part, as plain values: all that reading takes.

Whoever has the manifest makes it; a process that only reads pages need not know manifests.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dcres.model.pages import Mask
from dcres.storage import layout
from dcres.storage.damage import corrupt
from dcres.storage.digest import FileSum, Sums
from dcres.storage.engine.expected import MemoryFile
from dcres.storage.format import tables


@dataclass(frozen=True, slots=True)
class MemoryPart:
    """A memory file with `pages` of a VM's `page_count` pages, and its tables' checksums.

    `index` is that of a packed file's index; a sparse one has none.
    """

    folder: Path
    memory_file: str
    page_count: int
    pages: int
    sums: FileSum
    index: FileSum | None

    def read(self) -> MemoryFile:
        """The memory file as its tables describe it. Raises CheckpointCorrupt."""
        mask, sums = self.read_sums()
        order = None
        if self.index is not None:
            order = tables.read_index(self.folder / layout.INDEX, self.page_count, self.index)
        return MemoryFile(self.folder / self.memory_file, mask, sums, order)

    def read_sums(self) -> tuple[Mask, Sums]:
        """Mask and checksums of the pages here. Raises CheckpointCorrupt."""
        path = self.folder / layout.SUMS
        mask, sums = tables.read_sums(path, self.page_count, self.sums)
        count = int(np.count_nonzero(mask))
        if count != self.pages:
            raise corrupt(path, f"it lists {count} pages and the manifest {self.pages}")
        return mask, sums
