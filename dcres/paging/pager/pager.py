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

from dcres.errors import DcresError, PagesLost, PagingError
from dcres.linux.pagemap import WriteTracker
from dcres.model.pages import Extents, Mask
from dcres.model.placement import MAIN
from dcres.model.wire import Kind
from dcres.paging import moves as moves_
from dcres.paging import settings as settings_
from dcres.paging.alone import alone
from dcres.paging.content import content_file
from dcres.paging.orders import PAGER_ORDERS
from dcres.paging.pager.attach import Attached, attach, lock_of, open_content, open_table
from dcres.paging.pager.book import PageBook
from dcres.paging.pager.evictor import Evictor
from dcres.paging.pager.faults import FaultHandler, HotFault
from dcres.paging.pager.filler import FILL_PAGES, Filler
from dcres.paging.pager.links import Links
from dcres.paging.pager.mover import Mover
from dcres.paging.pager.orders import Orders, Parts
from dcres.paging.pager.standstill import PagerState, Standstill
from dcres.paging.settings import PagerSettings
from dcres.paging.transport.control_server import ControlServer, typed
from dcres.paging.transport.link import Link
from dcres.paging.transport.loop import READ, Loop
from dcres.paging.transport.requests import Request, Runs

log = logging.getLogger("dcres.pager")

TICK_S = 0.1
IDLE_S = 0.02


class Pager:
    """Faults, page-outs, links and orders, in one loop."""

    def __init__(self, settings_path: Path, stack: ExitStack) -> None:
        settings = settings_.load(PagerSettings, settings_path)
        stack.enter_context(alone(lock_of(settings), "a pager of this VM"))
        table = open_table(settings)
        self._book = PageBook(table)
        path = content_file(Path(settings.table))
        content = self._book.content = open_content(table, path, settings.base)
        attached = attach(settings, self._book, stack)
        self._uffd = attached.uffd
        self._started = time.monotonic()
        self._first_tick = int(table.ticks.max(initial=0)) + 1
        self._loop = Loop()
        self._links = Links(self._loop, settings, self)
        subs, everywhere = self._links.subs, self._links.all
        tracker = stack.enter_context(
            WriteTracker(settings.qemu_pid, attached.base, settings.page_count)
        )
        outbox = attached.outbox
        self._evictor = Evictor(self._book, outbox, subs, tracker, self.tick)
        if not attached.adopted and (settings.base or table.ticks[table.owners == MAIN].any()):
            self._evictor.begin_anew()
        self._faults = FaultHandler(
            attached.uffd, attached.base, self._book, self._evictor, outbox, everywhere, self.tick
        )
        self._share = self._evictor.share
        self._mover = Mover(self._book, self._faults, self._share)
        self._mover.order(moves_.load(Path(settings.moves)))
        self._filler = Filler(self._book, self._links, self._faults, self._share)
        self._standstill = Standstill(self._faults, self._evictor, self._mover, self.tick)
        self._listening = True
        self._stopping = False
        self._pidfd = os.pidfd_open(settings.qemu_pid)
        stack.callback(os.close, self._pidfd)
        self._listen_to_all(attached)
        parts = Parts(
            attached,
            self._book,
            self._links,
            self._evictor,
            self._faults,
            self._mover,
            self._filler,
            self._standstill,
            content,
            native=self._loop.hot is not None,
        )
        parts.links_changed()
        handler = typed("pager", PAGER_ORDERS, Orders(settings_path, parts).take)
        self._control = ControlServer(self._loop, Path(settings.control), handler)

    def _listen_to_all(self, attached: Attached) -> None:
        """Faults, by the hot path first, and the end of QEMU."""
        hot = attached.outbox.hot = self._loop.hot
        self._loop.add(attached.uffd.fd, self._fault_ready)
        if hot is not None:
            asked = self._faults.asked
            hot.watch(attached.uffd.fd, attached.base, self._book.for_hot_path, asked)
        self._loop.add(self._pidfd, self._qemu_ended)

    def tick(self) -> int:
        """The present tick of access history; goes on where an earlier pager left off."""
        return self._first_tick + int((time.monotonic() - self._started) / TICK_S)

    def run(self) -> None:
        """Page until told to stop or QEMU ends."""
        busy = True
        while not self._stopping:
            idle = not self._loop.turn(0 if busy else IDLE_S)
            for link in self._links.all:
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
        self._listen(quiet or not self._share.over_limit)
        if self._faults.guest_waits and not self._share.over_limit and not self._share.shrinking:
            return False  # its answer goes first
        moved = self._evictor.step() or self._mover.step() or self._take_back_stranded()
        if not moved and self._standstill.state is PagerState.RUNNING:
            moved = self._filler.step()
        return moved

    def _take_back_stranded(self) -> bool:
        pages = self._evictor.stranded(FILL_PAGES)
        self._faults.take_back(pages)
        return pages.size > 0

    def _settle(self) -> None:
        if not self._faults.fetching:
            for link in self._links.subs:
                link.flush_releases()

    def _listen(self, wanted: bool) -> None:
        """Take faults from the kernel or leave them there."""
        if wanted != self._listening:
            self._listening = wanted
            self._loop.want(self._uffd.fd, READ if wanted else 0)

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
        expected: Mask = self._book.owners[first : first + count] == link.code
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
