"""Plans against trying every way, and what must hold of each of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcres.bench import plan as bench
from dcres.errors import NoRoom
from dcres.model import plan as planner
from dcres.model.history import Ticks
from dcres.model.pages import Mask
from dcres.model.placement import SAVED_NOWHERE, Owners
from dcres.model.plan import Plan, plan

NOWHERE = SAVED_NOWHERE


@dataclass(frozen=True)
class Case:
    placement: Owners
    ticks: Ticks
    capacities: tuple[int, ...]
    holds: Mask
    hot_first: bool

    def plan(self) -> Plan:
        return plan(self.placement, self.ticks, self.capacities, self.holds, self.hot_first)

    @property
    def placed(self) -> Mask:
        return self.placement != NOWHERE

    @property
    def wanted(self) -> int:
        return min(self.capacities[0], int(self.placed.sum()))

    def moved(self, owners: Owners) -> int:
        here = self.placed
        return int((~self.holds[self.placement[here], owners[here]]).sum())

    def allowed(self, owners: Owners) -> bool:
        """Whether `owners` is a plan at all: room, and no cooler page before a hotter one."""
        here = self.placed
        used = np.bincount(owners[here], minlength=len(self.capacities))
        if (used > self.capacities).any() or (owners[~here] != NOWHERE).any():
            return False
        if not self.hot_first:
            return True
        main, remote = self.ticks[owners == 0], self.ticks[here & (owners != 0)]
        ordered = not main.size or not remote.size or main.min() >= remote.max()
        return len(main) == self.wanted and bool(ordered)

    def all_ways(self) -> Iterator[Owners]:
        targets = range(len(self.capacities))
        choices = [targets if placed else [NOWHERE] for placed in self.placed]
        yield from (np.array(way, dtype=np.uint8) for way in product(*choices))


@st.composite
def cases(
    draw: st.DrawFn, most_pages: int, most_parts: int, most_targets: int, hottest: int = 2**32 - 1
) -> Case:
    parts = draw(st.integers(1, most_parts))
    targets = draw(st.integers(1, most_targets))
    pages = draw(st.integers(0, most_pages))
    part = st.integers(0, parts - 1) | st.just(NOWHERE)
    placement = draw(st.lists(part, min_size=pages, max_size=pages))
    tick = st.integers(0, 2) | st.integers(0, hottest)
    ticks = draw(st.lists(tick, min_size=pages, max_size=pages))
    room = st.integers(0, max(pages, 1))
    capacities = draw(st.lists(room, min_size=targets, max_size=targets))
    lacking = sum(part != NOWHERE for part in placement) - sum(capacities)
    capacities[draw(st.integers(0, targets - 1))] += max(lacking, 0)
    pair = st.lists(st.booleans(), min_size=targets, max_size=targets)
    holds = draw(st.lists(pair, min_size=parts, max_size=parts))
    return Case(
        np.array(placement, dtype=np.uint8),
        np.array(ticks, dtype=np.uint32),
        tuple(capacities),
        np.array(holds, dtype=np.bool_).reshape(parts, targets),
        draw(st.booleans()),
    )


@given(cases(7, 3, 3, hottest=3))
def test_no_other_plan_moves_less(case: Case) -> None:
    found = case.plan()
    least = min(case.moved(way) for way in case.all_ways() if case.allowed(way))
    assert case.moved(found.owners) == found.moved_pages == least


@given(cases(80, 6, 6), st.sampled_from([1, 7, 64, planner.CHUNK_PAGES]))
def test_every_page_once_where_there_is_room(case: Case, chunk_pages: int) -> None:
    with patch.object(planner, "CHUNK_PAGES", chunk_pages):
        found = case.plan()
    assert case.allowed(found.owners)
    assert case.moved(found.owners) == found.moved_pages
    parts, targets = case.holds.shape
    flow = np.zeros((parts, targets), dtype=np.int64)
    np.add.at(flow, (case.placement[case.placed], found.owners[case.placed]), 1)
    assert found.flow.tolist() == flow.tolist()


@given(cases(80, 6, 6))
def test_chunks_make_no_difference(case: Case) -> None:
    """Nor does asking again."""
    whole = case.plan().owners.tolist()
    with patch.object(planner, "CHUNK_PAGES", 5):
        assert case.plan().owners.tolist() == whole


@given(cases(60, 4, 4))
def test_arguments_are_left_alone(case: Case) -> None:
    before = case.placement.copy(), case.ticks.copy(), case.holds.copy()
    case.placement.flags.writeable = case.ticks.flags.writeable = case.holds.flags.writeable = False
    case.plan()
    assert (case.placement == before[0]).all()
    assert (case.ticks == before[1]).all()
    assert (case.holds == before[2]).all()


def pages(*runs: tuple[int, int]) -> Owners:
    """Pages from runs of (how many, which part)."""
    return np.repeat(
        np.array([part for _, part in runs], dtype=np.uint8), [count for count, _ in runs]
    )


def pages_of_targets(found: planner.Plan) -> list[int]:
    """How many pages each target will have."""
    counts: list[int] = found.flow.sum(axis=0).tolist()
    return counts


def never(count: int) -> Ticks:
    return np.zeros(count, dtype=np.uint32)


def test_what_is_hot_goes_to_the_main_host_from_wherever_it_is() -> None:
    placement = pages((4, 0), (4, 1))
    ticks = np.array([1, 9, 1, 9, 9, 1, 9, 1], dtype=np.uint32)
    found = plan(placement, ticks, [4, 4], np.eye(2, dtype=np.bool_))
    assert found.owners.tolist() == [1, 0, 1, 0, 0, 1, 0, 1]
    assert found.flow.tolist() == [[2, 2], [2, 2]]
    assert found.moved_pages == 4


def test_pages_of_a_class_stay_in_long_runs() -> None:
    found = plan(pages((9, 0)), never(9), [3, 4, 9], np.zeros((1, 3), dtype=np.bool_))
    assert found.owners.tolist() == [0] * 3 + [1] * 4 + [2] * 2


def test_a_host_is_drained_onto_those_with_room_and_nothing_else_moves() -> None:
    placement = pages((5, 0), (3, 1), (4, 2))
    found = plan(placement, never(12), [6, 0, 8], np.eye(3, dtype=np.bool_), hot_first=False)
    assert found.owners[:5].tolist() == [0] * 5
    assert found.owners[8:].tolist() == [2] * 4
    assert found.moved_pages == 3
    assert pages_of_targets(found) == [6, 0, 6]


def test_a_part_makes_way_for_another_that_fits_nowhere_else() -> None:
    """Part 0 is read by both targets, part 1 by the first only: a greedy choice would move it."""
    holds = np.array([[True, True], [True, False]])
    found = plan(pages((4, 0), (4, 1)), never(8), [4, 4], holds, hot_first=False)
    assert found.moved_pages == 0
    assert found.owners.tolist() == [1] * 4 + [0] * 4


def test_nothing_is_placed() -> None:
    found = plan(pages((3, NOWHERE)), never(3), [0], np.ones((1, 1), dtype=np.bool_))
    assert found.owners.tolist() == [NOWHERE] * 3
    assert pages_of_targets(found) == [0]
    assert found.moved_pages == 0


@pytest.mark.parametrize("hot_first", [True, False])
def test_too_little_room_says_how_much_is_missing(hot_first: bool) -> None:
    sentence = "the shares hold 2 MiB, but 4 MiB of memory are in use; give the hosts 2 MiB more"
    with pytest.raises(NoRoom, match=sentence):
        plan(pages((1024, 0)), never(1024), [257, 255], np.ones((1, 2), dtype=np.bool_), hot_first)


def test_a_host_may_have_more_room_than_can_be_counted() -> None:
    found = plan(pages((3, 0)), never(3), [2**63, 2**63], np.ones((1, 2), dtype=np.bool_))
    assert pages_of_targets(found) == [3, 0]


def test_arguments_that_do_not_match() -> None:
    one = np.ones((1, 1), dtype=np.bool_)
    with pytest.raises(ValueError, match="2 capacities"):
        plan(pages((1, 0)), never(1), [1, 1], one)
    with pytest.raises(ValueError, match="2 ticks for 1 pages"):
        plan(pages((1, 0)), never(2), [1], one)
    with pytest.raises(ValueError, match="at most 255"):
        plan(pages((1, 0)), never(1), [1] * 256, np.ones((1, 256), dtype=np.bool_))
    with pytest.raises(ValueError, match="parts that are not among the 1"):
        plan(pages((1, 1)), never(1), [1], one)


def test_as_many_hosts_as_there_can_be() -> None:
    rng = np.random.default_rng(7)
    placement = rng.integers(0, 201, 200_000, dtype=np.uint8)
    ticks = rng.geometric(0.001, 200_000).astype(np.uint32)
    capacities = rng.integers(900, 1300, 200).tolist()
    found = plan(placement, ticks, capacities, rng.random((201, 200)) < 0.02)
    assert pages_of_targets(found)[0] == capacities[0]
    assert ticks[found.owners == 0].min() >= ticks[found.owners != 0].max()


def test_the_benchmark_plans_what_it_made_up(capsys: pytest.CaptureFixture[str]) -> None:
    bench.child(1 << 16)
    answer = json.loads(capsys.readouterr().out)
    assert answer["pages"] == 1 << 16
    assert 0 < answer["moved_pages"] < 1 << 16
    assert answer["seconds"] > 0
