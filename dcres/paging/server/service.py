"""A table of pages behind a TCP port: who may connect, and the answers to requests.

Memory servers and part servers are this with a table of their own. Everything runs in one
`Loop`. A pager's requests are answered as they come. A reader's wait for each other: one is
answered per turn, and only when the reader has taken the answer before, so that somebody who
moves gigabytes neither keeps the pager waiting nor fills this process's memory.
"""

from __future__ import annotations

import logging
import secrets
import socket
import time
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from dcres.errors import (
    CheckpointCorrupt,
    NoRoom,
    PagesLost,
    PagingError,
    ProtocolError,
    Refused,
)
from dcres.model import wire
from dcres.model.handshake import NONCE_BYTES, Identity, Role, ServerHandshake
from dcres.model.pages import Extents, Mask, count_pages
from dcres.model.wire import Endpoint, Frame, Kind, Part
from dcres.paging.transport.loop import Loop
from dcres.paging.transport.stream import FrameStream

log = logging.getLogger("dcres.server")

HANDSHAKE_TIMEOUT_S = 5.0
ENDING_TIMEOUT_S = 5.0  # for a peer to take the ERROR that ends its connection
MOST_STRANGERS = 16
MOST_OF_A_ROLE = 64


class Table(Protocol):
    """Pages that can be served."""

    def existence(self, first: int, count: int) -> Mask:
        """Which of `count` pages from `first` are here."""

    def read(self, extents: Extents) -> Sequence[Part]:
        """The data of `extents`, in pieces. Raises PagesLost, CheckpointCorrupt."""

    def peek(self, extents: Extents) -> tuple[Extents, Sequence[Part]]:
        """Those pages of `extents` that are here, and their data. Raises CheckpointCorrupt."""

    def write(self, extents: Extents, data: memoryview) -> None:
        """Take pages in. Raises NoRoom; ProtocolError where nothing is taken."""

    def release(self, extents: Extents) -> None:
        """Pages that need not be kept any more."""

    def fetch(self, asker: FrameStream, request: int, source: Endpoint, extents: Extents) -> None:
        """Bring pages from another server; FETCHED goes to `asker`. Raises ProtocolError."""

    def gone(self, asker: FrameStream) -> None:
        """This pager's connection has ended: nothing is to be written for it any more."""


class Connection:
    """One accepted connection: a stranger until the handshake is done."""

    def __init__(self, service: PageService, sock: socket.socket, peer: str) -> None:
        self._service = service
        self._waiting: deque[tuple[Kind, int, bytes]] = deque()  # a reader's requests
        self.peer = peer
        self.since = time.monotonic()
        self.handshake = ServerHandshake(
            service.identity, secrets.token_bytes(NONCE_BYTES), service.page_count
        )
        self.stream = FrameStream(service.loop, sock, self._frame, self._closed)

    @property
    def role(self) -> Role:
        """What it is, once it was accepted."""
        return self.handshake.role

    @property
    def due(self) -> bool:
        """Whether a request waits that may be answered now."""
        return bool(self._waiting) and self.stream.open and self.stream.idle

    def use_hot_path(self, fd: int, here: Mask) -> None:
        """Have page-ins answered without Python where that is possible."""
        if self._service.loop.hot is not None:
            self._service.loop.hot.server(
                self.stream.fd,
                fd,
                self.stream.buffer,
                self.stream.shared,
                here,
                self.role is Role.EXPRESS,
            )

    def refuse(self, why: PagingError) -> None:
        """Say REFUSED without the reason, log the reason, close."""
        self.stream.send([wire.frame(Kind.REFUSED, 0)])
        self.stream.close(why)

    def answer_next(self) -> None:
        """Answer the request that has waited longest."""
        kind, request, payload = self._waiting.popleft()
        self._answer(Frame(kind, request, memoryview(payload), 0))

    def _frame(self, frame: Frame) -> None:
        if not self.handshake.accepted:
            self._greet(frame)
        elif self.role is Role.READER:
            self._waiting.append((frame.kind, frame.request, bytes(frame.payload)))
        else:
            self._answer(frame)

    def _answer(self, frame: Frame) -> None:
        try:
            self._service.serve(self.role, self.stream, frame)
        except (CheckpointCorrupt, NoRoom, PagesLost, ProtocolError) as error:
            self.stream.send([wire.frame(Kind.ERROR, frame.request, wire.pack_error(error))])
            self.stream.end(PagingError(str(error)))

    def _greet(self, frame: Frame) -> None:
        try:
            answer = self.handshake.answer(frame)
            if self.handshake.accepted:
                self._service.admit(self)
        except Refused as why:
            self.refuse(why)
            return
        self.stream.send([answer])

    def _closed(self, why: PagingError | OSError) -> None:
        self._service.closed(self, why)


