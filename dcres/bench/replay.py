"""Replays recorded page accesses against a replacement policy, and against the optimum.

The policy is told what the pager would be told: arrivals, what was written when it chooses,
and who was touched on standby. Between two ticks there are always as many accesses.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dcres.model.pages import Mask, Pages
from dcres.model.policy import Policy

ACCESSES_PER_TICK = 256
_BATCH_PAGES = 64
_CHOSEN_PAGES = 4096
_STANDBY_PER_TICK = 512


@dataclass(frozen=True, slots=True)
class Trace:
    """Accesses in their order: which page, and whether it was written."""

    page_count: int
    pages: Pages
    written: Mask


def hit_rate(
    trace: Trace, policy: Policy, capacity: int, accesses_per_tick: int = ACCESSES_PER_TICK
) -> float:
    """The part of the accesses that find their page on a main host of `capacity` pages."""
    host = _MainHost(trace.page_count, policy, capacity)
    hits = at = 0
    pages, written = trace.pages.tolist(), trace.written.tolist()
    for at, (page, write) in enumerate(zip(pages, written, strict=True)):
        if at % accesses_per_tick == 0:
            host.pass_tick()
        hits += host.access(page, write)
    return hits / (at + 1)


class _MainHost:
    """What `Evictor` and `Watcher` do, without pages."""

    def __init__(self, page_count: int, policy: Policy, capacity: int) -> None:
        self._policy = policy
        self._capacity = capacity
        self._here = np.zeros(page_count, dtype=np.bool_)
        self._mapped = np.zeros(page_count, dtype=np.bool_)
        self._written = np.zeros(page_count, dtype=np.bool_)
        # A scalar look-up in bytes costs a third of numpy's.
        self._bytes = [each.view(np.uint8).data for each in (self._here, self._mapped)]
        self._written_bytes = self._written.view(np.uint8).data
        self._chosen: deque[Pages] = deque()
        self._batch = max(1, min(_BATCH_PAGES, capacity // 16))
        self._resident = self._tick = 0

    def access(self, page: int, write: bool) -> bool:
        here, mapped = self._bytes
        hit = bool(here[page])
        if not hit:
            if self._resident == self._capacity:
                self._evict()
            here[page] = 1
            self._resident += 1
            self._policy.arrived(page, page + 1, self._tick)
        mapped[page] = 1
        if write:
            self._written_bytes[page] = 1
        return hit

    def pass_tick(self) -> None:
        self._tick += 1
        self._untouched(np.flatnonzero(self._policy.on_standby))
        pages = self._policy.suspects(self._here, self._tick, _STANDBY_PER_TICK)
        self._mapped[pages] = False
        self._policy.standby(pages, self._tick)

    def _untouched(self, pages: Pages) -> Pages:
        touched = self._policy.on_standby[pages] & self._mapped[pages]
        self._policy.touched(pages[touched], self._tick)
        return pages[~touched]

    def _evict(self) -> None:
        pages: Pages = np.empty(0, dtype=np.int64)
        while not pages.size:
            if not self._chosen:
                self._choose()
            pages = self._chosen.popleft()
            pages = self._untouched(pages[self._here[pages]])
        self._here[pages] = False
        self._mapped[pages] = False
        self._policy.left(pages)
        self._resident -= pages.size

    def _choose(self) -> None:
        written = np.flatnonzero(self._written & self._mapped)
        self._written[:] = False
        self._policy.touched(written, self._tick)
        count = max(1, min(_CHOSEN_PAGES, self._capacity // 8))
        pages = self._policy.victims(self._here, count)
        self._chosen.extend(
            pages[at : at + self._batch] for at in range(0, pages.size, self._batch)
        )


def belady(trace: Trace, capacity: int) -> float:
    """The greatest hit rate there can be: the page needed last leaves.

    L. A. Belady, A study of replacement algorithms for a virtual-storage computer, 1966.
    """
    next_use = _next_uses(trace.pages, trace.page_count)
    here: dict[int, int] = {}  # page → its next use
    latest: list[tuple[int, int]] = []  # (-next use, page), stale ones included
    hits = 0
    for page, use in zip(trace.pages.tolist(), next_use.tolist(), strict=True):
        if page in here:
            hits += 1
        elif len(here) == capacity:
            _drop_latest(here, latest)
        here[page] = use
        heapq.heappush(latest, (-use, page))
    return hits / max(trace.pages.size, 1)


def _drop_latest(here: dict[int, int], latest: list[tuple[int, int]]) -> None:
    while True:
        use, page = heapq.heappop(latest)
        if here.get(page) == -use:
            del here[page]
            return


def _next_uses(pages: Pages, page_count: int) -> npt.NDArray[np.int64]:
    """For each access, which access is the next of the same page; past the end if none."""
    following = [pages.size] * page_count
    uses = np.empty(pages.size, dtype=np.int64)
    accesses: Sequence[int] = pages.tolist()
    for at in range(len(accesses) - 1, -1, -1):
        uses[at] = following[accesses[at]]
        following[accesses[at]] = at
    return uses
