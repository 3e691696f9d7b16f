"""Replacement policies and their simulator: by hand, against the optimum, against each other."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcres.bench.replay import Trace, belady, hit_rate
from dcres.model.pages import Mask, Pages
from dcres.model.policy import PATIENCE_TICKS, STANDBY_SHARE, Fifo, Policy, SegmentedFifo


def trace(pages: list[int], page_count: int = 8, written: list[bool] | None = None) -> Trace:
    marks = np.array(written if written is not None else [False] * len(pages), dtype=np.bool_)
    return Trace(page_count, np.array(pages, dtype=np.int64), marks)


def segmented(page_count: int) -> SegmentedFifo:
    return SegmentedFifo(np.zeros(page_count, dtype=np.uint32))


def everybody(page_count: int) -> Mask:
    return np.ones(page_count, dtype=np.bool_)


def pages_of(*numbers: int) -> Pages:
    return np.array(numbers, dtype=np.int64)


# The simulator

BELADYS_OWN = [1, 2, 3, 4, 1, 2, 5, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("capacity", "first_in_first_out", "optimum"),
    # Belady's anomaly: with FIFO, a fourth page frame makes it worse.
    [(3, 3, 5), (4, 2, 6), (5, 7, 7)],
)
def test_hits_as_counted_by_hand(capacity: int, first_in_first_out: int, optimum: int) -> None:
    accesses = trace(BELADYS_OWN)
    hits = hit_rate(accesses, Fifo(8), capacity, accesses_per_tick=1) * len(BELADYS_OWN)
    assert round(hits) == first_in_first_out
    assert round(belady(accesses, capacity) * len(BELADYS_OWN)) == optimum


def test_a_page_touched_on_standby_stays_and_an_untouched_one_leaves() -> None:
    # 0 is read again and again, which FIFO cannot know; 1 … 7 pass by.
    pages = [page for passing in (1, 2, 3, 4, 5, 6, 7) for page in (0, passing)]
    rates = [hit_rate(trace(pages), policy, 3, 1) for policy in (segmented(8), Fifo(8))]
    assert [round(rate * len(pages)) for rate in rates] == [6, 4]


class _Told(Fifo):
    """FIFO that writes down what it hears."""

    def __init__(self, page_count: int) -> None:
        super().__init__(page_count)
        self.heard: list[list[int]] = []

    def touched(self, pages: Pages, tick: int) -> None:
        if pages.size:
            self.heard.append(pages.tolist())


def test_the_policy_hears_of_writes_when_it_has_to_choose_and_of_reads_never() -> None:
    policy = _Told(8)
    hit_rate(trace([0, 1, 0, 2, 3], written=[True, False, True, False, False]), policy, 2, 1)
    assert policy.heard == [[0]]


ACCESSES = st.lists(st.tuples(st.integers(0, 11), st.booleans()), min_size=1, max_size=200)
POLICIES: list[Callable[[int], Policy]] = [Fifo, segmented]


@given(ACCESSES, st.integers(1, 12), st.integers(1, 20))
def test_nothing_is_better_than_the_optimum(
    accesses: list[tuple[int, bool]], capacity: int, accesses_per_tick: int
) -> None:
    recorded = trace([page for page, _ in accesses], 12, [write for _, write in accesses])
    optimum = belady(recorded, capacity)
    for make in POLICIES:
        assert hit_rate(recorded, make(12), capacity, accesses_per_tick) <= optimum + 1e-9


@given(ACCESSES, st.integers(1, 12))
def test_with_room_for_all_only_first_touches_miss(
    accesses: list[tuple[int, bool]], accesses_per_tick: int
) -> None:
    pages = [page for page, _ in accesses]
    expected = 1 - len(set(pages)) / len(pages)
    for make in POLICIES:
        assert hit_rate(trace(pages, 12), make(12), 12, accesses_per_tick) == pytest.approx(
            expected
        )
    assert belady(trace(pages, 12), 12) == pytest.approx(expected)


def test_segmented_fifo_beats_fifo_where_a_hot_set_is_used_besides_a_walk() -> None:
    rng = np.random.default_rng(1)
    page_count, count = 4096, 60_000
    hot = rng.integers(0, page_count // 8, count)
    walk = np.arange(count) % page_count
    pages = np.where(rng.random(count) < 0.5, hot, walk)
    recorded = Trace(page_count, pages, np.zeros(count, dtype=np.bool_))
    ours = hit_rate(recorded, segmented(page_count), page_count // 4)
    fifo = hit_rate(recorded, Fifo(page_count), page_count // 4)
    assert ours > 1.3 * fifo
    assert ours > 0.45, "half of the accesses go to pages that fit"


# The policy

CALLS = st.lists(
    st.tuples(
        st.sampled_from(["arrived", "left", "touched", "suspects", "victims"]),
        st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True),
    ),
    max_size=40,
)


@given(CALLS)
def test_only_who_is_here_is_chosen_and_ascending(calls: list[tuple[str, list[int]]]) -> None:
    policy, here = segmented(10), np.zeros(10, dtype=np.bool_)
    for tick, (what, numbers) in enumerate(calls, start=1):
        pages = np.array(sorted(numbers), dtype=np.int64)
        if what == "arrived":
            policy.arrived(numbers[0], numbers[0] + 1, tick)
            here[numbers[0]] = True
        elif what == "left":
            policy.left(pages)
            here[pages] = False
        elif what == "touched":
            policy.touched(pages[here[pages]], tick)
        elif what == "suspects":
            chosen = policy.suspects(here, tick, len(numbers))
            assert here[chosen].all()
            assert not policy.on_standby[chosen].any()
            assert (np.diff(chosen) > 0).all()
            assert chosen.size <= len(numbers)
            policy.standby(chosen, tick)
        else:
            chosen = policy.victims(here, len(numbers))
            assert here[chosen].all()
            assert (np.diff(chosen) > 0).all()
            assert chosen.size <= len(numbers)
            assert chosen.size > 0 or not here.any()
        assert not policy.on_standby[~here].any()


def test_who_arrives_goes_on_trial_in_the_next_tick() -> None:
    policy = segmented(8)
    policy.arrived(0, 4, 5)
    assert policy.suspects(everybody(8) & (np.arange(8) < 4), 5, 8).size == 0
    assert policy.suspects(everybody(8) & (np.arange(8) < 4), 6, 3).tolist() == [0, 1, 2]


def proven(policy: SegmentedFifo, first: int, stop: int, tick: int) -> None:
    policy.arrived(first, stop, tick)
    pages = np.arange(first, stop)
    policy.standby(pages, tick)
    policy.touched(pages, tick)


def test_who_was_longest_on_standby_leaves_first() -> None:
    policy = segmented(256)
    policy.arrived(0, 256, 1)
    policy.standby(np.arange(128, 256), 2)
    policy.standby(np.arange(0, 128), 3)
    assert policy.victims(everybody(256), 100).tolist() == list(range(128, 228))


def test_when_nobody_could_be_watched_the_protected_leave_last() -> None:
    policy = segmented(256)
    proven(policy, 0, 128, 1)
    policy.arrived(128, 256, 2)
    assert policy.victims(everybody(256), 100).tolist() == list(range(128, 228))
    policy.left(np.arange(128, 256))
    assert policy.victims(np.arange(256) < 128, 100).tolist() == list(range(100))


def test_when_pages_leave_a_share_of_the_protected_is_watched_the_oldest_first() -> None:
    policy, here = segmented(110), np.arange(110) < 100
    proven(policy, 50, 100, 1)
    proven(policy, 0, 50, 2)
    assert policy.suspects(here, 3, 100).size == 0, "nobody has to leave"
    policy.left(np.arange(100, 110))
    chosen = policy.suspects(here, 3, 100)
    assert chosen.tolist() == list(range(50, 50 + int(100 * STANDBY_SHARE)))
    policy.standby(chosen, 3)
    policy.left(np.arange(100, 110))
    assert policy.suspects(here, 3, 100).size == 0, "enough are"


def test_after_a_while_everybody_is_on_trial_again() -> None:
    policy = segmented(100)
    proven(policy, 0, 100, 1)
    policy.standby(np.arange(50), 2)
    assert policy.suspects(everybody(100), PATIENCE_TICKS, 100).size == 0
    late = policy.suspects(everybody(100), PATIENCE_TICKS + 2, 100)
    assert late.tolist() == list(range(50, 100))


def test_new_pages_and_protected_ones_share_what_can_be_watched() -> None:
    policy = segmented(200)
    proven(policy, 0, 100, 1)
    policy.arrived(100, 200, PATIENCE_TICKS)
    chosen = policy.suspects(everybody(200), PATIENCE_TICKS + 2, 20)
    assert chosen.tolist() == [*range(10), *range(100, 110)]


def test_a_write_is_a_touch_and_proves_nothing_unless_on_standby() -> None:
    ticks = np.zeros(200, dtype=np.uint32)
    policy = SegmentedFifo(ticks)
    policy.arrived(0, 200, 1)
    policy.standby(pages_of(7), 2)
    policy.touched(pages_of(6, 7), 9)
    assert ticks[:8].tolist() == [1, 1, 1, 1, 1, 1, 9, 9]
    assert not policy.on_standby.any()
    new = policy.suspects(everybody(200), 10, 200)
    assert 6 in new
    assert 7 not in new
