"""Fault-around: which pages besides the missed one are worth bringing. Pure; pages are numbers.

Nobody tells whether the guest used a neighbour that came unasked, but misses tell two things:

* **Walks.** A miss where the last window of a walk ended, or inside it while it is still on its
  way, means that the guest goes on in that direction. The next window is twice as long, up to
  `MOST_PAGES`, and is asked for before the guest has come to its end. A walk that stops costs
  what was asked for last, and its successor begins small. (As in Linux's read-ahead.)
* **Probes.** Now and then a miss that belongs to no walk brings nobody along. Whether another
  page of the same block is missed soon says what its neighbours would have been worth. The share
  of the probes for which that was so decides whether neighbours come at all; while they do not,
  every such miss is a probe. A guest that jumps about in much memory thus pays for the pages it
  wants, and not for fifteen others with each of them.
"""

from __future__ import annotations

from dataclasses import dataclass

BLOCK_PAGES = 16
MOST_PAGES = 128
WALKS = 4
PROBE_EVERY = 8
HORIZON = 256  # misses within which a block must be missed again, to have been worth bringing
WORTH = 0.25  # of the probes; fifteen pages cost about as much as two misses
_WEIGHT = 1 / 16


@dataclass(slots=True)
class _Walk:
    """The last window of it, and how long it was meant to be."""

    first: int
    stop: int
    pages: int


class FaultAround:
    """Told of every miss of a remote page; answers with a window of pages to bring."""

    def __init__(self) -> None:
        self._walks: list[_Walk] = []  # that have gone on at least once
        self._begun: list[_Walk] = []
        self._probes: dict[int, int] = {}  # block → the miss that probed it, oldest first
        self._misses = 0
        self.worth = 2 * WORTH  # until it is known: neighbours come

    def missed(self, page: int) -> tuple[int, int, bool]:
        """``(first, stop, at_once)``: bring these as well, at once or once `page` is there.

        The window may hold `page`, pages that are here and pages on their way, or be empty.
        """
        for known in (self._walks, self._begun):
            for walk in known:
                if walk.first <= page <= walk.stop:
                    return self._go_on(walk, page)
        return self._jump(page)

    def _go_on(self, walk: _Walk, page: int) -> tuple[int, int, bool]:
        if walk in self._begun:
            self._begun.remove(walk)
            self._walks.append(walk)
            del self._walks[:-WALKS]
        walk.pages = min(MOST_PAGES, max(BLOCK_PAGES, 2 * walk.pages))
        walk.first, walk.stop = walk.stop, walk.stop + walk.pages
        return min(page, walk.first), walk.stop, True

    def _jump(self, page: int) -> tuple[int, int, bool]:
        self._misses += 1
        block = page // BLOCK_PAGES
        self._learn(block)
        first, stop = block * BLOCK_PAGES, (block + 1) * BLOCK_PAGES
        if self.worth < WORTH or self._misses % PROBE_EVERY == 0:
            self._probes.setdefault(block, self._misses)
            first, stop = page, page + 1
        self._begun.append(_Walk(page, stop, stop - first))
        del self._begun[:-WALKS]
        return first, stop, False

    def _learn(self, block: int) -> None:
        if self._probes.pop(block, None) is not None:
            self.worth += (1 - self.worth) * _WEIGHT
        while self._probes:
            oldest, since = next(iter(self._probes.items()))
            if self._misses - since <= HORIZON:
                break
            del self._probes[oldest]
            self.worth -= self.worth * _WEIGHT
