"""What a pager does when it is ordered to (docs/protocol.md, "The control protocol")."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import assert_never

import numpy as np

from dcres.errors import PagingError
from dcres.linux.files import allocated_bytes
from dcres.model.pages import PAGE_SIZE
from dcres.model.placement import pages_by_host
from dcres.paging import moves as moves_
from dcres.paging import settings as settings_
from dcres.paging.changes import NOBODY_LOOKS, DirtyBitmap
from dcres.paging.content import ContentChanges
from dcres.paging.orders import (
    Cut,
    Done,
    Freeze,
    PagerOrder,
    Quiesce,
    Rebase,
    Reload,
    Reply,
    ResizePager,
    Scan,
    Status,
    Thaw,
    Track,
    Untrack,
    Written,
)
from dcres.paging.pager.attach import Attached, keep_owners
from dcres.paging.pager.book import PageBook
from dcres.paging.pager.evictor import Evictor
from dcres.paging.pager.faults import FaultHandler
from dcres.paging.pager.filler import Filler
from dcres.paging.pager.links import Links
from dcres.paging.pager.mover import Mover
from dcres.paging.pager.standstill import Standstill
from dcres.paging.settings import PagerSettings
from dcres.paging.status import LinkStatus, PagerStatus


@dataclass(frozen=True, slots=True)
class Parts:
    """What a pager is made of."""

    attached: Attached
    book: PageBook
    links: Links
    evictor: Evictor
    faults: FaultHandler
    mover: Mover
    filler: Filler
    standstill: Standstill
    content: ContentChanges
    native: bool
    """Whether the hot path is in C."""

    def links_changed(self) -> None:
        """Tell whoever moves pages where they may be from now on."""
        links = self.links
        self.evictor.set_links(links.subs, owners_kept=bool(links.all))
        self.faults.set_links(links.all)
        self.mover.set_links(links.all)
        self.standstill.set_links(links.subs)


class Orders:
    """Takes the orders of a pager."""

    def __init__(self, settings_path: Path, parts: Parts) -> None:
        self._settings_path = settings_path
        self._parts = parts
        self._tracking = ""

    def take(self, order: PagerOrder, reply: Reply) -> None:
        """Do it, and answer at once or when it is done. Raises what is to be answered."""
        parts = self._parts
        match order:
            case Status():
                reply(self._status())
            case Quiesce():
                parts.standstill.quiesce(reply)
            case Freeze():
                parts.standstill.freeze(reply)
            case Thaw():
                parts.standstill.thaw()
                reply(Done())
            case ResizePager(limit_pages):
                self._resize(limit_pages)
                reply(Done())
            case Reload():
                self._reload()
                reply(Done())
            case Track(changes):
                self._track(Path(changes))
                reply(Done())
            case Scan(changes):
                reply(Written(self._scan(changes)))
            case Untrack():
                parts.book.changes = NOBODY_LOOKS
                self._tracking = ""
                reply(Done())
            case Cut(checkpoint):
                self._cut(checkpoint)
                reply(Done())
            case Rebase(checkpoint):
                parts.content.rebase(checkpoint)
                reply(Done())
            case _:
                assert_never(order)

    def _track(self, changes: Path) -> None:
        """From now on mark in `changes` what comes, goes and is written. Repeatable."""
        self._parts.standstill.require_alive()
        marks = DirtyBitmap.shared(changes, self._parts.book.table.page_count)
        self._parts.evictor.note_writes()  # what was written before is not news
        self._parts.book.changes = marks
        self._tracking = str(changes)

    def _scan(self, changes: str) -> int:
        """Mark what the guest wrote since the last scan; how many pages are marked now.

        A pager that was started again in the middle has missed changes, and says so.
        """
        self._parts.standstill.require_alive()
        marks = self._parts.book.changes
        if changes != self._tracking or not isinstance(marks, DirtyBitmap):
            raise PagingError("the pager was started again and does not track this checkpoint")
        self._parts.evictor.note_writes()
        return marks.count()

    def _cut(self, checkpoint: str) -> None:
        """The freeze has asked the kernel what was written; until the thaw nothing is."""
        self._parts.standstill.require_frozen()
        self._parts.content.cut(checkpoint)

    def _resize(self, limit_pages: int) -> None:
        self._parts.standstill.require_alive()
        self._parts.filler.wanted = limit_pages > self._parts.book.table.limit_pages
        self._parts.evictor.share.limit(limit_pages)

    def _reload(self) -> None:
        """Take sub hosts, part servers and moves as the settings file has them by now.

        Raises PagingError, and changes nothing, if pages are still with a host that is to go.
        """
        parts = self._parts
        parts.standstill.require_alive()
        fresh = settings_.load(PagerSettings, self._settings_path)
        parts.links.require_none_needed(fresh, parts.book.owners)
        staying = bool(fresh.subs or fresh.sources)
        if not staying and parts.book.leaving:
            raise PagingError("pages of this VM are still on their way to a sub host")
        if staying and not parts.links.all:
            keep_owners(parts.attached, fresh, parts.book)
            parts.evictor.share.allow_what_is_here()
        parts.links.take(fresh)
        parts.links_changed()
        parts.mover.order(moves_.load(Path(fresh.moves)))

    def _pages_by_host(self) -> list[int]:
        parts = self._parts
        if parts.links.all:
            return pages_by_host(parts.book.owners, [link.code for link in parts.links.subs])
        # Without sub hosts nobody keeps the owners; what is there, the file system knows.
        return [allocated_bytes(parts.attached.ram) // PAGE_SIZE]

    def _status(self) -> PagerStatus:
        parts = self._parts
        samples = np.array(parts.faults.latencies_ns or [0]) / 1000
        return PagerStatus(
            state=str(parts.standstill.state),
            lost_why=parts.standstill.lost_why,
            pid=os.getpid(),
            adopted=parts.attached.adopted,
            tracking=bool(self._tracking),
            native=parts.native,
            limit_pages=parts.book.table.limit_pages,
            pages=self._pages_by_host(),
            leaving=parts.book.leaving,
            moving=parts.mover.moving,
            pages_to_move=parts.mover.pages_left,
            page_in_median_us=float(np.median(samples)),
            page_in_p99_us=float(np.percentile(samples, 99)),
            links={
                # One host may have both a memory server and a part server of this VM.
                link.sub.host + (" (parts)" if link.source else ""): LinkStatus(
                    state=str(link.state), trouble=link.trouble, express=link.express
                )
                for link in parts.links.all
            },
            **parts.standstill.counts(),
        )
