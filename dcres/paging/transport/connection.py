"""One connection of a pager to a server: it greets, numbers requests and matches the answers.

A link has one in the role of the pager and, with a memory server, a second one in the role
*express*: PAGE_IN of what the guest waits for, and nothing else. On the first one a missed page
would wait for whatever is on its way there: windows of a walk, pages that leave, releases. A
PAGE_IN changes nothing on the server, and no page's other requests are made while one for it is
unanswered, so nothing depends on the order between the two (docs/protocol.md, "The express
connection").
"""

from __future__ import annotations

import secrets
import socket
from collections import deque
from collections.abc import Sequence
from mmap import mmap
from typing import Protocol

from dcres.errors import CheckpointCorrupt, PagesLost, PagingError, ProtocolError, Refused
from dcres.linux.pipe import address_of
from dcres.model import wire
from dcres.model.handshake import NONCE_BYTES, ClientHandshake, Identity, Role
from dcres.model.pages import PAGE_SIZE
from dcres.model.wire import Frame, Kind, Part
from dcres.paging.settings import SubAddress
from dcres.paging.transport.loop import Loop
from dcres.paging.transport.requests import Request, Runs
from dcres.paging.transport.silence import Silence
from dcres.paging.transport.stream import FrameStream

ANSWER_TIMEOUT_S = 10.0


class ConnectionUser(Protocol):
    """Who is told what comes on a connection."""

    def connected(self, connection: Connection) -> None:
        """The server has greeted: requests may be sent from now on."""

    def answered(self, connection: Connection, request: Request, frame: Frame) -> None:
        """The oldest request is answered. Raises PagingError for a bad answer: it ends then."""

    def fetched(self, connection: Connection, request: Request, frame: Frame) -> None:
        """A fetch is answered; it counts as under way until `Connection.fetch_is_over`."""

    def put(self, request: Request, first: int, stop: int, at_ns: int) -> None:
        """The hot path has put in place what was asked for."""

    def closed(self, connection: Connection, why: PagingError | OSError) -> None:
        """It has ended; what is unanswered will not be answered."""


