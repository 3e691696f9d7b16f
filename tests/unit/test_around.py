"""Fault-around: windows grow along a walk, and neighbours come only where they are wanted."""

from __future__ import annotations

import random

from dcres.model.around import BLOCK_PAGES, MOST_PAGES, WORTH, FaultAround


class Guest:
    """Touches pages; all that a window brings is there at the next touch."""

    def __init__(self) -> None:
        self.around = FaultAround()
        self.here: set[int] = set()
        self.misses = self.brought = 0

    def touch(self, page: int) -> None:
        if page in self.here:
            return
        self.misses += 1
        first, stop, _ = self.around.missed(page)
        fresh = {page, *range(first, stop)} - self.here
        self.here |= fresh
        self.brought += len(fresh)


def test_a_walk_is_brought_in_ever_longer_windows() -> None:
    guest = Guest()
    for page in range(10_000):
        guest.touch(page)
    assert guest.misses < 10_000 / MOST_PAGES + 10
    assert guest.brought <= 10_000 + MOST_PAGES


def test_a_walk_is_asked_for_ahead_of_the_guest() -> None:
    around = FaultAround()
    _, stop, _ = around.missed(0)
    first, further, at_once = around.missed(stop)
    assert (first, at_once) == (stop, True)
    # It is on its way and the guest waits inside it: what comes behind it is asked for now.
    assert around.missed(stop + 1) == (stop + 1, further + 4 * BLOCK_PAGES, True)


def test_several_walks_at_once_are_told_apart_from_each_other_and_from_chance() -> None:
    guest, rng = Guest(), random.Random(2)
    for step in range(4_000):
        for start in (0, 1_000_000, 2_000_000):
            guest.touch(start + step)
        guest.touch(rng.randrange(3_000_000, 9_000_000))
    walked = guest.misses - 4_000
    assert walked < 3 * (4_000 / MOST_PAGES + 20)


def test_a_walk_that_ends_costs_no_more_than_its_last_windows() -> None:
    guest = Guest()
    for page in range(1_000):
        guest.touch(page)
    assert guest.brought <= 1_000 + 2 * MOST_PAGES
    before = guest.brought
    guest.touch(500_000)
    assert guest.brought - before <= BLOCK_PAGES


def test_who_jumps_about_in_much_memory_is_brought_what_it_asks_for() -> None:
    guest, rng = Guest(), random.Random(3)
    for _ in range(2_000):
        guest.touch(rng.randrange(10_000_000))
    assert guest.around.worth < WORTH
    before, misses = guest.brought, guest.misses
    for _ in range(2_000):
        guest.touch(rng.randrange(10_000_000))
    assert guest.brought - before <= 1.05 * (guest.misses - misses)


def test_who_uses_neighbours_is_brought_neighbours() -> None:
    guest, rng = Guest(), random.Random(4)
    for _ in range(2_000):
        block = rng.randrange(1_000_000) * BLOCK_PAGES
        for _ in range(8):
            guest.touch(block + rng.randrange(BLOCK_PAGES))
    assert guest.around.worth >= WORTH
    assert guest.misses < 2_000 * 2.5


def test_habits_may_change_both_ways() -> None:
    guest, rng = Guest(), random.Random(5)
    for _ in range(3_000):
        guest.touch(rng.randrange(10_000_000))
    assert guest.around.worth < WORTH
    for _ in range(300):
        block = rng.randrange(20_000_000, 30_000_000) // BLOCK_PAGES * BLOCK_PAGES
        for page in rng.sample(range(block, block + BLOCK_PAGES), 6):
            guest.touch(page)
    assert guest.around.worth >= WORTH
