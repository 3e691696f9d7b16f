"""Whether shares fit hosts: the same answer as trying every way, and words that help."""

from __future__ import annotations

from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcres.actors.control.room import (
    MIB,
    HostInfo,
    free_sentence,
    host_named,
    hosts_to_join,
    require_room,
    whole_mib,
)
from dcres.errors import ConfigError, NoRoom, NotFound


def host(name: str, free_mib: int, *, alive: bool = True) -> HostInfo:
    return HostInfo(name, f"id-{name}", "127.0.0.1", 8 * MIB, free_mib * MIB, alive)


def fits(shares: list[int], hosts: list[HostInfo], names: list[str] | None = None) -> bool:
    try:
        require_room(shares, names, hosts)
    except NoRoom:
        return False
    return True


@given(
    st.lists(st.integers(1, 4 * MIB), min_size=1, max_size=4),
    st.lists(st.integers(0, 4), max_size=4),
)
def test_it_fits_if_any_assignment_does(shares: list[int], free: list[int]) -> None:
    hosts = [host(f"h{number}", mib) for number, mib in enumerate(free)]
    possible = any(
        all(whole_mib(share) <= mib for share, mib in zip(shares, order, strict=True))
        for order in permutations(free, len(shares))
    )
    assert fits(shares, hosts) == possible


@given(
    st.lists(st.integers(1, 4 * MIB), max_size=4),
    st.lists(st.integers(0, 4), max_size=5),
)
def test_hosts_are_found_to_join_if_any_assignment_does(shares: list[int], free: list[int]) -> None:
    """All but the first, which is the VM's already, and the last, which is dead."""
    hosts = [host(f"h{number}", mib, alive=number < 4) for number, mib in enumerate(free)]
    others = {each.name: each.memory_free_bytes for each in hosts[1:] if each.alive}
    possible = any(
        all(
            whole_mib(share) * MIB <= others[name]
            for share, name in zip(shares, order, strict=True)
        )
        for order in permutations(others, len(shares))
    )
    if not possible:
        with pytest.raises(NoRoom, match="no host that is not the VM's already has"):
            hosts_to_join(shares, {"h0"}, hosts)
        return
    found = hosts_to_join(shares, {"h0"}, hosts)
    assert len(set(found)) == len(shares)
    for share, name in zip(shares, found, strict=True):
        assert whole_mib(share) * MIB <= others[name]


def test_a_dead_host_has_no_room() -> None:
    hosts = [host("h0", 4), host("h1", 4, alive=False)]
    with pytest.raises(NoRoom, match="2 hosts are needed: h0 has 4 MiB free"):
        require_room([MIB, MIB], None, hosts)
    with pytest.raises(NotFound, match="no host h1 in the cluster; it has h0"):
        require_room([MIB], ["h1"], hosts)


def test_prescribed_hosts_are_asked_in_order() -> None:
    hosts = [host("h0", 1), host("h1", 4)]
    require_room([4 * MIB, MIB], ["h1", "h0"], hosts)
    with pytest.raises(NoRoom, match=r"a share of 4 MiB does not fit host h0: h0 has 1 MiB, h1"):
        require_room([4 * MIB, MIB], ["h0", "h1"], hosts)


@pytest.mark.parametrize("names", [["h0"], ["h0", "h0"], ["h0", "h1", "h2"]])
def test_as_many_different_hosts_as_shares(names: list[str]) -> None:
    hosts = [host(f"h{number}", 4) for number in range(3)]
    with pytest.raises(ConfigError, match="2 shares need as many different hosts"):
        require_room([MIB, MIB], names, hosts)


def test_shares_are_rounded_up_to_what_ray_counts() -> None:
    assert [whole_mib(length) for length in (4096, MIB, MIB + 4096)] == [1, 1, 2]
    assert not fits([MIB + 4096], [host("h0", 1)])


def test_a_cluster_without_hosts() -> None:
    assert free_sentence([]) == "the cluster has no host"
    with pytest.raises(NotFound, match="it has none"):
        host_named("h0", [])