class Connection:
    """Call `greet` at first. How connecting went shows when something is sent."""

    def __init__(
        self, loop: Loop, identity: Identity, page_count: int, sub: SubAddress, role: Role
    ) -> None:
        self.ready = False
        self.unanswered: deque[Request] = deque()
        self.fetches: dict[int, Request] = {}  # answered when they are done, in any order
        self._loop, self._sub, self._page_count, self._role = loop, sub, page_count, role
        self._handshake = ClientHandshake(identity, secrets.token_bytes(NONCE_BYTES), role)
        self._silence = Silence(ANSWER_TIMEOUT_S)
        self._scratch: mmap | None = None  # for answers with zeros in them, which most have not

    def greet(self, user: ConnectionUser) -> None:
        """Connect and say HELLO; `user` is told what comes of it, maybe at once."""
        self._user = user
        family = socket.AF_INET6 if ":" in self._sub.address else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        sock.setblocking(False)
        sock.connect_ex((self._sub.address, self._sub.port))
        self._stream = FrameStream(self._loop, sock, self._frame, self._closed, self._put)
        self.shared = self._stream.shared
        """Numbers that the hot path knows, too."""
        self._buffer_address = address_of(self._stream.buffer)
        self._stream.send([self._handshake.hello()])

    def use_hot_path(self) -> None:
        """From now on it may ask here for what is missed, and put in place what comes."""
        hot, stream = self._loop.hot, self._stream
        if hot is not None:
            express = self._role is Role.EXPRESS
            hot.client(stream.fd, self._sub.code, stream.buffer, stream.shared, express)

    def end_if_silent(self, now_s: float) -> None:
        """End it when the server has owed the same answer for too long.

        TCP would notice a host without power, but not a process that hangs, nor soon a host
        that was never reached. The guest waits either way, and status says for whom.
        """
        if self._silence.too_long(self._owed, now_s):
            why = f"it has not answered for {ANSWER_TIMEOUT_S:g} s"
            self.close(PagingError(f"{why}; see whether it and the network are well"))

    @property
    def _owed(self) -> object:
        """What the server has to do next. A fetch may take its time: it waits for others."""
        if self.unanswered:
            return self.unanswered[0].number
        return None if self.ready else "WELCOME"

    @property
    def next_number(self) -> int:
        """The number of the next request."""
        return self.shared[wire.NUMBER] % 0xFFFFFFFF + 1

    def frame(self, request: Request, payload: Sequence[Part]) -> list[Part]:
        """A request's frame, for `send`; the request counts as unanswered from now on."""
        self.shared[wire.NUMBER] = request.number
        if request.kind is Kind.FETCH:
            self.fetches[request.number] = request
        else:
            self.unanswered.append(request)
        return [wire.header(request.kind, request.number, sum(map(len, payload))), *payload]

    def send(self, parts: Sequence[Part]) -> None:
        """In one go: it may end in it, and then all the requests are among the unanswered."""
        self._stream.send(parts)

    def page_in(self, runs: Runs) -> None:
        """Ask for pages, at most `wire.MAX_PAGES`."""
        number = self.shared[wire.NUMBER] = self.next_number
        self.unanswered.append(Request(number, Kind.PAGE_IN, runs))
        self._stream.send([wire.frame(Kind.PAGE_IN, number, wire.pack_runs(runs))])

    def asked(self, page: int, number: int, sent_bytes: int) -> None:
        """The hot path has asked for a page, and sent so much of the frame."""
        self.unanswered.append(Request(number, Kind.PAGE_IN, [(page, page + 1)]))
        frame = wire.frame(Kind.PAGE_IN, number, wire.pack_run(page, page + 1))
        if sent_bytes < len(frame):
            self._stream.finish(memoryview(frame)[sent_bytes:])

    def fetch_is_over(self, request: Request) -> None:
        """Before the user is told: of what a bad answer ends it is told as of unanswered."""
        del self.fetches[request.number]

    def close(self, why: PagingError | OSError) -> None:
        """End it; `closed` is told, unless it has ended already."""
        self._stream.close(why)

    def address_of(self, frame: Frame, data: memoryview) -> int:
        """Where `data` is: behind what else the frame holds, or, with zeros put in, copied."""
        if data.obj is frame.payload.obj:
            return self._buffer_address + frame.offset + len(frame.payload) - len(data)
        if self._scratch is None:
            self._scratch = mmap(-1, wire.MAX_PAGES * PAGE_SIZE)
        self._scratch[: len(data)] = bytes(data)
        return address_of(self._scratch)

    def _closed(self, why: PagingError | OSError) -> None:
        self._user.closed(self, why)

    def _frame(self, frame: Frame) -> None:
        if not self.ready:
            self._greeted(frame)
        elif frame.kind is Kind.ERROR:
            # What it means shows when the link is made again and the maps are compared.
            error = wire.unpack_error(frame.payload, self._sub.host)
            if isinstance(error, CheckpointCorrupt):  # asking again would not mend it
                raise PagesLost(str(error))
            raise PagingError(str(error))
        elif frame.kind is Kind.FETCHED:
            if frame.request not in self.fetches:
                raise ProtocolError(f"{self._sub.host} answered a fetch that was not ordered")
            self._user.fetched(self, self.fetches[frame.request], frame)
        else:
            self._answer(frame)

    def _answer(self, frame: Frame) -> None:
        request = self._oldest(frame.request)
        try:
            self._user.answered(self, request, frame)
        except PagingError:
            if self._stream.open:  # it ends for it, and then the request is made again
                self.unanswered.appendleft(request)
            raise

    def _put(self, number: int, first: int, stop: int, at_ns: int) -> None:
        """The answer of `number` is in place, and its frame gone."""
        self._user.put(self._oldest(number), first, stop, at_ns)

    def _oldest(self, number: int) -> Request:
        if not self.unanswered or self.unanswered[0].number != number:
            raise ProtocolError(f"{self._sub.host} answered a request that was not made")
        return self.unanswered.popleft()

    def _greeted(self, frame: Frame) -> None:
        answer = self._handshake.answer(frame)
        if answer is not None:
            self._stream.send([answer])
            return
        if self._handshake.page_count != self._page_count:
            raise Refused(f"{self._sub.host} serves a VM of another size")
        self.ready = True
        self._user.connected(self)
