"""Page-out: who leaves when the main host holds more than its share, and where to.

Who leaves is for a `Policy` to say, which learns of reads through the `Watcher`; how many, for
`Share`; where to, for `Homes`. `Evictor.step` moves one batch from the RAM file to the outbox and
sends it to a sub host. A fault takes a page back from the outbox as long as that host has not
acknowledged it; the page book says what becomes of the copy on the way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from dcres.linux.pagemap import WriteTracker
from dcres.model.pages import (
    Extents,
    Pages,
    extents_of_pages,
    mask_of_extents,
    pages_of_extents,
)
from dcres.model.placement import LEAVING, MAIN
from dcres.model.policy import Policy, SegmentedFifo
from dcres.paging.changes import NOBODY_LOOKS
from dcres.paging.pager.book import PageBook
from dcres.paging.pager.homes import Homes
from dcres.paging.pager.outbox import Outbox
from dcres.paging.pager.share import STEP_PAGES, Share
from dcres.paging.pager.watcher import Watcher
from dcres.paging.transport.link import Link
from dcres.paging.transport.requests import Request

MOST_IN_FLIGHT_PAGES = 1024
CANDIDATES = 4096


class Evictor:
    """Keeps the main host within its share."""

    def __init__(
        self,
        book: PageBook,
        outbox: Outbox,
        links: Sequence[Link],
        tracker: WriteTracker,
        now: Callable[[], int],
        policy: Policy | None = None,
    ) -> None:
        self._book = book
        self._outbox = outbox
        self.set_links(links, owners_kept=bool(links))
        self._tracker = tracker
        self._now = now
        self._candidates: deque[Pages] = deque()
        self._policy = policy or SegmentedFifo(book.table.ticks)
        self._watcher = Watcher(self._policy, outbox, tracker, book.may_leave, now)
        self._unsent: deque[Extents] = deque()
        self._taken: tuple[Link, Pages] | None = None
        self.enabled = True
        self.share = Share(book)
        self.pages_out = 0
        left_over = np.flatnonzero(book.owners == LEAVING)
        self._queue(extents_of_pages(left_over))

    def set_links(self, links: Sequence[Link], *, owners_kept: bool) -> None:
        """Where pages may go from now on, and whether the table says who is here."""
        self._homes = Homes(self._book.table.page_count, links)
        self._owners_kept = owners_kept

    @property
    def drained(self) -> bool:
        """Whether no page is on its way out."""
        return self._book.leaving == 0 and not self._book.in_flight_pages

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
        excess = self.share.excess_pages
        if excess < self.share.batch_pages or self._book.leaving >= MOST_IN_FLIGHT_PAGES:
            return False
        roomiest = self._homes.roomiest()
        if roomiest is None:
            return False
        pages = self._victims(min(STEP_PAGES, excess))
        if pages.size == 0:
            return False
        link, together = self._homes.destination(pages, roomiest)
        if not together.all():
            self._candidates.appendleft(pages[~together])
        pages = pages[together]
        if pages.size == 0:  # a link went down over its releases
            return False
        self._outbox.take(pages)
        self._note_last_writes(pages)
        self._policy.left(pages)
        self._taken = (link, pages)
        return True

    def _send_taken(self) -> bool:
        """Send what the last step took, unless the guest has missed it since."""
        if self._taken is None:
            return False
        link, pages = self._taken
        self._taken = None
        pages = self._book.waiting(pages)
        if link.room_pages < pages.size:
            self._unsent.append(extents_of_pages(pages))
        elif pages.size:
            self._send(link, pages)
        return True

    def _watch(self) -> bool:
        # Without sub hosts nobody leaves, and holes are not caught. While a checkpoint is taken
        # each page put on standby would have to be saved once more.
        if not self._homes.any or self._book.changes is not NOBODY_LOOKS:
            return False
        return self._watcher.step().size > 0

    def _victims(self, count: int) -> Pages:
        while True:
            if not self._candidates:
                self._choose()
                if not self._candidates:
                    return np.empty(0, dtype=np.int64)
            batch = self._candidates.popleft()
            batch = batch[self._book.may_leave(batch)]
            batch = batch[~self._watcher.touched_of(batch)]
            if batch.size > count:
                self._candidates.appendleft(batch[count:])
                batch = batch[:count]
            if batch.size:
                return batch

    def _choose(self) -> None:
        """Refill the candidates, in batches of neighbours."""
        self.note_writes()
        count = min(CANDIDATES, max(STEP_PAGES, self._book.resident // 8))
        pages = self._policy.victims(self._book.may_leave(slice(None)), count)
        for at in range(0, pages.size, STEP_PAGES):
            self._candidates.append(pages[at : at + STEP_PAGES])

    def _note_last_writes(self, pages: Pages) -> None:
        """These have just left the RAM file: what was written since the last scan.

        Now, since the kernel's record of a page is erased when it comes back.
        """
        content = self._book.content
        if content.kept:
            content.mark(self._tracker.written(content.unmarked(pages)))

    def begin_anew(self) -> None:
        """Before a guest runs that was restored: what was loaded was not written by it.

        The kernel takes a page for written that was never mapped nor protected. The first
        `note_writes` would find all of memory touched, no page colder than another, and all
        changed since the checkpoint.
        """
        self._tracker.scan(protect=True)

    def note_writes(self) -> None:
        """Take the kernel's record of written pages into the access history."""
        written = mask_of_extents(self._tracker.scan(protect=True), self._book.table.page_count)
        if self._owners_kept:
            written &= self._book.owners == MAIN
        # Else a hole may be reported as written, and whoever saves finds out.
        pages = np.flatnonzero(written)
        self._book.content.mark(pages)
        self._book.changes.mark_pages(pages)
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
        # One that was taken back and has left once more is on its way already, maybe elsewhere.
        pages = self._book.waiting(pages_of_extents(self._unsent[0]))
        link = self._homes.roomiest() if pages.size else None
        if pages.size and link is None:
            return False
        self._unsent.popleft()
        if link is not None:
            if pages.size > link.room_pages:
                self._unsent.appendleft(extents_of_pages(pages[link.room_pages :]))
            self._send(link, pages[: link.room_pages])
        return True

    def _send(self, link: Link, pages: Pages) -> None:
        extents = extents_of_pages(pages)
        self._book.sent(pages)
        link.page_out(extents, self._outbox.read(extents))

    def stored(self, link: Link, extents: Extents) -> None:
        """A sub host holds these pages: the book says so, then the outbox forgets them."""
        pages = pages_of_extents(extents)
        theirs = self._book.stored(pages, link.code)
        gone = pages[theirs]
        self.pages_out += gone.size
        self.share.come_down(gone.size)
        self._outbox.drop(extents_of_pages(gone))
        if gone.size < pages.size:
            link.release(extents_of_pages(pages[~theirs]).tolist())

    def unanswered(self, requests: Sequence[Request]) -> None:
        """Page-outs on a link that broke: send again what is still leaving."""
        for request in requests:
            self._book.unanswered(request.pages)
            self._unsent.append(np.asarray(request.extents))

    def stranded(self, most: int) -> Pages:
        """At most so many pages on their way out that no sub host is to take any more."""
        if not self._book.leaving or self._homes.wanted:
            return np.empty(0, dtype=np.int64)
        return self._book.waiting(np.flatnonzero(self._book.owners == LEAVING))[:most]

    def taken_back(self, page: int) -> None:
        """A page that was leaving is in the RAM file again: it leaves the outbox."""
        self._book.taken_back(page)
        self.arrived(page, page + 1)
        self._outbox.drop(np.array([[page, page + 1]]))

    def arrived(self, first: int, stop: int) -> None:
        """Pages ``[first, stop)`` were wanted and came; not so those brought ahead of need."""
        self._policy.arrived(first, stop, self._now())
