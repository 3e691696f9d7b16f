"""Loading what a restore needs of a checkpoint: pages, their plan, the main host's part.

A host that has parts in its own store reads its pages from there. The others come from a *part
server*, a process on a host that has them. With a lazy restore nothing is loaded before the guest
runs: the pager takes every page from part servers.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from dcres.actors.host.meter import Meter
from dcres.actors.messages import (
    LoadOrder,
    MainPart,
    Planned,
    PlanOrder,
    Reading,
    RunOrder,
    ServeOrder,
    pack_array,
    pack_mask,
    unpack_mask,
)
from dcres.linux.files import open_own, punch_hole
from dcres.model import plan as plan_
from dcres.model.handshake import Identity
from dcres.model.pages import PAGE_SIZE, Mask, extents_of_mask
from dcres.paging.settings import SubAddress
from dcres.paging.transport import puller
from dcres.storage.engine import memory_file
from dcres.storage.engine.bulk import write_fully
from dcres.storage.format.manifest import Manifest, loads
from dcres.storage.store.store import Store

NAME = Path("manifest.json")  # for errors: the text came in a message


def parse(manifest: str) -> Manifest:
    """The manifest that came in an order. Raises CheckpointCorrupt."""
    return loads(manifest, NAME)


def identity_of(order: RunOrder | ServeOrder) -> Identity:
    """What a host proves to part servers to be."""
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

    The file is created, or emptied first. Every page was verified, here or by the part server
    that sent it. `require_use` is called as pages come, and raises when nothing needs them any
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
    tables = store.read_main_tables(manifest)
    placement, history = tables.placement, tables.history
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
    tables = store.read_main_tables(manifest)
    return MainPart(
        pack_array(tables.placement),
        pack_array(tables.history),
        store.vmcore(manifest).read_bytes(),
    )
