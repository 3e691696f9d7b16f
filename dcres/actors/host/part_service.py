"""Parts of a checkpoint in a host's own store, read and served for the other hosts of a restore.

From the first question about a checkpoint to the end of the restore each host that has some has it
pinned, so that it is not deleted meanwhile.
"""

from __future__ import annotations

import logging
import threading
import time
from contextlib import suppress
from dataclasses import replace

from dcres.actors.host import page_loader
from dcres.actors.host.daemon import Daemon
from dcres.actors.host.page_loader import parse
from dcres.actors.host.part_server import PartServerSettings
from dcres.actors.host.site import Site
from dcres.actors.messages import MainPart, PartsOrder, Planned, PlanOrder
from dcres.errors import Conflict, DcresError
from dcres.paging import settings as paging_settings
from dcres.paging.control import PartServerControl
from dcres.paging.settings import SubAddress
from dcres.storage.store.pins import Hold

log = logging.getLogger("dcres.host")

_PIN_AGAIN_S = 0.05


class PartService:
    """See `dcres.actors.protocol.Parts`."""

    def __init__(self, site: Site) -> None:
        self._settings = site.settings
        self._folder = site.folder
        self._store = site.store
        self._server = Daemon("dcres.actors.host.part_server", site.folder, "parts")
        self._control = PartServerControl(self._server.call)
        self._patient = PartServerControl(self._server.call_patiently)
        self._settings_path = site.folder.run / "parts.json"
        self._starting = threading.Lock()
        self._over = False
        self._hold = Hold()

    def adopt(self) -> None:
        """Go on with what an actor before this one began."""
        if self.is_serving:
            self._server.adopt()
            # The store may hang, and this actor has more to adopt.
            threading.Thread(target=self._pin_again, name="pin", daemon=True).start()

    @property
    def is_serving(self) -> bool:
        """Whether a part server is to run here."""
        return self._folder.is_ours and self._settings_path.exists()

    def parts_here(self, manifest: str) -> tuple[str, ...]:
        """The hosts whose parts of a checkpoint this host's store has; it is pinned from now on.

        Raises Conflict while it is being deleted, and when the end has come meanwhile.
        """
        wanted = parse(manifest)
        found = self._store.parts_here(wanted)
        if found:
            self._pin(wanted.checkpoint)
        return found

    def _pin(self, checkpoint: str) -> None:
        self._hold.take(checkpoint, self._store.pin(checkpoint))

    def _pin_again(self) -> None:
        """What an actor before this one had pinned, unless a deletion was faster."""
        try:
            checkpoint = paging_settings.load(PartServerSettings, self._settings_path).checkpoint
            while not self._over:
                # What only looks whether it may be deleted is in the way for a moment.
                with suppress(Conflict):
                    self._pin(checkpoint)
                    return
                time.sleep(_PIN_AGAIN_S)
        except (DcresError, OSError, ValueError) as error:
            log.warning("what the part server here serves may be deleted: %s", error)

    def plan(self, order: PlanOrder) -> Planned:
        """See `page_loader.make_plan`."""
        self._pin(parse(order.manifest).checkpoint)
        return page_loader.make_plan(self._store, order)

    def read_main_part(self, manifest: str) -> MainPart:
        """See `page_loader.read_main_part`."""
        self._pin(parse(manifest).checkpoint)
        return page_loader.read_main_part(self._store, manifest)

    def serve_parts(self, order: PartsOrder) -> SubAddress:
        """Start a part server; where it listens.

        Raises PagingError, CheckpointCorrupt, Conflict when the end has come meanwhile.
        """
        with self._starting:
            if self._over:
                raise Conflict("this VM was ended before its parts were served")
            return self._serve_parts(order)

    def _serve_parts(self, order: PartsOrder) -> SubAddress:
        incarnation, manifest = order.incarnation, parse(order.manifest)
        self._pin(manifest.checkpoint)
        self._folder.make()
        settings = PartServerSettings(
            vm=incarnation.identity,
            generation=incarnation.generation,
            secret=incarnation.secret,
            address=self._settings.address,
            port=0,
            control=str(self._server.control),
            parts=tuple(self._store.memory_part(manifest, host) for host in order.parts),
        )
        paging_settings.save(settings, self._settings_path)
        self._server.start()
        port = self._control.status()["port"]
        # One that is started again must be found where the others look for it.
        paging_settings.save(replace(settings, port=port), self._settings_path)
        return SubAddress(self._settings.name, settings.address, port)

    def parts_trouble(self) -> str:
        """What the part server here found to be wrong with its files; empty if nothing."""
        if not self.is_serving:
            return ""
        return self._patient.status()["trouble"]

    def end_serving_parts(self) -> None:
        """End the part server, for good; one that is being started, too. Repeatable.

        The checkpoint is not pinned here any more.
        """
        self._over = True
        self._server.stop()
        with self._starting:
            self.stop()
        self._hold.release()

    def stop(self) -> None:
        """Serve and pin nothing until the next order. Repeatable."""
        self._server.stop()
        self._hold.drop()
        self._folder.remove_file(self._settings_path)
