"""The memory server of a sub host: ``python -m dcres.paging.server SETTINGS``.

One process per VM and sub host, one thread, one event loop. It serves whoever proves to be
this generation of this VM's pager, one at a time: a new pager that proves itself takes the
place of the old one. Its pages outlive it in the store file.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from dcres.errors import DcresError, NoRoom, PagesLost, PagingError, ProtocolError, Refused
from dcres.model import wire
from dcres.model.pages import PAGE_SIZE, count_pages
from dcres.model.placement import digest
from dcres.model.wire import Frame, Kind
from dcres.paging import settings as settings_
from dcres.paging.changes import ChangeMap
from dcres.paging.control import ControlServer, Reply
from dcres.paging.loop import Loop
from dcres.paging.settings import ServerSettings
from dcres.paging.stream import FrameStream
from dcres.paging.subtable import SubTable

log = logging.getLogger("dcres.server")

HANDSHAKE_TIMEOUT_S = 5.0
MOST_STRANGERS = 16


class Connection:
    """One accepted connection: a stranger until the handshake is done."""

    def __init__(self, server: MemoryServer, sock: socket.socket, peer: str) -> None:
        self._server = server
        self.peer = peer
        self.since = time.monotonic()
        self.handshake = wire.ServerHandshake(
            server.settings.identity,
            secrets.token_bytes(wire.NONCE_BYTES),
            server.settings.page_count,
        )
        self.stream = FrameStream(server.loop, sock, self._frame, self._closed)

    def refuse(self, why: PagingError) -> None:
        """Say REFUSED without the reason, log the reason, close."""
        self.stream.send([wire.frame(Kind.REFUSED, 0)])
        self.stream.close(why)

    def _frame(self, frame: Frame) -> None:
        if not self.handshake.accepted:
            self._greet(frame)
            return
        try:
            self._server.serve(self.stream, frame)
        except (NoRoom, PagesLost, ProtocolError) as error:
            text = f"{type(error).__name__}: {error}".encode()
            self.stream.send([wire.frame(Kind.ERROR, frame.request, text)])
            self.stream.close(PagingError(str(error)))

    def _greet(self, frame: Frame) -> None:
        try:
            answer = self.handshake.answer(frame)
        except Refused as why:
            self.refuse(why)
            return
        self.stream.send([answer])
        if self.handshake.accepted:
            self._server.accepted(self)

    def _closed(self, why: PagingError | OSError) -> None:
        self._server.closed(self, why)


class MemoryServer:
    """The page sub-table, behind a TCP port and a control socket."""

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.loop = Loop()
        self.table = SubTable(Path(settings.store), settings.page_count, settings.capacity_pages)
        self.pages_in = self.pages_out = self.refused = 0
        self._pager: Connection | None = None
        self._strangers: list[Connection] = []
        self._stopping = False
        self._tracking = ""
        self._listener = socket.create_server((settings.address, settings.port), backlog=16)
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self.loop.add(self._listener.fileno(), self._accept)
        self._control = ControlServer(self.loop, Path(settings.control), self._order)

    def run(self) -> None:
        """Serve until told to stop."""
        while not self._stopping:
            self.loop.turn(1.0)
            self._drop_idle_strangers()
        self._control.close()

    def stop(self) -> None:
        """Leave `run` soon. The store file stays."""
        self._stopping = True

    def accepted(self, connection: Connection) -> None:
        """A pager has proved itself; the one before it, if any, is out."""
        self._strangers.remove(connection)
        previous, self._pager = self._pager, connection
        if previous is not None:
            previous.stream.close(Refused("a newer connection of the pager took its place"))
        log.info("pager connected from %s", connection.peer)

    def closed(self, connection: Connection, why: PagingError | OSError) -> None:
        """A connection is gone; a stranger's end is logged as a refusal."""
        if connection in self._strangers:
            self._strangers.remove(connection)
            self.refused += 1
            log.warning("refused %s: %s", connection.peer, why)
            return
        if connection is self._pager:
            self._pager = None
        log.info("pager at %s disconnected: %s", connection.peer, why)

    def serve(self, stream: FrameStream, frame: Frame) -> None:
        """Answer one request of the pager. Raises what becomes an ERROR frame."""
        match frame.kind:
            case Kind.PAGE_IN:
                self._page_in(stream, frame)
            case Kind.PAGE_OUT:
                extents, at = wire.unpack_pages(frame.payload, self.settings.page_count)
                self.table.write(extents, frame.payload[at:])
                self.pages_out += count_pages(extents)
                stream.send([wire.frame(Kind.STORED, frame.request)])
            case Kind.RELEASE:
                extents = wire.unpack_only_extents(frame.payload, self.settings.page_count)
                self.table.release(extents.tolist())
                stream.send([wire.frame(Kind.RELEASED, frame.request)])
            case Kind.EXISTENCE:
                first, count = wire.unpack_range(frame.payload, self.settings.page_count)
                bits = wire.pack_mask(self.table.existence(first, count))
                stream.send([wire.frame(Kind.EXISTENCE_MAP, frame.request, bits)])
            case _:
                raise ProtocolError(f"a pager does not send {frame.kind.name}")

    def _page_in(self, stream: FrameStream, frame: Frame) -> None:
        extents = wire.unpack_only_extents(frame.payload, self.settings.page_count)
        pages = count_pages(extents)
        if pages > wire.MAX_PAGES:
            raise ProtocolError(f"{pages} pages asked for at once; {wire.MAX_PAGES} at most")
        pieces = self.table.read(extents)
        packed = bytes(frame.payload)
        head = wire.header(Kind.PAGES, frame.request, len(packed) + pages * PAGE_SIZE)
        stream.send([head + packed, *pieces])
        self.pages_in += pages

    def _accept(self, _: int) -> None:
        try:
            sock, peer = self._listener.accept()
        except OSError as error:  # the peer may be gone already
            log.info("accept: %s", error)
            return
        if len(self._strangers) >= MOST_STRANGERS:
            self._strangers[0].refuse(Refused("too many connections without a proof"))
        self._strangers.append(Connection(self, sock, f"{peer[0]}:{peer[1]}"))

    def _drop_idle_strangers(self) -> None:
        deadline = time.monotonic() - HANDSHAKE_TIMEOUT_S
        for stranger in [s for s in self._strangers if s.since < deadline]:
            stranger.refuse(Refused("it did not prove itself in time"))

    def _order(self, do: str, arguments: dict[str, Any], reply: Reply) -> None:
        match do:
            case "status":
                reply({"ok": True, **self.status()})
            case "track":
                self.table.changes = ChangeMap(Path(arguments["changes"]), self.settings.page_count)
                self._tracking = arguments["changes"]
                reply({"ok": True})
            case "scan":
                reply({"ok": True, "written": self._scan(arguments["changes"])})
            case "untrack":
                self.table.changes = None
                self._tracking = ""
                reply({"ok": True})
            case "stop":
                self.stop()
                reply({"ok": True})
            case _:
                raise ProtocolError(f"a memory server cannot {do}")

    def _scan(self, changes: str) -> int:
        """How many pages are marked; a server that was started again has missed some."""
        if changes != self._tracking or self.table.changes is None:
            raise PagingError("the memory server was started again and does not track this")
        return self.table.changes.count()

    def status(self) -> dict[str, Any]:
        """Counters and the digest of the existence map, as JSON values."""
        return {
            "port": self.port,
            "pid": os.getpid(),
            "held_pages": self.table.held_pages,
            "capacity_pages": self.table.capacity_pages,
            "pages_in": self.pages_in,
            "pages_out": self.pages_out,
            "refused": self.refused,
            "connected": self._pager is not None,
            "digest": digest(self.table.existence(0, self.settings.page_count)),
        }


def main(arguments: list[str]) -> int:
    """Run the memory server whose settings file is named."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    path = Path(arguments[0])
    try:
        server = MemoryServer(settings_.load(ServerSettings, path))
    except (OSError, DcresError) as error:
        log.error("cannot start: %s", error)
        return 1
    signal.signal(signal.SIGTERM, lambda *_: server.stop())
    log.info("serving on port %d", server.port)
    server.run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
