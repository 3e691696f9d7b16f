"""Any page of a memory file at any time, each compared with its checksum: what serves them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Self

import numpy as np

from dcres.model.pages import PAGE_SIZE, Mask
from dcres.storage.damage import unreadable
from dcres.storage.digest import Sums, page_sums
from dcres.storage.memory_file import read_piece, require_length, require_sums


class PageReader:
    """A memory file, opened to read any of the pages in `mask`.

    Opening looks at nothing but the file's length, so it takes no time however long the file
    is: a page that is a hole, or was altered, is found when it is read. Reads go through the page
    cache, because neighbours of a page that somebody wants are wanted soon. Raises
    CheckpointCorrupt if the file is missing or has another length than `mask`.
    """

    def __init__(self, path: Path, mask: Mask, sums: Sums) -> None:
        self.path = path
        self.mask = mask
        self._sums = sums
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise unreadable(path, error) from None
        try:
            require_length(path, self._fd, len(mask))
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def read(self, first: int, stop: int) -> memoryview:
        """The data of pages ``[first, stop)``, all of which `mask` must have.

        Raises CheckpointCorrupt, which names the file and the first bad page.
        """
        data = memoryview(bytearray((stop - first) * PAGE_SIZE))
        read_piece(self.path, self._fd, data, first * PAGE_SIZE)
        found = page_sums(data, np.arange(stop - first))
        require_sums(self.path, np.arange(first, stop), found, self._sums)
        return data
