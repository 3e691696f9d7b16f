"""Which page goes to which host, for a restore and for a VM that is spread anew while it runs.

The hottest pages go to the main host as far as it has room, the rest to the other hosts; among
all plans that do so, one that moves the fewest pages.

Pages are never looked at one by one, and never sorted. The main host's share is found by
counting ticks, first by their upper and then by their lower 16 bits: that gives the *threshold*,
the tick of the coolest pages that it takes. Then a page's *class* is all that matters: the part
that it lies in, and whether it is hotter than the threshold, a tie, or colder.
`model/transport.py` decides how many pages of a class go to each host, and they are handed out
in page order, so that runs stay long. Each step goes over memory in chunks, several at a time:
1 TiB is 268 million pages, and no step needs a second array of that length.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from dcres.errors import NoRoom
from dcres.model.history import Ticks
from dcres.model.pages import PAGES_PER_MIB, Mask, mib_of
from dcres.model.placement import SAVED_NOWHERE, Owners
from dcres.model.transport import Counts, least_moves, least_moves_with_main

CHUNK_PAGES = 1 << 19
_PARTS = 256  # what a placement can tell apart; SAVED_NOWHERE is one of them
_COLD, _TIE, _HOT = range(3)
_CLASSES = 3 * _PARTS
_HALF = 1 << 16

Classes = npt.NDArray[np.uint16]
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Where every page goes, and how many pages that are from where to where."""

    owners: Owners  # per page the index of its target, or SAVED_NOWHERE
    flow: Counts  # (parts, targets): pages that the target takes of the part
    holds: Mask  # (parts, targets): whether it reads them without the network

    @property
    def moved_pages(self) -> int:
        """Pages that cross the network."""
        return int(self.flow[~self.holds].sum())


def plan(
    placement: Owners,
    ticks: Ticks,
    capacities: Sequence[int],
    holds: Mask,
    hot_first: bool = True,
) -> Plan:
    """Where the pages of `placement` go, given room for `capacities` pages on the targets.

    `placement` has the part of every page, or SAVED_NOWHERE; `ticks` when each was touched
    last; ``holds[part, target]`` says whether that target reads that part without the network.

    With `hot_first`, target 0 gets exactly as many of the hottest pages as it has room for;
    otherwise it is a target like the others and `ticks` is not read. Either way the fewest
    pages are moved, and equal arguments give equal plans. Raises NoRoom.
    """
    _check(placement, ticks, capacities, holds)
    room = np.array([min(each, len(placement)) for each in capacities], dtype=np.int64)
    total = sum(_over_chunks(lambda at: _count_placed(placement[at]), len(placement)))
    _require_room(total, int(room.sum()))
    wanted = min(total, int(room[0])) if hot_first else None
    threshold = None if wanted is None else _threshold(placement, ticks, wanted)

    def classes(at: slice) -> Classes:
        return _classes(placement[at], ticks[at], threshold)

    counted = list(_over_chunks(lambda at: _count(classes(at)), len(placement)))
    counts = np.array(counted, dtype=np.int64).reshape(-1, _CLASSES)
    quotas = _quotas(counts.sum(axis=0).reshape(3, _PARTS), wanted, room, holds)
    owners = _hand_out(classes, counts, quotas, len(placement))
    return Plan(owners, quotas.sum(axis=0), holds)


def _check(placement: Owners, ticks: Ticks, capacities: Sequence[int], holds: Mask) -> None:
    """ValueError for arrays that do not belong together, or more hosts than fit a byte."""
    if len(ticks) != len(placement):
        raise ValueError(f"{len(ticks)} ticks for {len(placement)} pages")
    if not 0 < len(capacities) == holds.shape[1]:
        raise ValueError(f"{len(capacities)} capacities for {holds.shape[1]} targets")
    if max(holds.shape) > SAVED_NOWHERE:
        raise ValueError(f"{holds.shape} parts and targets; at most {SAVED_NOWHERE} each")


def _over_chunks(work: Callable[[slice], Result], page_count: int) -> Iterator[Result]:
    """What `work` makes of each chunk, in order; numpy lets several threads work at a time."""
    chunks = (slice(at, at + CHUNK_PAGES) for at in range(0, page_count, CHUNK_PAGES))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        yield from pool.map(work, chunks)


def _count_placed(placement: Owners) -> int:
    return int(np.count_nonzero(placement != SAVED_NOWHERE))


def _require_room(pages: int, room: int) -> None:
    if room < pages:
        raise NoRoom(
            f"the shares hold {room // PAGES_PER_MIB} MiB, but {mib_of(pages)} MiB of memory are "
            f"in use; give the hosts {mib_of(pages - room)} MiB more"
        )


