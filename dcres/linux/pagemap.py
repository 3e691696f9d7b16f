"""PAGEMAP_SCAN: which pages of another process were written, and protect them again.

With userfaultfd's WP_ASYNC the kernel lifts write protection by itself and remembers; the scan
reads that memory and re-protects in one atomic step (Documentation/admin-guide/mm/pagemap.rst).
Only WRITTEN is asked for: SWAPPED is also set for the markers that protect holes, and a hole
without a marker counts as written, so the caller keeps only pages that it knows to be present.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
from typing import Self

import numpy as np

from dcres.linux import abi
from dcres.model.pages import PAGE_SIZE, Extents, join

_REGIONS_AT_ONCE = 16384


class WriteTracker:
    """The pages of one mapping that were written since they were last protected."""

    def __init__(self, pid: int, start: int, page_count: int) -> None:
        self._fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        self._start = start
        self._end = start + page_count * PAGE_SIZE
        self._regions = np.empty((_REGIONS_AT_ONCE, 3), dtype=np.uint64)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def scan(self, *, protect: bool = True) -> Extents:
        """Extents written since they were last protected; protects them again if asked.

        Raises OSError (EPERM when the mapping is not registered with WP_ASYNC).
        """
        flags = abi.PM_SCAN_CHECK_WPASYNC | (abi.PM_SCAN_WP_MATCHING if protect else 0)
        call = abi.PmScanArg(
            size=ctypes.sizeof(abi.PmScanArg),
            flags=flags,
            start=self._start,
            end=self._end,
            vec=self._regions.ctypes.data,
            vec_len=_REGIONS_AT_ONCE,
            category_mask=abi.PAGE_IS_WRITTEN,
            return_mask=abi.PAGE_IS_WRITTEN,
        )
        parts = []
        while call.start < self._end:
            found = fcntl.ioctl(self._fd, abi.PAGEMAP_SCAN, call)
            parts.append(self._regions[:found, :2].astype(np.int64))
            call.start = call.walk_end
        pages = (np.concatenate(parts) - self._start) // PAGE_SIZE
        return join(pages)
