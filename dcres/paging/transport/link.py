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
import secrets
import time
from collections import deque
from collections.abc import Sequence
from enum import StrEnum
from mmap import mmap
from typing import cast

import numpy as np

from dcres.errors import CheckpointCorrupt, PagesLost, PagingError, ProtocolError, Refused
from dcres.linux.pipe import address_of
from dcres.model import wire
from dcres.model.handshake import NONCE_BYTES, ClientHandshake, Identity, Role
from dcres.model.pages import (
    PAGE_SIZE,
    Extents,
    count_pages,
    extents_of_mask,
    join,
    pages_of_extents,
)
from dcres.model.wire import Endpoint, Frame, Kind, Part
from dcres.paging.settings import SubAddress
from dcres.paging.transport.express import Express, connect
from dcres.paging.transport.loop import Loop
from dcres.paging.transport.requests import LinkUser, Request, Runs
from dcres.paging.transport.silence import Silence
from dcres.paging.transport.stream import FrameStream

log = logging.getLogger("dcres.pager")

RETRY_S = 0.1
RELEASE_PAGES = 512
ANSWER_TIMEOUT_S = 10.0


class LinkState(StrEnum):
    """How far a link is."""

    DOWN = "down"
    GREETING = "greeting"
    RECONCILING = "reconciling"
    READY = "ready"


