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
TRIALS_PER_LEAVER = 4
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
    """Queues in a row: who comes is on trial, and who is touched again stays.

    ::

                            ┌──────── proven ────────┐
                    touched │                        │ oldest
                            │                        ▼
        arrival ──▶ new ──▶ standby ──oldest, untouched──▶ leaves

    Whoever arrives was wanted once, or is only a neighbour of such a page; the second touch
    proves it, and shows on standby alone. So memory that is walked through once does not drive
    out what is used again and again (R. Karedla et al., Caching strategies to improve disk
    system performance, 1994: SLRU). Proven pages get their next trial when pages leave and less
    than `STANDBY_SHARE` of all is on standby, or `PATIENCE_TICKS` after they were last known to be
    touched: the access history then also knows who is read while nobody has to leave.

    `ticks`, the access history, is written here and may be written by others.
    """

    def __init__(self, ticks: Ticks) -> None:
        self._ticks = ticks
        self._entered = np.zeros(ticks.size, dtype=np.uint32)  # the tick, of those on standby
        self._proven: Mask = np.zeros(ticks.size, dtype=np.bool_)
        self.on_standby: Mask = np.zeros(ticks.size, dtype=np.bool_)
        self._left_pages = 0  # since the last choice of suspects

    def arrived(self, first: int, stop: int, tick: int) -> None:
        """They are new: on trial from the next tick on."""
        self._ticks[first:stop] = tick

    def left(self, pages: Pages) -> None:
        """What they have proven is forgotten."""
        self.on_standby[pages] = False
        self._proven[pages] = False
        self._left_pages += pages.size

    def touched(self, pages: Pages, tick: int) -> None:
        """Those on standby have proven that they are used."""
        self._ticks[pages] = tick
        # A write that was not on standby may be the touch that brought the page.
        self._proven[pages] |= self.on_standby[pages]
        self.on_standby[pages] = False

    def suspects(self, here: Mask, tick: int, most: int) -> Pages:
        """New pages, and proven ones whose next trial is due; half of each if there are many."""
        waiting = here & ~self.on_standby
        # Not in the tick of their arrival: what touched them then may not be done with them.
        new = waiting & ~self._proven & (self._ticks < tick)
        wanted = self._trials_wanted(here, waiting, new, tick)
        self._left_pages = 0
        first = coldest(self._ticks, new, max(most - wanted, most // 2))
        again = coldest(self._ticks, waiting & self._proven, min(most - first.size, wanted))
        return np.sort(np.concatenate((first, again)))

    def _trials_wanted(self, here: Mask, waiting: Mask, new: Mask, tick: int) -> int:
        """How many proven pages should be on standby once more."""
        everybody = int(np.count_nonzero(here))
        soon = everybody - int(np.count_nonzero(waiting)) + int(np.count_nonzero(new))
        long_ago = self._ticks < max(tick - PATIENCE_TICKS, 0)
        doubtful = int(np.count_nonzero(waiting & self._proven & long_ago))
        lacking = min(int(STANDBY_SHARE * everybody) - soon, TRIALS_PER_LEAVER * self._left_pages)
        return max(lacking, doubtful)

    def standby(self, pages: Pages, tick: int) -> None:
        """Their trial begins."""
        self._entered[pages] = tick
        self.on_standby[pages] = True

    def victims(self, here: Mask, most: int) -> Pages:
        """Whoever was longest on standby; without enough of them, the unproven by age."""
        enough = min(ENOUGH_PAGES, most)
        watched = here & self.on_standby
        if np.count_nonzero(watched) >= enough:
            return coldest(self._entered, watched, most)
        # More leave than can be watched: the best guess is who was not proven.
        unproven = here & ~self._proven
        if np.count_nonzero(unproven) >= enough:
            return coldest(self._ticks, unproven, most)
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
