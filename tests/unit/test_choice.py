"""Which hosts are chosen, against what must hold of any choice and against trying all of them."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcres.errors import NoRoom
from dcres.model.choice import Candidate, choose, choose_evenly, choose_for
from dcres.model.pages import PAGES_PER_MIB, mib_of

MIB = PAGES_PER_MIB


def host(name: str, free_mib: int, held: int = 0, *, main: bool = False) -> Candidate:
    return Candidate(name, free_mib * MIB, held, main)


@st.composite
def clusters(draw: st.DrawFn) -> list[Candidate]:
    hosts = draw(
        st.lists(st.tuples(st.integers(0, 6 * MIB), st.integers(0, 3), st.booleans()), max_size=6)
    )
    return [Candidate(f"h{at}", free, held, main) for at, (free, held, main) in enumerate(hosts)]


memories = st.integers(1, 20 * MIB)


def room(hosts: list[Candidate]) -> int:
    return sum(each.room_mib for each in hosts)


@given(memories, clusters())
def test_the_whole_memory_fits_what_was_chosen(memory: int, hosts: list[Candidate]) -> None:
    by_name = {each.name: each for each in hosts}
    if room(hosts) < mib_of(memory):
        with pytest.raises(NoRoom, match=f", {mib_of(memory) - room(hosts)} MiB more than"):
            choose(memory, hosts)
        return
    shares = choose(memory, hosts)
    assert sum(share for _, share in shares) == memory
    assert len({name for name, _ in shares}) == len(shares)
    assert all(0 < mib_of(share) <= by_name[name].room_mib for name, share in shares)
    chosen = [by_name[name] for name, _ in shares]
    assert chosen[0].room_mib == max(each.room_mib for each in chosen)
    assert shares[0][1] == min(memory, chosen[0].room_mib * MIB)


@given(memories, clusters())
def test_who_holds_nothing_is_chosen_only_if_the_holders_are_too_small(
    memory: int, hosts: list[Candidate]
) -> None:
    holders = [each for each in hosts if each.held_pages]
    if room(holders) >= mib_of(memory):
        assert choose(memory, hosts) == choose(memory, holders)


@given(memories, clusters(), st.integers(1, 7))
def test_as_many_hosts_as_were_asked_for_if_any_would_do(
    memory: int, hosts: list[Candidate], count: int
) -> None:
    fitting = [
        some
        for some in combinations([each for each in hosts if each.room_mib], count)
        if room(list(some)) >= mib_of(memory)
    ]
    if not fitting:
        with pytest.raises(NoRoom):
            choose_evenly(memory, hosts, count)
        return
    shares = choose_evenly(memory, hosts, count)
    by_name = {each.name: each for each in hosts}
    chosen = [by_name[name] for name, _ in shares]
    assert len(shares) == len(set(chosen)) == count
    assert sum(bool(each.held_pages) for each in chosen) == max(
        sum(bool(each.held_pages) for each in some) for some in fitting
    )
    assert chosen[0].room_mib == max(each.room_mib for each in chosen)


@given(memories, clusters(), st.integers(1, 7))
def test_shares_are_even_whole_and_enough(memory: int, hosts: list[Candidate], count: int) -> None:
    try:
        shares = choose_evenly(memory, hosts, count)
    except NoRoom:
        return
    by_name = {each.name: each for each in hosts}
    assert sum(share for _, share in shares) >= memory
    assert all(share > 0 and share % MIB == 0 for _, share in shares)
    most = max(share for _, share in shares)
    assert all(share in (most, by_name[name].room_mib * MIB) for name, share in shares)
    rooms = [by_name[name].room_mib for name, _ in shares]
    assert sum(min(each, most // MIB - 1) for each in rooms) < mib_of(memory), "less would do"


@given(memories, clusters().flatmap(lambda some: st.tuples(st.just(some), st.permutations(some))))
def test_the_order_of_the_candidates_does_not_matter(
    memory: int, orders: tuple[list[Candidate], list[Candidate]]
) -> None:
    hosts, shuffled = orders
    if room(hosts) >= mib_of(memory):
        assert choose(memory, hosts) == choose(memory, shuffled)
        count = len([each for each in hosts if each.room_mib])
        assert choose_evenly(memory, hosts, count) == choose_evenly(memory, shuffled, count)


def test_holders_come_first_and_the_roomiest_of_them_is_the_main_host() -> None:
    hosts = [host("a", 2, held=5), host("b", 3, held=5), host("c", 100)]
    assert choose(4 * MIB, hosts) == [("b", 3 * MIB), ("a", MIB)]


def test_as_few_hosts_as_do() -> None:
    hosts = [host("a", 2, held=9), host("b", 8, held=5), host("c", 4, held=7)]
    assert choose(8 * MIB, hosts) == [("b", 8 * MIB)]


def test_a_host_that_is_not_needed_any_more_is_left_out() -> None:
    assert choose(8 * MIB, [host("a", 1, held=9), host("b", 8)]) == [("b", 8 * MIB)]


def test_among_equals_the_holder_of_the_main_part_is_the_main_host() -> None:
    hosts = [host("a", 4, held=7), host("b", 4, held=7, main=True), host("c", 4, held=9)]
    assert choose(12 * MIB, hosts)[0] == ("b", 4 * MIB)
    assert choose_evenly(6 * MIB, hosts, 3) == [("b", 2 * MIB), ("c", 2 * MIB), ("a", 2 * MIB)]


def test_the_last_share_is_what_is_left_to_the_page() -> None:
    assert choose(4 * MIB + 1, [host("a", 4), host("b", 4)]) == [("a", 4 * MIB), ("b", 1)]


def test_even_shares_spare_a_host_that_is_small() -> None:
    hosts = [host("a", 1, held=1), host("b", 9, held=1), host("c", 9)]
    assert choose_evenly(9 * MIB, hosts, 3) == [("b", 4 * MIB), ("a", MIB), ("c", 4 * MIB)]


def test_a_holder_gives_way_if_the_memory_would_not_fit() -> None:
    hosts = [host("a", 2, held=1), host("b", 3, held=1), host("c", 9)]
    assert choose_evenly(5 * MIB, hosts, 2) == [("b", 3 * MIB), ("a", 2 * MIB)]
    assert choose_evenly(8 * MIB, hosts, 2) == [("c", 5 * MIB), ("b", 3 * MIB)]


def test_sentences() -> None:
    hosts = [host("a", 2, held=1), host("b", 0, held=1), host("c", 3)]
    sentence = "the VM has 9 MiB of memory, 4 MiB more than all hosts have room for; free memory"
    with pytest.raises(NoRoom, match=sentence):
        choose(9 * MIB, hosts)
    with pytest.raises(NoRoom, match="6 MiB more than any 1 of the hosts have room for"):
        choose_evenly(9 * MIB, hosts, 1)
    with pytest.raises(NoRoom, match="3 hosts are asked for, but only 2 have room; ask for fewer"):
        choose_evenly(MIB, hosts, 3)


shares_of_layouts = st.lists(st.integers(1, 6 * MIB), min_size=1, max_size=5)


@given(shares_of_layouts, clusters())
def test_every_share_of_a_layout_finds_a_host_if_there_is_a_way(
    shares: list[int], hosts: list[Candidate]
) -> None:
    by_name = {each.name: each for each in hosts}
    # A way: the largest share on the roomiest host, and so on.
    rooms = sorted((each.room_mib for each in hosts), reverse=True)
    sizes = sorted(map(mib_of, shares), reverse=True)
    if len(rooms) < len(sizes) or any(map(int.__lt__, rooms, sizes)):
        with pytest.raises(NoRoom, match="has room for a share of"):
            choose_for(shares, hosts)
        return
    chosen = choose_for(shares, hosts)
    assert len(set(chosen)) == len(chosen) == len(shares)
    for name, share in zip(chosen, shares, strict=True):
        assert by_name[name].room_mib >= mib_of(share)


def test_a_layout_goes_to_who_holds_slices_and_its_main_share_to_who_holds_the_main_part() -> None:
    hosts = [host("a", 9), host("b", 9, 5), host("c", 9, 1, main=True), host("d", 2)]
    assert choose_for([4 * MIB, 8 * MIB], hosts) == ["c", "b"]
    assert choose_for([MIB, MIB, MIB], hosts) == ["c", "b", "d"], "large hosts stay free"
