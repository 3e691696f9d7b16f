"""The pager of a main host: ``python -m dcres.paging.pager SETTINGS``.

One process per VM, one thread, one event loop. It owns the network page table and answers
QEMU's page faults; nothing else runs in it, because whatever holds the interpreter lock holds
up the guest. How it stops for a checkpoint is told in `dcres.paging.pager.standstill`.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from dcres.errors import DcresError, PagesLost, PagingError, ProtocolError
from dcres.linux.files import allocated_bytes
from dcres.linux.pagemap import WriteTracker
from dcres.model.pages import PAGE_SIZE, Extents, Mask
from dcres.model.placement import MAIN, pages_by_host
from dcres.model.wire import Kind
from dcres.paging import control
from dcres.paging import moves as moves_
from dcres.paging import settings as settings_
from dcres.paging.alone import alone
from dcres.paging.changes import NOBODY_LOOKS, ChangeMap
from dcres.paging.control import Answer, ControlServer, Reply
from dcres.paging.pager.attach import Attached, attach, keep_owners, lock_of, open_table
from dcres.paging.pager.book import PageBook
from dcres.paging.pager.evictor import Evictor
from dcres.paging.pager.faults import FaultHandler, HotFault
from dcres.paging.pager.mover import Mover
from dcres.paging.pager.standstill import PagerState, Standstill
from dcres.paging.settings import PagerSettings, SubAddress
from dcres.paging.transport.link import Link
from dcres.paging.transport.loop import READ, Loop
from dcres.paging.transport.requests import Request, Runs

log = logging.getLogger("dcres.pager")

TICK_S = 0.1
IDLE_S = 0.02
FILL_PAGES = 64


class Pager:
    """Faults, page-outs, links and orders, in one loop."""

    def __init__(self, settings_path: Path, stack: ExitStack) -> None:
        self._settings_path = settings_path
        self._settings = settings = settings_.load(PagerSettings, settings_path)
        stack.enter_context(alone(lock_of(settings), "a pager of this VM"))
        self._table = open_table(settings)
        self._book = PageBook(self._table)
        self._attached: Attached = attach(settings, self._book, stack)
        self._started = time.monotonic()
        self._first_tick = int(self._table.ticks.max(initial=0)) + 1
        self._loop = Loop()
        self._links = [self._link(sub) for sub in settings.subs]
        self._sources = [self._link(each, source=True) for each in settings.sources]
        tracker = stack.enter_context(
            WriteTracker(settings.qemu_pid, self._attached.base, settings.page_count)
        )
        outbox = self._attached.outbox
        self._evictor = Evictor(self._book, outbox, self._links, tracker, self.tick)
        if not self._attached.adopted and self._table.ticks[self._table.owners == MAIN].any():
            self._evictor.keep_history()
        self._faults = FaultHandler(
            self._attached.uffd,
            self._attached.base,
            self._book,
            self._evictor,
            outbox,
            self._all_links,
            self.tick,
        )
        self._evictor.set_links(self._links, owners_kept=bool(self._all_links))
        self._mover = Mover(self._book, self._faults, self._evictor.share)
        self._mover.set_links(self._all_links)
        self._mover.order(moves_.load(Path(settings.moves)))
        self._standstill = Standstill(self._faults, self._evictor, self._mover, self.tick)
        self._standstill.set_links(self._links)
        self._filling = False
        self._tracking = ""
        self._listening = True
        self._stopping = False
        self._pidfd = os.pidfd_open(settings.qemu_pid)
        stack.callback(os.close, self._pidfd)
        self._loop.add(self._attached.uffd.fd, self._fault_ready)
        outbox.hot = self._loop.hot
        if self._loop.hot is not None:
            owners, asked = self._book.for_hot_path, self._faults.asked
            self._loop.hot.watch(self._attached.uffd.fd, self._attached.base, owners, asked)
        self._loop.add(self._pidfd, self._qemu_ended)
        self._control = ControlServer(self._loop, Path(settings.control), self._order)

    def _link(self, sub: SubAddress, *, source: bool = False) -> Link:
        known = self._settings
        return Link(self._loop, sub, known.identity, known.page_count, self, source=source)

    @property
    def _all_links(self) -> list[Link]:
        return [*self._links, *self._sources]

    def tick(self) -> int:
        """The present tick of access history; goes on where an earlier pager left off."""
        return self._first_tick + int((time.monotonic() - self._started) / TICK_S)

    def run(self) -> None:
        """Page until told to stop or QEMU ends."""
        busy = True
        while not self._stopping:
            idle = not self._loop.turn(0 if busy else IDLE_S)
            for link in self._all_links:
                link.connect_if_due()
            self._standstill.keep_promises()
            busy = self._work()  # faults may be answered in it, and are told of in the next turn
            if idle and not busy:
                self._settle()
        self._control.close()

    def stop(self) -> None:
        """Leave `run` soon. QEMU keeps its descriptors: the guest's faults wait."""
        self._stopping = True

    def _work(self) -> bool:
        """One step of what is not a fault; whether there may be more at once."""
        if not self._standstill.answers_faults:
            self._listen(False)
            return False
        # While QUIET nothing leaves, so waiting for room would be waiting for ever.
        quiet = self._standstill.state is PagerState.QUIET
        self._listen(quiet or not self._evictor.share.over_limit)
        if (
            self._faults.guest_waits
            and not self._evictor.share.over_limit
            and not self._evictor.share.shrinking
        ):
            return False  # its answer goes first
        moved = self._evictor.step() or self._mover.step() or self._take_back_stranded()
        if not moved and self._filling and self._standstill.state is PagerState.RUNNING:
            moved = self._fill()
        return moved

    def _take_back_stranded(self) -> bool:
        pages = self._evictor.stranded(FILL_PAGES)
        self._faults.take_back(pages)
        return pages.size > 0

    def _fill(self) -> bool:
        if self._faults.bringing:
            return False
        room = -self._evictor.share.excess_pages
        self._filling = room > 0 and self._faults.fill(min(FILL_PAGES, room))
        return self._filling

    def _settle(self) -> None:
        if not self._faults.fetching:
            for link in self._links:
                link.flush_releases()

    def _listen(self, wanted: bool) -> None:
        """Take faults from the kernel or leave them there."""
        if wanted != self._listening:
            self._listening = wanted
            self._loop.want(self._attached.uffd.fd, READ if wanted else 0)

    def _fault_ready(self, told: int | list[HotFault]) -> None:
        try:
            if isinstance(told, list):
                self._faults.told(told)
            else:
                self._faults.read()
        except PagesLost as error:
            self.memory_lost(error)
        except (ProcessLookupError, FileNotFoundError):
            self.stop()  # QEMU is on its way out

    def _qemu_ended(self, _: int) -> None:
        log.info("QEMU has ended")
        self.stop()

    # What links tell (LinkUser)

    def expected(self, link: Link, first: int, count: int) -> Mask:
        """Which pages the table places on the link's host."""
        expected: Mask = self._table.owners[first : first + count] == link.code
        return expected

    def link_ready(self, link: Link) -> None:
        """Go on with what waits for this host."""
        log.info("%s is connected and holds %d pages", link.sub.host, link.held_pages)
        self._faults.link_ready(link)

    def link_down(self, link: Link, unanswered: list[Request]) -> None:
        """Keep what was under way for when it is back."""
        self._faults.unanswered(link, [r for r in unanswered if r.kind is Kind.PAGE_IN])
        self._mover.unanswered(link, [r for r in unanswered if r.kind is Kind.FETCH])
        self._evictor.unanswered([r for r in unanswered if r.kind is Kind.PAGE_OUT])

    def pages_arrived(self, link: Link, runs: Runs, address: int) -> None:
        """Page-in."""
        self._faults.arrived(link, runs, address)

    def pages_put(self, link: Link, first: int, stop: int, at_ns: int) -> None:
        """Page-in that the hot path has done."""
        self._faults.put(link, first, stop, at_ns)

    def pages_stored(self, link: Link, extents: Extents) -> None:
        """Page-out is acknowledged."""
        self._evictor.stored(link, extents)

    def pages_fetched(self, link: Link, asked: Extents, stored: Extents) -> None:
        """A move from host to host."""
        self._mover.fetched(link, asked, stored)

    def memory_lost(self, why: PagingError) -> None:
        """Stop serving for good; the guest waits."""
        log.error("the VM is lost: %s", why)
        self._standstill.lose(str(why))
        self._listen(False)

    # Orders

    def _order(self, do: str, arguments: dict[str, Any], reply: Reply) -> None:
        match do:
            case "status":
                reply(self._status())
            case "quiesce":
                self._standstill.quiesce(reply)
            case "freeze":
                self._standstill.freeze(reply)
            case "thaw":
                self._standstill.thaw()
                reply({"ok": True})
            case "resize":
                self._resize(control.pages(arguments, "limit_pages"))
                reply({"ok": True})
            case "reload":
                self._reload()
                reply({"ok": True})
            case "track":
                self._track(Path(control.text(arguments, "changes")))
                reply({"ok": True})
            case "scan":
                changes = control.text(arguments, "changes")
                reply({"ok": True, "written": self._scan(changes)})
            case "untrack":
                self._book.changes = NOBODY_LOOKS
                self._tracking = ""
                reply({"ok": True})
            case _:
                raise ProtocolError(f"a pager cannot {do}")

    def _track(self, changes: Path) -> None:
        """From now on mark in `changes` what comes, goes and is written. Repeatable."""
        self._standstill.require_alive()
        marks = ChangeMap.shared(changes, self._settings.page_count)
        self._evictor.note_writes()  # what was written before is not news
        self._book.changes = marks
        self._tracking = str(changes)

    def _scan(self, changes: str) -> int:
        """Mark what the guest wrote since the last scan; how many pages are marked now.

        A pager that was started again in the middle has missed changes, and says so.
        """
        self._standstill.require_alive()
        marks = self._book.changes
        if changes != self._tracking or not isinstance(marks, ChangeMap):
            raise PagingError("the pager was started again and does not track this checkpoint")
        self._evictor.note_writes()
        return marks.count()

    def _resize(self, limit_pages: int) -> None:
        self._standstill.require_alive()
        self._filling = limit_pages > self._table.limit_pages
        self._evictor.share.limit(limit_pages)

    def _reload(self) -> None:
        """Take sub hosts, slice servers and moves as the settings file has them by now.

        Raises PagingError, and changes nothing, if pages are still with a host that is to go.
        """
        self._standstill.require_alive()
        fresh = settings_.load(PagerSettings, self._settings_path)
        staying = {each.code for each in (*fresh.subs, *fresh.sources)}
        counts = np.bincount(self._table.owners, minlength=256)
        for link in self._all_links:
            if link.code not in staying and (counts[link.code] or link.needed):
                raise PagingError(f"{link.sub.host} still has pages of this VM")
        if not staying and self._book.leaving:
            raise PagingError("pages of this VM are still on their way to a sub host")
        known = {link.code: link for link in self._all_links}
        if not known and staying:
            keep_owners(self._attached, fresh, self._book)
            self._evictor.share.allow_what_is_here()
        self._settings = fresh
        self._links = [self._kept_or_new(known, sub) for sub in fresh.subs]
        self._sources = [self._kept_or_new(known, each, source=True) for each in fresh.sources]
        for code in known.keys() - staying:
            known[code].close()
        self._evictor.set_links(self._links, owners_kept=bool(self._all_links))
        self._faults.set_links(self._all_links)
        self._mover.set_links(self._all_links)
        self._standstill.set_links(self._links)
        self._mover.order(moves_.load(Path(fresh.moves)))

    def _kept_or_new(
        self, known: dict[int, Link], sub: SubAddress, *, source: bool = False
    ) -> Link:
        link = known.get(sub.code)
        if link is None:
            return self._link(sub, source=source)
        link.sub = sub
        return link

    def _pages_by_host(self) -> list[int]:
        if self._all_links:
            return pages_by_host(self._table.owners, [link.code for link in self._links])
        # Without sub hosts nobody keeps the owners; what is there, the file system knows.
        return [allocated_bytes(self._attached.ram) // PAGE_SIZE]

    def _status(self) -> Answer:
        samples = np.array(self._faults.latencies_ns or [0]) / 1000
        return {
            "ok": True,
            "state": str(self._standstill.state),
            "lost_why": self._standstill.lost_why,
            "pid": os.getpid(),
            "adopted": self._attached.adopted,
            "tracking": bool(self._tracking),
            "native": self._loop.hot is not None,
            "limit_pages": self._table.limit_pages,
            "pages": self._pages_by_host(),
            "leaving": self._book.leaving,
            "moving": self._mover.moving,
            "pages_to_move": self._mover.pages_left,
            "page_in_median_us": float(np.median(samples)),
            "page_in_p99_us": float(np.percentile(samples, 99)),
            "links": {
                # One host may have both a memory server and a slice server of this VM.
                link.sub.host + (" (parts)" if link.source else ""): link.status()
                for link in self._all_links
            },
            **self._standstill.counters(),
        }


def main(arguments: list[str]) -> int:
    """Run the pager whose settings file is named."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    try:
        with ExitStack() as stack:
            pager = Pager(Path(arguments[0]), stack)
            signal.signal(signal.SIGTERM, lambda *_: pager.stop())
            pager.run()
    except (OSError, DcresError) as error:
        log.error("%s: %s", type(error).__name__, error)
        return 1
    return 0
