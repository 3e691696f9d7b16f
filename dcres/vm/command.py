"""QEMU's command line, as a pure function of the VM file and of where things are kept."""

from __future__ import annotations

import json
import uuid
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from dcres.config import Accel, Disk, VmSpec, format_size
from dcres.errors import ConfigError

QEMU = "qemu-system-x86_64"
MACHINE = "q35"  # an alias, of the newest version that this QEMU knows
# sockaddr_un.sun_path holds 108 bytes with the final NUL (unix(7)).
MAX_SOCKET_PATH_BYTES = 107
# QEMU rounds -m up to this and then refuses a backend of another size.
RAM_MULTIPLE_BYTES = 8192


@dataclass(frozen=True, slots=True)
class VmFiles:
    """Where one VM's run-time files are: guest RAM on tmpfs, the rest in a folder of its own."""

    ram: Path
    monitor: Path
    console: Path
    log: Path

    @classmethod
    def of(cls, name: str, run: Path, ram: Path) -> VmFiles:
        """The usual names: ``RAM/NAME.ram`` and ``RUN/NAME/{qmp.sock, console.log, qemu.log}``."""
        folder = run / name
        return cls(
            ram=ram / f"{name}.ram",
            monitor=folder / "qmp.sock",
            console=folder / "console.log",
            log=folder / "qemu.log",
        )


def disk_node(index: int) -> str:
    """The block node name of the disk at `index` of the VM file."""
    return f"disk{index}"


def disk_nodes(spec: VmSpec) -> list[str]:
    """The block node names of all disks, in order."""
    return [disk_node(index) for index in range(len(spec.disks))]


def owned_nodes(spec: VmSpec) -> list[str]:
    """The names of all block nodes that the disks of the VM file have."""
    return [name for node in disk_nodes(spec) for name in (node, _file_node(node))]


def _file_node(node: str) -> str:
    return f"{node}-file"


def _quote(path: Path) -> str:
    """A path inside a QEMU ``key=value,…`` option: a comma is written twice."""
    return str(path).replace(",", ",,")


def _accel(accel: Accel) -> str:
    match accel:
        case Accel.TCG:
            return "tcg,thread=multi"
        case Accel.KVM:
            return "kvm"
        case Accel.AUTO:
            raise ValueError("choose between kvm and tcg first (dcres.vm.accel)")


def _disk(index: int, disk: Disk, on_device: bool) -> list[str]:
    cache = {"direct": disk.cache_direct}
    node = {
        "driver": disk.format,
        "node-name": disk_node(index),
        "cache": cache,
        "file": {
            "driver": "host_device" if on_device else "file",
            "node-name": _file_node(disk_node(index)),
            "filename": str(disk.path),
            "aio": "threads",
            "cache": cache,
        },
    }
    device = f"virtio-blk-pci,drive={disk_node(index)},id=virtio-{disk_node(index)}"
    return ["-blockdev", json.dumps(node), "-device", device]


def _check(spec: VmSpec, files: VmFiles) -> None:
    length = len(str(files.monitor).encode())
    if length > MAX_SOCKET_PATH_BYTES:
        raise ConfigError(
            f"the monitor socket {files.monitor} has {length} bytes and a Unix socket's path at "
            f"most {MAX_SOCKET_PATH_BYTES}; set DCRES_RUN to a shorter folder"
        )
    if spec.memory % RAM_MULTIPLE_BYTES:
        raise ConfigError(
            f"memory of VM {spec.name} is {format_size(spec.memory)}; QEMU wants a multiple of "
            f"{RAM_MULTIPLE_BYTES} bytes"
        )


def qemu_command(
    spec: VmSpec,
    files: VmFiles,
    accel: Accel,
    *,
    incoming: bool = False,
    devices: Collection[Path] = (),
    qemu: str = QEMU,
    machine: str = MACHINE,
) -> list[str]:
    """The command line: the VM is stopped (``-S``), with guest RAM in the shared file `files.ram`.

    With `incoming` it waits for a VM core instead of booting; `machine` is then the versioned
    machine type that the core was saved from, so that a newer QEMU can load it. `devices` are
    those disks that are block devices and no files. Raises ConfigError for a socket path that is
    too long and for memory that QEMU would round.
    """
    _check(spec, files)
    kib = f"{spec.memory >> 10}K"
    argv = [
        qemu,
        *("-name", f"guest={spec.name},debug-threads=on"),
        *("-uuid", str(uuid.uuid5(uuid.NAMESPACE_DNS, f"{spec.name}.dcres"))),
        *("-machine", f"{machine},memory-backend=ram"),
        *("-accel", _accel(accel)),
        # discard-data=on would let QEMU drop the file's content when it ends.
        "-object",
        f"memory-backend-file,id=ram,size={kib},mem-path={_quote(files.ram)},"
        "share=on,discard-data=off",
        *("-m", kib),
        *("-smp", str(spec.vcpus)),
        *("-nodefaults", "-no-user-config", "-display", "none"),
        # A guest that powers itself off leaves QEMU in run state shutdown, which tells for as long
        # as it takes; a QEMU that had ended would look as if it had crashed. Signals still end it.
        "-no-shutdown",
        *("-chardev", f"file,id=console,path={_quote(files.console)},append=on"),
        *("-serial", "chardev:console"),
        *("-qmp", f"unix:{_quote(files.monitor)},server=on,wait=off"),
    ]
    if spec.kernel is not None:
        argv += ["-kernel", str(spec.kernel), "-append", spec.append]
    if spec.initrd is not None:
        argv += ["-initrd", str(spec.initrd)]
    for index, disk in enumerate(spec.disks):
        argv += _disk(index, disk, disk.path in devices)
    argv.append("-S")
    if incoming:
        argv += ["-incoming", "defer"]
    return [*argv, *spec.extra_args]
