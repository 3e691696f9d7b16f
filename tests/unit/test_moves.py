"""Moves from one placement to another: complete, in order of heat, in long rows."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dcres.model import moves as moves_
from dcres.model.moves import ROW_PAGES, moves
from dcres.model.placement import FIRST_SUB, MAIN, NOWHERE

CODES = [NOWHERE, MAIN, FIRST_SUB, FIRST_SUB + 1, FIRST_SUB + 2]
NOW = 1000

pages = st.tuples(st.sampled_from(CODES), st.sampled_from(CODES), st.integers(0, NOW))
memories = st.lists(pages, max_size=60)
chunks = st.sampled_from([1, 7, moves_.CHUNK_PAGES])


def arrays(memory: list[tuple[int, int, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    owners, wanted, ticks = np.array(memory or np.empty((0, 3)), dtype=np.int64).reshape(-1, 3).T
    return owners.astype(np.uint8), wanted.astype(np.uint8), ticks.astype(np.uint32)


@given(memories, chunks)
def test_every_page_that_is_elsewhere_is_moved_once(
    memory: list[tuple[int, int, int]], chunk_pages: int
) -> None:
    owners, wanted, ticks = arrays(memory)
    after = owners.copy()
    seen = np.zeros(len(memory), dtype=int)
    with patch.object(moves_, "CHUNK_PAGES", chunk_pages):
        rows = moves(owners, wanted, ticks, NOW)
    for first, stop, source, target in rows.tolist():
        assert 0 < stop - first <= ROW_PAGES
        assert (owners[first:stop] == source).all()
        after[first:stop] = target
        seen[first:stop] += 1
    there = (owners != NOWHERE) & (wanted != NOWHERE)
    assert (after[there] == wanted[there]).all()
    assert (after[~there] == owners[~there]).all()
    assert seen.max(initial=0) <= 1


@given(memories, chunks)
def test_what_was_touched_lately_goes_first(
    memory: list[tuple[int, int, int]], chunk_pages: int
) -> None:
    owners, wanted, ticks = arrays(memory)
    ages = NOW - ticks.astype(np.int64)
    oldest = 0
    with patch.object(moves_, "CHUNK_PAGES", chunk_pages):
        rows = moves(owners, wanted, ticks, NOW)
    for first, stop, _, _ in rows.tolist():
        assert ages[first:stop].max() * 2 + 1 >= oldest
        oldest = max(oldest, int(ages[first:stop].min()))


def test_neighbours_of_about_one_age_share_a_row() -> None:
    owners = np.full(600, FIRST_SUB, dtype=np.uint8)
    wanted = np.full(600, MAIN, dtype=np.uint8)
    ticks = np.full(600, NOW - 100, dtype=np.uint32)
    rows = moves(owners, wanted, ticks, NOW)
    assert rows.tolist() == [
        [0, 256, FIRST_SUB, MAIN],
        [256, 512, FIRST_SUB, MAIN],
        [512, 600, FIRST_SUB, MAIN],
    ]
