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
import numpy.typing as npt

from dcres.errors import PagesLost, PagingError
from dcres.linux.pipe import address_of
from dcres.linux.userfaultfd import Userfaultfd
from dcres.model.around import FaultAround
from dcres.model.history import hottest
from dcres.model.pages import (
    PAGE_SIZE,
    Mask,
    Pages,
    extents_of_mask,
    extents_of_pages,
    split,
)
from dcres.model.placement import LEAVING, MAIN, NOWHERE
from dcres.paging.pager.evictor import Evictor
from dcres.paging.pager.outbox import Outbox
from dcres.paging.pager.table import PageTable
from dcres.paging.transport.link import Link, LinkState
from dcres.paging.transport.requests import Request, Runs

FRAME_PAGES = 64  # in one answer of many: the next is read while the last is put in place
_SAMPLES = 4096
_FAULTS_AT_ONCE = 16

Numbers: TypeAlias = npt.NDArray[np.uint32]
# Page, number of the request for it or 0, bytes of that sent, owner's code, when (monotonic ns).
HotFault: TypeAlias = tuple[int, int, int, int, int]


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
        self.asked: Numbers = np.zeros(table.page_count, dtype=np.uint32)
        """Per page: the number of the request that brings it, 0 if none does."""
        self._asked = self.asked.data
        self._fetching = 0  # pages that were asked for
        self._brought: set[int] = set()  # those of them that nobody has missed, nor a neighbour
        self._missed: dict[int, int] = {}  # page → when the guest missed it (ns)
        self._around = FaultAround()
        self._later: dict[int, tuple[int, int]] = {}  # missed page → window to bring after it
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
                self._fetching += 1
                self._missed[page] = at_ns
                self._links[code].asked(page, number, sent_bytes)
        for page, number, _, code, _ in faults:
            if number:
                self._ask_around(page, self._links[code])
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
        if not self._asked[page]:
            self._ask(link, page, page + 1, hurry=True)
        self._ask_around(page, link)

    def _ask(self, link: Link, first: int, stop: int, *, hurry: bool = False) -> None:
        # Before it is sent: should the link break in sending, it is among the unanswered.
        self.asked[first:stop] = link.next_number(hurry=hurry)
        self._fetching += stop - first
        link.page_in([(first, stop)], hurry=hurry)

    def _ask_around(self, page: int, link: Link) -> None:
        """Neighbours of a missed page: at once, or once the guest goes on.

        Later is better for the guest unless it will want them next: their request, and the
        memory server's work on it, would make it wait 70 µs more.
        """
        first, stop, at_once = self._around.missed(page)
        if link.state is not LinkState.READY:
            return
        if at_once:
            self._ask_window(link, first, stop)
        elif stop - first > 1:
            self._later[page] = (first, stop)

    def _ask_window(self, link: Link, lowest: int, highest: int) -> None:
        """The pages of a window that this host holds and nobody has asked for, in frames."""
        here = np.frombuffer(self._owners, np.uint8)[lowest:highest] == link.code
        here &= self.asked[lowest:highest] == 0
        for first, stop in split(extents_of_mask(here) + lowest, FRAME_PAGES):
            if link.state is LinkState.READY:
                self._ask(link, first, stop)

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
        wanted = pages[self.asked[pages] == 0]
        if wanted.size == 0 or link.state is not LinkState.READY:
            return False
        self.asked[wanted] = link.next_number()
        self._fetching += wanted.size
        self._brought.update(wanted.tolist())
        link.page_in(extents_of_pages(wanted).tolist())
        return True

    def arrived(self, link: Link, runs: Runs, address: int) -> None:
        """Put pages in place, record it, and only then let the sub host forget them.

        Pages that were brought ahead of need keep the time of their last access.
        """
        brought = runs[0][0] in self._brought
        for first, stop in runs:
            length = (stop - first) * PAGE_SIZE
            at_ns = self._put(link, first, stop, address)
            address += length
            self._is_here(first, stop, at_ns, brought=brought)
        link.release_runs(runs)
        self._go_around(link, runs[0][0])

    def put(self, link: Link, first: int, stop: int, at_ns: int) -> None:
        """The same, of one run that is in place since `at_ns`."""
        self._is_here(first, stop, at_ns, brought=first in self._brought)
        link.release_runs([(first, stop)])
        self._go_around(link, first)

    def _go_around(self, link: Link, page: int) -> None:
        """The guest goes on with `page`: bring its neighbours if they were left for later."""
        if self._later:
            window = self._later.pop(page, None)
            if window is not None:
                self._ask_window(link, *window)

    def _is_here(self, first: int, stop: int, at_ns: int, *, brought: bool) -> None:
        """Pages that were asked for are in place since `at_ns`, and the table says so."""
        self.asked[first:stop] = 0
        self._fetching -= stop - first
        self.pages_in += stop - first
        if brought:
            self._brought.difference_update(range(first, stop))
        self._evictor.arrived(first, stop, wanted=not brought)
        self._guest_goes_on(first, stop, at_ns)
        self.on_arrival(first, stop)

    def _put(self, link: Link, first: int, stop: int, address: int) -> int:
        """Pages in place and in the table, unless they are; when that was."""
        owners = self._owners[first:stop]
        # The hot path has put it there if the table says so: of a page that was asked for nothing
        # else does.
        if owners == bytes([MAIN]) * (stop - first):
            return link.put_at_ns
        if owners != bytes([link.code]) * (stop - first):
            raise PagingError(f"{link.sub.host} sent pages that it does not own")
        self._uffd.copy(self._base + first * PAGE_SIZE, address, (stop - first) * PAGE_SIZE)
        self._table.owners[first:stop] = MAIN
        return time.monotonic_ns()

    def _guest_goes_on(self, first: int, stop: int, at_ns: int) -> None:
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
            waiting = request.pages[self.asked[request.pages] == request.number]
            # The hot path may have put pages in place whose frame nobody reads any more. Their
            # copies are leftovers that the link releases when it is back.
            here = waiting[self._table.owners[waiting] == MAIN]
            for first, stop in extents_of_pages(here).tolist():
                self._is_here(first, stop, time.monotonic_ns(), brought=first in self._brought)
            pages = np.setdiff1d(waiting, here).tolist()
            self.asked[pages] = 0
            self._fetching -= len(pages)
            self._brought.difference_update(pages)
            for page in pages:
                self._later.pop(page, None)
            missed = self._missed.keys() & pages
            self._waiting.setdefault(link.code, set()).update(missed)
