"""How many pages the main host may keep, and how it comes down to a lower limit."""

from __future__ import annotations

from dcres.paging.pager.book import PageBook

STEP_PAGES = 64


def headroom_pages(limit_pages: int) -> int:
    """How far below its limit a main host is kept, so that faults find room."""
    return min(512, limit_pages // 16)


class Share:
    """The limit in the page table, held against what the page book counts."""

    def __init__(self, book: PageBook) -> None:
        self._book = book
        self._table = book.table
        self.allow_what_is_here()

    def limit(self, limit_pages: int) -> None:
        """Set the limit: what is here beyond it leaves, and is allowed until then."""
        self._table.limit_pages = limit_pages
        self.allow_what_is_here()

    def allow_what_is_here(self) -> None:
        """As after a new limit."""
        self._allowed = float(self._book.resident + self._book.leaving)

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
        return self._book.resident - (self._table.limit_pages - self.headroom_pages)

    @property
    def shrinking(self) -> bool:
        """Whether the main host is still on its way down to its limit."""
        return self._allowed > self._table.limit_pages

    @property
    def over_limit(self) -> bool:
        """Whether faults must wait until pages have left.

        After the limit was lowered by much that cannot mean until all of them have left: the
        guest would be paused for as long as it takes.
        """
        allowed = max(self._allowed, self._table.limit_pages)
        return self._book.resident + self._book.leaving >= allowed + self.slack_pages

    def come_down(self, pages: int) -> None:
        """These have left: allow fewer from now on.

        As few as there are; and if the guest brings pages as fast as they leave, one fewer for
        every two that left, so that it never waits for long and the limit is reached all the same.
        """
        if self.shrinking:
            here = self._book.resident + self._book.leaving
            self._allowed = min(self._allowed - pages / 2, here)
