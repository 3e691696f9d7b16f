"""The part server: ``python -m dcres.actors.host.part_server SETTINGS``.

A process on a host that sees parts of a checkpoint. It serves their pages straight from the
memory files, each verified before it is sent, over the paging protocol: to the pager of a VM
that is restored lazily, to memory servers that fetch, and to hosts that pull. It changes
nothing, and while it runs the checkpoint cannot be deleted.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from dcres.errors import CheckpointCorrupt, ConfigError, DcresError, PagesLost, ProtocolError
from dcres.model.handshake import Identity, Role
from dcres.model.pages import Extents, Mask, extents_within
from dcres.model.wire import Endpoint
from dcres.paging import settings as settings_
from dcres.paging.orders import Reply, Status
from dcres.paging.server.service import PageService
from dcres.paging.status import PartServerStatus
from dcres.paging.transport.control_server import ControlServer, typed
from dcres.paging.transport.loop import Loop
from dcres.paging.transport.stream import FrameStream
from dcres.storage.damage import corrupt
from dcres.storage.engine.page_reader import PageReader
from dcres.storage.format.memory_part import MemoryPart
from dcres.storage.store.pins import pinned

log = logging.getLogger("dcres.parts")

_NOT_HERE = 0xFF


@dataclass(frozen=True, slots=True)
class PartServerSettings:
    """A part server's settings. Port 0 lets the kernel choose at the first start.

    `parts`, one or more, are all of one checkpoint. No manifest is read here: that would take a
    third of this process's start.
    """

    vm: str
    generation: int
    secret: str
    address: str
    port: int
    control: str
    parts: tuple[MemoryPart, ...]

    @property
    def page_count(self) -> int:
        """Pages of the VM's memory."""
        return self.parts[0].page_count

    @property
    def checkpoint(self) -> str:
        """Its id."""
        return self.parts[0].folder.parent.name

    @property
    def identity(self) -> Identity:
        """What a client must prove to be: one that belongs to the VM which is restored."""
        return Identity(bytes.fromhex(self.vm), self.generation, bytes.fromhex(self.secret))


class PartTable:
    """The pages of some parts of a checkpoint, as a table that never changes."""

    def __init__(self, readers: Sequence[PageReader], page_count: int) -> None:
        self.trouble = ""  # what was found to be wrong with the files
        self._readers = readers
        # For every page the reader that has it.
        self._where: npt.NDArray[np.uint8] = np.full(page_count, _NOT_HERE, dtype=np.uint8)
        for index, reader in enumerate(readers):
            twice = np.flatnonzero(reader.mask & (self._where != _NOT_HERE))
            if twice.size:
                raise corrupt(reader.path, f"page {twice[0]} is in another memory file as well")
            self._where[reader.mask] = index
        self._here: Mask = self._where != _NOT_HERE

    def existence(self, first: int, count: int) -> Mask:
        """See `Table`."""
        return self._here[first : first + count]

    def read(self, extents: Extents) -> list[memoryview]:
        """See `Table`."""
        for first, stop in extents.tolist():
            if not self._here[first:stop].all():
                raise PagesLost(f"pages {first} to {stop - 1} are not all in the parts served here")
        return self._pieces(extents)

    def peek(self, extents: Extents) -> tuple[Extents, list[memoryview]]:
        """See `Table`."""
        here = extents_within(extents, self._here)
        return here, self._pieces(here)

    def write(self, extents: Extents, data: memoryview) -> None:
        """Refused."""
        raise ProtocolError("a part server takes no pages")

    def release(self, extents: Extents) -> None:
        """Nothing: the checkpoint stays as it is."""

    def fetch(self, asker: FrameStream, request: int, source: Endpoint, extents: Extents) -> None:
        """Refused."""
        raise ProtocolError("a part server fetches no pages")

    def gone(self, asker: FrameStream) -> None:
        """Nothing."""

    def _pieces(self, extents: Extents) -> list[memoryview]:
        try:
            return [piece for run in extents.tolist() for piece in self._run(*run)]
        except CheckpointCorrupt as error:
            self.trouble = str(error)
            log.error("%s", error)
            raise

    def _run(self, first: int, stop: int) -> list[memoryview]:
        """Neighbours in memory may lie in the files of several parts."""
        where = self._where[first:stop]
        cuts = [0, *(np.flatnonzero(np.diff(where)) + 1).tolist(), stop - first]
        return [
            self._readers[where[start]].read(first + start, first + end)
            for start, end in pairwise(cuts)
        ]


class PartServer:
    """Parts of a checkpoint, behind a TCP port and a control socket."""

    def __init__(self, settings: PartServerSettings, held: ExitStack) -> None:
        loop = Loop()
        self._table = _open_table(settings, held)
        at = Endpoint(settings.address, settings.port)
        self._service = PageService(
            loop, settings.identity, settings.page_count, at, self._table, many_pagers=True
        )
        self._control = ControlServer(
            loop, Path(settings.control), typed("part server", {"status": Status}, self._order)
        )

    @property
    def port(self) -> int:
        """Where it listens."""
        return self._service.port

    def run(self) -> NoReturn:
        """Serve until the process ends; its pin ends with it."""
        while True:
            self._service.turn(1.0)

    def _order(self, order: Status, reply: Reply) -> None:
        reply(self.status())

    def status(self) -> PartServerStatus:
        """Counters, and what is wrong with the files."""
        return PartServerStatus(
            port=self.port,
            pid=os.getpid(),
            pages_served=self._service.pages_in + self._service.pages_peeked,
            refused=self._service.refused,
            pagers=self._service.connected(Role.PAGER),
            readers=self._service.connected(Role.READER),
            trouble=self._table.trouble,
        )


def _open_table(settings: PartServerSettings, held: ExitStack) -> PartTable:
    """Pin the checkpoint and open its parts; `held` lets go of them."""
    if len(settings.parts) >= _NOT_HERE:
        raise ConfigError(f"{len(settings.parts)} parts are too many for one process")
    held.enter_context(pinned(settings.parts[0].folder.parent))
    readers = [held.enter_context(PageReader(part.read())) for part in settings.parts]
    return PartTable(readers, settings.page_count)


def main(arguments: list[str]) -> NoReturn:
    """Run the part server whose settings file is named."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    with ExitStack() as held:
        try:
            server = PartServer(settings_.load(PartServerSettings, Path(arguments[0])), held)
        except (OSError, DcresError) as error:
            log.error("cannot start: %s", error)
            sys.exit(1)
        log.info("serving on port %d", server.port)
        server.run()


if __name__ == "__main__":
    main(sys.argv[1:])
