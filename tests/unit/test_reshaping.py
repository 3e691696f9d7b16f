"""What a change of shares would move: nobody ends with too much, nothing moves for nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcres.actors.host.shape import Shape, foresee, kept_pages
from dcres.errors import NoRoom
from dcres.model.history import Ticks
from dcres.model.placement import FIRST_SUB, LEAVING, MAIN, NOWHERE, Owners, pages_by_host
from dcres.paging.pager.homes import REGION_PAGES

ONE, TWO, THREE = FIRST_SUB, FIRST_SUB + 1, FIRST_SUB + 2
PAGES = 8 * REGION_PAGES


def memory(*runs: tuple[int, int]) -> Owners:
    """Owners from ``(pages, code)`` runs."""
    return np.repeat([code for _, code in runs], [count for count, _ in runs]).astype(np.uint8)


def never(owners: Owners) -> Ticks:
    return np.zeros(owners.size, dtype=np.uint32)


def held(flow: dict[tuple[int, int], int], owners: Owners, codes: list[int]) -> list[int]:
    """Pages per host after the moves, the main host's first."""
    places = [MAIN, *codes]
    counts = dict(zip(places, pages_by_host(owners, codes), strict=True))
    for (source, target), pages in flow.items():
        counts[source] -= pages
        counts[target] += pages
    return [counts[place] for place in places]


codes = st.sampled_from([NOWHERE, MAIN, LEAVING, ONE, TWO])
memories = st.lists(st.tuples(st.integers(1, 400), codes), min_size=1, max_size=30)


@given(
    memories,
    st.integers(64, 4000),
    st.integers(64, 4000),
    st.lists(st.integers(0, 4000), min_size=2, max_size=3),
)
def test_nobody_ends_with_more_than_it_may(
    runs: list[tuple[int, int]], limit: int, other: int, capacities: list[int]
) -> None:
    owners = memory(*runs)
    before = owners.copy()
    shape = Shape(dict(zip([ONE, TWO, THREE], capacities, strict=False)), other)
    try:
        flow = foresee(owners, never(owners), limit, shape)
    except NoRoom:
        main, *subs = pages_by_host(owners, [ONE, TWO])
        assert sum(subs) > sum(capacities) + max(0, kept_pages(max(limit, other)) - main)
        return
    assert (owners == before).all(), "it was only asked"
    main, *subs = held(flow, owners, list(shape.capacities))
    assert all(pages <= most for pages, most in zip(subs, capacities, strict=True))
    if other < limit and sum(capacities) > sum(subs):
        assert main <= kept_pages(other)
    if other > limit and any(subs):
        assert main >= kept_pages(other)


def test_a_host_that_leaves_gives_its_pages_to_one_that_joins() -> None:
    owners = memory((1000, MAIN), (600, ONE), (500, TWO))
    shape = Shape({ONE: 0, TWO: 600, THREE: 1000}, 1024)
    flow = foresee(owners, never(owners), 1024, shape)
    assert sum(pages for (source, _), pages in flow.items() if source == ONE) == 600
    assert {source for source, _ in flow} == {ONE}
    with pytest.raises(NoRoom, match="give the hosts"):
        foresee(owners, never(owners), 1024, Shape({ONE: 0, TWO: 600, THREE: 400}, 1024))


def test_a_main_host_that_grows_is_filled_from_one_sub_host_after_the_other() -> None:
    owners = memory((480, MAIN), (300, ONE), (700, TWO))
    shape = Shape({ONE: 1000, TWO: 1000}, 1024, replaced=False)
    room = kept_pages(1024) - 480
    assert foresee(owners, never(owners), 512, shape) == {
        (ONE, MAIN): 300,
        (TWO, MAIN): room - 300,
    }


def test_a_main_host_that_shrinks_sends_out_what_was_touched_longest_ago() -> None:
    owners = memory((PAGES, MAIN))
    shape = Shape({ONE: PAGES, TWO: PAGES}, PAGES // 2, replaced=False)
    flow = foresee(owners, never(owners), PAGES, shape)
    assert sum(flow.values()) == PAGES - kept_pages(PAGES // 2)
    assert set(flow) == {(MAIN, ONE), (MAIN, TWO)}, "regions have homes on both"
    assert min(flow.values()) >= sum(flow.values()) // 4
    ticks = never(owners)
    ticks[REGION_PAGES:] = 1
    one_region = Shape(shape.capacities, PAGES - REGION_PAGES // 2, replaced=False)
    excess = PAGES - kept_pages(one_region.limit_pages)
    assert foresee(owners, ticks, PAGES, one_region) == {(MAIN, ONE): excess}, "region 0 is theirs"


def test_what_its_home_has_no_room_for_goes_to_the_roomiest() -> None:
    owners = memory((PAGES, MAIN), (1990, ONE))
    shape = Shape({ONE: 2000, TWO: 4000}, PAGES // 2, replaced=False)
    excess = PAGES - kept_pages(PAGES // 2)
    flow = foresee(owners, never(owners), PAGES, shape)
    assert flow == {(MAIN, ONE): 10, (MAIN, TWO): excess - 10}


def test_with_sub_hosts_that_are_full_the_rest_stays() -> None:
    owners = memory((1000, MAIN), (100, ONE))
    flow = foresee(owners, never(owners), 1024, Shape({ONE: 150}, 512, replaced=False))
    assert flow == {(MAIN, ONE): 50}
    assert foresee(owners, never(owners), 1024, Shape({}, 512, replaced=False)) == {}


def test_a_main_host_that_shrinks_has_until_then_the_room_that_it_had() -> None:
    """It need not come down to where it is kept when nobody else has room."""
    owners = memory((950, MAIN), (500, ONE))
    assert kept_pages(1000) < 950
    assert foresee(owners, never(owners), 2048, Shape({ONE: 450}, 1000)) == {(ONE, MAIN): 50}


def test_other_shares_of_sub_hosts_alone_leave_the_main_host_alone() -> None:
    owners = memory((1000, MAIN), (24, LEAVING), (100, ONE), (100, TWO))
    flow = foresee(owners, never(owners), 1024, Shape({ONE: 40, TWO: 160}, 1024))
    assert flow == {(ONE, TWO): 60}