def _threshold(placement: Owners, ticks: Ticks, wanted: int) -> int:
    """The tick of the coolest page among the `wanted` hottest."""

    def upper(at: slice) -> Counts:
        return _histogram(ticks[at][placement[at] != SAVED_NOWHERE] >> 16)

    def lower(at: slice) -> Counts:
        among = (placement[at] != SAVED_NOWHERE) & (ticks[at] >> 16 == high)
        return _histogram(ticks[at][among] & (_HALF - 1))

    none = np.zeros(_HALF, dtype=np.int64)
    high, hotter = _reach(sum(_over_chunks(upper, len(ticks)), none), wanted)
    low, _ = _reach(sum(_over_chunks(lower, len(ticks)), none), wanted - hotter)
    return high << 16 | low


def _histogram(halves: Ticks) -> Counts:
    return np.bincount(halves, minlength=_HALF)


def _reach(histogram: Counts, wanted: int) -> tuple[int, int]:
    """The greatest value with at least `wanted` at or above it, and how many are above it."""
    from_top = np.cumsum(histogram[::-1])
    at = int(np.searchsorted(from_top, wanted))
    return _HALF - 1 - at, int(from_top[at] - histogram[::-1][at])


def _classes(placement: Owners, ticks: Ticks, threshold: int | None) -> Classes:
    """The class of each page: part + 256 × heat. Without a threshold every page is cold."""
    classes = placement.astype(np.uint16)
    if threshold is not None:
        classes += (ticks >= threshold) * np.uint16(_TIE * _PARTS)
        classes += (ticks > threshold) * np.uint16((_HOT - _TIE) * _PARTS)
    return classes


def _count(classes: Classes) -> Counts:
    return np.bincount(classes, minlength=_CLASSES)


def _quotas(totals: Counts, wanted: int | None, room: Counts, holds: Mask) -> Counts:
    """Pages per (heat, part, target), from pages per (heat, any part that can be told apart).

    `wanted` is what target 0 gets, the hottest; None if it is a target like the others.
    """
    parts = len(holds)
    if totals[:, parts:SAVED_NOWHERE].any():
        raise ValueError(f"the placement names parts that are not among the {parts}")
    cold, tie, hot = totals[:, :parts]
    quotas = np.zeros((3, *holds.shape), dtype=np.int64)
    if wanted is None:
        quotas[_COLD] = least_moves(cold, room, holds)
        return quotas
    chosen, others = least_moves_with_main(
        tie, wanted - int(hot.sum()), holds[:, 0], tie + cold, room[1:], holds[:, 1:]
    )
    quotas[_HOT, :, 0] = hot
    quotas[_TIE, :, 0] = chosen
    # To the targets in order, of each part first what is cold and then the ties that are left.
    below = np.minimum(np.cumsum(others, axis=1), cold[:, np.newaxis])
    quotas[_COLD, :, 1:] = np.diff(below, axis=1, prepend=0)
    quotas[_TIE, :, 1:] = others - quotas[_COLD, :, 1:]
    return quotas


def _hand_out(
    classes: Callable[[slice], Classes],
    counts: Counts,
    quotas: Counts,
    page_count: int,
) -> Owners:
    """The target of each page: within a class, its pages go to the targets in page order.

    In most chunks all pages of a class have the same target, which a table tells; only where a
    target's quota ends inside a chunk are the pages of that class looked up.
    """
    parts, targets = quotas.shape[1:]
    handed = np.zeros((3, _PARTS, targets), dtype=np.int64)
    handed[:, :parts] = np.cumsum(quotas, axis=2)
    ends = handed.reshape(_CLASSES, targets)
    starts = np.cumsum(counts, axis=0) - counts
    owners = np.empty(page_count, dtype=np.uint8)

    def give(at: slice) -> None:
        chunk = at.start // CHUNK_PAGES
        first, stop = starts[chunk], starts[chunk] + counts[chunk]
        target = (ends <= first[:, np.newaxis]).sum(axis=1)
        last = (ends < stop[:, np.newaxis]).sum(axis=1)
        table = target.astype(np.uint8)
        table[SAVED_NOWHERE::_PARTS] = SAVED_NOWHERE
        found = classes(at)
        owners[at] = table[found]
        for one in np.flatnonzero(target < last):
            shares = np.diff(np.clip(ends[one], first[one], stop[one]), prepend=first[one])
            pages = np.flatnonzero(found == one) + at.start
            owners[pages] = np.repeat(np.arange(targets, dtype=np.uint8), shares)

    for _ in _over_chunks(give, page_count):
        pass
    return owners
