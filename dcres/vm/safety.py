"""Refuse VMs whose memory is written behind the page table's back, or that checkpoints would miss.

Remote paging takes a page away by punching it out of the RAM file, and finds changes through
write protection. Both see what goes through page tables: vCPUs, QEMU's own threads, buffered
I/O. They do not see a device or a kernel thread that holds a page pinned and writes to it by
its physical address: such writes go to a page that is no longer the guest's, and are lost
without a word. So each way to pin guest memory is refused before the VM first runs.

A checkpoint has the disks of the VM file. One that came in ``extra_args`` and is written to would
be newer than the memory that comes back, and is refused as well.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcres.errors import UnsafeDevice
from dcres.vm.devices import PLUGGED, children, network_types, networks
from dcres.vm.monitor import Monitor

RAM_ID = "ram"

# Type name of a device, by its beginning → what is wrong with it and what to use instead.
_DEVICES = {
    "vfio-": "gives a host device direct access to guest memory; use an emulated device",
    "vhost-user-": "shares guest memory with another process; use the virtio device",
    "vhost-vdpa-": "gives a host device direct access to guest memory; use the virtio device",
    "vhost-scsi": "lets the kernel's SCSI target pin guest memory; use virtio-scsi or virtio-blk",
    "scsi-generic": "lets SG_IO pin guest memory; use scsi-hd or virtio-blk",
    "scsi-block": "lets SG_IO pin guest memory; use scsi-hd or virtio-blk",
    "virtio-balloon": "drops pages of the RAM file by itself; leave it out",
    "virtio-mem": "adds and drops memory by itself; give the VM all of its memory at start",
    "virtio-pmem": "maps memory that is not in the RAM file; use a disk",
    "ivshmem": "maps memory that is not in the RAM file; use a network device",
    "pc-dimm": "adds memory that is not in the RAM file; give the VM all of its memory at start",
    "nvdimm": "adds memory that is not in the RAM file; use a disk",
    "pvrdma": "pins guest memory for RDMA; use virtio-net",
}
_NODE_DRIVERS = {
    "nvme": "(nvme://) writes guest memory directly; use the host's block device",
    "virtio-blk-vhost-user": "shares guest memory with another process; use a qcow2 file",
    "virtio-blk-vhost-vdpa": "writes guest memory directly; use a qcow2 file",
    "virtio-blk-vfio-pci": "writes guest memory directly; use a qcow2 file",
    "nvme-io_uring": "pins guest memory; use a qcow2 file",
}
_NETDEVS = ("vhost-user", "vhost-vdpa", "af-xdp")


@dataclass(frozen=True, slots=True)
class Facts:
    """What QEMU and the kernel say about one VM.

    `disks` are the names of the block nodes that checkpoints have, None if that does not matter.
    `block_nodes` and `memory` are the answers to query-named-block-nodes and query-memdev;
    `devices` are pairs of path and type; `network` is HMP's ``info network``; the numbers are VmLck
    and VmPin of ``/proc/PID/status`` and ShmemPmdMapped of the RAM file's mapping.
    """

    block_nodes: tuple[Mapping[str, Any], ...] = ()
    disks: frozenset[str] | None = frozenset()
    devices: tuple[tuple[str, str], ...] = ()
    network: str = ""
    memory: tuple[Mapping[str, Any], ...] = ()
    locked_kib: int = 0
    pinned_kib: int = 0
    huge_kib: int = 0


def _block_problems(facts: Facts) -> list[str]:
    problems = []
    for path in sorted(_unsaved_files(facts)):
        problems.append(
            f"{path} may be written to and no checkpoint would have it; list it under disks, or "
            "attach it with readonly=on (-drive) or read-only=on (-blockdev)"
        )
    for node in facts.block_nodes:
        name = f"block node {node['node-name']} ({node.get('file', 'no file')})"
        if node.get("cache", {}).get("direct"):
            problems.append(
                f"{name} has cache.direct=on: its I/O writes guest memory behind the page table; "
                "set cache.direct=off"
            )
        if node["drv"] in _NODE_DRIVERS:
            problems.append(f"{name}: driver {node['drv']} {_NODE_DRIVERS[node['drv']]}")
    return problems


def _unsaved_files(facts: Facts) -> set[str]:
    """What block nodes may write to that are no disk of the VM file; most files have two nodes."""
    if facts.disks is None:
        return set()
    written = (node for node in facts.block_nodes if not node["ro"])
    return {
        node.get("file") or f"block node {node['node-name']}"
        for node in written
        if node["node-name"] not in facts.disks
    }


def _device_problems(devices: Iterable[tuple[str, str]]) -> list[str]:
    return [
        f"device {path} ({kind}) {why}"
        for path, kind in devices
        for beginning, why in _DEVICES.items()
        if kind.startswith(beginning)
    ]


def _network_problems(network: str) -> list[str]:
    return [
        f"network {name} is of type {kind}, which shares guest memory; use tap or user"
        for name, kind in network_types(network)
        if kind in _NETDEVS
    ]


def _memory_problems(facts: Facts) -> list[str]:
    problems = []
    backends = {backend.get("id"): backend for backend in facts.memory}
    if RAM_ID not in backends or not backends[RAM_ID]["share"]:
        problems.append(
            f"guest RAM is not the shared memory backend {RAM_ID!r}; leave memory-backend= out of "
            "extra_args"
        )
    for other in sorted(str(name) for name in backends if name != RAM_ID):
        problems.append(f"memory backend {other} is not in the RAM file; leave it out")
    if facts.locked_kib:
        problems.append(
            f"QEMU has locked {facts.locked_kib} KiB of memory, which page-out cannot move; leave "
            "mem-lock=on out and raise no RLIMIT_MEMLOCK for it"
        )
    if facts.pinned_kib:
        problems.append(
            f"{facts.pinned_kib} KiB of QEMU's memory are pinned for direct access by a device; "
            "leave RDMA, VFIO and registered I/O buffers out"
        )
    if facts.huge_kib:
        problems.append(
            f"{facts.huge_kib} KiB of guest RAM are in huge pages, which cannot move one by one; "
            "mount the RAM folder's tmpfs with huge=never"
        )
    return problems


def problems(facts: Facts) -> list[str]:
    """One sentence for each thing that makes remote paging of this VM unsafe; pure."""
    return [
        *_block_problems(facts),
        *_device_problems(facts.devices),
        *_network_problems(facts.network),
        *_memory_problems(facts),
    ]


def _status_kib(pid: int, *names: str) -> list[int]:
    text = Path(f"/proc/{pid}/status").read_text()
    found = dict(re.findall(r"^(\w+):\s*(\d+) kB$", text, re.MULTILINE))
    return [int(found.get(name, 0)) for name in names]


def huge_kib_of(smaps: str, ram: Path) -> int:
    """KiB of huge pages in the mappings of file `ram`, from the text of ``/proc/PID/smaps``."""
    total, ours = 0, False
    for line in smaps.splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            ours = line.endswith(f" {ram}")
        elif ours and line.startswith("ShmemPmdMapped:"):
            total += int(line.split()[1])
    return total


def gather(monitor: Monitor, pid: int, ram: Path, disks: Collection[str] | None) -> Facts:
    """Ask QEMU and the kernel. Raises MonitorError; OSError when the process has ended."""
    devices = (each for folder in PLUGGED for each in children(monitor, folder))
    locked_kib, pinned_kib = _status_kib(pid, "VmLck", "VmPin")
    return Facts(
        block_nodes=tuple(monitor.execute("query-named-block-nodes")),
        disks=None if disks is None else frozenset(disks),
        devices=tuple(devices),
        network=networks(monitor),
        memory=tuple(monitor.execute("query-memdev")),
        locked_kib=locked_kib,
        pinned_kib=pinned_kib,
        huge_kib=huge_kib_of(Path(f"/proc/{pid}/smaps").read_text(), ram),
    )


def require_safe(monitor: Monitor, pid: int, ram: Path, disks: Collection[str] | None = ()) -> None:
    """Raise UnsafeDevice, naming each device and its remedy, unless the VM may be paged and saved.

    `disks` are the block nodes that checkpoints have (`command.owned_nodes`), None where others
    may be. To be called before the first `Monitor.cont`, and again after a device was added.
    """
    found = problems(gather(monitor, pid, ram, disks))
    if found:
        raise UnsafeDevice("; ".join(found))
