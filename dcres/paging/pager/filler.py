"""Fills the room that a raised limit has made on the main host."""

from __future__ import annotations

from dcres.model.history import hottest
from dcres.model.placement import LEAVING
from dcres.paging.pager.book import PageBook
from dcres.paging.pager.faults import FaultHandler
from dcres.paging.pager.links import Links
from dcres.paging.pager.share import Share

FILL_PAGES = 64


class Filler:
    """Brings remote pages that nobody has missed, the last touched first, while there is room."""

    def __init__(self, book: PageBook, links: Links, faults: FaultHandler, share: Share) -> None:
        self._book = book
        self._links = links
        self._faults = faults
        self._share = share
        self.wanted = False

    def step(self) -> bool:
        """Ask for a few pages if that is wanted; whether any were asked for."""
        if not self.wanted or self._faults.bringing:
            return False
        room = -self._share.excess_pages
        self.wanted = room > 0 and self._bring(min(FILL_PAGES, room))
        return self.wanted

    def _bring(self, most: int) -> bool:
        owners, ticks = self._book.owners, self._book.table.ticks
        remote = owners > LEAVING
        for link in self._links.all:
            pages = hottest(ticks, remote & (owners == link.code), most)
            if self._faults.bring(link, pages):
                return True
        return False
