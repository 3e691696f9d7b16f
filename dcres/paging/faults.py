"""Page-in: every page that the guest misses is brought, with its neighbours.

This is the path whose latency the guest feels. It looks things up in bytes rather than numpy
arrays and asks for the missed page in a frame of its own, so that the guest goes on before the
neighbours are there (measured with `dcres bench paging`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from mmap import mmap

import numpy as np

from dcres.errors import PagesLost, PagingError
from dcres.linux.pipe import address_of
from dcres.linux.userfaultfd import Userfaultfd
from dcres.model.history import hottest
from dcres.model.pages import PAGE_SIZE, Extents, Mask, Pages, extents_of_pages, pages_of_extents
from dcres.model.placement import LEAVING, MAIN, NOWHERE
from dcres.paging.evictor import Evictor
from dcres.paging.link import Link, LinkState, Request
from dcres.paging.outbox import Outbox
from dcres.paging.table import PageTable

WINDOW_PAGES = 16
RUN_PAGES = 64
_SAMPLES = 4096
_FAULTS_AT_ONCE = 16


class FaultHandler:
    """Answers the faults of one VM."""

    def __init__(
        self,
        uffd: Userfaultfd,
        base: int,
        table: PageTable,
        evictor: Evictor,
        outbox: Outbox,
        links: Sequence[Link],
        now: Callable[[], int],
    ) -> None:
        self._uffd = uffd
        self._base = base
        self._table = table
        self._owners = table.owner_bytes()
        self._evictor = evictor
        self._outbox = outbox
        self.set_links(links)
        self._now = now
        self.on_arrival: Callable[[int, int], None] = lambda first, stop: None
        self._page = mmap(-1, PAGE_SIZE)
        self._page_address = address_of(self._page)
        self._fetching: set[int] = set()  # pages that were asked for
        self._brought: set[int] = set()  # those of them that nobody has missed, nor a neighbour
        self._missed: dict[int, int] = {}  # page → when the guest missed it (ns)
        self._walk = -1  # where the last window ended
        self._waiting: dict[int, set[int]] = {}  # link code → missed pages while it is down
        self.latencies_ns: deque[int] = deque(maxlen=_SAMPLES)
        self.faults = self.pages_in = self.zero_pages = self.taken_back = 0

    @property
    def fetching(self) -> bool:
        """Whether a page-in is under way."""
        return bool(self._fetching or self._missed)

    @property
    def guest_waits(self) -> bool:
        """Whether one of them is for a page that the guest has missed."""
        return bool(self._missed)

    @property
    def bringing(self) -> int:
        """How many pages are on their way that nobody has missed."""
        return len(self._brought)

    def on_their_way(self, pages: Pages) -> Mask:
        """Which of `pages` were asked for, or will be when a link is back; shape of `pages`."""
        under_way = [page in self._fetching or page in self._missed for page in pages.tolist()]
        return np.array(under_way, dtype=np.bool_)

    def set_links(self, links: Sequence[Link]) -> None:
        """Where pages may be from now on."""
        self._links = {link.code: link for link in links}

    def read(self) -> None:
        """Answer a handful of faults that wait at the userfaultfd."""
        for address in self._uffd.read_faults(_FAULTS_AT_ONCE):
            self.faults += 1
            self._fault((address - self._base) // PAGE_SIZE)

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
        self._owners[page] = MAIN
        self._evictor.arrived(page, page + 1)
        self.zero_pages += 1

    def _already_here(self, page: int) -> None:
        # Two vCPUs missed it at once, or it came with its neighbours meanwhile. To wake the
        # guest without looking would spin for ever, should the page be gone.
        if not self._outbox.ram_has(page):
            raise PagesLost(f"page {page} is no longer in the guest's RAM file")
        self._uffd.wake(self._base + page * PAGE_SIZE, PAGE_SIZE)

    def _take_back(self, page: int) -> None:
        self._page[:] = self._evictor.take_back(page)
        self._uffd.copy(self._base + page * PAGE_SIZE, self._page_address, PAGE_SIZE)
        self._evictor.taken_back(page)
        self.taken_back += 1

    def _page_in(self, page: int, owner: int) -> None:
        if page in self._missed:
            return
        self._missed[page] = time.perf_counter_ns()
        if page in self._fetching:
            return
        link = self._links[owner]
        if link.state is not LinkState.READY:
            self._waiting.setdefault(owner, set()).add(page)
            return
        self._fetching.add(page)
        link.page_in_run(page, page + 1)
        if page == self._walk:  # the guest goes on where the last window ended: more, and at once
            self._ask_around(page, link, page, RUN_PAGES)

    def _ask_around(self, page: int, link: Link, lowest: int, count: int) -> None:
        self._walk = lowest + count
        for first, stop in self._neighbours(page, link.code, lowest, self._walk):
            self._fetching.update(range(first, stop))
            link.page_in_run(first, stop)

    def _neighbours(
        self, page: int, owner: int, lowest: int, highest: int
    ) -> list[tuple[int, int]]:
        """The runs before and after `page`, in a window around it, that the same host holds.

        They end where a page is elsewhere or on its way: neighbours of neighbours are less
        likely to be wanted, and a run is all that a frame asks for quickly.
        """
        owners, fetching = self._owners, self._fetching
        highest = min(highest, len(owners))
        first = page
        while first > lowest and owners[first - 1] == owner and first - 1 not in fetching:
            first -= 1
        stop = page + 1
        while stop < highest and owners[stop] == owner and stop not in fetching:
            stop += 1
        return [run for run in ((first, page), (page + 1, stop)) if run[0] < run[1]]

    def fill(self, most: int) -> bool:
        """Bring `most` remote pages nobody has missed, the last touched first, to fill room."""
        remote = self._table.owners > LEAVING
        for code, link in self._links.items():
            here = remote & (self._table.owners == code)
            pages = hottest(self._table.ticks, here, most)
            if self.bring(link, pages):
                return True
        return False

    def bring(self, link: Link, pages: Pages) -> bool:
        """Page in what nobody has missed, unless it is on its way; whether anything was asked.

        At most `wire.MAX_PAGES` pages.
        """
        wanted = [page for page in pages.tolist() if page not in self._fetching]
        if not wanted or link.state is not LinkState.READY:
            return False
        self._fetching.update(wanted)
        self._brought.update(wanted)
        link.page_in(extents_of_pages(np.array(wanted, dtype=np.int64)))
        return True

    def arrived(self, link: Link, extents: Extents, address: int) -> None:
        """Put pages in place, record it, and only then let the sub host forget them.

        Pages that were brought ahead of need keep the time of their last access.
        """
        tick = self._now()
        missed = False
        brought = int(extents[0, 0]) in self._brought
        for first, stop in extents.tolist():
            if self._owners[first:stop] != bytes([link.code]) * (stop - first):
                raise PagingError(f"{link.sub.host} sent pages that it does not own")
            length = (stop - first) * PAGE_SIZE
            self._uffd.copy(self._base + first * PAGE_SIZE, address, length)
            self._table.owners[first:stop] = MAIN
            address += length
            for page in range(first, stop):
                if self._done(page):
                    missed = True
                    self._table.ticks[page] = tick
            if brought:
                self._brought.difference_update(range(first, stop))
            self._evictor.arrived(first, stop, wanted=not brought)
            self.on_arrival(first, stop)
            self.pages_in += stop - first
        link.release(extents)
        if missed and not brought:
            # Only now that the guest goes on: the request for its neighbours, and the memory
            # server's work on it, would have made it wait 70 µs more.
            page = int(extents[0, 0])
            self._ask_around(page, link, page - page % WINDOW_PAGES, WINDOW_PAGES)

    def _done(self, page: int) -> bool:
        self._fetching.discard(page)
        missed_at = self._missed.pop(page, 0)
        if missed_at:
            self.latencies_ns.append(time.perf_counter_ns() - missed_at)
        return bool(missed_at)

    def link_ready(self, link: Link) -> None:
        """Ask again for what was missed while the link was down."""
        for page in sorted(self._waiting.pop(link.code, set())):
            if self._missed.pop(page, 0):
                self._page_in(page, link.code)

    def unanswered(self, link: Link, requests: Sequence[Request]) -> None:
        """Page-ins on a link that broke: ask again, when it is back, for what was missed."""
        for request in requests:
            pages = pages_of_extents(request.extents).tolist()
            self._fetching.difference_update(pages)
            self._brought.difference_update(pages)
            missed = self._missed.keys() & pages
            self._waiting.setdefault(link.code, set()).update(missed)
