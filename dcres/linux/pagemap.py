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
from dcres.model.pages import PAGE_SIZE, Extents, Mask, Pages, join, mask_of_extents

_REGIONS_AT_ONCE = 16384
_GAP_PAGES = 64  # reading over so many entries takes as long as another read


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

    def mapped(self, pages: Pages) -> Mask:
        """Which of the ascending `pages` are in the process's page table.

        One that was taken out of it and is back was touched meanwhile.
        """
        if not pages.size:
            return np.zeros(0, dtype=np.bool_)
        found = [
            _present(os.pread(self._fd, 8 * int(run[-1] - run[0] + 1), self._entry(int(run[0]))))[
                run - run[0]
            ]
            for run in _close_by(pages)
        ]
        return np.concatenate(found)

    def _entry(self, page: int) -> int:
        return 8 * (self._start // PAGE_SIZE + page)

    def scan(self, *, protect: bool = True) -> Extents:
        """Extents written since they were last protected; protects them again if asked.

        A page that is written meanwhile is among them, or will be the next time, or both.
        Raises OSError (EPERM when the mapping is not registered with WP_ASYNC).
        """
        flags = abi.PM_SCAN_CHECK_WPASYNC | (abi.PM_SCAN_WP_MATCHING if protect else 0)
        return join(self._scan(flags, self._start, self._end))

    def written(self, pages: Pages) -> Pages:
        """Which of the ascending `pages` were written since they were last protected.

        Protects nothing. A page whose hole was just punched keeps that record as a marker, and
        nobody can write it any more; so right after the punch the answer is final.
        """
        if not pages.size:
            return pages
        found = [np.zeros(0, dtype=np.int64)]
        for run in _close_by(pages):
            first, stop = int(run[0]), int(run[-1]) + 1
            begin, end = (self._start + at * PAGE_SIZE for at in (first, stop))
            extents = self._scan(abi.PM_SCAN_CHECK_WPASYNC, begin, end)
            found.append(run[mask_of_extents(extents - first, stop - first)[run - first]])
        return np.concatenate(found)

    def _scan(self, flags: int, start: int, end: int) -> Extents:
        """Extents of written pages in a stretch of the process's memory, maybe overlapping."""
        call = abi.PmScanArg(
            size=ctypes.sizeof(abi.PmScanArg),
            flags=flags,
            start=start,
            end=end,
            vec=self._regions.ctypes.data,
            vec_len=_REGIONS_AT_ONCE,
            category_mask=abi.PAGE_IS_WRITTEN,
            return_mask=abi.PAGE_IS_WRITTEN,
        )
        parts = []
        full = True
        while full and call.start < end:
            found = fcntl.ioctl(self._fd, abi.PAGEMAP_SCAN, call)
            parts.append(self._regions[:found, :2].astype(np.int64))
            # With room left everything was looked at, but `walk_end` does not say so: it is
            # where the kernel's own buffer of 512 regions was last full (do_pagemap_scan). To go
            # on there would find a second time, and longer, what was written meanwhile.
            full = found == len(self._regions)
            call.start = call.walk_end
        pages: Extents = (np.concatenate(parts) - self._start) // PAGE_SIZE
        return pages


def _close_by(pages: Pages) -> list[Pages]:
    """Ascending pages in groups that are worth one look."""
    return np.split(pages, np.flatnonzero(np.diff(pages) > _GAP_PAGES) + 1)


def _present(entries: bytes) -> Mask:
    """Bit 63 of each entry: a page is mapped there (pagemap.rst)."""
    present: Mask = np.frombuffer(entries, dtype=np.int64) < 0
    return present
