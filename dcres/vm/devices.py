"""What a VM consists of besides its memory, and whether a checkpoint of it could be restored.

A restore starts QEMU with the command line of the start, and QEMU loads a VM core only into the
very devices that it was saved from. What somebody plugged in or out since, by a monitor of his
own, or the guest by ejecting it, is on no command line; nor is a file that a disk's writes go to
since. So the devices of the start are written down, and those of a checkpoint compared with them.

The lists are as QEMU has them: QOM paths for devices (CPUs and memory are among them), block nodes
by name, the node that each drive has, and networks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dcres.errors import UnsafeDevice
from dcres.vm.monitor import Monitor

PLUGGED = ("/machine/peripheral", "/machine/peripheral-anon")
_BUILT_IN = "/machine/unattached"  # what the machine and -nic made
_CHILD = re.compile(r"child<(.+)>")
_NETWORK = re.compile(r"^[ \\]*(\S+): .*?type=([\w-]+)", re.MULTILINE)
_PLACE = ("parent_bus", "addr")
_REMEDY = (
    "a restore brings back the devices of the start, so no checkpoint is taken; undo this through "
    "the monitor that it was done with, or stop the VM and start it with what it should have"
)


def children(monitor: Monitor, folder: str) -> list[tuple[str, str]]:
    """Path and type of each object in a QOM folder."""
    found = []
    for child in monitor.execute("qom-list", {"path": folder}):
        if (kind := _CHILD.fullmatch(child["type"])) is not None:
            found.append((f"{folder}/{child['name']}", kind[1]))
    return found


def networks(monitor: Monitor) -> str:
    """HMP's ``info network``; QMP has no such list. A name that QEMU made up stays."""
    said: str = monitor.execute("human-monitor-command", {"command-line": "info network"})
    return said


def network_types(said: str) -> list[tuple[str, str]]:
    """Name and type of each network in what `networks` said."""
    return _NETWORK.findall(said)


def _plugged(monitor: Monitor, path: str, kind: str) -> str:
    """A device's type and where it is plugged in: another place is another device to QEMU."""
    names = {each["name"] for each in monitor.execute("qom-list", {"path": path})}
    place = (
        str(monitor.execute("qom-get", {"path": path, "property": each}))
        for each in _PLACE
        if each in names
    )
    return " at ".join([kind, *place])


def _block(nodes: list[dict[str, Any]], drives: list[dict[str, Any]]) -> dict[str, str]:
    found = {}
    for node in nodes:
        name, mode = _node_name(node), "read-only" if node["ro"] else "writable"
        found[f"block node {name}"] = f"{node['drv']}, {node.get('file', 'no file')}, {mode}"
    for drive in drives:
        if "qdev" in drive:
            medium = drive.get("inserted")
            found[f"medium of {drive['qdev']}"] = "none" if medium is None else _node_name(medium)
    return found


def _node_name(node: Mapping[str, Any]) -> str:
    """A block node's name; of one that QEMU made up, which a medium put back does not get again,
    what the node is.
    """
    name: str = node["node-name"]
    return f"of {node.get('file', '')} ({node['drv']})" if name.startswith("#") else name


def inventory(monitor: Monitor) -> dict[str, str]:
    """What the VM consists of: for each thing by name, what it is. Raises MonitorError."""
    found = {
        f"device {path}": _plugged(monitor, path, kind)
        for folder in PLUGGED
        for path, kind in children(monitor, folder)
    }
    built_in = children(monitor, _BUILT_IN)
    found |= {f"device {path}": kind for path, kind in built_in if "/device[" in path}
    found |= {f"network {name}": kind for name, kind in network_types(networks(monitor))}
    nodes = monitor.execute("query-named-block-nodes", {"flat": True})
    return found | _block(nodes, monitor.execute("query-block"))


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """How two inventories of a VM differ, thing by thing; pure."""
    said = []
    for name in sorted(before.keys() | now.keys()):
        was, is_ = before.get(name), now.get(name)
        if was is None:
            said.append(f"{name} ({is_}) was added since the start")
        elif is_ is None:
            said.append(f"{name} ({was}) was removed since the start")
        elif was != is_:
            said.append(f"{name} was {was} at the start and is {is_}")
    return said


def _persistent_bitmaps(monitor: Monitor) -> list[str]:
    return [
        f"{node['node-name']} {bitmap.get('name', '')}"
        for node in monitor.execute("query-named-block-nodes", {"flat": True})
        for bitmap in node.get("dirty-bitmaps", [])
        if bitmap.get("persistent") and not node["ro"]
    ]


def _obstacles(monitor: Monitor) -> list[str]:
    """What keeps QEMU from saving the VM, or its disks from being taken back."""
    said = []
    if reasons := monitor.execute("query-migrate").get("blocked-reasons"):
        said.append(
            f"QEMU cannot save this VM ({'; '.join(reasons)}); remove what it names from the VM, "
            "or release it in the guest"
        )
    if bitmaps := _persistent_bitmaps(monitor):
        said.append(
            f"disks have persistent dirty bitmaps ({', '.join(bitmaps)}), so QEMU could not "
            "revert them to a snapshot; remove the bitmaps with block-dirty-bitmap-remove"
        )
    return said


def require_saveable(monitor: Monitor, at_start: Mapping[str, str] | None = None) -> None:
    """UnsafeDevice unless a checkpoint of the VM as it is now could be taken and restored.

    `at_start` is its inventory from then. Raises MonitorError.
    """
    problems = _obstacles(monitor)
    if at_start is not None and (changed := changes(at_start, inventory(monitor))):
        problems.append(f"{', '.join(changed)}: {_REMEDY}")
    if problems:
        raise UnsafeDevice("; ".join(problems))
