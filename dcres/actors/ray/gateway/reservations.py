"""Memory set aside for VMs: placement groups, one bundle per host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray.exceptions
from ray._private.state import state as ray_state
from ray.core.generated.gcs_pb2 import ActorTableData
from ray.util.placement_group import (
    PlacementGroup,
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from dcres.actors.control.room import MIB, free_sentence, require_room, whole_mib
from dcres.actors.ray.gateway import nodes
from dcres.actors.ray.gateway.actors import kill, poll
from dcres.actors.ray.gateway.nodes import LIVE_GROUPS
from dcres.errors import Conflict, NoRoom, NotFound


@dataclass(frozen=True, slots=True)
class Reservation:
    """Memory set aside: bundle i on a host of its own. A plain value; see `reserve`."""

    name: str

    def node_id_of(self, bundle: int) -> str:
        """The Ray node that bundle `bundle` lies on now; "" for none."""
        return str(self._table()["bundles_to_node_id"].get(bundle, ""))

    def host_of(self, bundle: int) -> str:
        """The host that bundle `bundle` lies on now. Raises NotFound if its host is dead."""
        node_id = self.node_id_of(bundle)
        for host in nodes.hosts():
            if host.node_id == node_id and host.alive:
                return host.name
        raise NotFound(f"no live host has part {bundle} of reservation {self.name}")

    @property
    def hosts(self) -> tuple[str, ...]:
        """The host of every bundle, in order."""
        return tuple(self.host_of(bundle) for bundle in range(len(self._table()["bundles"])))

    @property
    def held(self) -> dict[str, int]:
        """Bytes set aside by live host."""
        table = self._table()
        names = {host.node_id: host.name for host in nodes.hosts() if host.alive}
        found: dict[str, int] = {}
        for bundle, resources in table["bundles"].items():
            host = names.get(table["bundles_to_node_id"].get(bundle, ""))
            if host is not None:
                share = int(resources.get("vm_memory", 0)) * MIB
                found[host] = found.get(host, 0) + share
        return found

    @property
    def length_bytes(self) -> int:
        """What is set aside, on all its hosts."""
        bundles = self._table()["bundles"].values()
        return sum(int(bundle.get("vm_memory", 0)) for bundle in bundles) * MIB

    def _table(self) -> Any:
        return placement_group_table(group_named(self.name))


def reserve(
    name: str,
    shares_bytes: Sequence[int],
    hosts: Sequence[str] | None = None,
    timeout_s: float = 30.0,
) -> Reservation:
    """Set memory aside on as many different hosts as there are shares, or raise.

    With `hosts`, share i lies on host i. The reservation outlives this process; `release`
    ends it. Raises NoRoom with what is missing and what is free, Conflict if the name is
    taken, NotFound for a host that is not there.
    """
    taken = f"a reservation {name} exists already; release it first"
    if reservation(name) is not None:
        raise Conflict(taken)
    require_room(shares_bytes, hosts, nodes.hosts())
    bundles = [{"vm_memory": float(whole_mib(share))} for share in shares_bytes]
    for bundle, host in zip(bundles, hosts or [], strict=False):
        bundle[f"host:{host}"] = 0.001
    try:
        group = placement_group(bundles, "STRICT_SPREAD", name=name, lifetime="detached")
    except ray.exceptions.RaySystemError as error:
        raise Conflict(taken) from error
    if group.wait(timeout_s):
        return Reservation(name)
    release(name)
    raise NoRoom(f"no memory for {name} within {timeout_s:.3g} s: {free_sentence(nodes.hosts())}")


def reservation(name: str) -> Reservation | None:
    """The reservation of that name, if there is one."""
    try:
        table = placement_group_table(group_named(name))
    except NotFound:
        return None
    return Reservation(name) if table.get("state") in LIVE_GROUPS else None


def list_reservations(prefix: str) -> list[str]:
    """The names of live reservations that begin with `prefix`, sorted."""
    groups = placement_group_table().values()
    names = (group["name"] for group in groups if group["state"] in LIVE_GROUPS)
    return sorted(name for name in names if name.startswith(prefix))


def release(name: str) -> None:
    """End a reservation and every actor in it; true when this returns. Repeatable."""
    try:
        group = group_named(name)
    except NotFound:
        return
    for actor_name in _actors_in(group):
        kill(actor_name)
    remove_placement_group(group)
    poll(lambda: reservation(name) is None, f"reservation {name} is not removed")


def group_named(name: str) -> PlacementGroup:
    """The placement group of a reservation. Raises NotFound."""
    try:
        return get_placement_group(name)
    except ValueError:
        raise NotFound(f"there is no reservation {name}") from None


def _actors_in(group: PlacementGroup) -> list[str]:
    """The names of the live actors in a group, which only the raw actor table tells."""
    accessor = ray_state._connect_and_get_accessor()
    rows = (ActorTableData.FromString(row) for row in accessor.get_actor_table(None, None))
    return [
        row.name
        for row in rows
        if row.placement_group_id == group.id.binary() and row.state != ActorTableData.DEAD
    ]
