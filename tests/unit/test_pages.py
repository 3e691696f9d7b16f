"""Page arithmetic against naive loops."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcres.errors import HostError
from dcres.model import pages
from dcres.model.pages import Extents, Mask

masks = st.lists(st.booleans(), max_size=80).map(lambda bits: np.array(bits, dtype=np.bool_))


def naive(mask: Mask) -> list[list[int]]:
    runs: list[list[int]] = []
    for page, here in enumerate(mask.tolist()):
        if here and runs and runs[-1][1] == page:
            runs[-1][1] = page + 1
        elif here:
            runs.append([page, page + 1])
    return runs


def check_shape(extents: Extents) -> None:
    assert extents.dtype == np.int64
    assert extents.ndim == 2
    assert extents.shape[1] == 2


@given(masks)
def test_extents_of_mask(mask: Mask) -> None:
    extents = pages.extents_of_mask(mask)
    check_shape(extents)
    assert extents.tolist() == naive(mask)


@given(masks)
def test_extents_of_pages(mask: Mask) -> None:
    extents = pages.extents_of_pages(np.flatnonzero(mask))
    check_shape(extents)
    assert extents.tolist() == naive(mask)


@given(masks)
def test_mask_of_extents(mask: Mask) -> None:
    back = pages.mask_of_extents(pages.extents_of_mask(mask), len(mask))
    assert back.dtype == np.bool_
    assert back.tolist() == mask.tolist()


UNSOUND = {
    "zero length": [[3, 3]],
    "zero length, not the first": [[0, 1], [5, 5]],
    "backward": [[4, 3]],
    "overlapping": [[0, 5], [4, 6]],
    "twice the same": [[2, 4], [2, 4]],
    "descending": [[4, 6], [0, 2]],
    "beyond the end": [[0, 9]],
    "beyond the end, not the first": [[0, 1], [7, 9]],
    "all of it beyond": [[20, 30]],
    "before the beginning": [[-2, 1]],
    "so far that a difference would overflow": [[5, -(2**63)], [2**63 - 1, 8]],
}


@pytest.mark.parametrize("extents", UNSOUND.values(), ids=UNSOUND)
def test_extents_that_cannot_be_make_no_mask(extents: list[list[int]]) -> None:
    with pytest.raises(HostError, match="are not ascending within the 8 pages"):
        pages.mask_of_extents(np.array(extents, dtype=np.int64), 8)


def test_extents_that_touch_may_be() -> None:
    touching = np.array([[0, 2], [2, 3], [7, 8]], dtype=np.int64)
    assert np.flatnonzero(pages.mask_of_extents(touching, 8)).tolist() == [0, 1, 2, 7]


@given(masks)
def test_pages_of_extents(mask: Mask) -> None:
    numbers = pages.pages_of_extents(pages.extents_of_mask(mask))
    assert numbers.dtype == np.int64
    assert numbers.tolist() == np.flatnonzero(mask).tolist()


@given(masks)
def test_count_pages(mask: Mask) -> None:
    assert pages.count_pages(pages.extents_of_mask(mask)) == sum(mask.tolist())


@given(masks, st.integers(1, 10))
def test_split_keeps_pages_and_order(mask: Mask, longest: int) -> None:
    pieces = list(pages.split(pages.extents_of_mask(mask), longest))
    assert [page for first, stop in pieces for page in range(first, stop)] == [
        page for page, here in enumerate(mask.tolist()) if here
    ]
    assert all(0 < stop - first <= longest for first, stop in pieces)


@given(masks, st.integers(1, 10))
def test_join_undoes_split(mask: Mask, longest: int) -> None:
    pieces = list(pages.split(pages.extents_of_mask(mask), longest))
    joined = pages.join(np.array(pieces, dtype=np.int64).reshape(-1, 2))
    check_shape(joined)
    assert joined.tolist() == naive(mask)


def test_pages_of_whole_pages_only() -> None:
    assert pages.pages_of(3 * pages.PAGE_SIZE) == 3
    with pytest.raises(ValueError, match="not a multiple of 4096"):
        pages.pages_of(4097)


@given(masks, st.data())
def test_extents_within(mask: Mask, data: st.DataObject) -> None:
    here = np.array([data.draw(st.booleans()) for _ in mask], dtype=np.bool_)
    extents = pages.extents_of_mask(mask)
    found = pages.extents_within(extents, here)
    check_shape(found)
    assert found.tolist() == naive(mask & here)
    assert (found is extents) == (not (mask & ~here).any())


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), max_size=12))
def test_join_of_ranges_that_overlap_in_any_order(ranges: list[tuple[int, int]]) -> None:
    mask = np.zeros(80, dtype=np.bool_)
    for first, length in ranges:
        mask[first : first + length] = True
    given_ranges = [(first, first + length) for first, length in ranges]
    joined = pages.join(np.array(given_ranges, dtype=np.int64).reshape(-1, 2))
    check_shape(joined)
    assert joined.tolist() == naive(mask)