class PageService:
    """Listens, lets in who belongs to the VM, and serves a `Table` to them."""

    def __init__(
        self,
        loop: Loop,
        identity: Identity,
        page_count: int,
        at: Endpoint,
        table: Table,
        *,
        many_pagers: bool = False,
        store: tuple[int, Mask] | None = None,
    ) -> None:
        self.loop = loop
        self.identity = identity
        self.page_count = page_count
        self.pages_in = self.pages_out = self.pages_peeked = self.refused = 0
        self._table = table
        self._many_pagers = many_pagers
        self._store = store  # a file of pages and who is in it, which the hot path may serve from
        self._strangers: list[Connection] = []
        self._members: dict[Role, list[Connection]] = {role: [] for role in Role}
        self._ending: list[Connection] = []
        family = socket.AF_INET6 if ":" in at.address else socket.AF_INET
        self._listener = socket.create_server((at.address, at.port), family=family, backlog=64)
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        loop.add(self._listener.fileno(), self._accept)

    def turn(self, timeout_s: float) -> None:
        """One turn of the loop, then one request of every reader that takes its answers."""
        readers = self._members[Role.READER]
        self.loop.turn(0.0 if any(each.due for each in readers) else timeout_s)
        for reader in [each for each in readers if each.due]:
            reader.answer_next()
        now = time.monotonic()
        late = now - HANDSHAKE_TIMEOUT_S
        for stranger in [each for each in self._strangers if each.since < late]:
            stranger.refuse(Refused("it did not prove itself in time"))
        for each in self._ending:
            if each.since < now - ENDING_TIMEOUT_S:
                each.stream.drop()
        self._ending = [each for each in self._ending if each.stream.ending]

    def close(self) -> None:
        """Stop listening and end all connections."""
        self.loop.remove(self._listener.fileno())
        self._listener.close()
        for each in [*self._strangers, *(one for some in self._members.values() for one in some)]:
            each.stream.close(ConnectionAbortedError("the server ends"))
        for each in self._ending:
            each.stream.drop()

    @property
    def pages_served(self) -> int:
        """Pages that pagers asked for and were sent."""
        members = [*self._members[Role.PAGER], *self._members[Role.EXPRESS]]
        return self.pages_in + sum(each.stream.shared[wire.SERVED] for each in members)

    def connected(self, role: Role) -> int:
        """How many of `role` are connected."""
        return len(self._members[role])

    def admit(self, connection: Connection) -> None:
        """A stranger has proved itself. A lone pager takes the place of the one before it.

        Raises Refused when too many of its role are here.
        """
        members = self._members[connection.role]
        if len(members) >= MOST_OF_A_ROLE:
            raise Refused(f"{len(members)} of its role are connected already")
        if connection.role is Role.EXPRESS and not self._members[Role.PAGER]:
            raise Refused("its pager is not connected")
        self._strangers.remove(connection)
        if connection.role is Role.PAGER and not self._many_pagers:
            for previous in list(members):
                previous.stream.close(Refused("a newer connection of the pager took its place"))
        members.append(connection)
        if connection.role is not Role.READER and self._store is not None:
            connection.use_hot_path(*self._store)
        log.info("%s connected from %s", connection.role.name.lower(), connection.peer)

    def closed(self, connection: Connection, why: PagingError | OSError) -> None:
        """A connection is gone; a stranger's end is logged as a refusal."""
        if connection in self._strangers:
            self._strangers.remove(connection)
            self.refused += 1
            log.warning("refused %s: %s", connection.peer, why)
            return
        self._members[connection.role].remove(connection)
        self.pages_in += connection.stream.shared[wire.SERVED]
        if connection.stream.ending:
            connection.since = time.monotonic()
            self._ending.append(connection)
            for oldest in self._ending[:-MOST_OF_A_ROLE]:
                oldest.stream.drop()
        if connection.role is Role.PAGER:
            self._table.gone(connection.stream)
            self._end_express()
        role = connection.role.name.lower()
        log.info("%s at %s disconnected: %s", role, connection.peer, why)

    def _end_express(self) -> None:
        """Without its pager an express connection is of no use to anybody."""
        if not self._members[Role.PAGER]:
            for each in list(self._members[Role.EXPRESS]):
                each.stream.close(ConnectionAbortedError("its pager is gone"))

    def serve(self, role: Role, stream: FrameStream, frame: Frame) -> None:
        """Answer one request. Raises what becomes an ERROR frame."""
        match frame.kind:
            case _ if role is Role.EXPRESS and frame.kind is not Kind.PAGE_IN:
                raise ProtocolError(f"an express connection does not send {frame.kind.name}")
            case Kind.EXISTENCE:
                first, count = wire.unpack_range(frame.payload, self.page_count)
                bits = wire.pack_mask(self._table.existence(first, count))
                stream.send([wire.frame(Kind.EXISTENCE_MAP, frame.request, bits)])
            case Kind.PEEK:
                self._peek(stream, frame)
            case _ if role is Role.READER:
                raise ProtocolError(f"a reader does not send {frame.kind.name}")
            case Kind.PAGE_IN:
                self._page_in(stream, frame)
            case Kind.PAGE_OUT:
                extents, data = wire.unpack_pages(frame.payload, self.page_count)
                self._table.write(extents, data)
                self.pages_out += count_pages(extents)
                stream.send([wire.frame(Kind.STORED, frame.request)])
            case Kind.RELEASE:
                self._table.release(wire.unpack_release(frame.payload, self.page_count))
                stream.send([wire.frame(Kind.RELEASED, frame.request)])
            case Kind.FETCH:
                source, extents = wire.unpack_fetch(frame.payload, self.page_count)
                self._table.fetch(stream, frame.request, source, extents)
            case _:
                raise ProtocolError(f"a pager does not send {frame.kind.name}")

    def _asked(self, frame: Frame) -> tuple[Extents, int]:
        extents = wire.unpack_only_extents(frame.payload, self.page_count)
        pages = count_pages(extents)
        if pages > wire.MAX_PAGES:
            raise ProtocolError(f"{pages} pages asked for at once; {wire.MAX_PAGES} at most")
        return extents, pages

    def _page_in(self, stream: FrameStream, frame: Frame) -> None:
        extents, pages = self._asked(frame)
        self._send_pages(stream, frame.request, bytes(frame.payload), self._table.read(extents))
        self.pages_in += pages

    def _peek(self, stream: FrameStream, frame: Frame) -> None:
        here, pieces = self._table.peek(self._asked(frame)[0])
        self._send_pages(stream, frame.request, wire.pack_extents(here), pieces)
        self.pages_peeked += count_pages(here)

    @staticmethod
    def _send_pages(
        stream: FrameStream, request: int, packed_extents: bytes, pieces: Sequence[Part]
    ) -> None:
        parts = [packed_extents, *wire.pack_data(pieces)]
        stream.send([wire.header(Kind.PAGES, request, sum(map(len, parts))), *parts])

    def _accept(self, _: int) -> None:
        try:
            sock, peer = self._listener.accept()
        except OSError as error:  # the peer may be gone already
            log.info("accept: %s", error)
            return
        if len(self._strangers) >= MOST_STRANGERS:
            self._strangers[0].refuse(Refused("too many connections without a proof"))
        self._strangers.append(Connection(self, sock, f"{peer[0]}:{peer[1]}"))
