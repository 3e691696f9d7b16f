"""Loading and serving parts of a checkpoint: what every host of a restore does with them.

A host that has parts in its own store reads its pages from there. The others come from a
*slice server*, a process on a host that has them. With a lazy restore nothing is loaded before
the guest runs: the pager takes every page from slice servers. From the first question about it to
the end each host has the checkpoint pinned, so that it is not deleted under the restore.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from dcres.actors.host.host import Daemon, Meter
from dcres.actors.host.slice_server import SliceSettings
from dcres.actors.host.vm_folder import VmFolder, end_leftovers
from dcres.actors.messages import (
    Description,
    LoadOrder,
    MainPart,
    PartsOrder,
    Planned,
    PlanOrder,
    Reading,
    RunOrder,
    ServeOrder,
    pack_array,
    pack_mask,
    unpack_mask,
)
from dcres.config import HostSettings
from dcres.errors import Conflict, DcresError
from dcres.linux import priority
from dcres.linux.files import open_own, punch_hole
from dcres.model import plan as plan_
from dcres.model.handshake import Identity
from dcres.model.pages import PAGE_SIZE, Mask, extents_of_mask
from dcres.paging import settings as paging_settings
from dcres.paging.settings import SubAddress
from dcres.paging.transport import puller
from dcres.storage.engine import memory_file
from dcres.storage.engine.bulk import write_fully
from dcres.storage.format.manifest import Manifest, loads
from dcres.storage.store.pins import Hold
from dcres.storage.store.store import Store

log = logging.getLogger("dcres.host")

_PIN_AGAIN_S = 0.05

NAME = Path("manifest.json")  # for errors: the text came in a message


def name_of_parts(vm: str) -> str:
    """What `vm` is called where only parts of it are; no VM has such a name."""
    return f"{vm}.parts"


def parse(manifest: str) -> Manifest:
    """The manifest that came in an order. Raises CheckpointCorrupt."""
    return loads(manifest, NAME)


def identity_of(order: RunOrder | ServeOrder) -> Identity:
    """What a host proves to slice servers to be."""
    life = order.incarnation
    return Identity(bytes.fromhex(life.identity), life.generation, bytes.fromhex(life.secret))


def load_pages(
    store: Store,
    order: LoadOrder,
    identity: Identity,
    target: Path,
    meter: Meter,
    require_use: Callable[[], None] = lambda: None,
) -> None:
    """Load the pages of `order` into the sparse file `target`, and nothing else.

    The file is created, or emptied first. Every page was verified, here or by the slice server
    that sent it. `require_use` is called as pages come, and raises when nobody needs them any
    more. Raises CheckpointCorrupt, NoRoom, PagingError.
    """
    manifest = parse(order.manifest)
    fd = open_own(target, os.O_RDWR | os.O_CREAT)
    try:
        os.ftruncate(fd, manifest.memory_bytes)
        punch_hole(fd, 0, manifest.memory_bytes)
        wanted = [unpack_mask(each.pages, manifest.page_count) for each in order.readings]
        with meter.measuring("load", sum(int(mask.sum()) for mask in wanted)):

            def done(pages: int) -> None:
                require_use()
                meter.done(pages)

            _load_all(store, manifest, order.readings, wanted, identity, fd, done)
    finally:
        os.close(fd)


def _load_all(
    store: Store,
    manifest: Manifest,
    readings: tuple[Reading, ...],
    wanted: list[Mask],
    identity: Identity,
    fd: int,
    done: Callable[[int], None],
) -> None:
    """From all places at the same time; the disk is one place."""
    pairs = list(zip(readings, wanted, strict=True))

    def from_store() -> None:
        for reading, mask in pairs:
            if reading.source is None:
                part = store.read_part(manifest, reading.part)
                memory_file.load(part.memory, fd, done, wanted=mask)

    def from_afar(source: SubAddress, mask: Mask) -> None:
        def write(first: int, stop: int, data: memoryview) -> None:
            write_fully(fd, data, first * PAGE_SIZE)

        extents = extents_of_mask(mask)
        puller.pull(source, identity, manifest.page_count, extents, write, done)

    afar = [(each.source, mask) for each, mask in pairs if each.source is not None]
    with ThreadPoolExecutor(1 + len(afar)) as pool:
        under_way = [pool.submit(from_store)]
        under_way += [pool.submit(from_afar, source, mask) for source, mask in afar]
        for each in under_way:
            each.result()


def make_plan(store: Store, order: PlanOrder) -> Planned:
    """Where every page goes; see `model.plan`. Raises NoRoom, CheckpointCorrupt."""
    manifest = parse(order.manifest)
    placement, history = store.read_placement(manifest), store.read_history(manifest)
    plan = plan_.plan(placement, history, order.capacities, np.array(order.holds))
    masks = {
        (part, target): pack_mask((placement == part) & (plan.owners == target))
        for part, target in (np.argwhere(plan.flow).tolist() if order.masks else ())
    }
    flow = tuple(tuple(map(int, row)) for row in plan.flow)
    return Planned(flow, masks, pack_array(plan.owners))


def read_main_part(store: Store, manifest_text: str) -> MainPart:
    """What another main host needs of the main host's part here. Raises CheckpointCorrupt."""
    manifest = parse(manifest_text)
    return MainPart(
        pack_array(store.read_placement(manifest)),
        pack_array(store.read_history(manifest)),
        store.vmcore(manifest).read_bytes(),
    )


