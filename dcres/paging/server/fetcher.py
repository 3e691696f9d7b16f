"""Pages that a memory server brings to itself: what FETCH asks for, without the pager's hands.

A FETCH is cut into parts of one PEEK each. The connection to a source is kept and used again;
it has a few PEEKs on the way at a time. When every part has been answered, or cannot be any
more, FETCHED says which pages were stored.

The pager may send a page out to this server, or release it here, while a fetch of the same page
is under way. What the pager says is younger than what the source has, so such a page is dropped
from the fetch: nothing is written for it any more, and FETCHED does not name it.
"""

from __future__ import annotations

import logging
import secrets
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dcres.errors import NoRoom, PagingError, ProtocolError, Refused
from dcres.model import wire
from dcres.model.handshake import NONCE_BYTES, ClientHandshake, Identity, Role
from dcres.model.pages import (
    PAGE_SIZE,
    Extents,
    Mask,
    Pages,
    count_pages,
    extents_of_pages,
    pages_of_extents,
)
from dcres.model.wire import Endpoint, Frame, Kind
from dcres.paging.server.subtable import SubTable
from dcres.paging.transport.loop import Loop
from dcres.paging.transport.stream import FrameStream

log = logging.getLogger("dcres.server")

WINDOW = 4
STALL_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True, eq=False)
class _Fetch:
    """One FETCH: per asked page whether it is still wanted, and whether it is stored."""

    asker: FrameStream
    request: int
    pages: Pages
    wanted: Mask
    stored: Mask
    parts: set[_Part]  # that are not done

    def forget(self, extents: Extents) -> None:
        """Drop pages; what is not asked for is passed over."""
        for low, high in np.searchsorted(self.pages, extents).tolist():
            self.wanted[low:high] = False
            self.stored[low:high] = False


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """The asked pages `low` to `high` - 1 of a fetch, which one PEEK brings."""

    fetch: _Fetch
    low: int
    high: int

    @property
    def extents(self) -> Extents:
        """What of it is still wanted."""
        here = slice(self.low, self.high)
        return extents_of_pages(self.fetch.pages[here][self.fetch.wanted[here]])

    def places(self, extents: Extents) -> Pages:
        """Where the pages of `extents` stand in the fetch. Raises ProtocolError."""
        pages = pages_of_extents(extents)
        places = self.low + np.searchsorted(self.fetch.pages[self.low : self.high], pages)
        known = places < self.high
        if not (known.all() and (self.fetch.pages[places] == pages).all()):
            raise ProtocolError("the source sent pages that were not asked for")
        return places


class _Source:
    """The connection to one server that pages are fetched from, used until it ends."""

    def __init__(
        self,
        loop: Loop,
        at: Endpoint,
        identity: Identity,
        page_count: int,
        arrived: Callable[[_Part, Extents, memoryview], None],
        ended: Callable[[_Source, list[_Part]], None],
    ) -> None:
        self.at = at
        self._page_count = page_count
        self._arrived, self._ended = arrived, ended
        self._waiting: deque[_Part] = deque()
        self._asked: deque[tuple[int, _Part]] = deque()
        self._number = 0
        self._proved = False
        self._heard_at = time.monotonic()
        self._handshake = ClientHandshake(identity, secrets.token_bytes(NONCE_BYTES), Role.READER)
        family = socket.AF_INET6 if ":" in at.address else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        sock.setblocking(False)
        sock.connect_ex((at.address, at.port))  # how it went shows when something is sent
        self._stream = FrameStream(loop, sock, self._frame, self._closed)

    def greet(self) -> None:
        """Begin; `ended` may be called from now on."""
        self._stream.send([self._handshake.hello()])

    def ask(self, part: _Part) -> None:
        """Bring a part: `arrived` will be called for it, or it is among what `ended` gets."""
        if not self._stream.open:
            self._ended(self, [part])
            return
        if self._proved and not self._asked:
            self._heard_at = time.monotonic()
        self._waiting.append(part)
        self._pump()

    def end_if_stalled(self) -> None:
        """Close the connection when the source owes something and has been silent for long."""
        owes = not self._proved or bool(self._asked)
        if owes and time.monotonic() - self._heard_at > STALL_TIMEOUT_S:
            self._stream.close(PagingError(f"it was silent for {STALL_TIMEOUT_S:.0f} s"))

    def _pump(self) -> None:
        while self._proved and self._waiting and len(self._asked) < WINDOW:
            part = self._waiting.popleft()
            extents = part.extents
            if not len(extents):
                self._arrived(part, extents, memoryview(b""))
                continue
            self._number = self._number % 0xFFFFFFFF + 1
            self._asked.append((self._number, part))
            self._stream.send([wire.frame(Kind.PEEK, self._number, wire.pack_extents(extents))])

    def _frame(self, frame: Frame) -> None:
        self._heard_at = time.monotonic()
        if not self._proved:
            self._greeted(frame)
            return
        if frame.kind is Kind.ERROR:
            raise PagingError(str(wire.unpack_error(frame.payload, "it")))
        if frame.kind is not Kind.PAGES or not self._asked or self._asked[0][0] != frame.request:
            raise ProtocolError(f"it sent {frame.kind.name}, which was not asked for")
        extents, data = wire.unpack_pages(frame.payload, self._page_count, may_be_none=True)
        self._arrived(self._asked[0][1], extents, data)
        self._asked.popleft()
        self._pump()

    def _greeted(self, frame: Frame) -> None:
        answer = self._handshake.answer(frame)
        if answer is not None:
            self._stream.send([answer])
            return
        if self._handshake.page_count != self._page_count:
            raise Refused("it serves a VM of another size")
        self._proved = True
        self._pump()

    def _closed(self, why: PagingError | OSError) -> None:
        left = [part for _, part in self._asked] + list(self._waiting)
        level = logging.WARNING if left else logging.INFO
        log.log(level, "source %s port %d: %s", self.at.address, self.at.port, why)
        self._asked.clear()
        self._waiting.clear()
        self._ended(self, left)


