"""The pager's connection to one memory server: made, proved, reconciled, used, made again.

::

    DOWN ──connect──▶ GREETING ──WELCOME──▶ RECONCILING ──maps agree──▶ READY
      ▲                                                                   │
      └───────────────── the connection ends, for whatever reason ◀───────┘

After each connect the server's existence map is held against the network page table. Pages
that the server has and the table places elsewhere are leftovers of a crash and are released;
a page that the table places there and the server lacks means that the VM has lost memory.
"""

from __future__ import annotations

import logging
import time
from enum import StrEnum
from functools import partial
from typing import Protocol, cast

import numpy as np

from dcres.errors import PagesLost, PagingError, ProtocolError
from dcres.model import wire
from dcres.model.handshake import Identity, Role
from dcres.model.pages import (
    Extents,
    Mask,
    count_pages,
    extents_of_mask,
    join,
    pages_of_extents,
)
from dcres.model.wire import Endpoint, Frame, Kind, Part
from dcres.paging.settings import SubAddress
from dcres.paging.transport.connection import Connection
from dcres.paging.transport.loop import Loop
from dcres.paging.transport.requests import Request, Runs

log = logging.getLogger("dcres.pager")

RETRY_S = 0.1
RELEASE_PAGES = 512


class LinkState(StrEnum):
    """How far a link is."""

    DOWN = "down"
    GREETING = "greeting"
    RECONCILING = "reconciling"
    READY = "ready"


class LinkUser(Protocol):
    """Who is told what happens on a link."""

    def expected(self, link: Link, first: int, count: int) -> Mask:
        """Which pages the network page table places on this link's host."""

    def link_ready(self, link: Link) -> None:
        """Requests may be sent from now on."""

    def link_down(self, link: Link, unanswered: list[Request]) -> None:
        """The connection ended; these requests were not answered and will not be."""

    def pages_arrived(self, link: Link, runs: Runs, address: int) -> None:
        """The data of `runs`, which were asked for, one after the other in memory at `address`."""

    def pages_put(self, link: Link, first: int, stop: int, at_ns: int) -> None:
        """The same, of one run that is in place and in the table since `at_ns`."""

    def pages_stored(self, link: Link, extents: Extents) -> None:
        """The server holds these pages."""

    def pages_fetched(self, link: Link, asked: Extents, stored: Extents) -> None:
        """Of `asked`, the server has fetched `stored` from another one and holds them."""

    def memory_lost(self, why: PagingError) -> None:
        """Pages are gone: the VM cannot go on."""


