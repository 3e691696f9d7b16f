"""The network page table, and what a pager makes of it after a crash at any instruction."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcres.errors import NoRoom, PagesLost
from dcres.model.placement import (
    FIRST_SUB,
    LEAVING,
    MAIN,
    NOWHERE,
    SAVED_NOWHERE,
    Owners,
    codes_of,
    digest,
    free_codes,
    from_saved,
    pages_by_host,
    recover,
    sub_code,
    to_saved,
)

SUBS = 3
CODES = [sub_code(i) for i in range(SUBS)]
codes = st.sampled_from([NOWHERE, MAIN, LEAVING, *(sub_code(i) for i in range(SUBS))])
tables = st.lists(codes, max_size=100).map(lambda owners: np.array(owners, dtype=np.uint8))


@given(tables)
def test_saved_placement_comes_back_and_leaving_counts_as_main(owners: Owners) -> None:
    saved = to_saved(owners, CODES)
    settled = np.where(owners == LEAVING, MAIN, owners)
    assert from_saved(saved, CODES).tolist() == settled.tolist()
    assert (saved == SAVED_NOWHERE).tolist() == (owners == NOWHERE).tolist()


@given(tables)
def test_every_page_is_counted_for_one_host(owners: Owners) -> None:
    counts = pages_by_host(owners, CODES)
    assert len(counts) == 1 + SUBS
    assert sum(counts) == np.count_nonzero(owners)
    assert counts[0] == np.isin(owners, (MAIN, LEAVING)).sum()


def test_the_last_possible_sub_host_fits_a_byte() -> None:
    every = [sub_code(i) for i in range(256 - FIRST_SUB)]
    owners = np.array([every[-1]], dtype=np.uint8)
    saved = to_saved(owners, every)
    assert from_saved(saved, every).tolist() == owners.tolist()
    assert saved[0] != SAVED_NOWHERE


def test_hosts_are_told_apart_by_code_whatever_their_order() -> None:
    owners = np.array([20, MAIN, 17, NOWHERE], dtype=np.uint8)
    assert to_saved(owners, [20, 17]).tolist() == [1, 0, 2, SAVED_NOWHERE]
    assert pages_by_host(owners, [17, 20]) == [1, 1, 1]


def test_a_page_that_is_with_no_host_of_the_vm_cannot_be_saved() -> None:
    with pytest.raises(PagesLost, match="1 pages are with none"):
        to_saved(np.array([MAIN, 30], dtype=np.uint8), CODES)


def test_free_codes_are_nobodys() -> None:
    assert free_codes([FIRST_SUB, FIRST_SUB + 2], 2) == [FIRST_SUB + 1, FIRST_SUB + 3]
    with pytest.raises(NoRoom, match="without --lazy"):
        free_codes(CODES, 256 - FIRST_SUB)


def test_who_is_known_keeps_its_code() -> None:
    known = {f"h{number}": sub_code(number) for number in range(200)}
    assert codes_of([*known, "new"], known) == [*known.values(), sub_code(200)]
    assert codes_of(["new", "h7"], known) == [sub_code(200), sub_code(7)]
    with pytest.raises(NoRoom, match="241 sub hosts and part servers"):
        codes_of([f"n{number}" for number in range(41)], known)


@given(st.lists(st.booleans(), max_size=64), st.lists(st.booleans(), max_size=64))
def test_sets_have_the_same_digest_only_when_they_are_the_same(
    one: list[bool], other: list[bool]
) -> None:
    size = max(len(one), len(other))
    first, second = (np.array(each + [False] * (size - len(each)), bool) for each in (one, other))
    assert (digest(first) == digest(second)) is bool((first == second).all())


# One page's life, step by step, as the pager's code takes them; a crash may come after each.

SUB = sub_code(1)


@dataclass(frozen=True, slots=True)
class Page:
    """Where copies of a page are, and what the table says. Versions: the guest's writes."""

    owner: int
    written: int = 0
    ram: int | None = None
    outbox: int | None = None
    sub: int | None = None


def zero(page: Page) -> Iterator[Page]:
    yield (page := replace(page, ram=page.written))
    yield replace(page, owner=MAIN)


def write(page: Page) -> Iterator[Page]:
    yield replace(page, written=page.written + 1, ram=page.written + 1)


def take(page: Page) -> Iterator[Page]:
    # What is in the pipe at a crash Outbox.recover puts into the outbox, or drops while the
    # page is in the RAM file still; so the pipe is the outbox here.
    yield (page := replace(page, ram=None, outbox=page.ram))
    yield replace(page, owner=LEAVING)


