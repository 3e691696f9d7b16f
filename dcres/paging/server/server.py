"""The memory server of a sub host: ``python -m dcres.paging.server SETTINGS``.

One process per VM and sub host, one thread, one event loop. It serves whoever proves to belong
to this generation of this VM: its pager, one at a time (a new pager that proves itself takes the
place of the old one), and readers. Its pages outlive it in the store file.
"""

from __future__ import annotations

import logging
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn, assert_never

from dcres.errors import DcresError, PagingError
from dcres.model.handshake import Role
from dcres.model.placement import digest
from dcres.model.wire import Endpoint
from dcres.paging import settings as settings_
from dcres.paging.alone import alone
from dcres.paging.changes import DirtyBitmap
from dcres.paging.orders import (
    SERVER_ORDERS,
    Done,
    Reply,
    ResizeServer,
    Scan,
    ServerOrder,
    Status,
    Track,
    Untrack,
    Written,
)
from dcres.paging.server.fetcher import FetchingTable
from dcres.paging.server.service import PageService
from dcres.paging.server.subtable import SubTable
from dcres.paging.settings import ServerSettings
from dcres.paging.status import ServerStatus
from dcres.paging.transport.control_server import ControlServer, typed
from dcres.paging.transport.loop import Loop

log = logging.getLogger("dcres.server")


class MemoryServer:
    """The page sub-table, behind a TCP port and a control socket."""

    def __init__(self, settings: ServerSettings) -> None:
        loop, identity, page_count = Loop(), settings.identity, settings.page_count
        self._pages = SubTable(Path(settings.store), page_count, settings.capacity_pages)
        self._table = FetchingTable(loop, identity, self._pages)
        at = Endpoint(settings.address, settings.port)
        self._service = PageService(
            loop, identity, page_count, at, self._table, store=self._pages.store
        )
        if loop.hot is not None:
            self._pages.attend = loop.hot.attend
        handler = typed("memory server", SERVER_ORDERS, self._order)
        self._control = ControlServer(loop, Path(settings.control), handler)
        self._tracking = ""

    @property
    def port(self) -> int:
        """Where it listens."""
        return self._service.port

    def run(self) -> NoReturn:
        """Serve until the process ends, at any moment: all that matters is in the store file."""
        while True:
            self._service.turn(1.0)
            self._table.end_stalled()

    def _order(self, order: ServerOrder, reply: Reply) -> None:
        match order:
            case Status():
                reply(self.status())
            case Track(changes):
                self._pages.changes = DirtyBitmap.shared(Path(changes), self._pages.page_count)
                self._tracking = changes
                reply(Done())
            case Scan(changes):
                reply(Written(self._scan(changes)))
            case Untrack():
                self._pages.changes = None
                self._tracking = ""
                reply(Done())
            case ResizeServer(capacity_pages):
                # Less than is held drops nothing; nothing more is taken then.
                self._pages.capacity_pages = capacity_pages
                reply(Done())
            case _:
                assert_never(order)

    def _scan(self, changes: str) -> int:
        """How many pages are marked; a server that was started again has missed some."""
        if changes != self._tracking or self._pages.changes is None:
            raise PagingError("the memory server was started again and does not track this")
        return self._pages.changes.count()

    def status(self) -> ServerStatus:
        """Counters and the digest of the existence map."""
        return ServerStatus(
            port=self.port,
            pid=os.getpid(),
            tracking=bool(self._tracking),
            held_pages=self._pages.held_pages,
            capacity_pages=self._pages.capacity_pages,
            pages_in=self._service.pages_served,
            pages_out=self._service.pages_out,
            pages_peeked=self._service.pages_peeked,
            pages_fetched=self._table.pages_fetched,
            refused=self._service.refused,
            connected=self._service.connected(Role.PAGER) > 0,
            readers=self._service.connected(Role.READER),
            digest=digest(self._pages.existence(0, self._pages.page_count)),
        )


def main(arguments: list[str]) -> NoReturn:
    """Run the memory server whose settings file is named."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    with ExitStack() as stack:
        try:
            settings = settings_.load(ServerSettings, Path(arguments[0]))
            stack.enter_context(alone(Path(settings.store), "a memory server of this VM"))
            server = MemoryServer(settings)
        except (OSError, DcresError) as error:
            log.error("cannot start: %s", error)
            sys.exit(1)
        log.info("serving on port %d", server.port)
        server.run()
