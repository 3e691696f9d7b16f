"""Whether a VM's shares fit the hosts: decided here, before Ray is asked.

Ray would leave a reservation that can never be met pending, and say nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from dcres.config import format_size
from dcres.errors import ConfigError, NoRoom, NotFound

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class HostInfo:
    """A node with memory for VMs; the head node has none and is not a host."""

    name: str
    node_id: str
    address: str
    memory_total_bytes: int
    memory_free_bytes: int
    alive: bool


@dataclass(frozen=True, slots=True)
class Seen:
    """A live host: the memory that is free there, and the parts of the checkpoint it has."""

    info: HostInfo
    parts: tuple[str, ...]
    trouble: str = ""  # why this host could not be the main host; see `naming.trouble`


@dataclass(frozen=True, slots=True)
class Around:
    """The hosts that could take part in a restore, and a sentence for each that says nothing."""

    seen: tuple[Seen, ...]
    left_out: tuple[str, ...] = ()


def whole_mib(length_bytes: int) -> int:
    """How many MiB are reserved for a share: Ray counts ``vm_memory`` in them."""
    return -(-length_bytes // MIB)


def free_sentence(hosts: Sequence[HostInfo]) -> str:
    """What is free where, for people."""
    free = [
        f"{host.name} has {format_size(host.memory_free_bytes)}" for host in hosts if host.alive
    ]
    return f"{', '.join(free)} free" if free else "the cluster has no host"


def host_named(name: str, hosts: Sequence[HostInfo]) -> HostInfo:
    """The live host of that name. Raises NotFound."""
    alive = {host.name: host for host in hosts if host.alive}
    if name not in alive:
        raise NotFound(f"no host {name} in the cluster; it has {', '.join(alive) or 'none'}")
    return alive[name]


def hosts_to_join(
    shares_bytes: Sequence[int], taken: Collection[str], hosts: Sequence[HostInfo]
) -> list[str]:
    """A live host for each share that is none of `taken`: the larger, the more room it has.

    Raises NoRoom.
    """
    others = [host for host in hosts if host.alive and host.name not in taken]
    others.sort(key=lambda host: host.memory_free_bytes, reverse=True)
    found: dict[int, str] = {}
    largest_first = sorted(range(len(shares_bytes)), key=lambda each: -shares_bytes[each])
    for place, each in enumerate(largest_first):
        share = shares_bytes[each]
        if place == len(others) or whole_mib(share) * MIB > others[place].memory_free_bytes:
            raise NoRoom(f"no host that is not the VM's already has {format_size(share)} free")
        found[each] = others[place].name
    return [found[each] for each in range(len(shares_bytes))]


def require_room(
    shares_bytes: Sequence[int], names: Sequence[str] | None, hosts: Sequence[HostInfo]
) -> None:
    """NoRoom unless every share fits a live host of its own: those of `names`, or any."""
    if names is not None:
        _require_room_on(shares_bytes, names, hosts)
        return
    # Largest share to the emptiest host: if that fails for one share, every way does.
    places = sorted((h.memory_free_bytes for h in hosts if h.alive), reverse=True)
    if len(places) < len(shares_bytes):
        raise NoRoom(f"{len(shares_bytes)} hosts are needed: {free_sentence(hosts)}")
    for share, free in zip(sorted(shares_bytes, reverse=True), places, strict=False):
        if whole_mib(share) * MIB > free:
            raise NoRoom(
                f"a share of {format_size(share)} fits no host that is left: {free_sentence(hosts)}"
            )


def _require_room_on(
    shares_bytes: Sequence[int], names: Sequence[str], hosts: Sequence[HostInfo]
) -> None:
    if len(names) != len(shares_bytes) or len(set(names)) != len(names):
        raise ConfigError(
            f"{len(shares_bytes)} shares need as many different hosts, not {', '.join(names)}"
        )
    for share, name in zip(shares_bytes, names, strict=True):
        if whole_mib(share) * MIB > host_named(name, hosts).memory_free_bytes:
            raise NoRoom(
                f"a share of {format_size(share)} does not fit host {name}: {free_sentence(hosts)}"
            )