class Link:
    """One sub host as the pager sees it, or, as a `source`, one slice server.

    A slice server keeps its pages whatever becomes of them here, so it is told of no release.
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
        self._loop = loop
        self._identity = identity
        self._page_count = page_count
        self._user = user
        self._stream: FrameStream | None = None
        self._buffer_address = 0
        self._scratch = mmap(-1, wire.MAX_PAGES * PAGE_SIZE)
        self._scratch_address = address_of(self._scratch)
        self._handshake: ClientHandshake | None = None
        self._unanswered: deque[Request] = deque()
        self._fetches: dict[int, Request] = {}  # answered when they are done, in any order
        self._releases: Runs = []
        self._release_pages = 0
        self._retry_at = 0.0
        self._silence = Silence(ANSWER_TIMEOUT_S)
        self._express: Express | None = None
        self._express_silence = Silence(ANSWER_TIMEOUT_S)

    @property
    def room_pages(self) -> int:
        """Pages that the server can still take; 0 while it is not ready."""
        if self.state is not LinkState.READY or self.source:
            return 0
        return max(0, self.sub.capacity_pages - self.held_pages)

    @property
    def settled(self) -> bool:
        """Whether nothing is waiting to be sent or answered."""
        express = self._express is not None and self._express.unanswered
        return not self._unanswered and not self._releases and not express

    @property
    def express(self) -> bool:
        """Whether what a guest waits for has a connection of its own by now."""
        return self._usable_express is not None

    def status(self) -> dict[str, object]:
        """What there is to tell of the link (docs/protocol.md, `status` of a pager)."""
        return {"state": str(self.state), "trouble": self.trouble, "express": self.express}

    @property
    def needed(self) -> bool:
        """Whether pages are under way on it. A host that is let go need not confirm releases."""
        waiting = (request.kind is not Kind.RELEASE for request in self._unanswered)
        return bool(self._fetches) or any(waiting)

    def connect_if_due(self) -> None:
        """Try to connect when down, at most every `RETRY_S`; go down when the server is silent."""
        now = time.monotonic()
        express = self._express
        if self._silence.too_long(self._owed, now) or self._express_silence.too_long(
            express.owed if express is not None else None, now
        ):
            self._end_silence()
        if self.state is not LinkState.DOWN or now < self._retry_at:
            return
        self._retry_at = now + RETRY_S
        self._stream = connect(self._loop, self.sub, self._frame, self._closed, self._put)
        self._buffer_address = address_of(self._stream.buffer)
        self._handshake = ClientHandshake(
            self._identity, secrets.token_bytes(NONCE_BYTES), Role.PAGER
        )
        self.state = LinkState.GREETING
        self._stream.send([self._handshake.hello()])

    @property
    def _owed(self) -> object:
        """What the server has to do next. A fetch may take its time: it waits for others."""
        if self._unanswered:
            return self._unanswered[0].number
        return self.state if self.state is LinkState.GREETING else None

    def _end_silence(self) -> None:
        # TCP would notice a host without power, but not a process that hangs, nor soon a host
        # that was never reached. The guest waits either way, and status says for whom.
        if self._stream is not None:
            why = f"it has not answered for {ANSWER_TIMEOUT_S:g} s"
            self._stream.close(PagingError(f"{why}; see whether it and the network are well"))

    @property
    def put_at_ns(self) -> int:
        """When the hot path last put pages of this host in place (monotonic)."""
        if self._stream is None:
            return 0
        at_ns = self._stream.shared[wire.PUT_AT]
        return at_ns if self._express is None else max(at_ns, self._express.shared[wire.PUT_AT])

    def next_number(self, *, hurry: bool = False) -> int:
        """The number of the next request; 0 while there is no connection."""
        if self._stream is None:
            return 0
        express = self._usable_express if hurry else None
        shared = self._stream.shared if express is None else express.shared
        return shared[wire.NUMBER] % 0xFFFFFFFF + 1

    @property
    def _usable_express(self) -> Express | None:
        return self._express if self._express is not None and self._express.ready else None

    def page_in(self, runs: Runs, *, hurry: bool = False) -> None:
        """Ask for pages that this host holds, at most `wire.MAX_PAGES`; `hurry`: a guest waits."""
        express = self._usable_express if hurry else None
        if express is None:
            self._request(Kind.PAGE_IN, runs, [wire.pack_runs(runs)])
            return
        number = express.shared[wire.NUMBER] = self.next_number(hurry=True)
        frame = wire.frame(Kind.PAGE_IN, number, wire.pack_runs(runs))
        express.send(Request(number, Kind.PAGE_IN, runs), [frame])

    def asked(self, page: int, number: int, sent_bytes: int) -> None:
        """The hot path has asked for a page, and sent so much of the frame."""
        request = Request(number, Kind.PAGE_IN, [(page, page + 1)])
        frame = wire.frame(Kind.PAGE_IN, number, wire.pack_run(page, page + 1))
        rest = memoryview(frame)[sent_bytes:]
        if self._usable_express is not None:
            self._usable_express.asked(request, rest)
            return
        self._unanswered.append(request)
        if rest and self._stream is not None:
            self._stream.finish(rest)

    def page_out(self, extents: Extents, data: list[bytes]) -> None:
        """Hand pages over; releases go first, so that the server has their room."""
        payload = [wire.pack_extents(extents), *wire.pack_data(data)]
        parts = [*self._release_parts(), *self._parts(Kind.PAGE_OUT, extents, payload)]
        self.held_pages += count_pages(extents)
        self._send(parts)

    def fetch(self, source: SubAddress, extents: Extents) -> None:
        """Have the server fetch pages from `source`; at most `wire.MAX_PAGES`."""
        payload = [wire.pack_fetch(Endpoint(source.address, source.port), extents)]
        parts = [*self._release_parts(), *self._parts(Kind.FETCH, extents, payload)]
        request = self._unanswered.pop()
        self._fetches[request.number] = request
        self.held_pages += count_pages(extents)
        self._send(parts)

    def release(self, extents: Extents) -> None:
        """Pages that the server need not keep any more; told in batches."""
        self.release_runs(extents.tolist())

    def release_runs(self, runs: Runs) -> None:
        """The same for runs."""
        if self.source:
            return
        self._releases += runs
        for first, stop in runs:
            self._release_pages += stop - first
        if self._release_pages >= RELEASE_PAGES:
            self.flush_releases()

    def flush_releases(self) -> None:
        """Send the releases that wait."""
        self._send(self._release_parts())

    def _release_parts(self) -> list[Part]:
        if not self._releases or self.state is not LinkState.READY:
            return []
        runs = np.array(self._releases, dtype=np.int64)
        extents = join(runs)
        self._releases, self._release_pages = [], 0
        parts: list[Part] = []
        for at in range(0, len(extents), wire.MAX_RELEASE_EXTENTS):
            part = extents[at : at + wire.MAX_RELEASE_EXTENTS]
            self.held_pages -= count_pages(part)
            parts += self._parts(Kind.RELEASE, part, [wire.pack_extents(part)])
        return parts

    def close(self) -> None:
        """End the connection for good; it must not be `needed`."""
        if self._stream is not None:
            self._stream.close(ConnectionAbortedError("it is not needed any more"))

    def _request(self, kind: Kind, extents: Extents | Runs, payload: Sequence[Part]) -> None:
        self._send(self._parts(kind, extents, payload))

    def _parts(self, kind: Kind, extents: Extents | Runs, payload: Sequence[Part]) -> list[Part]:
        """A request's frame; the request counts as unanswered from now on."""
        if self._stream is None:
            raise PagingError(f"{self.sub.host} is not connected")
        number = self._stream.shared[wire.NUMBER] = self.next_number()
        self._unanswered.append(Request(number, kind, extents))
        length = sum(map(len, payload))
        return [wire.header(kind, number, length), *payload]

    def _send(self, parts: Sequence[Part]) -> None:
        # In one go: the link may go down in it, and then all the requests are among the unanswered.
        if parts and self._stream is not None:
            self._stream.send(parts)

    def _let_hot_path_use_it(self) -> None:
        stream, hot = self._stream, self._loop.hot
        if hot is not None and stream is not None:
            hot.client(stream.fd, self.code, stream.buffer, stream.shared, False)

    def _open_express(self) -> None:
        """A slice server is asked for what is missed on the one connection that it has."""
        if not self.source:
            told = (self._pages_came, self._pages_put, self._express_closed)
            express = Express(self._loop, self.sub, self._identity, self._page_count, *told)
            if self.state is LinkState.READY:  # else it could not be opened, and all is down
                self._express = express

    def _express_closed(self, why: PagingError | OSError) -> None:
        # Both end together: what is true then shows when the maps are compared.
        if self._stream is not None:
            self._stream.close(why)

    def _closed(self, why: PagingError | OSError) -> None:
        was, self.state, self._stream = self.state, LinkState.DOWN, None
        unanswered, self._unanswered = [*self._unanswered, *self._fetches.values()], deque()
        express, self._express = self._express, None
        if express is not None:
            unanswered += express.unanswered
            express.close(why)
        self._fetches.clear()
        self._releases, self._release_pages = [], 0
        if isinstance(why, PagesLost):
            self._user.memory_lost(why)
        if str(why) != self.trouble:
            log.warning("link to %s is down (was %s): %s", self.sub.host, was, why)
        self.trouble = str(why)
        self._user.link_down(self, unanswered)

    def _frame(self, frame: Frame) -> None:
        if self.state is LinkState.GREETING:
            self._greet(frame)
            return
        if frame.kind is Kind.ERROR:
            # What it means shows when the link is made again and the maps are compared.
            error = wire.unpack_error(frame.payload, self.sub.host)
            if isinstance(error, CheckpointCorrupt):  # asking again would not mend it
                raise PagesLost(str(error))
            raise PagingError(str(error))
        if frame.kind is Kind.FETCHED:
            self._fetched(frame)
            return
        if not self._unanswered or self._unanswered[0].number != frame.request:
            raise ProtocolError(f"{self.sub.host} answered a request that was not made")
        request = self._unanswered.popleft()
        try:
            self._answered(request, frame)
        except PagingError:
            if self._stream is not None:  # the link ends for it, and then it is asked again
                self._unanswered.appendleft(request)
            raise

    def _put(self, number: int, first: int, stop: int, at_ns: int) -> None:
        """The answer of `number` is in place, and its frame gone."""
        request = self._unanswered.popleft() if self._unanswered else None
        if request is None or request.number != number:
            raise ProtocolError(f"{self.sub.host} answered a request that was not made")
        self._pages_put(request, first, stop, at_ns)

    def _pages_put(self, request: Request, first: int, stop: int, at_ns: int) -> None:
        if len(request.extents) != 1 or tuple(request.extents[0]) != (first, stop):
            raise ProtocolError(f"{self.sub.host} sent pages that were not asked for")
        self._user.pages_put(self, first, stop, at_ns)

    def _pages_came(self, request: Request, frame: Frame, buffer_address: int) -> None:
        runs = cast(Runs, request.extents)
        data = wire.data_of_runs(frame.payload, runs, self.sub.host)
        self._user.pages_arrived(self, runs, self._address_of(frame, data, buffer_address))

    def _greet(self, frame: Frame) -> None:
        if self._handshake is None or self._stream is None:
            raise ProtocolError("a frame came before HELLO was sent")
        answer = self._handshake.answer(frame)
        if answer is not None:
            self._stream.send([answer])
            return
        if self._handshake.page_count != self._page_count:
            raise Refused(f"{self.sub.host} serves a VM of another size")
        self.state = LinkState.RECONCILING
        self.held_pages = 0
        for first in range(0, self._page_count, wire.MAX_MAP_PAGES):
            count = min(wire.MAX_MAP_PAGES, self._page_count - first)
            extent = np.array([[first, first + count]], dtype=np.int64)
            self._request(Kind.EXISTENCE, extent, [wire.pack_range(first, count)])

    def _answered(self, request: Request, frame: Frame) -> None:
        match request.kind, frame.kind:
            case Kind.PAGE_IN, Kind.PAGES:
                self._pages_came(request, frame, self._buffer_address)
            case Kind.PAGE_OUT, Kind.STORED if not frame.payload:
                self._user.pages_stored(self, cast(Extents, request.extents))
            case Kind.RELEASE, Kind.RELEASED if not frame.payload:
                pass
            case Kind.EXISTENCE, Kind.EXISTENCE_MAP:
                self._reconcile(cast(Extents, request.extents), frame)
            case asked, got:
                raise ProtocolError(f"{self.sub.host} answered {asked.name} with {got.name}")

    def _address_of(self, frame: Frame, data: memoryview, buffer_address: int) -> int:
        """Where `data` is: behind what else the frame holds, or, with zeros put in, copied."""
        if data.obj is frame.payload.obj:
            return buffer_address + frame.offset + len(frame.payload) - len(data)
        self._scratch[: len(data)] = bytes(data)
        return self._scratch_address

    def _fetched(self, frame: Frame) -> None:
        request = self._fetches.get(frame.request)
        if request is None:
            raise ProtocolError(f"{self.sub.host} answered a fetch that was not ordered")
        stored = wire.unpack_only_extents(frame.payload, self._page_count, may_be_none=True)
        asked = cast(Extents, request.extents)
        if not np.isin(pages_of_extents(stored), pages_of_extents(asked)).all():
            raise ProtocolError(f"{self.sub.host} fetched pages that it was not to fetch")
        del self._fetches[frame.request]  # now: of what a bad answer ends, the user is told
        self.held_pages -= count_pages(asked) - count_pages(stored)
        self._user.pages_fetched(self, asked, stored)

    def _reconcile(self, extents: Extents, frame: Frame) -> None:
        first, stop = extents[0].tolist()
        here = wire.unpack_mask(frame.payload, stop - first)
        expected = self._user.expected(self, first, stop - first)
        lacking = int((expected & ~here).sum())
        if lacking:
            raise PagesLost(f"{self.sub.host} lacks {lacking} pages that it should hold")
        self.held_pages += int(here.sum())
        leftover = extents_of_mask(here & ~expected) + first
        if len(leftover):
            self.release(leftover)
        if stop == self._page_count:
            self.state, self.trouble = LinkState.READY, ""
            self._let_hot_path_use_it()
            self._open_express()
            if self.state is LinkState.READY:
                self.flush_releases()
                self._user.link_ready(self)
