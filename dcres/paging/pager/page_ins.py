"""Page-ins under way: which pages were asked for, under which number, and whether anybody waits."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from dcres.model.around import FaultAround
from dcres.model.pages import Pages, extents_of_mask, extents_of_pages, split
from dcres.paging.pager.book import PageBook
from dcres.paging.transport.link import Link, LinkState
from dcres.paging.transport.requests import Request

FRAME_PAGES = 64  # in one answer of many: the next is read while the last is put in place

Numbers: TypeAlias = npt.NDArray[np.uint32]


class PageIns:
    """What was asked for and has not come. The hot path asks, too, and writes `asked`."""

    def __init__(self, page_count: int) -> None:
        self.asked: Numbers = np.zeros(page_count, dtype=np.uint32)
        """Per page: the number of the request that brings it, 0 if none does."""
        self.by_page = self.asked.data
        """The same, for a quick look at one page."""
        self.pages = 0
        self._brought: set[int] = set()  # those of them that nobody has missed, nor a neighbour

    @property
    def brought(self) -> int:
        """How many pages are on their way that nobody has missed."""
        return len(self._brought)

    def ask(self, link: Link, first: int, stop: int, *, hurry: bool = False) -> None:
        """Ask for a run of pages; `hurry`: the guest waits for it."""
        # Before it is sent: should the link break in sending, it is among the unanswered.
        self.asked[first:stop] = link.next_number(hurry=hurry)
        self.pages += stop - first
        link.page_in([(first, stop)], hurry=hurry)

    def bring(self, link: Link, pages: Pages) -> bool:
        """Ask for what nobody has missed, unless it is on its way; whether anything was asked.

        At most `wire.MAX_PAGES` pages.
        """
        wanted = pages[self.asked[pages] == 0]
        if wanted.size == 0 or link.state is not LinkState.READY:
            return False
        self.asked[wanted] = link.next_number()
        self.pages += wanted.size
        self._brought.update(wanted.tolist())
        link.page_in(extents_of_pages(wanted).tolist())
        return True

    def came(self, first: int, stop: int) -> bool:
        """A run that was asked for is in place; whether somebody had missed it, or a neighbour."""
        if stop == first + 1:
            self.by_page[first] = 0
        else:
            self.asked[first:stop] = 0
        self.pages -= stop - first
        if first not in self._brought:
            return True
        self._brought.difference_update(range(first, stop))
        return False

    def of(self, request: Request) -> Pages:
        """The pages of a request that have not come."""
        waiting: Pages = request.pages[self.asked[request.pages] == request.number]
        return waiting

    def will_not_come(self, pages: Pages) -> None:
        """These were asked for on a link that broke."""
        self.asked[pages] = 0
        self.pages -= pages.size
        self._brought.difference_update(pages.tolist())


class Neighbours:
    """Asks for the neighbours of a missed page: at once, or once the guest goes on.

    Later is better for the guest unless it will want them next: their request, and the
    memory server's work on it, would make it wait 70 µs more.
    """

    def __init__(self, book: PageBook, page_ins: PageIns) -> None:
        self._owners = book.owners
        self._page_ins = page_ins
        self._around = FaultAround()
        self._later: dict[int, tuple[int, int]] = {}  # missed page → window to bring after it

    def missed(self, page: int, link: Link) -> None:
        """The guest waits for `page`, which was asked for if the link is there."""
        first, stop, at_once = self._around.missed(page)
        if link.state is not LinkState.READY:
            return
        if at_once:
            self._ask(link, first, stop)
        elif stop - first > 1:
            self._later[page] = (first, stop)

    def came(self, page: int, link: Link) -> None:
        """The guest goes on with `page`."""
        if self._later:
            window = self._later.pop(page, None)
            if window is not None:
                self._ask(link, *window)

    def will_not_come(self, pages: Pages) -> None:
        """These were asked for on a link that broke."""
        for page in pages.tolist():
            self._later.pop(page, None)

    def _ask(self, link: Link, lowest: int, highest: int) -> None:
        """The pages of a window that this host holds and nobody has asked for, in frames."""
        here = self._owners[lowest:highest] == link.code
        here &= self._page_ins.asked[lowest:highest] == 0
        for first, stop in split(extents_of_mask(here) + lowest, FRAME_PAGES):
            if link.state is LinkState.READY:
                self._page_ins.ask(link, first, stop)