def send(page: Page) -> Iterator[Page]:
    yield replace(page, sub=page.outbox)


def stored(page: Page) -> Iterator[Page]:
    yield (page := replace(page, owner=SUB))
    yield replace(page, outbox=None)


def take_back(page: Page) -> Iterator[Page]:
    yield (page := replace(page, ram=page.outbox))
    yield (page := replace(page, owner=MAIN))
    yield replace(page, outbox=None)


def page_in(page: Page) -> Iterator[Page]:
    yield (page := replace(page, ram=page.sub))
    yield replace(page, owner=MAIN)


def release(page: Page) -> Iterator[Page]:
    yield replace(page, sub=None)


def may(page: Page) -> list[str]:
    """What the pager, the guest or the sub host may do next; named for `STEPS`."""
    match page.owner:
        case 0:
            return ["zero"]
        case 1 if page.sub is not None:
            return ["write", "release"]  # recalled: it does not leave before that
        case 1:
            return ["write", "take"]
        case 2 if page.sub is None:
            return ["send", "take_back"]
        case 2:
            return ["stored", "take_back"]
        case _:
            return ["page_in"]


STEPS = {
    each.__name__: each for each in (zero, write, take, send, stored, take_back, page_in, release)
}


def recovered(page: Page) -> Page:
    """The page once its pager's successor and the sub host have compared notes."""
    found = recover(
        np.array([page.owner], dtype=np.uint8),
        np.array([page.ram is not None]),
        np.array([page.outbox is not None]),
    )
    assert not found.lost.any(), page
    page = replace(page, owner=int(found.owners[0]))
    if found.stale_outbox[0]:
        page = replace(page, outbox=None)
    return page if page.owner == SUB else replace(page, sub=None)


def check(page: Page) -> None:
    """The table names the one place that holds the guest's last write."""
    places = {NOWHERE: None, MAIN: page.ram, LEAVING: page.outbox, SUB: page.sub}
    held = places[page.owner]
    if page.owner == NOWHERE:
        assert page.written == 0
    else:
        assert held == page.written, page
    others = [each for code, each in places.items() if code != page.owner]
    assert all(each is None for each in others), page


@given(st.data())
def test_a_crash_after_any_step_loses_nothing(data: st.DataObject) -> None:
    page = Page(NOWHERE)
    for _ in range(data.draw(st.integers(1, 30))):
        step = STEPS[data.draw(st.sampled_from(may(page)))]
        for moment in step(page):
            check(recovered(moment))
            page = moment
        if data.draw(st.booleans()):
            page = recovered(page)


def test_every_state_within_eight_steps_recovers() -> None:
    seen, fresh = set[Page](), {Page(NOWHERE)}
    for _ in range(8):
        moments = {m for page in fresh for name in may(page) for m in STEPS[name](page)}
        ends = {last(STEPS[name](page)) for page in fresh for name in may(page)}
        for moment in moments:
            check(recovered(moment))
        seen |= fresh
        fresh = {replace(each, written=each.written) for each in ends} - seen
    assert len(seen) > 30


def last(moments: Iterator[Page]) -> Page:
    *_, end = moments
    return end


@pytest.mark.parametrize("owner", [MAIN, LEAVING])
def test_a_page_that_is_in_no_place_is_reported_lost(owner: int) -> None:
    none = np.array([False])
    assert recover(np.array([owner], dtype=np.uint8), none, none).lost.all()


@pytest.mark.parametrize("owner", [NOWHERE, SUB])
def test_a_page_that_is_not_the_main_host_s_is_not_missed(owner: int) -> None:
    none = np.array([False])
    found = recover(np.array([owner], dtype=np.uint8), none, none)
    assert not found.lost.any()
    assert found.owners.tolist() == [owner]


@given(tables, st.randoms())
def test_recovering_twice_changes_nothing_more(owners: Owners, random: object) -> None:
    rng = np.random.default_rng(abs(hash(random)) % 2**32)
    in_ram, in_outbox = rng.random((2, owners.size)) < 0.5
    once = recover(owners, in_ram, in_outbox)
    in_outbox &= ~once.stale_outbox
    twice = recover(once.owners, in_ram, in_outbox)
    assert not twice.stale_outbox.any()
    assert (twice.owners == once.owners).all()
    assert (twice.lost == once.lost).all()
