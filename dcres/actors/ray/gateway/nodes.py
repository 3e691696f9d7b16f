"""The hosts of the cluster, and how much memory for VMs each has left."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray
from ray.util.placement_group import placement_group_table

from dcres.actors.control.room import MIB, HostInfo

LIVE_GROUPS = ("PENDING", "CREATED", "RESCHEDULING")  # states of a placement group


def hosts() -> list[HostInfo]:
    """All hosts that Ray knows, by name; dead ones too, unless the name is in use again."""
    used = _reserved_by_node()
    found: dict[str, HostInfo] = {}
    for node in sorted(ray.nodes(), key=lambda node: bool(node["Alive"])):
        name = _host_name(node)
        if name is not None:
            found[name] = _host_info(name, node, used.get(node["NodeID"], 0))
    return [found[name] for name in sorted(found)]


def _host_name(node: Mapping[str, Any]) -> str | None:
    """The label ``dcres-host``; a dead node has lost its resources but not its labels."""
    name = node["Labels"].get("dcres-host")
    return None if name is None else str(name)


def _host_info(name: str, node: Mapping[str, Any], used_bytes: int) -> HostInfo:
    total = int(node["Resources"].get("vm_memory", 0)) * MIB
    return HostInfo(
        name=name,
        node_id=node["NodeID"],
        address=node["NodeManagerAddress"],
        memory_total_bytes=total,
        memory_free_bytes=max(total - used_bytes, 0),
        alive=node["Alive"],
    )


def _reserved_by_node() -> dict[str, int]:
    """Node id → bytes of vm_memory in placement groups.

    Ray's own view of available resources lags behind by a heartbeat; this table does not.
    """
    used: dict[str, int] = {}
    for group in placement_group_table().values():
        if group["state"] not in LIVE_GROUPS:
            continue
        for index, resources in group["bundles"].items():
            node_id = group["bundles_to_node_id"].get(index, "")
            share = int(resources.get("vm_memory", 0)) * MIB
            used[node_id] = used.get(node_id, 0) + share
    return used
