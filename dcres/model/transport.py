"""How many pages each host takes of each part of memory, so that the fewest cross the network.

A host that can read a part without the network takes pages of it for nothing; from any other
part a page costs one. Because there is no third price, the cheapest plan is the one with the
most free pages, which is a maximum flow over the pairs that are free; what is left may go
wherever there is room. All numbers are exact integers; the matrices have a row per part and a
column per host, never anything per page.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dcres.model.pages import Mask

Counts = npt.NDArray[np.int64]


def least_moves(supply: Counts, room: Counts, holds: Mask) -> Counts:
    """Pages per (part, host): all of `supply`, never more than `room`, the fewest moved.

    `holds` says which host reads which part without the network. The rooms must be enough.
    """
    nobody = np.zeros(len(supply), dtype=np.int64)
    return least_moves_with_main(nobody, 0, nobody.astype(np.bool_), supply, room, holds)[1]


def least_moves_with_main(
    eligible: Counts,
    wanted: int,
    main_holds: Mask,
    supply: Counts,
    room: Counts,
    holds: Mask,
) -> tuple[Counts, Counts]:
    """The same beside a main host that takes exactly `wanted` pages.

    They are some of the `eligible` pages of each part; `supply` counts all its pages, those
    included. Returns the main host's pages per part, and pages per (part, other host).

    The main host stands in two columns: one for parts that it holds, with as many pages as they
    have, and one for the others. A free page on the main host frees at most one elsewhere, so
    no cheaper plan gives it fewer free ones. Its columns are filled before the others, and
    augmenting never takes from a column that is full.
    """
    from_held = np.where(main_holds, eligible, 0)
    free_wanted = min(wanted, int(from_held.sum()))
    to_main = np.stack((from_held, eligible - from_held), axis=1)
    columns = np.concatenate(([free_wanted, wanted - free_wanted], room))
    flow = np.zeros((len(supply), len(columns)), dtype=np.int64)
    limit = np.concatenate((to_main, np.zeros_like(holds, dtype=np.int64)), axis=1)
    _fill(flow, limit, supply, columns)
    limit[:, 2:] = np.where(holds, supply[:, np.newaxis], 0)
    _fill(flow, limit, supply, columns)
    others = flow[:, 2:]
    others += _in_order(supply - flow.sum(axis=1), room - others.sum(axis=0))
    return flow[:, :2].sum(axis=1), others


def _in_order(supply: Counts, room: Counts) -> Counts:
    """Everything of `supply` into `room`, one row and one column after the other."""
    rows, columns = np.cumsum(supply)[:, np.newaxis], np.cumsum(room)
    stop = np.minimum(rows, columns)
    first = np.maximum(rows - supply[:, np.newaxis], columns - room)
    overlap: Counts = np.maximum(stop - first, 0)
    return overlap


def _fill(flow: Counts, limit: Counts, supply: Counts, room: Counts) -> None:
    """Raise `flow` to a maximum one within `limit` per pair (Edmonds and Karp's algorithm)."""
    left, free = supply - flow.sum(axis=1), room - flow.sum(axis=0)
    while (path := _shortest_path(left > 0, free > 0, flow < limit, flow > 0)) is not None:
        rows, columns = path
        back = (rows[1:], columns[:-1])
        amount = min(
            int(left[rows[0]]),
            int(free[columns[-1]]),
            int((limit[rows, columns] - flow[rows, columns]).min()),
            *flow[back].tolist(),
        )
        flow[rows, columns] += amount
        flow[back] -= amount
        left[rows[0]] -= amount
        free[columns[-1]] -= amount


def _shortest_path(
    left: Mask, free: Mask, spare: Mask, used: Mask
) -> tuple[list[int], list[int]] | None:
    """A way from a row with something left to a column with room, by breadth-first search.

    It goes rows[0] → columns[0] ← rows[1] → columns[1] …: forward where a pair has `spare`
    flow, backward where flow that is `used` can be taken away. None if there is none.
    """
    row_before = np.full(len(free), -1)  # per column
    column_before = np.full(len(left), -1)  # per row
    seen = left.copy()
    rows = np.flatnonzero(left)
    while rows.size:
        forward = spare[rows] & (row_before < 0)
        columns = np.flatnonzero(forward.any(axis=0))
        if columns.size == 0:
            break
        row_before[columns] = rows[forward[:, columns].argmax(axis=0)]
        ends = columns[free[columns]]
        if ends.size:
            return _trace(int(ends[0]), row_before, column_before)
        back = used[:, columns] & ~seen[:, np.newaxis]
        rows = np.flatnonzero(back.any(axis=1))
        column_before[rows] = columns[back[rows].argmax(axis=1)]
        seen[rows] = True
    return None


def _trace(
    column: int, row_before: npt.NDArray[np.int64], column_before: npt.NDArray[np.int64]
) -> tuple[list[int], list[int]]:
    columns, rows = [column], [int(row_before[column])]
    while (column := int(column_before[rows[-1]])) >= 0:
        columns.append(column)
        rows.append(int(row_before[column]))
    return rows[::-1], columns[::-1]
