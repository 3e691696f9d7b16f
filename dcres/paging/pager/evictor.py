"""Page-out: who leaves when the main host holds more than its share, and where to.

Who leaves is for a `Policy` to say, which learns of reads through the `Watcher`. `Evictor.step`
moves one batch from the RAM file to the outbox and sends it to a sub host. A page is `LEAVING`
until that host has acknowledged it; a fault takes it back from the outbox. A page taken back
while its copy was on the way is *recalled*: when the acknowledgement comes the copy is released,
and until then the page does not leave again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from dcres.linux.pagemap import WriteTracker
from dcres.model.pages import (
    Extents,
    Mask,
    Pages,
    extents_of_pages,
    mask_of_extents,
    pages_of_extents,
)
from dcres.model.placement import LEAVING, MAIN
from dcres.model.policy import Policy, SegmentedFifo
from dcres.paging.pager.outbox import Outbox
from dcres.paging.pager.table import PageTable
from dcres.paging.pager.watcher import Watcher
from dcres.paging.transport.link import Link
from dcres.paging.transport.requests import Request

STEP_PAGES = 64
MOST_IN_FLIGHT_PAGES = 1024
CANDIDATES = 4096


REGION_PAGES = 512
_GOLDEN = 0.6180339887498949


def homes_of(page_count: int, capacities: Sequence[int]) -> npt.NDArray[np.int64]:
    """The index of each region's sub host, in proportion to the capacities.

    Multiples of the golden ratio fall evenly into the unit interval, so that any stretch of
    memory is spread over the sub hosts as well as the whole of it is.
    """
    regions = np.arange(-(-page_count // REGION_PAGES))
    bounds = np.cumsum(capacities) / max(sum(capacities), 1)
    return np.searchsorted(bounds[:-1], regions * _GOLDEN % 1.0, side="right")


def headroom_pages(limit_pages: int) -> int:
    """How far below its limit a main host is kept, so that faults find room."""
    return min(512, limit_pages // 16)


class Changes(Protocol):
    """Who wants to know which pages came, left or were written: see `ChangeMap`."""

    def mark(self, first: int, stop: int) -> None:
        """Pages ``[first, stop)`` have just changed."""

    def mark_pages(self, pages: Pages) -> None:
        """The same for page numbers."""


class _NobodyLooks:
    def mark(self, first: int, stop: int) -> None:
        return

    def mark_pages(self, pages: Pages) -> None:
        return


NOBODY_LOOKS = _NobodyLooks()


class Evictor:
    """Keeps the main host within its share."""

    def __init__(
        self,
        table: PageTable,
        outbox: Outbox,
        links: Sequence[Link],
        tracker: WriteTracker,
        now: Callable[[], int],
        policy: Policy | None = None,
    ) -> None:
        self._table = table
        self._outbox = outbox
        self.set_links(links, owners_kept=bool(links))
        self._tracker = tracker
        self._now = now
        self._candidates: deque[Pages] = deque()
        self.recalled = np.zeros(table.page_count, dtype=np.bool_)
        """Pages that must not leave until a copy elsewhere is released."""
        self._policy = policy or SegmentedFifo(table.ticks)
        self._watcher = Watcher(self._policy, outbox, tracker, self._may_leave, now)
        self._unsent: deque[Extents] = deque()
        self._taken: tuple[Link, Pages] | None = None
        self._in_flight: set[int] = set()
        self.enabled = True
        self.changes: Changes = NOBODY_LOOKS
        self.pages_out = 0
        self.resident = int((table.owners == MAIN).sum())
        self.leaving = int((table.owners == LEAVING).sum())
        self.limit_changed()
        left_over = np.flatnonzero(table.owners == LEAVING)
        self._queue(extents_of_pages(left_over))

    def set_links(self, links: Sequence[Link], *, owners_kept: bool) -> None:
        """Where pages may go from now on, and whether the table says who is here."""
        self._links = links
        self._owners_kept = owners_kept
        self._homes = homes_of(self._table.page_count, [link.sub.capacity_pages for link in links])

    def recount(self) -> None:
        """The owners were written anew."""
        self.resident = int((self._table.owners == MAIN).sum())
        self.limit_changed()

    def limit_changed(self) -> None:
        """The table has another limit: what is here beyond it leaves, and is allowed until then."""
        self._allowed = float(self.resident + self.leaving)

    @property
    def headroom_pages(self) -> int:
        """How far below its limit the main host is kept, so that faults find room."""
        return headroom_pages(self._table.limit_pages)

    @property
    def batch_pages(self) -> int:
        """Pages that leave together; one by itself costs nearly as much as 64."""
        return max(1, min(STEP_PAGES, self.headroom_pages))

    @property
    def slack_pages(self) -> int:
        """How far above its limit the main host may go for a moment."""
        return max(64, min(1024, self._table.limit_pages // 16))

    @property
    def excess_pages(self) -> int:
        """Pages to send out now; negative when there is room."""
        return self.resident - (self._table.limit_pages - self.headroom_pages)

    @property
    def shrinking(self) -> bool:
        """Whether the main host is still on its way down to its limit."""
        return self._allowed > self._table.limit_pages

    @property
    def over_limit(self) -> bool:
        """Whether faults must wait until pages have left.

        After the limit was lowered by much that cannot mean until all of them have left: the
        guest would stand still for as long as it takes.
        """
        allowed = max(self._allowed, self._table.limit_pages)
        return self.resident + self.leaving >= allowed + self.slack_pages

    def _come_down(self, pages: int) -> None:
        """These have left: allow fewer from now on.

        As few as there are; and if the guest brings pages as fast as they leave, one fewer for
        every two that left, so that it never waits for long and the limit is reached all the same.
        """
        if self.shrinking:
            self._allowed = min(self._allowed - pages / 2, self.resident + self.leaving)

    @property
    def drained(self) -> bool:
        """Whether no page is on its way out."""
        return self.leaving == 0 and not self._in_flight

    def step(self) -> bool:
        """Send what waits, or one batch more if there is too much; whether anything moved.

        Some pages are watched in passing, whatever the pressure: it then pays most.
        """
        if self._send_taken() or self._send_unsent():
            return True
        if not self.enabled:
            return False
        # Nothing is sent behind `take` or `unmap`: faults are answered in them.
        took = self._take()
        return self._watch() or took

    def _take(self) -> bool:
        """Move a batch to the outbox; the next step sends it, after faults that came meanwhile."""
        if self.excess_pages < self.batch_pages or self.leaving >= MOST_IN_FLIGHT_PAGES:
            return False
        roomiest = self._roomiest()
        if roomiest is None:
            return False
        pages = self._victims(min(STEP_PAGES, self.excess_pages))
        if pages.size == 0:
            return False
        link, pages = self._destination(pages, roomiest)
        if pages.size == 0:  # a link went down over its releases
            return False
        self._outbox.take(pages)
        self._policy.left(pages)
        self.changes.mark_pages(pages)
        self.resident -= pages.size
        self.leaving += pages.size
        self._taken = (link, pages)
        return True

    def _send_taken(self) -> bool:
        """Send what the last step took, unless the guest has missed it since."""
        if self._taken is None:
            return False
        link, pages = self._taken
        self._taken = None
        pages = pages[self._table.owners[pages] == LEAVING]
        if link.room_pages < pages.size:
            self._unsent.append(extents_of_pages(pages))
        elif pages.size:
            self._send(link, extents_of_pages(pages))
        return True

    def _watch(self) -> bool:
        # Without sub hosts nobody leaves, and holes are not caught. While a checkpoint is taken
        # each page put on standby would have to be saved once more.
        if not self._links or self.changes is not NOBODY_LOOKS:
            return False
        pages = self._watcher.step()
        self.changes.mark_pages(pages)
        return pages.size > 0

    def _roomiest(self) -> Link | None:
        # Each RELEASE costs both sides 0.2 ms, and one is sent ahead of the batch in any case.
        if all(link.room_pages < STEP_PAGES for link in self._links):
            for link in self._links:
                link.flush_releases()
        roomy = [link for link in self._links if link.room_pages > 0]
        return max(roomy, key=lambda link: link.room_pages, default=None)

    def _destination(self, pages: Pages, roomiest: Link) -> tuple[Link, Pages]:
        """Where the first of `pages` goes, and which of them go with it.

        Each region of memory has a sub host of its own, as long as there is room: neighbours
        stay together, which makes fault-around find them and files long stretches.
        """
        homes = self._homes[pages // REGION_PAGES]
        link = self._links[int(homes[0])]
        together: Mask = homes == homes[0]
        if link.room_pages < pages.size:
            link.flush_releases()
        if link.room_pages < pages.size:
            link, together = roomiest, np.ones(pages.size, dtype=np.bool_)
        together[link.room_pages :] = False
        if not together.all():
            self._candidates.appendleft(pages[~together])
        return link, pages[together]

    def _victims(self, count: int) -> Pages:
        while True:
            if not self._candidates:
                self._choose()
                if not self._candidates:
                    return np.empty(0, dtype=np.int64)
            batch = self._candidates.popleft()
            batch = batch[self._may_leave(batch)]
            batch = batch[~self._watcher.touched_of(batch)]
            if batch.size > count:
                self._candidates.appendleft(batch[count:])
                batch = batch[:count]
            if batch.size:
                return batch

    def _may_leave(self, pages: Pages | slice) -> Mask:
        may_leave: Mask = (self._table.owners[pages] == MAIN) & ~self.recalled[pages]
        return may_leave

    def _choose(self) -> None:
        """Refill the candidates, in batches of neighbours."""
        self.note_writes()
        count = min(CANDIDATES, max(STEP_PAGES, self.resident // 8))
        pages = self._policy.victims(self._may_leave(slice(None)), count)
        for at in range(0, pages.size, STEP_PAGES):
            self._candidates.append(pages[at : at + STEP_PAGES])

    def keep_history(self) -> None:
        """Before a guest runs that was restored: what was loaded was not written by it.

        The kernel takes a page for written that was never mapped nor protected. The first
        `note_writes` would find all of memory touched, and no page colder than another.
        """
        self._tracker.scan(protect=True)

    def note_writes(self) -> None:
        """Take the kernel's record of written pages into the access history."""
        written = mask_of_extents(self._tracker.scan(protect=True), self._table.page_count)
        if self._owners_kept:
            written &= self._table.owners == MAIN
        # Else a hole may be reported as written, and whoever saves finds out.
        pages = np.flatnonzero(written)
        self.changes.mark_pages(pages)
        # A page on standby is reported once more for what was written before it came there.
        watched = self._policy.on_standby[pages]
        self._policy.touched(pages[~watched], self._now())
        self._watcher.touched_of(pages[watched])

    def _queue(self, extents: Extents) -> None:
        for first, stop in extents.tolist():
            for at in range(first, stop, STEP_PAGES):
                self._unsent.append(np.array([[at, min(at + STEP_PAGES, stop)]]))

    def _send_unsent(self) -> bool:
        """Send again, as far as there is room, what a broken link has left in the outbox."""
        if not self._unsent:
            return False
        pages = pages_of_extents(self._unsent[0])
        pages = pages[self._table.owners[pages] == LEAVING]
        # One that was taken back and has left once more is on its way already, maybe elsewhere.
        idle = [page not in self._in_flight for page in pages.tolist()]
        pages = pages[np.array(idle, dtype=np.bool_)]
        link = self._roomiest() if pages.size else None
        if pages.size and link is None:
            return False
        self._unsent.popleft()
        if link is not None:
            if pages.size > link.room_pages:
                self._unsent.appendleft(extents_of_pages(pages[link.room_pages :]))
            self._send(link, extents_of_pages(pages[: link.room_pages]))
        return True

    def _send(self, link: Link, extents: Extents) -> None:
        self._in_flight.update(pages_of_extents(extents).tolist())
        link.page_out(extents, self._outbox.read(extents))

    def stored(self, link: Link, extents: Extents) -> None:
        """A sub host holds these pages: the table says so, then the outbox forgets them.

        Only of what is still leaving; of what came back meanwhile the copy there is released.
        """
        pages = pages_of_extents(extents)
        self._in_flight.difference_update(pages.tolist())
        leaving = (self._table.owners[pages] == LEAVING) & ~self.recalled[pages]
        gone = pages[leaving]
        self._table.owners[gone] = link.code
        self.leaving -= gone.size
        self.pages_out += gone.size
        self._come_down(gone.size)
        self._outbox.drop(extents_of_pages(gone))
        if gone.size < pages.size:
            self.recalled[pages[~leaving]] = False
            link.release(extents_of_pages(pages[~leaving]))

    def unanswered(self, requests: Sequence[Request]) -> None:
        """Page-outs on a link that broke: send again what is still leaving."""
        for request in requests:
            pages = request.pages
            self._in_flight.difference_update(pages.tolist())
            self.recalled[pages] = False  # a copy that did arrive is found when maps are compared
            self._unsent.append(np.asarray(request.extents))

    def stranded(self, most: int) -> Pages:
        """At most so many pages on their way out that no sub host is to take any more."""
        if not self.leaving or any(link.sub.capacity_pages for link in self._links):
            return np.empty(0, dtype=np.int64)
        leaving = np.flatnonzero(self._table.owners == LEAVING)
        idle = [page for page in leaving.tolist() if page not in self._in_flight]
        return np.array(idle[:most], dtype=np.int64)

    def take_back(self, page: int) -> bytes:
        """The content of a leaving page that is wanted again; then call `taken_back`."""
        extents = np.array([[page, page + 1]])
        return self._outbox.read(extents)[0]

    def taken_back(self, page: int) -> None:
        """The page is in the RAM file again: it leaves the outbox."""
        self._table.owners[page] = MAIN
        self.arrived(page, page + 1)
        self.leaving -= 1
        if page in self._in_flight:
            self.recalled[page] = True
        self._outbox.drop(np.array([[page, page + 1]]))

    def arrived(self, first: int, stop: int, *, wanted: bool = True) -> None:
        """Pages ``[first, stop)`` are on the main host now, and the table says so.

        Those that were brought ahead of need are as old as they were.
        """
        self.changes.mark(first, stop)
        if wanted:
            self._policy.arrived(first, stop, self._now())
        self.resident += stop - first
