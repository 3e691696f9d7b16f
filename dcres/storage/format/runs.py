"""What is known of each page, as runs of pages: only where it differs from what was known before.

So a table has as many rows as there were changes, however large the VM is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dcres.model.history import Ticks
from dcres.model.pages import Extents, Mask, pages_of_extents

_LONG = 64  # pages; shorter runs are laid all at once


@dataclass(frozen=True, slots=True, eq=False)
class Runs:
    """Extents, which may touch, and the value that all pages of each have."""

    extents: Extents
    values: npt.NDArray[Any]

    def __len__(self) -> int:
        return len(self.values)

    def columns(self) -> list[npt.NDArray[np.uint64]]:
        """First pages, and those behind the last ones."""
        return [np.ascontiguousarray(self.extents[:, at]).view(np.uint64) for at in (0, 1)]

    def lay(self, target: npt.NDArray[Any], values: npt.NDArray[Any] | None = None) -> None:
        """Write each run's value, or that of `values`, over its pages of `target`."""
        values = self.values if values is None else values
        lengths = self.extents[:, 1] - self.extents[:, 0]
        long = lengths >= _LONG
        rows = zip(self.extents[long].tolist(), values[long].tolist(), strict=True)
        for (first, stop), value in rows:
            target[first:stop] = value
        pages = pages_of_extents(self.extents[~long])
        target[pages] = np.repeat(values[~long], lengths[~long])


def runs_where(differs: Mask, values: npt.NDArray[Any]) -> Runs:
    """The longest runs of pages that all differ and have one value."""
    first = _begins(differs, values)
    stop = np.append(differs[:-1] & (first[1:] | ~differs[1:]), differs[-1:])
    firsts, stops = np.flatnonzero(first), np.flatnonzero(stop) + 1
    return Runs(np.stack((firsts, stops), axis=1), values[firsts])


def _begins(differs: Mask, values: npt.NDArray[Any]) -> Mask:
    """Where one of these runs begins."""
    begins: Mask = differs.copy()
    begins[1:] &= ~differs[:-1] | (values[1:] != values[:-1])
    return begins


def history_runs(now: Ticks, tick: int, before: Ticks, most: int) -> Runs:
    """At most so many runs of the last accesses since `before`, at whatever detail that takes.

    A page counts as accessed where its tick is greater than `before`; no tick gets smaller, unless
    it was greater than the `tick` it is now. Where there are too many runs, regions of 2, 4, 8 …
    pages get the greatest tick of their pages.
    """
    ahead: Mask = before > tick  # of a clock that began anew
    known = np.where(ahead, now, np.maximum(now, before))
    differs: Mask = ahead | (now > before)
    size = 1
    while np.count_nonzero(_begins(differs, known)) > max(most, 1):
        size *= 2
        known, differs = _by_two(known).max(axis=1), _by_two(differs).max(axis=1)
    runs = runs_where(differs, known)
    return Runs(np.minimum(runs.extents * size, len(now)), runs.values)


def _by_two(column: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if len(column) % 2:
        column = np.append(column, column.dtype.type(0))
    return column.reshape(-1, 2)
