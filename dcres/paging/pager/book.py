"""The page book: where each page is, and what is under way with it. Nothing else writes that.

::

    a page is           it becomes           by
    NOWHERE             MAIN                 first_touch
    host i              MAIN                 page_in, heard_page_in
    host i, fetched     MAIN, recalled       the same
    MAIN                LEAVING              page_out
    LEAVING             LEAVING, in flight   sent
    LEAVING             MAIN                 taken_back
    …, in flight        host i               stored
    …, in flight        LEAVING              unanswered
    …, in flight        MAIN, recalled       taken_back
    host i              host i, fetched      fetch
    host i, fetched     host j, fetched      hand_over
    host i, fetched     host i               fetched
    MAIN, recalled      MAIN                 stored, unanswered, fetched
    any                 what files hold      recover, resume_page_out, keep_owners

docs/protocol.md ("A page's life") tells what belongs to each. A method looks at the state first: a
transition that is not in the table raises PagingError and changes nothing. That ends the link it
came over, or the pager, whose successor starts from what the files hold.

All checks are vectorised, one or two numpy operations for a batch. Two are cheaper still, since a
guest waits meanwhile: a run that comes is compared as bytes (0.2 µs), and a batch's numbers are
not looked through for one that comes twice. What is under way is known here alone and dies with
the pager; owners are in the table file, where `dcres/paging/hot.c` makes one transition by
itself: *page-in* of a run that it has asked for. Python hears of it (`heard_page_in`).

Who tracks changes is told of every page that comes or goes, after it has (`changes`). What its
content is, only a first touch decides here; of writes the kernel knows (`content`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from dcres.errors import PagesLost, PagingError
from dcres.model.pages import Mask, Pages
from dcres.model.placement import FIRST_SUB, LEAVING, MAIN, NOWHERE, Owners, recover
from dcres.paging.changes import NOBODY_LOOKS, Changes
from dcres.paging.content import NO_ACCOUNT, Content
from dcres.paging.pager.table import PageTable


def mains(count: int) -> bytes:
    """The owners of a run that is on the main host."""
    return bytes((MAIN,)) * count


class PageBook:
    """The state of every page of one VM, and its transitions."""

    def __init__(self, table: PageTable) -> None:
        self.table = table
        self.owners: Owners = table.owners
        """Read-only, as are all views that are given out."""
        self._owners = self.for_hot_path = table.writable_owners
        self._bytes = self._owners.data  # a scalar look-up costs a third of numpy's
        self._recalled: Mask = np.zeros(table.page_count, dtype=np.bool_)
        self._in_flight: Mask = np.zeros(table.page_count, dtype=np.bool_)
        self._fetching: Mask = np.zeros(table.page_count, dtype=np.bool_)
        self.in_flight_pages = self.fetching_pages = 0
        self.changes: Changes = NOBODY_LOOKS
        self.content: Content = NO_ACCOUNT
        self._count()

    def _count(self) -> None:
        # `resident` pages are in the RAM file as far as Python has heard, `leaving` in the outbox.
        self.resident = int(np.count_nonzero(self._owners == MAIN))
        self.leaving = int(np.count_nonzero(self._owners == LEAVING))

    @property
    def recalled(self) -> Mask:
        """Pages that must not leave until a copy elsewhere is released."""
        return _read_only(self._recalled)

    # What is where

    def may_leave(self, pages: Pages | slice) -> Mask:
        """Which of `pages` are on the main host and not recalled."""
        may_leave: Mask = (self._owners[pages] == MAIN) & ~self._recalled[pages]
        return may_leave

    def waiting(self, pages: Pages) -> Pages:
        """Those of `pages` that are leaving and were not sent to anybody."""
        waiting: Pages = pages[(self._owners[pages] == LEAVING) & ~self._in_flight[pages]]
        return waiting

    def not_fetched(self, first: int, stop: int, code: int) -> Pages:
        """Which pages of a run are with this host, and no host fetches them."""
        there = (self._owners[first:stop] == code) & ~self._fetching[first:stop]
        return np.flatnonzero(there) + first

    # A page comes to the main host

    def first_touch(self, page: int) -> None:
        """NOWHERE → MAIN: a zero page is in place."""
        if self._bytes[page] != NOWHERE:
            raise self._refusal("a first touch", page)
        self._bytes[page] = MAIN
        self.content.mark(np.array([page]))
        self._came(page, page + 1)

    def page_in(self, first: int, stop: int, code: int) -> None:
        """The host `code` → MAIN, or MAIN recalled while a host fetches it: a run is in place."""
        if code < FIRST_SUB or self._bytes[first:stop] != bytes((code,)) * (stop - first):
            raise self._refusal(f"a page-in from host {code}", first)
        self._bytes[first:stop] = mains(stop - first)
        self._came(first, stop)

    def heard_page_in(self, first: int, stop: int) -> None:
        """The hot path has done that: its owners are written, the rest is done here."""
        here = self._bytes[first] == MAIN  # a scalar is quicker, and a run of one the rule
        if not here or (stop > first + 1 and self._bytes[first:stop] != mains(stop - first)):
            raise self._refusal("a page-in of the hot path", first)
        self._came(first, stop)

    def taken_back(self, page: int) -> None:
        """LEAVING → MAIN, or MAIN recalled if it is in flight: it is in the RAM file again."""
        if self._bytes[page] != LEAVING:
            raise self._refusal("a page taken back", page)
        self._bytes[page] = MAIN
        self._recalled[page] = self._in_flight[page]
        self.leaving -= 1
        self._came(page, page + 1)

    def _came(self, first: int, stop: int) -> None:
        self.resident += stop - first
        if self.fetching_pages:  # what the host then holds is older than what the guest writes here
            self._recalled[first:stop] |= self._fetching[first:stop]
        self.changes.mark(first, stop)

    # A page goes to another host

    def page_out(self, pages: Pages) -> None:
        """MAIN → LEAVING: these are in the outbox and no longer in the RAM file."""
        self._require(self.may_leave(pages), "a page-out", pages)
        self._owners[pages] = LEAVING
        self.resident -= pages.size
        self.leaving += pages.size
        self.changes.mark_pages(pages)

    def resume_page_out(self, pages: Pages) -> None:
        """The same of a batch of a killed pager, which may have written this or not."""
        mains = (self._owners[pages] == MAIN) | (self._owners[pages] == LEAVING)
        under_way = self._in_flight[pages] | self._recalled[pages] | self._fetching[pages]
        self._require(mains & ~under_way, "a page-out resumed", pages)
        self._owners[pages] = LEAVING
        self._count()

    def sent(self, pages: Pages) -> None:
        """LEAVING → in flight: they are on their way to a host."""
        leaving = (self._owners[pages] == LEAVING) & ~self._in_flight[pages]
        self._require(leaving, "a page sent", pages)
        self._in_flight[pages] = True
        self.in_flight_pages += pages.size

    def stored(self, pages: Pages, code: int) -> Mask:
        """In flight → the host `code`, which holds them; of those recalled, → MAIN.

        Which of them are that host's now. Its copies of the others are to be released.
        """
        _require_host(code)
        self._require(self._in_flight[pages], "STORED", pages)
        theirs: Mask = self._owners[pages] == LEAVING
        gone = pages[theirs]
        self._owners[gone] = code
        self.leaving -= gone.size
        self._land(pages)
        return theirs

    def unanswered(self, pages: Pages) -> None:
        """In flight → LEAVING, and of those recalled → MAIN: the link broke on the way.

        A copy that did arrive is found, and released, when maps are compared.
        """
        self._require(self._in_flight[pages], "a page-out without an answer", pages)
        self._land(pages)

    def _land(self, pages: Pages) -> None:
        self._in_flight[pages] = self._recalled[pages] = False
        self.in_flight_pages -= pages.size

    # A page goes from host to host

    def fetch(self, pages: Pages) -> None:
        """A host → the same, fetched: another one has begun to get these from there."""
        with_a_host = (self._owners[pages] >= FIRST_SUB) & ~self._fetching[pages]
        self._require(with_a_host, "a fetch", pages)
        self._fetching[pages] = True
        self.fetching_pages += pages.size

    def hand_over(self, pages: Pages, code: int) -> Owners:
        """A host, fetched → the host `code`, which holds them; whose they were. Then `fetched`."""
        _require_host(code)
        theirs = (self._owners[pages] >= FIRST_SUB) & self._fetching[pages]
        self._require(theirs, "a page handed over", pages)
        before = self._owners[pages]
        self._owners[pages] = code
        return before

    def fetched(self, pages: Pages) -> None:
        """Fetched → no longer, and of those recalled → MAIN: the fetch is over."""
        self._require(self._fetching[pages], "FETCHED", pages)
        self._fetching[pages] = self._recalled[pages] = False
        self.fetching_pages -= pages.size

    # All pages at once, when a pager starts or the first sub host joins

    def recover(self, in_ram: Mask, in_outbox: Mask) -> Mask:
        """Any → what the files really hold; which copies in the outbox are stale.

        Raises PagesLost when one page of the main host is in neither, and changes nothing.
        """
        found = recover(self._owners, in_ram, in_outbox)
        if found.lost.any():
            raise PagesLost(f"{int(found.lost.sum())} pages of the main host are gone")
        self._owners[:] = found.owners
        # Its predecessor may have asked the kernel what was written, and not have kept the answer.
        self.content.distrust((self._owners == MAIN) | (self._owners == LEAVING))
        self._count()
        return found.stale_outbox

    def keep_owners(self, in_ram: Mask) -> None:
        """NOWHERE ↔ MAIN as the RAM file has it; until now nobody kept them. LEAVING stays."""
        leaving = ~in_ram & (self._owners == LEAVING)  # of sub hosts that there were before
        self._require(self._owners < FIRST_SUB, "owners kept from now on", slice(None))
        self._owners[:] = np.select([in_ram, leaving], [MAIN, LEAVING], NOWHERE)
        self.content.distrust(in_ram)
        self._count()

    # What is refused

    def _require(self, allowed: Mask, what: str, pages: Pages | slice) -> None:
        if not allowed.all():
            numbers = np.arange(self._owners.size)[pages]
            raise self._refusal(what, int(numbers[~allowed][0]))

    def _refusal(self, what: str, page: int) -> PagingError:
        state = [str(self._owners[page])]
        under_way = {
            "in flight": self._in_flight,
            "recalled": self._recalled,
            "being fetched": self._fetching,
        }
        state += [name for name, mask in under_way.items() if mask[page]]
        return PagingError(f"{what} is not possible for page {page} (owner {', '.join(state)})")


def _require_host(code: int) -> None:
    if code < FIRST_SUB:
        raise PagingError(f"no host has the owner code {code}")


def _read_only(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    view = array.view()
    view.flags.writeable = False
    return view
