"""Access history: when each page was last known to be touched, and who leaves first.

Recency is a coarse tick per page, ``uint32``, 0 = never. Faults and writes are known touches, and
so is whatever touches a page on standby; see `dcres.model.policy`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dcres.model.pages import Mask, Pages

Ticks = npt.NDArray[np.uint32]


def coldest(ticks: Ticks, candidates: Mask, count: int) -> Pages:
    """The `count` candidates touched longest ago, ascending by page number.

    Ties go to the lower page number, so that cold neighbours leave together.
    """
    pages = np.flatnonzero(candidates)
    if count < 1:
        return pages[:0]
    if pages.size > count:
        ages = ticks[pages]
        threshold = np.partition(ages, count - 1)[count - 1]
        older = pages[ages < threshold]
        ties = pages[ages == threshold][: count - older.size]
        pages = np.sort(np.concatenate((older, ties)))
    return pages


def hottest(ticks: Ticks, candidates: Mask, count: int) -> Pages:
    """The `count` candidates touched last, ascending by page number."""
    newest_first = np.uint32(0xFFFFFFFF) - ticks
    return coldest(newest_first, candidates, count)
