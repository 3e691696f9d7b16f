"""Who was touched longest ago, against sorting."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dcres.model.history import Ticks, coldest, hottest
from dcres.model.pages import Mask

TICKS = st.integers(0, 2**32 - 1) | st.integers(0, 3)
PAGES = st.lists(st.tuples(TICKS, st.booleans()), min_size=1, max_size=80)


def split(pages: list[tuple[int, bool]]) -> tuple[Ticks, Mask]:
    ticks = np.array([tick for tick, _ in pages], dtype=np.uint32)
    return ticks, np.array([candidate for _, candidate in pages])


def first_by(pages: list[tuple[int, bool]], count: int, sign: int) -> list[int]:
    candidates = [page for page, (_, candidate) in enumerate(pages) if candidate]
    return sorted(sorted(candidates, key=lambda page: (sign * pages[page][0], page))[:count])


@given(PAGES, st.integers(0, 90))
def test_coldest_is_what_sorting_finds(pages: list[tuple[int, bool]], count: int) -> None:
    assert coldest(*split(pages), count).tolist() == first_by(pages, count, 1)


@given(PAGES, st.integers(0, 90))
def test_hottest_is_what_sorting_finds(pages: list[tuple[int, bool]], count: int) -> None:
    assert hottest(*split(pages), count).tolist() == first_by(pages, count, -1)


def test_ties_go_to_neighbours_at_the_low_end() -> None:
    ticks = np.full(10, 5, dtype=np.uint32)
    assert coldest(ticks, np.ones(10, dtype=np.bool_), 4).tolist() == [0, 1, 2, 3]


def test_nothing_among_nobody() -> None:
    ticks = np.zeros(4, dtype=np.uint32)
    assert coldest(ticks, np.zeros(4, dtype=np.bool_), 2).size == 0


def test_neither_changes_its_arguments() -> None:
    ticks, candidates = split([(3, True), (1, True), (2, False)])
    before = ticks.copy(), candidates.copy()
    coldest(ticks, candidates, 1)
    hottest(ticks, candidates, 1)
    assert (ticks == before[0]).all()
    assert (candidates == before[1]).all()
