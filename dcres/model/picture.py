"""Placement and heat of a VM's memory in a few thousand numbers: what ``dcres status`` draws.

Memory is cut into *buckets* of consecutive pages. A bucket has a power of two of pages, so that
buckets can be joined to larger ones and begin at round addresses; the last may be shorter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dcres.model.history import Ticks
from dcres.model.placement import NOWHERE, Owners

MOST_BUCKETS = 4096

Counts = npt.NDArray[np.int64]
Ages = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """How many pages of each bucket lie where, and when they were last known to be touched.

    `pages` has a row per bucket and a column per host, then one for pages that a lazy restore
    has not yet brought, then one for pages that are nowhere. `age_s` has the same columns but
    the last: the geometric mean of the pages' ages, counted from the newest touch in the VM
    and rounded up to whole ticks; NaN where there is no page.
    """

    page_count: int
    bucket_pages: int
    hosts: tuple[str, ...]  # the main host first
    pages: Counts
    age_s: Ages

    @property
    def existing(self) -> Counts:
        """`pages` without the column of those that are nowhere."""
        return self.pages[:, :-1]

    @property
    def totals(self) -> dict[str, int]:
        """Pages per host, the main host first."""
        return dict(zip(self.hosts, self.pages.sum(axis=0).tolist(), strict=False))

    @property
    def not_yet_brought(self) -> int:
        """Pages that no host of the VM holds yet; they are still in the checkpoint."""
        return int(self.pages[:, -2].sum())

    @property
    def nowhere(self) -> int:
        """Pages that the guest never touched."""
        return int(self.pages[:, -1].sum())

    def joined(self, factor: int) -> Picture:
        """The same with `factor` (a power of two) buckets made one."""
        starts = np.arange(0, len(self.pages), factor)
        logs = np.log(np.where(self.existing > 0, self.age_s, 1.0)) * self.existing
        pages = np.add.reduceat(self.pages, starts)
        ages = _mean_ages(np.add.reduceat(logs, starts), pages[:, :-1])
        return Picture(self.page_count, self.bucket_pages * factor, self.hosts, pages, ages)


def bucket_pages(page_count: int, buckets: int) -> int:
    """The least power of two of pages of which at most `buckets` buckets hold `page_count`."""
    if buckets < 1:
        raise ValueError(f"memory cannot be cut into {buckets} buckets")
    return 1 << max(-(-page_count // buckets) - 1, 0).bit_length()


def summarise(
    owners: Owners,
    ticks: Ticks,
    hosts: Mapping[int, str],
    *,
    buckets: int,
    tick_now: int,
    tick_s: float,
) -> Picture:
    """The picture of a network page table, with at most `buckets` buckets.

    `hosts` names the host of each owner code, the main host's first; several codes may stand
    for one host. A page with a code that is not among them is not yet brought. Both arrays may
    be written to meanwhile: every page is then counted once, as it was before or after.
    """
    names = tuple(dict.fromkeys(hosts.values()))
    column_of = np.full(256, len(names), dtype=np.uint8)
    column_of[list(hosts)] = [names.index(name) for name in hosts.values()]
    column_of[NOWHERE] = len(names) + 1
    width = bucket_pages(owners.size, buckets)
    firsts = range(0, owners.size, width)
    columns = len(names) + 2
    pages = np.empty((len(firsts), columns), dtype=np.int64)
    logs = np.empty((len(firsts), columns - 1))
    # One bucket at a time: what is made of it stays in the processor's cache.
    for row, first in enumerate(firsts):
        column = column_of[owners[first : first + width]]
        since = tick_now - np.minimum(ticks[first : first + width], np.uint32(tick_now))
        log_ages = np.log(since.astype(np.float32) + np.float32(1))
        pages[row] = np.bincount(column, minlength=columns)
        logs[row] = np.bincount(column, log_ages, minlength=columns)[:-1]
    ages = _mean_ages(logs, pages[:, :-1]) * tick_s
    return Picture(owners.size, width, names, pages, ages)


def _mean_ages(logs: Ages, pages: Counts) -> Ages:
    """From sums of logarithms; NaN where there are no pages."""
    means = np.full(pages.shape, np.nan)
    np.divide(logs, pages, out=means, where=pages > 0)
    np.exp(means, out=means)
    return means
