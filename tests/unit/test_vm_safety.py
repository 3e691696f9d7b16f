"""Which VMs are refused because something would write their memory behind the page table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dcres.vm.safety import Facts, huge_kib_of, problems


def node(**more: Any) -> dict[str, Any]:
    cache = {"writeback": True, "direct": False, "no-flush": False}
    made = {"node-name": "disk0", "drv": "qcow2", "file": "/d/a.qcow2", "ro": False, "cache": cache}
    return made | more


SAFE = Facts(
    block_nodes=(node(), node(**{"node-name": "cdrom", "drv": "raw", "ro": True})),
    disks=frozenset({"disk0"}),
    devices=(
        ("/machine/peripheral/virtio-disk0", "virtio-blk-pci"),
        ("/machine/peripheral-anon/device[0]", "virtio-net-pci"),
        ("/machine/peripheral-anon/device[1]", "nvme"),  # emulated: goes through QEMU
    ),
    network="virtio-net-pci.0: index=0,type=nic,model=virtio-net-pci\n \\ net0: index=0,type=tap\n",
    memory=({"id": "ram", "size": 1 << 29, "share": True, "prealloc": False},),
)


def test_an_ordinary_vm_is_safe() -> None:
    assert problems(SAFE) == []


def test_cache_direct() -> None:
    direct = node(cache={"writeback": True, "direct": True, "no-flush": False})
    (problem,) = problems(replace(SAFE, block_nodes=(direct,)))
    assert "disk0 (/d/a.qcow2) has cache.direct=on" in problem
    assert "set cache.direct=off" in problem


def test_a_disk_that_no_checkpoint_has() -> None:
    other = node(**{"node-name": "#block123", "file": "/d/data.raw"})
    (problem,) = problems(replace(SAFE, block_nodes=(*SAFE.block_nodes, other)))
    assert problem.startswith("/d/data.raw may be written to and no checkpoint would have it; ")
    assert problems(replace(SAFE, block_nodes=(other,), disks=None)) == []


@pytest.mark.parametrize("driver", ["nvme", "virtio-blk-vhost-vdpa", "virtio-blk-vfio-pci"])
def test_block_drivers_that_bypass(driver: str) -> None:
    (problem,) = problems(replace(SAFE, block_nodes=(node(drv=driver),)))
    assert f"driver {driver}" in problem


@pytest.mark.parametrize(
    "kind",
    [
        "vfio-pci",
        "vhost-user-fs-pci",
        "vhost-vdpa-device-pci",
        "vhost-scsi-pci",
        "virtio-balloon-pci",
        "virtio-mem-pci",
        "virtio-pmem-pci",
        "ivshmem-plain",
        "pc-dimm",
        "nvdimm",
        "scsi-generic",
        "pvrdma",
    ],
)
def test_devices(kind: str) -> None:
    devices = (*SAFE.devices, ("/machine/peripheral/x", kind))
    (problem,) = problems(replace(SAFE, devices=devices))
    assert problem.startswith(f"device /machine/peripheral/x ({kind}) ")
    assert "; " in problem, "the remedy follows"


@pytest.mark.parametrize("kind", ["vhost-user", "vhost-vdpa", "af-xdp"])
def test_networks(kind: str) -> None:
    network = f"virtio-net-pci.0: index=0,type=nic\n \\ net0: index=0,type={kind},path=x\n"
    (problem,) = problems(replace(SAFE, network=network))
    assert f"network net0 is of type {kind}" in problem


@pytest.mark.parametrize(
    ("memory", "words"),
    [
        ((), "not the shared memory backend"),
        (({"id": "ram", "share": False},), "not the shared memory backend"),
        (({"id": "ram", "share": True}, {"id": "more", "share": True}), "backend more is not"),
    ],
)
def test_memory_backends(memory: tuple[dict[str, Any], ...], words: str) -> None:
    (problem,) = problems(replace(SAFE, memory=memory))
    assert words in problem


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (replace(SAFE, locked_kib=4), "mem-lock=on"),
        (replace(SAFE, pinned_kib=4), "pinned"),
        (replace(SAFE, huge_kib=2048), "huge=never"),
    ],
)
def test_locked_pinned_and_huge(facts: Facts, words: str) -> None:
    (problem,) = problems(facts)
    assert words in problem


def test_every_problem_is_told() -> None:
    assert len(problems(replace(SAFE, locked_kib=4, huge_kib=2048, memory=()))) == 3


def test_huge_pages_are_counted_in_the_ram_file_only() -> None:
    smaps = (
        "7f0000000000-7f0000400000 rw-s 00000000 00:19 5    /dev/shm/a.ram\n"
        "Size:               4096 kB\nShmemPmdMapped:     2048 kB\nVmFlags: rd wr\n"
        "7f0000400000-7f0000800000 rw-s 00000000 00:19 6    /dev/shm/b.ram\n"
        "ShmemPmdMapped:     4096 kB\n"
    )
    assert huge_kib_of(smaps, Path("/dev/shm/a.ram")) == 2048
    assert huge_kib_of(smaps, Path("/dev/shm/c.ram")) == 0
