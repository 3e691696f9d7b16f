"""Who leaves the main host: replacement policies, told what the pager can know and nothing more.

A stock kernel keeps no record of reads, so a policy hears of a page only when it arrives, when
it was seen written, and when it was touched *on standby*: such a page is still on the main
host, but taken out of the guest's page table, so that the guest's next touch shows.

Pages are numbered as everywhere; `here` is the mask of pages that may be chosen. Ticks are
coarse and only grow.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from dcres.model.history import Ticks, coldest
from dcres.model.pages import Mask, Pages

STANDBY_SHARE = 0.25
PATIENCE_TICKS = 100
AGAIN_PER_LEAVER = 4
ENOUGH_PAGES = 64


class Policy(Protocol):
    """What the evictor asks and tells. Chosen pages are ascending and distinct."""

    on_standby: Mask
    """Who is watched: true only for pages given to `standby`."""

    def arrived(self, first: int, stop: int, tick: int) -> None:
        """Pages ``[first, stop)`` came to the main host, which counts as a touch."""

    def left(self, pages: Pages) -> None:
        """These pages are no longer on the main host."""

    def touched(self, pages: Pages, tick: int) -> None:
        """These pages were written, or touched on standby, where they no longer are."""

    def suspects(self, here: Mask, tick: int, most: int) -> Pages:
        """At most `most` pages that should be put on standby next; none when enough are."""

    def standby(self, pages: Pages, tick: int) -> None:
        """These pages were just taken out of the guest's page table."""

    def victims(self, here: Mask, most: int) -> Pages:
        """Between one and `most` pages to send away first; none only when `here` is empty.

        Those on standby that turn out to have been touched meanwhile stay; see `touched`.
        """


class SegmentedFifo:
    """Queues in a row: what comes is probationary, what is touched again is protected.

    ::

                            ┌────── protected ───────┐
                    touched │                        │ oldest
                            │                        ▼
        arrival ──▶ new ──▶ standby ──oldest, untouched──▶ leaves

    What arrives was wanted once, or is only a neighbour of such a page; the second touch
    protects it, and shows on standby alone. So memory that is walked through once does not drive
    out what is used again and again (R. Karedla et al., Caching strategies to improve disk
    system performance, 1994: SLRU). Protected pages are put on standby again when pages leave and
    less than `STANDBY_SHARE` of all is on standby, or `PATIENCE_TICKS` after they were last known
    to be touched: the access history then also knows what is read while nothing has to leave.

    `ticks`, the access history, is written here and may be written by others.
    """

    def __init__(self, ticks: Ticks) -> None:
        self._ticks = ticks
        self._entered = np.zeros(ticks.size, dtype=np.uint32)  # the tick, of those on standby
        self._protected: Mask = np.zeros(ticks.size, dtype=np.bool_)
        self.on_standby: Mask = np.zeros(ticks.size, dtype=np.bool_)
        self._left_pages = 0  # since the last choice of suspects

    def arrived(self, first: int, stop: int, tick: int) -> None:
        """They are new: they may be put on standby from the next tick on."""
        self._ticks[first:stop] = tick

    def left(self, pages: Pages) -> None:
        """They are protected no more."""
        self.on_standby[pages] = False
        self._protected[pages] = False
        self._left_pages += pages.size

    def touched(self, pages: Pages, tick: int) -> None:
        """Those on standby are protected from now on."""
        self._ticks[pages] = tick
        # A write that was not on standby may be the touch that brought the page.
        self._protected[pages] |= self.on_standby[pages]
        self.on_standby[pages] = False

    def suspects(self, here: Mask, tick: int, most: int) -> Pages:
        """New pages, and protected ones to be watched again; half of each if there are many."""
        waiting = here & ~self.on_standby
        # Not in the tick of their arrival: what touched them then may not be done with them.
        new = waiting & ~self._protected & (self._ticks < tick)
        wanted = self._again_wanted(here, waiting, new, tick)
        self._left_pages = 0
        first = coldest(self._ticks, new, max(most - wanted, most // 2))
        again = coldest(self._ticks, waiting & self._protected, min(most - first.size, wanted))
        return np.sort(np.concatenate((first, again)))

    def _again_wanted(self, here: Mask, waiting: Mask, new: Mask, tick: int) -> int:
        """How many protected pages should be on standby once more."""
        everybody = int(np.count_nonzero(here))
        soon = everybody - int(np.count_nonzero(waiting)) + int(np.count_nonzero(new))
        long_ago = self._ticks < max(tick - PATIENCE_TICKS, 0)
        doubtful = int(np.count_nonzero(waiting & self._protected & long_ago))
        lacking = min(int(STANDBY_SHARE * everybody) - soon, AGAIN_PER_LEAVER * self._left_pages)
        return max(lacking, doubtful)

    def standby(self, pages: Pages, tick: int) -> None:
        """They are watched from now on."""
        self._entered[pages] = tick
        self.on_standby[pages] = True

    def victims(self, here: Mask, most: int) -> Pages:
        """What was longest on standby; without enough of it, what is not protected, by age."""
        enough = min(ENOUGH_PAGES, most)
        watched = here & self.on_standby
        if np.count_nonzero(watched) >= enough:
            return coldest(self._entered, watched, most)
        # More leave than can be watched: the best guess is what was not protected.
        probationary = here & ~self._protected
        if np.count_nonzero(probationary) >= enough:
            return coldest(self._ticks, probationary, most)
        return coldest(self._ticks, here, most)


class Fifo:
    """Who came first leaves first, whatever was touched; nobody is on standby."""

    def __init__(self, page_count: int) -> None:
        self._arrived: Ticks = np.zeros(page_count, dtype=np.uint32)
        self.on_standby: Mask = np.zeros(page_count, dtype=np.bool_)

    def arrived(self, first: int, stop: int, tick: int) -> None:
        """The only thing that counts."""
        self._arrived[first:stop] = tick

    def left(self, pages: Pages) -> None:
        """Of no consequence."""

    def touched(self, pages: Pages, tick: int) -> None:
        """Of no consequence."""

    def suspects(self, here: Mask, tick: int, most: int) -> Pages:
        """Nobody."""
        return np.empty(0, dtype=np.int64)

    def standby(self, pages: Pages, tick: int) -> None:
        """Of no consequence."""

    def victims(self, here: Mask, most: int) -> Pages:
        """Those who came first."""
        return coldest(self._arrived, here, most)
