"""The mover: brings pages of a running VM where they are wanted, a few at a time.

It serves lazy restore (pages come from part servers) and re-placement (from sub hosts). The
main host's pages are paged in; a sub host fetches its own, directly from where they are, and
the page table changes once it has them. The guest does not wait for any of it: a page that it
misses comes at once from wherever it is, and is left alone by the mover from then on.

A page that comes to the main host while a sub host fetches it is *recalled*: it must not leave
again before the copy there was released, since that copy is older. The page book sees to it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np

from dcres.model.moves import NO_MOVES, Moves
from dcres.model.pages import (
    Extents,
    Pages,
    extents_of_pages,
    pages_of_extents,
)
from dcres.model.placement import MAIN
from dcres.paging.pager.book import PageBook
from dcres.paging.pager.faults import FaultHandler
from dcres.paging.pager.share import Share
from dcres.paging.transport.link import Link, LinkState
from dcres.paging.transport.requests import Request

MOST_FETCHING_PAGES = 1024
FETCH_PAGES = 256
BRING_PAGES = 64
RETRY_S = 0.1
_ROWS_AT_ONCE = 64

Row: TypeAlias = tuple[int, int, int, int]


class Mover:
    """Carries out moves in the pager's loop; `step` asks for a few pages.

    It goes through its orders until it finds nothing left to do: what could not be brought, as
    a host was away for a moment, is still where it was and found again by the next pass.
    """

    def __init__(self, book: PageBook, faults: FaultHandler, share: Share) -> None:
        self._book = book
        self._faults = faults
        self._share = share
        self._links: Mapping[int, Link] = {}
        self._orders: Moves = NO_MOVES
        self._rows: deque[Row] = deque()
        self._found_some = False  # in this pass
        self._wait_until = 0.0
        self.enabled = True
        self.pages_left = 0  # at most; what the guest brings by itself is found out later

    def set_links(self, links: Sequence[Link]) -> None:
        """Sub hosts and part servers as they are from now on."""
        self._links = {link.code: link for link in links}

    def order(self, rows: Moves) -> None:
        """Do `rows` instead of what was to be done."""
        self._orders = rows
        self._rows = deque(map(tuple, rows.tolist()))
        self._found_some = False
        self.pages_left = int((rows[:, 1] - rows[:, 0]).sum())

    @property
    def moving(self) -> bool:
        """Whether anything is left to do."""
        return len(self._orders) > 0

    @property
    def drained(self) -> bool:
        """Whether no sub host is fetching."""
        return self._book.fetching_pages == 0

    def step(self) -> bool:
        """Ask for a few pages more, or find out that there are none; whether that did anything."""
        if not self.enabled or not self.moving or time.monotonic() < self._wait_until:
            return False
        for _ in range(_ROWS_AT_ONCE):
            if not self._rows:
                return self._next_pass()
            row = self._rows[0]
            first, stop, source, _ = row
            pages = self._book.not_fetched(first, stop, source)
            if pages.size:
                self._found_some = True
                return self._ask(row, pages)
            self._rows.popleft()
            self._count(stop - first)
        return True

    def _next_pass(self) -> bool:
        if self._book.fetching_pages or self._faults.bringing:
            return False
        self.pages_left = 0
        if self._found_some:
            self._rows = deque(map(tuple, self._orders.tolist()))
        else:
            self._orders = NO_MOVES
        self._found_some = False
        return True

    def _count(self, pages: int) -> None:
        self.pages_left = max(0, self.pages_left - pages)

    def _ask(self, row: Row, pages: Pages) -> bool:
        """Have the first of `pages` brought; False when it has to wait."""
        asked = self._bring(row, pages) if row[3] == MAIN else None
        if asked is None:
            asked = self._fetch(row, pages)
        if asked:
            first, stop = row[0], int(pages[asked - 1]) + 1
            self._count(stop - first)
            self._rows[0] = (stop, row[1], row[2], row[3])
        return asked > 0

    def _bring(self, row: Row, pages: Pages) -> int | None:
        """Page in to the main host; None when there is no room, so that it must not wait."""
        room = -self._share.excess_pages - self._faults.bringing
        if self._faults.bringing > BRING_PAGES:
            return 0
        if room <= 0:
            return 0 if self._faults.bringing else None
        few = pages[: min(room, BRING_PAGES)]
        if self._links[row[2]].state is not LinkState.READY:
            return 0
        self._faults.bring(self._links[row[2]], few)
        return few.size

    def _fetch(self, row: Row, pages: Pages) -> int:
        source = self._links[row[2]]
        link = self._destination(row[3], source)
        if link is None or self._book.fetching_pages >= MOST_FETCHING_PAGES:
            return 0
        few = pages[: min(link.room_pages, FETCH_PAGES)]
        few = few[~self._faults.on_their_way(few)]
        if few.size == 0:
            return 0
        self._book.fetch(few)
        link.fetch(source.sub, extents_of_pages(few))
        return few.size

    def _destination(self, code: int, source: Link) -> Link | None:
        """The sub host that is wanted, or the roomiest one when it has no room."""
        wanted = self._links.get(code)
        if wanted is not None and (wanted.room_pages or wanted.state is not LinkState.READY):
            return wanted if wanted.room_pages else None  # it will be back
        others = [each for each in self._links.values() if each is not source and each.room_pages]
        return max(others, key=lambda each: each.room_pages, default=None)

    def fetched(self, link: Link, asked: Extents, stored: Extents) -> None:
        """A sub host holds `stored` of the pages that it was to fetch."""
        if len(stored) == 0:  # their source does not answer: it may be back in a moment
            self._wait_until = time.monotonic() + RETRY_S
        pages = pages_of_extents(stored)
        stale = self._book.recalled[pages] | self._faults.on_their_way(pages)
        self._hand_over(link, pages[~stale])
        self._book.fetched(pages_of_extents(asked))
        if stale.any():
            link.release(extents_of_pages(pages[stale]).tolist())

    def _hand_over(self, link: Link, pages: Pages) -> None:
        """The book first: a page is never released where the table still looks for it."""
        before = self._book.hand_over(pages, link.code)
        for code in np.unique(before).tolist():
            self._links[code].release(extents_of_pages(pages[before == code]).tolist())

    def unanswered(self, link: Link, requests: Sequence[Request]) -> None:
        """Fetches on a link that broke: nothing was moved; what did arrive is released there."""
        for request in requests:
            asked = np.asarray(request.extents)
            self.fetched(link, asked, asked[:0])
