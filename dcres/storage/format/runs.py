"""What is known of each page, as runs of pages: only where it differs from what was known before.

So a table has as many rows as there were changes, however large the VM is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dcres.model.history import Ticks
from dcres.model.pages import Extents, Mask, Pages, pages_of_extents

Column = npt.NDArray[Any]

_AT_ONCE = 1 << 20  # pages; fresh memory for all of a large VM's takes longer than all else
_LONG = 64  # pages; shorter runs are laid all at once


@dataclass(frozen=True, slots=True, eq=False)
class Runs:
    """Extents, which may touch, and the value that all pages of each have."""

    extents: Extents
    values: Column

    def __len__(self) -> int:
        return len(self.values)

    def columns(self) -> list[npt.NDArray[np.uint64]]:
        """First pages, and those behind the last ones."""
        return [np.ascontiguousarray(self.extents[:, at]).view(np.uint64) for at in (0, 1)]

    def lay(self, target: Column) -> None:
        """Write each run's value over its pages of `target`."""
        for first, stop, value in self._long():
            target[first:stop] = value
        pages, values = self._short()
        target[pages] = values

    def lift(self, target: Column) -> None:
        """The same where it is greater than what is there."""
        for first, stop, value in self._long():
            np.maximum(target[first:stop], value, out=target[first:stop])
        pages, values = self._short()
        target[pages] = np.maximum(target[pages], values)

    @property
    def _lengths(self) -> Pages:
        return self.extents[:, 1] - self.extents[:, 0]

    def _long(self) -> list[tuple[int, int, Any]]:
        long = self._lengths >= _LONG
        rows = zip(self.extents[long].tolist(), self.values[long], strict=True)
        return [(first, stop, value) for (first, stop), value in rows]

    def _short(self) -> tuple[Pages, Column]:
        """Each page of the other runs, and its value."""
        short = self._lengths < _LONG
        values = np.repeat(self.values[short], self._lengths[short])
        return pages_of_extents(self.extents[short]), values


def runs_of(column: Column, differs: Callable[[slice], Mask]) -> Runs:
    """The longest runs of pages which all differ and have one value in `column`.

    ``differs(pages)`` says which of some pages do.
    """
    pieces = [slice(at, at + _AT_ONCE) for at in range(0, max(len(column), 1), _AT_ONCE)]
    found = [_runs_at(each.start, column[each], differs(each)) for each in pieces]
    extents = np.concatenate([runs.extents for runs in found])
    return _joined(extents, np.concatenate([runs.values for runs in found]))


def _runs_at(start: int, column: Column, differs: Mask) -> Runs:
    """Runs of some pages, of which the first is `start`."""
    begins: Mask = differs.copy()
    begins[1:] &= ~differs[:-1] | (column[1:] != column[:-1])
    ends: Mask = differs.copy()
    ends[:-1] &= ~differs[1:] | begins[1:]
    firsts, stops = np.flatnonzero(begins), np.flatnonzero(ends) + 1
    return Runs(np.stack((firsts, stops), axis=1) + start, column[firsts])


def _joined(extents: Extents, values: Column) -> Runs:
    """The same with runs that touch and have one value as one."""
    apart = (extents[1:, 0] != extents[:-1, 1]) | (values[1:] != values[:-1])
    firsts = extents[np.insert(apart, 0, True)[: len(extents)], 0]
    stops = extents[np.append(apart, True)[: len(extents)], 1]
    return Runs(np.stack((firsts, stops), axis=1), values[np.insert(apart, 0, True)[: len(values)]])


def history_runs(now: Ticks, tick: int, before: Ticks, most: int) -> Runs:
    """At most so many runs of the accesses since `before`, at whatever detail that takes.

    `lift` puts them upon `before`, once what it has of a later time than `tick` is forgotten.
    """
    known = before if before.max(initial=0) <= tick else without_later(before, tick)
    exact = runs_of(now, lambda pages: now[pages] > known[pages])
    return coarser(exact, most, len(now))


def without_later(ticks: Ticks, tick: int) -> Ticks:
    """As if what was accessed after `tick`, by a clock that was set back since, never was."""
    return np.where(ticks > tick, np.uint32(0), ticks)


def coarser(runs: Runs, most: int, page_count: int) -> Runs:
    """`runs`, or at most so many of regions of 2, 4, 8 … pages that cover them.

    A region has the greatest value that any of its pages has in `runs`.
    """
    size = 1
    while len(runs) > max(most, 1):
        runs, size = _halved(runs), 2 * size
    return Runs(np.minimum(runs.extents * size, page_count), runs.values)


def _halved(runs: Runs) -> Runs:
    """Runs of regions of two pages. The greater of two neighbours has the region that both are in.

    No region can be in three, since each has at least one of its two pages.
    """
    first, stop = runs.extents[:, 0] // 2, (runs.extents[:, 1] + 1) // 2
    both = stop[:-1] > first[1:]
    left = runs.values[:-1] >= runs.values[1:]
    first[1:] += both & left
    stop[:-1] -= both & ~left
    kept = first < stop
    return _joined(np.stack((first[kept], stop[kept]), axis=1), runs.values[kept])