class PartServing:
    """The part of a host's actor that reads the store for others; see the module.

    It is also an actor by itself, on a host that has parts and no memory of the VM.
    """

    def __init__(self, settings: HostSettings, folder: VmFolder, store: Store) -> None:
        priority.take_normal()
        self._settings = settings
        self._folder = folder
        self._store = store
        self._slices = Daemon("dcres.actors.host.slice_server", folder, "slices")
        self._starting_slices = threading.Lock()
        self._slices_over = False
        self._hold = Hold()
        if self._serves_parts:
            self._slices.adopt()
            # The store may hang, and this actor has more to adopt.
            threading.Thread(target=self._pin_again, name="pin", daemon=True).start()

    @property
    def _slices_path(self) -> Path:
        return self._folder.run / "slices.json"

    @property
    def _serves_parts(self) -> bool:
        return self._folder.is_ours and self._slices_path.exists()

    def require_free(self, take_over: bool) -> None:
        """Conflict where `clear` would refuse. Changes nothing."""
        if why := self._folder.trouble(take_over=take_over):
            raise Conflict(why)

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
            checkpoint = paging_settings.load(SliceSettings, self._slices_path).checkpoint
            while not self._slices_over:
                # Who only looks whether it may be deleted is in the way for a moment.
                with suppress(Conflict):
                    self._pin(checkpoint)
                    return
                time.sleep(_PIN_AGAIN_S)
        except (DcresError, OSError, ValueError) as error:
            log.warning("what the slice server here serves may be deleted: %s", error)

    def plan(self, order: PlanOrder) -> Planned:
        """See `make_plan`."""
        self._pin(parse(order.manifest).checkpoint)
        return make_plan(self._store, order)

    def read_main_part(self, manifest: str) -> MainPart:
        """See `read_main_part` of the module."""
        self._pin(parse(manifest).checkpoint)
        return read_main_part(self._store, manifest)

    def serve_parts(self, order: PartsOrder) -> SubAddress:
        """Start a slice server; where it listens.

        Raises PagingError, CheckpointCorrupt, Conflict when the end has come meanwhile.
        """
        with self._starting_slices:
            if self._slices_over:
                raise Conflict("this VM was ended before its parts were served")
            return self._serve_parts(order)

    def _serve_parts(self, order: PartsOrder) -> SubAddress:
        incarnation, manifest = order.incarnation, parse(order.manifest)
        self._pin(manifest.checkpoint)
        self._folder.make()
        settings = SliceSettings(
            vm=incarnation.identity,
            generation=incarnation.generation,
            secret=incarnation.secret,
            address=self._settings.address,
            port=0,
            control=str(self._slices.control),
            parts=tuple(self._store.memory_part(manifest, host) for host in order.parts),
        )
        paging_settings.save(settings, self._slices_path)
        self._slices.start()
        port = int(self._slices.call("status")["port"])
        # One that is started again must be found where the others look for it.
        paging_settings.save(replace(settings, port=port), self._slices_path)
        return SubAddress(self._settings.name, settings.address, port)

    def parts_trouble(self) -> str:
        """What the slice server here found to be wrong with its files; empty if nothing."""
        if not self._serves_parts:
            return ""
        return str(self._slices.call_patiently("status")["trouble"])

    def end_serving_parts(self) -> None:
        """End the slice server, for good; one that is being started, too. Repeatable.

        The checkpoint is not pinned here any more.
        """
        self._slices_over = True
        self._slices.stop()
        with self._starting_slices:
            self._stop_slices()
        self._hold.release()

    def _stop_slices(self) -> None:
        self._slices.stop()
        self._hold.drop()
        self._folder.remove_file(self._slices_path)


class SliceHost(PartServing):
    """The actor of a host that is none of the VM's and has parts of its checkpoint."""

    def __init__(
        self,
        vm: str,
        address: str = "127.0.0.1",
        cluster: str = "",
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        settings = HostSettings.from_environ(environ, address)
        folder = VmFolder.of(settings, name_of_parts(vm), cluster)
        folder.resume()
        super().__init__(settings, folder, Store(settings.store))

    def describe(self) -> Description:
        """Who this host is."""
        return Description(self._settings.name, "parts", present=self._serves_parts)

    def destroy(self) -> None:
        """End the slice server and leave nothing. Repeatable."""
        self.end_serving_parts()
        end_leftovers(self._folder)
        self._folder.remove()
        self._folder.release()
