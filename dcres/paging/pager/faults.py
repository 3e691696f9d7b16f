"""Page-in: every page that the guest misses is brought, with its neighbours.

This is the path whose latency the guest feels. It looks things up in bytes rather than numpy
arrays and asks for the missed page in a frame of its own, so that the guest goes on before the
neighbours are there (measured with `dcres bench paging`). The simple cases are done before any
of this runs, by `dcres/paging/hot.c`; this module is told, keeps the books, and can do without.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from mmap import mmap
from typing import TypeAlias

import numpy as np

from dcres.errors import PagesLost, PagingError
from dcres.linux.pipe import address_of
from dcres.linux.userfaultfd import Userfaultfd
from dcres.model.pages import PAGE_SIZE, Mask, Pages, extents_of_pages
from dcres.model.placement import LEAVING, MAIN, NOWHERE
from dcres.paging.pager.book import PageBook, mains
from dcres.paging.pager.evictor import Evictor
from dcres.paging.pager.outbox import Outbox
from dcres.paging.pager.page_ins import Neighbours, Numbers, PageIns
from dcres.paging.transport.link import Link, LinkState
from dcres.paging.transport.requests import Request, Runs

_SAMPLES = 4096
_FAULTS_AT_ONCE = 16

# Page, number of the request for it or 0, bytes of that sent, owner's code, when (monotonic ns).
HotFault: TypeAlias = tuple[int, int, int, int, int]


class FaultHandler:
    """Answers the faults of one VM."""

    def __init__(
        self,
        uffd: Userfaultfd,
        base: int,
        book: PageBook,
        evictor: Evictor,
        outbox: Outbox,
        links: Sequence[Link],
        now: Callable[[], int],
    ) -> None:
        self._uffd = uffd
        self._base = base
        self._book = book
        self._table = book.table
        self._owners = book.table.owner_bytes()
        self._evictor = evictor
        self._outbox = outbox
        self.set_links(links)
        self._now = now
        self._page = mmap(-1, PAGE_SIZE)
        self._page_address = address_of(self._page)
        self._page_ins = PageIns(book.table.page_count)
        self._neighbours = Neighbours(book, self._page_ins)
        self._missed: dict[int, int] = {}  # page → when the guest missed it (ns)
        self._waiting: dict[int, set[int]] = {}  # link code → missed pages while it is down
        self.latencies_ns: deque[int] = deque(maxlen=_SAMPLES)
        self.faults = self.pages_in = self.zero_pages = self.taken_back = 0

    @property
    def asked(self) -> Numbers:
        """Per page: the number of the request that brings it, 0 if none does."""
        return self._page_ins.asked

    @property
    def fetching(self) -> bool:
        """Whether a page-in is under way."""
        return bool(self._page_ins.pages or self._missed)

    @property
    def guest_waits(self) -> bool:
        """Whether one of them is for a page that the guest has missed."""
        return bool(self._missed)

    @property
    def bringing(self) -> int:
        """How many pages are on their way that nobody has missed."""
        return self._page_ins.brought

    def on_their_way(self, pages: Pages) -> Mask:
        """Which of `pages` were asked for, or will be when a link is back; shape of `pages`."""
        under_way: Mask = self.asked[pages] != 0
        if self._missed:
            under_way |= np.isin(pages, list(self._missed))
        return under_way

    def set_links(self, links: Sequence[Link]) -> None:
        """Where pages may be from now on."""
        self._links = {link.code: link for link in links}

    def read(self) -> None:
        """Answer a handful of faults that wait at the userfaultfd."""
        for address in self._uffd.read_faults(_FAULTS_AT_ONCE):
            self.faults += 1
            self._fault((address - self._base) // PAGE_SIZE)

    def told(self, faults: Sequence[HotFault]) -> None:
        """Faults that the hot path has read, and asked for where it could."""
        self.faults += len(faults)
        # Their requests are sent: they come before any that we send now.
        for page, number, sent_bytes, code, at_ns in faults:
            if number:
                self._page_ins.pages += 1
                self._missed[page] = at_ns
                self._links[code].asked(page, number, sent_bytes)
        for page, number, _, code, _ in faults:
            if number:
                self._neighbours.missed(page, self._links[code])
            else:
                self._fault(page)

    def _fault(self, page: int) -> None:
        owner = self._owners[page]
        if owner == NOWHERE:
            self._zero(page)
        elif owner == MAIN:
            self._already_here(page)
        elif owner == LEAVING:
            self._take_back(page)
        else:
            self._page_in(page, owner)

    def _zero(self, page: int) -> None:
        self._uffd.zero(self._base + page * PAGE_SIZE, PAGE_SIZE)
        self._book.first_touch(page)
        self._evictor.arrived(page, page + 1)
        self.zero_pages += 1

    def _already_here(self, page: int) -> None:
        # Two vCPUs missed it at once, or it came with its neighbours meanwhile. To wake the
        # guest without looking would spin for ever, should the page be gone.
        if not self._outbox.ram_has(page):
            raise PagesLost(f"page {page} is no longer in the guest's RAM file")
        self._uffd.wake(self._base + page * PAGE_SIZE, PAGE_SIZE)

    def _take_back(self, page: int) -> None:
        self._page[:] = self._outbox.read_page(page)
        self._uffd.copy(self._base + page * PAGE_SIZE, self._page_address, PAGE_SIZE)
        self._evictor.taken_back(page)
        self.taken_back += 1

    def take_back(self, pages: Pages) -> None:
        """Pages on their way out that nobody will take: they are here again."""
        for page in pages.tolist():
            self._take_back(page)

    def _page_in(self, page: int, owner: int) -> None:
        if page in self._missed:
            return
        self._missed[page] = time.monotonic_ns()
        link = self._links[owner]
        if link.state is not LinkState.READY:
            self._waiting.setdefault(owner, set()).add(page)
            return
        if not self._page_ins.by_page[page]:
            self._page_ins.ask(link, page, page + 1, hurry=True)
        self._neighbours.missed(page, link)

    def bring(self, link: Link, pages: Pages) -> bool:
        """Page in what nobody has missed, unless it is on its way; whether anything was asked."""
        return self._page_ins.bring(link, pages)

    def arrived(self, link: Link, runs: Runs, address: int) -> None:
        """Put pages in place, record it, and only then let the sub host forget them.

        Pages that were brought ahead of need keep the time of their last access.
        """
        for first, stop in runs:
            at_ns = self._put(link, first, stop, address)
            address += (stop - first) * PAGE_SIZE
            self._is_here(first, stop, at_ns)
        link.release(runs)
        self._neighbours.came(runs[0][0], link)

    def put(self, link: Link, first: int, stop: int, at_ns: int) -> None:
        """The same, of one run that the hot path has put in place at `at_ns`."""
        self._book.heard_page_in(first, stop)
        self._is_here(first, stop, at_ns)
        link.release([(first, stop)])
        self._neighbours.came(first, link)

    def _put(self, link: Link, first: int, stop: int, address: int) -> int:
        """Pages in place and in the book, unless they are; when that was."""
        owners = self._owners[first:stop]
        # The hot path has put it there if the table says so: of a page that was asked for nothing
        # else does.
        if owners == mains(stop - first):
            self._book.heard_page_in(first, stop)
            return link.put_at_ns
        if owners != bytes((link.code,)) * (stop - first):
            raise PagingError(f"{link.sub.host} sent pages that it does not own")
        self._uffd.copy(self._base + first * PAGE_SIZE, address, (stop - first) * PAGE_SIZE)
        self._book.page_in(first, stop, link.code)
        return time.monotonic_ns()

    def _is_here(self, first: int, stop: int, at_ns: int) -> None:
        """Pages that were asked for are in place since `at_ns`, and the book says so."""
        self.pages_in += stop - first
        if self._page_ins.came(first, stop):
            self._evictor.arrived(first, stop)
        for page in [page for page in self._missed if first <= page < stop]:
            self.latencies_ns.append(max(0, at_ns - self._missed.pop(page)))
            self._table.ticks[page] = self._now()

    def link_ready(self, link: Link) -> None:
        """Ask again for what was missed while the link was down."""
        for page in sorted(self._waiting.pop(link.code, set())):
            if self._missed.pop(page, 0):
                self._fault(page)

    def unanswered(self, link: Link, requests: Sequence[Request]) -> None:
        """Page-ins on a link that broke: ask again, when it is back, for what was missed."""
        for request in requests:
            waiting = self._page_ins.of(request)
            # The hot path may have put pages in place whose frame nobody reads any more. Their
            # copies are leftovers that the link releases when it is back.
            put = self._table.owners[waiting] == MAIN
            for first, stop in extents_of_pages(waiting[put]).tolist():
                self._book.heard_page_in(first, stop)
                self._is_here(first, stop, time.monotonic_ns())
            lost = waiting[~put]
            self._page_ins.will_not_come(lost)
            self._neighbours.will_not_come(lost)
            missed = self._missed.keys() & lost.tolist()
            self._waiting.setdefault(link.code, set()).update(missed)