class Link:
    """One sub host as the pager sees it, or, as a `source`, one part server.

    A part server keeps its pages whatever becomes of them here, so it is told of no release.
    """

    def __init__(
        self,
        loop: Loop,
        sub: SubAddress,
        identity: Identity,
        page_count: int,
        user: LinkUser,
        *,
        source: bool = False,
    ) -> None:
        self.sub = sub
        self.code = sub.code
        self.source = source
        self.state = LinkState.DOWN
        self.held_pages = 0  # as the server will count them once it has read what was sent
        self.trouble = ""  # why it is down
        self._new = partial(Connection, loop, identity, page_count)
        self._page_count = page_count
        self._user = user
        self._main: Connection | None = None
        self._express: Connection | None = None
        self._releases: Runs = []
        self._release_pages = 0
        self._retry_at = 0.0

    @property
    def room_pages(self) -> int:
        """Pages that the server can still take; 0 while it is not ready."""
        if self.state is not LinkState.READY or self.source:
            return 0
        return max(0, self.sub.capacity_pages - self.held_pages)

    @property
    def settled(self) -> bool:
        """Whether nothing is waiting to be sent or answered."""
        waiting = any(each.unanswered for each in self._connections)
        return not waiting and not self._releases

    @property
    def express(self) -> bool:
        """Whether what a guest waits for has a connection of its own by now."""
        return self._express is not None and self._express.ready

    @property
    def needed(self) -> bool:
        """Whether pages are under way on it. A host that is let go need not confirm releases."""
        asked = [request for each in self._connections for request in each.unanswered]
        fetches = any(each.fetches for each in self._connections)
        return fetches or any(request.kind is not Kind.RELEASE for request in asked)

    @property
    def _connections(self) -> list[Connection]:
        return [each for each in (self._main, self._express) if each is not None]

    def connect_if_due(self) -> None:
        """Try to connect when down, at most every `RETRY_S`; go down when the server is silent."""
        now = time.monotonic()
        for each in (self._main, self._express):
            if each is not None:
                each.end_if_silent(now)
        if self.state is LinkState.DOWN and now >= self._retry_at:
            self._retry_at = now + RETRY_S
            self.state, self._main = LinkState.GREETING, self._new(self.sub, Role.PAGER)
            self._main.greet(self)

    @property
    def put_at_ns(self) -> int:
        """When the hot path last put pages of this host in place (monotonic)."""
        return max((each.shared[wire.PUT_AT] for each in self._connections), default=0)

    def _for(self, *, hurry: bool) -> Connection | None:
        """The connection for a PAGE_IN; None while there is none."""
        express = self._express if hurry else None
        return express if express is not None and express.ready else self._main

    def next_number(self, *, hurry: bool = False) -> int:
        """The number of the next request; 0 while there is no connection."""
        connection = self._for(hurry=hurry)
        return 0 if connection is None else connection.next_number

    def page_in(self, runs: Runs, *, hurry: bool = False) -> None:
        """Ask for pages that this host holds, at most `wire.MAX_PAGES`; `hurry`: a guest waits."""
        connection = self._for(hurry=hurry)
        if connection is None:
            raise PagingError(f"{self.sub.host} is not connected")
        connection.page_in(runs)

    def asked(self, page: int, number: int, sent_bytes: int) -> None:
        """The hot path has asked for a page, and sent so much of the frame."""
        connection = self._for(hurry=True)
        if connection is not None:
            connection.asked(page, number, sent_bytes)
        else:  # it has just ended
            self._user.link_down(self, [Request(number, Kind.PAGE_IN, [(page, page + 1)])])

    def page_out(self, extents: Extents, data: list[bytes]) -> None:
        """Hand pages over; releases go first, so that the server has their room."""
        payload = [wire.pack_extents(extents), *wire.pack_data(data)]
        self._hand_over(Kind.PAGE_OUT, extents, payload)

    def fetch(self, source: SubAddress, extents: Extents) -> None:
        """Have the server fetch pages from `source`; at most `wire.MAX_PAGES`."""
        payload = wire.pack_fetch(Endpoint(source.address, source.port), extents)
        self._hand_over(Kind.FETCH, extents, [payload])

    def _hand_over(self, kind: Kind, extents: Extents, payload: list[Part]) -> None:
        if self._main is None:
            raise PagingError(f"{self.sub.host} is not connected")
        parts = self._release_parts(self._main)
        parts += self._main.frame(Request(self._main.next_number, kind, extents), payload)
        self.held_pages += count_pages(extents)
        self._main.send(parts)

    def release(self, runs: Runs) -> None:
        """Pages that the server need not keep any more; told in batches."""
        if self.source:
            return
        self._releases += runs
        for first, stop in runs:
            self._release_pages += stop - first
        if self._release_pages >= RELEASE_PAGES:
            self.flush_releases()

    def flush_releases(self) -> None:
        """Send the releases that wait."""
        if self._main is not None and (parts := self._release_parts(self._main)):
            self._main.send(parts)

    def _release_parts(self, main: Connection) -> list[Part]:
        if not self._releases or self.state is not LinkState.READY:
            return []
        extents = join(np.array(self._releases, dtype=np.int64))
        self._releases, self._release_pages = [], 0
        parts: list[Part] = []
        for at in range(0, len(extents), wire.MAX_RELEASE_EXTENTS):
            part = extents[at : at + wire.MAX_RELEASE_EXTENTS]
            self.held_pages -= count_pages(part)
            request = Request(main.next_number, Kind.RELEASE, part)
            parts += main.frame(request, [wire.pack_extents(part)])
        return parts

    def close(self) -> None:
        """End the connection for good; it must not be `needed`."""
        if self._main is not None:
            self._main.close(ConnectionAbortedError("it is not needed any more"))

    # What connections tell (ConnectionUser)

    def connected(self, connection: Connection) -> None:
        """Ask for the existence map at first. An express connection is of use at once."""
        if connection is self._express:
            connection.use_hot_path()
            return
        self.state, self.held_pages = LinkState.RECONCILING, 0
        for first in range(0, self._page_count, wire.MAX_MAP_PAGES):
            count = min(wire.MAX_MAP_PAGES, self._page_count - first)
            extent = np.array([[first, first + count]], dtype=np.int64)
            request = Request(connection.next_number, Kind.EXISTENCE, extent)
            connection.send(connection.frame(request, [wire.pack_range(first, count)]))

    def answered(self, connection: Connection, request: Request, frame: Frame) -> None:
        """One of our requests."""
        match request.kind, frame.kind:
            case Kind.PAGE_IN, Kind.PAGES:
                runs = cast(Runs, request.extents)
                data = wire.data_of_runs(frame.payload, runs, self.sub.host)
                self._user.pages_arrived(self, runs, connection.address_of(frame, data))
            case Kind.PAGE_OUT, Kind.STORED if not frame.payload:
                self._user.pages_stored(self, cast(Extents, request.extents))
            case Kind.RELEASE, Kind.RELEASED if not frame.payload:
                pass
            case Kind.EXISTENCE, Kind.EXISTENCE_MAP:
                self._reconcile(connection, cast(Extents, request.extents), frame)
            case asked, got:
                raise ProtocolError(f"{self.sub.host} answered {asked.name} with {got.name}")

    def put(self, request: Request, first: int, stop: int, at_ns: int) -> None:
        """One of our page-ins, by the hot path."""
        if len(request.extents) != 1 or tuple(request.extents[0]) != (first, stop):
            raise ProtocolError(f"{self.sub.host} sent pages that were not asked for")
        self._user.pages_put(self, first, stop, at_ns)

    def fetched(self, connection: Connection, request: Request, frame: Frame) -> None:
        """One of our fetches, if the answer names nothing else."""
        stored = wire.unpack_only_extents(frame.payload, self._page_count, may_be_none=True)
        asked = cast(Extents, request.extents)
        if not np.isin(pages_of_extents(stored), pages_of_extents(asked)).all():
            raise ProtocolError(f"{self.sub.host} fetched pages that it was not to fetch")
        connection.fetch_is_over(request)
        self.held_pages -= count_pages(asked) - count_pages(stored)
        self._user.pages_fetched(self, asked, stored)

    def closed(self, connection: Connection, why: PagingError | OSError) -> None:
        """Both connections end together: what is true then shows when the maps are compared."""
        if connection is not self._main:
            if self._main is not None:
                self._main.close(why)
            return
        was, self.state, self._main = self.state, LinkState.DOWN, None
        unanswered = [*connection.unanswered, *connection.fetches.values()]
        express, self._express = self._express, None
        if express is not None:
            unanswered += express.unanswered
            express.close(why)
        self._releases, self._release_pages = [], 0
        if isinstance(why, PagesLost):
            self._user.memory_lost(why)
        if str(why) != self.trouble:
            log.warning("link to %s is down (was %s): %s", self.sub.host, was, why)
        self.trouble = str(why)
        self._user.link_down(self, unanswered)

    def _reconcile(self, main: Connection, extents: Extents, frame: Frame) -> None:
        first, stop = extents[0].tolist()
        here = wire.unpack_mask(frame.payload, stop - first)
        expected = self._user.expected(self, first, stop - first)
        lacking = int((expected & ~here).sum())
        if lacking:
            raise PagesLost(f"{self.sub.host} lacks {lacking} pages that it should hold")
        self.held_pages += int(here.sum())
        leftover = extents_of_mask(here & ~expected) + first
        if len(leftover):
            self.release(leftover.tolist())
        if stop == self._page_count:
            self.state, self.trouble = LinkState.READY, ""
            main.use_hot_path()
            if not self.source:  # a part server is asked for all on the one connection it has
                self._express = self._new(self.sub, Role.EXPRESS)
                self._express.greet(self)
            if self.state is LinkState.READY:  # else the other could not be made: all is down
                self.flush_releases()
                self._user.link_ready(self)
