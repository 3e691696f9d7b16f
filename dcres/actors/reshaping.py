"""Re-placement of a running VM's pages: who is to hold how much, worked out on the main host."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dcres.model.history import Ticks
from dcres.model.moves import Moves, moves
from dcres.model.placement import LEAVING, MAIN, SAVED_NOWHERE, Owners
from dcres.model.plan import plan
from dcres.paging.evictor import headroom_pages


def moves_into(
    owners: Owners,
    ticks: Ticks,
    now: int,
    capacities: Mapping[int, int],
    limit_pages: int,
) -> Moves:
    """The fewest moves after which no sub host holds more than it may.

    `capacities` are pages per owner code, of all sub hosts. The main host takes pages as far as
    it has room below `limit_pages`; what it holds already is left to the pager. Raises NoRoom
    when the pages do not fit.
    """
    codes = list(capacities)
    index_of = np.full(256, SAVED_NOWHERE, dtype=np.uint8)
    index_of[codes] = np.arange(len(codes))
    here = int(np.count_nonzero((owners == MAIN) | (owners == LEAVING)))
    room = max(0, limit_pages - headroom_pages(limit_pages) - here)
    targets = [*codes, MAIN]
    planned = plan(
        index_of[owners],
        ticks,
        [*capacities.values(), room],
        np.eye(len(codes), len(targets), dtype=np.bool_),
        hot_first=False,
    )
    code_of = np.zeros(256, dtype=np.uint8)
    code_of[: len(targets)] = targets
    wanted = np.where(planned.owners == SAVED_NOWHERE, owners, code_of[planned.owners])
    return moves(owners, wanted, ticks, now)
