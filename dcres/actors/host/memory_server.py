"""The memory server of a sub host: started, resized, asked."""

from __future__ import annotations

import threading
from dataclasses import replace

from dcres.actors.host.daemon import Daemon
from dcres.actors.host.page_loader import identity_of, load_pages
from dcres.actors.host.room import require_ram
from dcres.actors.host.site import Site
from dcres.actors.host.state import VmState
from dcres.actors.messages import ChangeId, Role, ServeOrder
from dcres.actors.protocol import SubStatus
from dcres.errors import NotFound
from dcres.model.pages import PAGE_SIZE
from dcres.paging import settings as paging_settings
from dcres.paging.control import ServerControl
from dcres.paging.settings import ServerSettings, SubAddress
from dcres.paging.status import ServerStatus


class MemoryServer:
    """See `dcres.actors.protocol.Serving`. `serve` begins anew after a failure.

    `control` gives orders to the process, `patient` those that may be repeated, through a restart
    if need be.
    """

    def __init__(self, site: Site) -> None:
        self._site = site
        self.daemon = Daemon("dcres.paging.server", site.folder, "server")
        self.control = ServerControl(self.daemon.call)
        self.patient = ServerControl(self.daemon.call_patiently)
        self._settings_path = site.folder.run / "server.json"
        self._resizing = threading.Lock()

    def serve(self, order: ServeOrder) -> SubAddress:
        """Load this host's part, if ordered, and start the memory server; where it listens.

        Raises NoRoom, CheckpointCorrupt, PagingError.
        """
        with self._site.life.beginning():
            return self._serve(order)

    def _serve(self, order: ServeOrder) -> SubAddress:
        site, reserved = self._site, order.capacity_pages * PAGE_SIZE
        require_ram(site.settings, reserved)
        site.folder.make()
        if order.load is not None:
            self.daemon.prepare()
            load_pages(site.store, order.load, identity_of(order), site.store_file, site.meter)
        settings = ServerSettings(
            vm=order.incarnation.identity,
            generation=order.incarnation.generation,
            secret=order.incarnation.secret,
            page_count=order.page_count,
            capacity_pages=order.capacity_pages,
            address=site.settings.address,
            port=0,
            store=str(site.store_file),
            control=str(self.daemon.control),
        )
        paging_settings.save(settings, self._settings_path)
        self.daemon.start()
        # A memory server that is started again must be found where the pager looks for it.
        settings = replace(settings, port=self.control.status()["port"])
        paging_settings.save(settings, self._settings_path)
        generation = order.incarnation.generation
        site.state.begin(VmState(generation=generation, reserved=reserved))
        return self._address(settings)

    def resize(self, change: ChangeId, capacity_pages: int) -> SubAddress:
        """Change how much this host may hold; what is there already stays. Where it listens.

        Raises Conflict for a change of shares that has been overtaken.
        """
        with self._resizing:
            self._site.state.obey(change)
            settings = paging_settings.load(ServerSettings, self._settings_path)
            settings = replace(settings, capacity_pages=capacity_pages)
            paging_settings.save(settings, self._settings_path)
            self.patient.resize(capacity_pages)
            return self._address(settings)

    def _address(self, settings: ServerSettings) -> SubAddress:
        return SubAddress(self._site.host, settings.address, settings.port, settings.capacity_pages)

    def counters(self) -> ServerStatus:
        """What the process tells of itself. Raises NotFound when this host serves nothing."""
        if self._site.state.now is None:
            raise NotFound(f"host {self._site.host} does not serve VM {self._site.vm}")
        return self.patient.status()

    def status(self) -> SubStatus:
        """The counters, and whose they are. Raises NotFound when this host serves nothing."""
        counters, state = self.counters(), self._site.state.now
        return SubStatus(
            host=self._site.host,
            role=Role.SUB,
            generation=0 if state is None else state.generation,
            restarts=self.daemon.restarts,
            **counters,
        )
