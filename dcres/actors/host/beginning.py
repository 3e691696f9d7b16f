"""What a main host goes on from: page table, access history, VM core and the mover's orders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dcres.actors.host.page_loader import parse
from dcres.actors.messages import Resumption, unpack_array
from dcres.errors import CheckpointCorrupt
from dcres.model.history import Ticks
from dcres.model.moves import NO_MOVES, Moves, moves
from dcres.model.placement import Owners, free_codes, from_saved
from dcres.paging.settings import SubAddress
from dcres.storage.atomic import write_durably
from dcres.storage.digest import bytes_sum
from dcres.storage.format.manifest import Manifest
from dcres.storage.store.protocols import CheckpointStore


@dataclass(frozen=True, slots=True, eq=False)
class Beginning:
    """The state of paging when the guest goes on; `sources` have their owner codes."""

    owners: Owners
    ticks: Ticks
    moves: Moves
    sources: tuple[SubAddress, ...]


def beginning_of(resumption: Resumption, store: CheckpointStore, codes: Sequence[int]) -> Beginning:
    """From the checkpoint and the plan. `codes` are the sub hosts' owner codes.

    With part servers every page is theirs at first, and moves say where it is to go.
    Raises CheckpointCorrupt, NoRoom when there are too many part servers.
    """
    manifest = parse(resumption.manifest)
    placement, ticks = _saved_tables(resumption, manifest, store)
    wanted = from_saved(unpack_array(resumption.targets, np.uint8), codes)
    if not resumption.sources:
        return Beginning(wanted, ticks, NO_MOVES, ())
    servers = sorted(set(resumption.sources.values()), key=lambda each: each.host)
    coded = {
        server: replace(server, code=code)
        for server, code in zip(servers, free_codes(codes, len(servers)), strict=True)
    }
    by_part = {part: coded[server].code for part, server in resumption.sources.items()}
    owners = _owners_in_parts(placement, manifest, by_part)
    return Beginning(
        owners, ticks, moves(owners, wanted, ticks, manifest.tick), tuple(coded.values())
    )


def _saved_tables(
    resumption: Resumption, manifest: Manifest, store: CheckpointStore
) -> tuple[Owners, Ticks]:
    part = resumption.main_part
    if part is None:
        tables = store.read_main_tables(manifest)
        return tables.placement, tables.history
    return unpack_array(part.placement, np.uint8), unpack_array(part.history, np.uint32)


def _owners_in_parts(placement: Owners, manifest: Manifest, by_part: Mapping[str, int]) -> Owners:
    """Every saved page at the part server that has its part."""
    codes = np.zeros(256, dtype=np.uint8)  # NOWHERE is 0, and a part without pages has no server
    for index, part in enumerate(manifest.hosts):
        codes[index] = by_part.get(part.host, 0)
    return codes[placement]


def vmcore_of(resumption: Resumption, store: CheckpointStore, spool: Path) -> Path:
    """The VM core's file, checked; one that came in the order is written to `spool`.

    Raises CheckpointCorrupt.
    """
    manifest = parse(resumption.manifest)
    part = resumption.main_part
    if part is None:
        return store.vmcore(manifest)
    if bytes_sum(manifest.vmcore.name, part.vmcore) != manifest.vmcore:
        raise CheckpointCorrupt(f"the VM core of {manifest.checkpoint} was altered on its way")
    write_durably(spool, part.vmcore)
    return spool