class FetchingTable:
    """A page sub-table as a memory server serves it: the pages, and the fetches under way."""

    def __init__(self, loop: Loop, identity: Identity, pages: SubTable) -> None:
        self.pages = pages
        self.pages_fetched = 0
        self._loop = loop
        self._identity = identity
        self._sources: dict[Endpoint, _Source] = {}
        self._fetches: set[_Fetch] = set()

    def existence(self, first: int, count: int) -> Mask:
        """See `SubTable`."""
        return self.pages.existence(first, count)

    def read(self, extents: Extents) -> list[bytes]:
        """See `SubTable`."""
        return self.pages.read(extents)

    def peek(self, extents: Extents) -> tuple[Extents, list[bytes]]:
        """See `SubTable`."""
        return self.pages.peek(extents)

    def write(self, extents: Extents, data: memoryview) -> None:
        """See `SubTable`; fetches under way drop these pages."""
        self._forget(extents)
        self.pages.write(extents, data)

    def release(self, extents: Extents) -> None:
        """See `SubTable`; fetches under way drop these pages."""
        self._forget(extents)
        self.pages.release(extents.tolist())

    def fetch(self, asker: FrameStream, request: int, source: Endpoint, extents: Extents) -> None:
        """Bring `extents` from `source`; FETCHED goes to `asker` when that is done."""
        self._forget(extents)  # of two fetches of one page the later counts
        pages = pages_of_extents(extents)
        wanted, stored = np.ones(len(pages), dtype=np.bool_), np.zeros(len(pages), dtype=np.bool_)
        fetch = _Fetch(asker, request, pages, wanted, stored, set())
        starts = range(0, len(pages), wire.MAX_PAGES)
        parts = [_Part(fetch, low, min(low + wire.MAX_PAGES, len(pages))) for low in starts]
        fetch.parts.update(parts)
        self._fetches.add(fetch)
        try:
            connection = self._source(source)
        except OSError as error:  # no socket for it: this host may not have its kind of addresses
            log.warning("source %s port %d: %s", source.address, source.port, error)
            for part in parts:
                self._done(part)
            return
        for part in parts:
            connection.ask(part)

    def gone(self, asker: FrameStream) -> None:
        """Nothing is written any more for fetches of this connection."""
        for fetch in [each for each in self._fetches if each.asker is asker]:
            fetch.wanted[:] = False
            self._fetches.discard(fetch)

    def end_stalled(self) -> None:
        """Give up on sources that have been silent for long."""
        for source in list(self._sources.values()):
            source.end_if_stalled()

    def _forget(self, extents: Extents) -> None:
        for fetch in self._fetches:
            fetch.forget(extents)

    def _source(self, at: Endpoint) -> _Source:
        source = self._sources.get(at)
        if source is None:
            source = _Source(
                self._loop, at, self._identity, self.pages.page_count, self._arrived, self._ended
            )
            self._sources[at] = source
            source.greet()
        return source

    def _ended(self, source: _Source, left: list[_Part]) -> None:
        if self._sources.get(source.at) is source:
            del self._sources[source.at]
        for part in left:
            self._done(part)

    def _arrived(self, part: _Part, extents: Extents, data: memoryview) -> None:
        fetch, places = part.fetch, part.places(extents)
        kept = fetch.wanted[places]
        if not kept.all():
            extents = extents_of_pages(fetch.pages[places[kept]])
            rows = np.frombuffer(data, dtype=np.uint8).reshape(-1, PAGE_SIZE)
            data = memoryview(rows[kept].tobytes())
        if len(extents):
            self._store(fetch, places[kept], extents, data)
        self._done(part)

    def _store(self, fetch: _Fetch, places: Pages, extents: Extents, data: memoryview) -> None:
        try:
            self.pages.write(extents, data)
        except NoRoom as error:
            log.warning("a fetch was cut short: %s", error)
            # Some of it may be written. What FETCHED does not name must not be here.
            self.pages.release(extents.tolist())
            fetch.wanted[:] = False
            return
        fetch.stored[places] = True
        self.pages_fetched += count_pages(extents)

    def _done(self, part: _Part) -> None:
        fetch = part.fetch
        fetch.parts.discard(part)
        if fetch.parts:
            return
        self._fetches.discard(fetch)
        stored = wire.pack_extents(extents_of_pages(fetch.pages[fetch.stored]))
        fetch.asker.send([wire.frame(Kind.FETCHED, fetch.request, stored)])
