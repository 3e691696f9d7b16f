"""Moves of a running VM's pages from host to host, in the order in which they are made.

An ``int64`` array of shape ``(n, 4)``: rows ``first, stop, from, to`` with pages ``[first,
stop)`` and owner codes. A row concerns those of its pages that still are where it says; the
guest may have brought the others to the main host meanwhile.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dcres.model.history import Ticks
from dcres.model.placement import NOWHERE, Owners

Moves = npt.NDArray[np.int64]

ROW_PAGES = 256
CHUNK_PAGES = 1 << 16  # what is worked out for so many pages stays in the processor's caches
NO_MOVES: Moves = np.empty((0, 4), dtype=np.int64)


def moves(owners: Owners, wanted: Owners, ticks: Ticks, now: int) -> Moves:
    """What it takes to get from `owners` to `wanted` (both codes per page), hottest first.

    Pages whose last access is about equally long ago (a factor of two) go in page order, so
    that rows are long. Memory is looked at in chunks, and no row is of two of them.
    """
    chunks = range(0, len(owners), CHUNK_PAGES)
    found = [_runs(owners, wanted, ticks, now, at, at + CHUNK_PAGES) for at in chunks]
    runs = np.concatenate([np.empty((0, 5), dtype=np.int64), *found])
    return _split(runs[np.argsort(runs[:, 4], kind="stable")])


def _runs(
    owners: Owners, wanted: Owners, ticks: Ticks, now: int, first: int, stop: int
) -> npt.NDArray[np.int64]:
    """Runs of pages of ``[first, stop)`` that move alike: ``first, count, from, to, coldness``."""
    source, target = owners[first:stop], wanted[first:stop]
    pages = np.flatnonzero((source != target) & (source != NOWHERE) & (target != NOWHERE))
    seen, last = ticks[first:stop][pages], np.uint32(now)
    ages = np.where(seen == 0, last, last - np.minimum(seen, last))
    coldness = np.frexp(ages.astype(np.float32))[1].astype(np.int64)
    alike = coldness << 16 | source[pages].astype(np.int64) << 8 | target[pages]
    new = np.flatnonzero((np.diff(pages) != 1) | (np.diff(alike) != 0)) + 1
    begins = np.concatenate((np.zeros(min(1, pages.size), dtype=np.int64), new))
    counts = np.diff(np.append(begins, pages.size))
    at = pages[begins]
    return np.stack((at + first, counts, source[at], target[at], coldness[begins]), axis=1)


def _split(runs: npt.NDArray[np.int64]) -> Moves:
    """Rows of at most `ROW_PAGES` from runs ``first, count, from, to, …``."""
    pieces = -(-runs[:, 1] // ROW_PAGES)
    rows = np.repeat(runs[:, :4], pieces, axis=0)
    offsets = (np.arange(len(rows)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * ROW_PAGES
    stops = np.minimum(rows[:, 1], offsets + ROW_PAGES) + rows[:, 0]
    rows[:, 0] += offsets
    rows[:, 1] = stops
    return rows
