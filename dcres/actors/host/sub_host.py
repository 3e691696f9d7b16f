"""The actor of a sub host: keeps the memory server running, saves and loads this host's part.

Every method runs on the sub host. Calling one again after a failure is safe: `serve` starts
over, `abandon` and `destroy` may be repeated.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import cast

from dcres.actors.host.disks import has_its_disks, put_disks_back
from dcres.actors.host.host import (
    Daemon,
    Life,
    Meter,
    require_ram,
    require_store_room,
    state_of,
    write_state,
)
from dcres.actors.host.loading import PartServing, identity_of, load_pages
from dcres.actors.host.saving import SavingHost
from dcres.actors.host.vm_folder import VmFolder, end_leftovers
from dcres.actors.messages import Description, PagingCounters, Saved, ServeOrder
from dcres.actors.protocol import SubStatus
from dcres.config import HostSettings
from dcres.errors import NotFound
from dcres.model.formats import MemoryFormat
from dcres.model.pages import PAGE_SIZE
from dcres.paging import settings as paging_settings
from dcres.paging.settings import ServerSettings, SubAddress
from dcres.paging.status import ServerStatus
from dcres.storage.digest import FileSum
from dcres.storage.engine.memory_file import SavedMemory
from dcres.storage.format import tables
from dcres.storage.layout import PAGES
from dcres.storage.store.store import Store


class SubHost(SavingHost, PartServing):
    """One VM's part on one sub host."""

    def __init__(
        self,
        vm: str,
        address: str = "127.0.0.1",
        cluster: str = "",
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self._settings = HostSettings.from_environ(environ, address)
        self._folder = VmFolder.of(self._settings, vm, cluster)
        self._folder.resume()
        self._server = Daemon("dcres.paging.server", self._folder, "server")
        store = Store(self._settings.store)
        SavingHost.__init__(self, store, vm, self._settings.name, Meter())
        PartServing.__init__(self, self._settings, self._folder, store)
        self._life = Life()
        if state_of(self._folder) is not None:
            self._server.adopt()

    def describe(self) -> Description:
        """Who this host is and whether it serves."""
        state = state_of(self._folder) or {}
        return Description(
            host=self._settings.name,
            role="sub",
            present=bool(state),
            generation=state.get("generation", 0),
            reserved=state.get("reserved", 0),
        )

    @property
    def _store_file(self) -> Path:
        return self._folder.ram / "store.ram"

    def clear(self, take_over: bool = False) -> None:
        """Before `serve`: end and remove what an earlier life of the VM left. Repeatable.

        Raises Conflict, see `VmFolder.take`.
        """
        with self._life.beginning():
            self._folder.take(take_over=take_over)
            undo = has_its_disks(self._folder)
            self._server.stop()
            self._stop_slices()
            end_leftovers(self._folder)
            if undo:
                put_disks_back(self._folder)
            self._folder.remove()

    def serve(self, order: ServeOrder) -> SubAddress:
        """Load this host's part, if ordered, and start the memory server; where it listens.

        Raises NoRoom, CheckpointCorrupt, PagingError.
        """
        with self._life.beginning():
            return self._serve(order)

    def _serve(self, order: ServeOrder) -> SubAddress:
        require_ram(self._settings, order.capacity_pages * PAGE_SIZE)
        self._folder.make()
        if order.load is not None:
            identity = identity_of(order)
            self._server.prepare()
            load_pages(self._store, order.load, identity, self._store_file, self._meter)
        settings = ServerSettings(
            vm=order.incarnation.identity,
            generation=order.incarnation.generation,
            secret=order.incarnation.secret,
            page_count=order.page_count,
            capacity_pages=order.capacity_pages,
            address=self._settings.address,
            port=0,
            store=str(self._store_file),
            control=str(self._server.control),
        )
        path = self._folder.run / "server.json"
        paging_settings.save(settings, path)
        self._server.start()
        port = int(self._server.call("status")["port"])
        # A memory server that is started again must be found where the pager looks for it.
        paging_settings.save(ServerSettings(**{**asdict(settings), "port": port}), path)
        reserved = order.capacity_pages * PAGE_SIZE
        state = {"generation": order.incarnation.generation, "reserved": reserved}
        write_state(self._folder.state, state)
        return SubAddress(self._settings.name, settings.address, port, order.capacity_pages)

    def resize(self, capacity_pages: int) -> SubAddress:
        """Change how much this host may hold; what is there already stays. Where it listens."""
        path = self._folder.run / "server.json"
        settings = replace(
            paging_settings.load(ServerSettings, path), capacity_pages=capacity_pages
        )
        paging_settings.save(settings, path)
        self._server.call_patiently("resize", capacity_pages=capacity_pages)
        return SubAddress(self._settings.name, settings.address, settings.port, capacity_pages)

    def status(self) -> SubStatus:
        """Counters of the memory server. Raises NotFound when this host serves nothing."""
        self._require_serving()
        return SubStatus(
            host=self._settings.name,
            role="sub",
            generation=(state_of(self._folder) or {}).get("generation", 0),
            restarts=self._server.restarts,
            **self._server_status(),
        )

    def _server_status(self) -> ServerStatus:
        return cast(ServerStatus, self._server.call_patiently("status"))

    def prepare(self, checkpoint: str, memory_format: MemoryFormat) -> PagingCounters:
        """Sweep what is unfinished, make room for a checkpoint, track changes from now on.

        Raises StoreFull, Conflict.
        """
        with self._saving:  # so that what gives the checkpoint up comes before it all or after
            self._require_wanted(checkpoint)
            self._require_serving()
            held = int(self._server.call_patiently("status")["held_pages"])
            # The main host removes the rest, if that is in this store as well.
            self._store.sweep(self._vm, keep=frozenset({checkpoint}), whole_parts=False)
            require_store_room(self._settings.store, held * PAGE_SIZE)
            self._begin_saving(checkpoint, memory_format, self._store_file, self._server)
        return PagingCounters()

    def save(self, checkpoint: str, tick: int) -> Saved:
        """Make this host's part durable, with its page existence file: the vote.

        Raises StoreFull, Conflict when it was cancelled.
        """
        with self._current(checkpoint) as saver:
            folder = saver.folder

        def write_tables(saved: SavedMemory) -> list[FileSum]:
            return [tables.write_existence(folder / PAGES, saved.mask)]

        saved = self._settle(checkpoint, write_tables)
        self._kept.let_go(checkpoint)
        return saved

    def halt(self, checkpoint: str) -> None:
        """As on every host; also when an actor before this one began the saving. Repeatable."""
        super().halt(checkpoint)
        if state_of(self._folder) is not None:
            self._end_tracking(self._store_file, self._server)

    def destroy(self) -> None:
        """End the memory server and give its memory back. Repeatable; it is final."""
        with self._life.ending(self._hurry):
            with self._saving:
                self._end_saving()
            self._folder.remove_file(self._folder.state)
            self.end_serving_parts()
            self._server.stop()  # once more: a start under way may have prepared another
            end_leftovers(self._folder)
            self._folder.remove()
            self._folder.release()

    def _hurry(self) -> None:
        self._meter.cancel()
        self._server.stop()
        end_leftovers(self._folder)

    def _require_serving(self) -> None:
        if state_of(self._folder) is None:
            raise NotFound(f"host {self._settings.name} serves nothing for VM {self._vm}")
