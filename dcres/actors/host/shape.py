"""Re-placement of a running VM's pages: how much each host is to hold, from its page table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dcres.model.history import Ticks, coldest, hottest
from dcres.model.moves import Moves, moves
from dcres.model.pages import Pages
from dcres.model.placement import LEAVING, MAIN, SAVED_NOWHERE, Owners, pages_by_host
from dcres.model.plan import CHUNK_PAGES, plan
from dcres.model.transport import Counts
from dcres.paging.pager.homes import REGION_PAGES, homes_of
from dcres.paging.pager.share import STEP_PAGES, headroom_pages

_MOST_BATCHES = 1024
_CODES = 256


@dataclass(frozen=True, slots=True)
class Shape:
    """How many pages each is to keep: all sub hosts by owner code, and the main host.

    `replaced` says whether shares of sub hosts change, so that the mover is to see to them.
    """

    capacities: Mapping[int, int]
    limit_pages: int
    replaced: bool = True


def moves_into(
    owners: Owners,
    ticks: Ticks,
    now: int,
    capacities: Mapping[int, int],
    limit_pages: int,
) -> Moves:
    """The moves to what is `_wanted`, hottest first. Raises NoRoom when the pages do not fit."""
    return moves(owners, _wanted(owners, ticks, capacities, limit_pages), ticks, now)


def _wanted(
    owners: Owners, ticks: Ticks, capacities: Mapping[int, int], limit_pages: int
) -> Owners:
    """Where every page belongs, by the fewest moves, so that no sub host has more than it may.

    `capacities` are pages per owner code, of all sub hosts. The main host takes pages as far as
    it has room below `limit_pages`; what it holds already is left to the pager. Raises NoRoom
    when the pages do not fit.
    """
    codes = list(capacities)
    index_of = np.full(_CODES, SAVED_NOWHERE, dtype=np.uint8)
    index_of[codes] = np.arange(len(codes))
    here = int(np.count_nonzero((owners == MAIN) | (owners == LEAVING)))
    room = max(0, kept_pages(limit_pages) - here)
    targets = [*codes, MAIN]
    planned = plan(
        index_of[owners],
        ticks,
        [*capacities.values(), room],
        np.eye(len(codes), len(targets), dtype=np.bool_),
        hot_first=False,
    )
    code_of = np.zeros(_CODES, dtype=np.uint8)
    code_of[: len(targets)] = targets
    return np.where(planned.owners == SAVED_NOWHERE, owners, code_of[planned.owners])


def kept_pages(limit_pages: int) -> int:
    """What a main host with this limit is kept at."""
    return limit_pages - headroom_pages(limit_pages)


def foresee(
    owners: Owners, ticks: Ticks, limit_pages: int, shape: Shape
) -> dict[tuple[int, int], int]:
    """How many pages would go from whom to whom (owner codes), from a limit to a new shape.

    As the pager would do it by itself, with a guest that is paused: a main host that may
    keep more is filled, then sub hosts come into shape, and only then a main host that may keep
    less sends out what was touched longest ago. Raises NoRoom as `moves_into` does.
    """
    after = np.where(owners == LEAVING, MAIN, owners).astype(np.uint8)
    before = after.copy()
    if shape.limit_pages > limit_pages:
        _fill(after, ticks, shape)
    if shape.replaced:
        most = max(limit_pages, shape.limit_pages)
        after = _wanted(after, ticks, shape.capacities, most).astype(np.uint8)
    if shape.limit_pages < limit_pages:
        _page_out(after, ticks, shape)
    return _flow(before, after)


def _fill(after: Owners, ticks: Ticks, shape: Shape) -> None:
    """As `FaultHandler.fill`: from one sub host after the other."""
    room = kept_pages(shape.limit_pages) - int(np.count_nonzero(after == MAIN))
    for code in shape.capacities:
        pages = hottest(ticks, after == code, room)
        after[pages] = MAIN
        room -= pages.size


def _page_out(after: Owners, ticks: Ticks, shape: Shape) -> None:
    """As `Evictor`: to each region's home, or the roomiest sub host when that is full."""
    codes = np.array(list(shape.capacities), dtype=np.uint8)
    if not codes.size:
        return
    here = after == MAIN
    excess = int(np.count_nonzero(here)) - kept_pages(shape.limit_pages)
    pages = coldest(ticks, here, excess)
    _, *held = pages_by_host(after, list(shape.capacities))
    capacities = np.array(list(shape.capacities.values()), dtype=np.int64)
    room = np.maximum(0, capacities - held)
    homes = homes_of(after.size, capacities.tolist())[pages // REGION_PAGES]
    homeless = [pages[:0]]
    for index, code in enumerate(codes):
        own = pages[homes == index]
        after[own[: room[index]]] = code
        homeless.append(own[room[index] :])
        room[index] -= min(int(room[index]), own.size)
    _to_the_roomiest(after, np.concatenate(homeless), codes, room)


def _to_the_roomiest(after: Owners, pages: Pages, codes: Owners, room: Counts) -> None:
    batch = max(STEP_PAGES, pages.size // _MOST_BATCHES)
    while pages.size and (most := int(room.max())):
        roomiest = int(room.argmax())
        going, pages = np.split(pages, [min(batch, most)])
        after[going] = codes[roomiest]
        room[roomiest] -= going.size


def _flow(before: Owners, after: Owners) -> dict[tuple[int, int], int]:
    counts = np.zeros(_CODES * _CODES, dtype=np.int64)
    for at in range(0, before.size, CHUNK_PAGES):
        chunk = slice(at, at + CHUNK_PAGES)
        pairs = before[chunk].astype(np.uint16) << 8 | after[chunk]
        counts += np.bincount(pairs, minlength=counts.size)
    flow = counts.reshape(_CODES, _CODES)
    np.fill_diagonal(flow, 0)
    return {
        (source, target): int(flow[source, target]) for source, target in np.argwhere(flow).tolist()
    }
