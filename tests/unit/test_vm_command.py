"""QEMU's command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dcres.config import Accel, VmSpec, vm_spec
from dcres.errors import ConfigError
from dcres.vm.command import VmFiles, disk_nodes, qemu_command


def spec(**more: Any) -> VmSpec:
    values: dict[str, Any] = {
        "name": "demo",
        "memory": "512MiB",
        "kernel": "/k/vmlinuz",
        "layout": {"main": "256MiB", "subs": ["256MiB"]},
    }
    return vm_spec(values | more)


FILES = VmFiles.of("demo", Path("/run/dcres"), Path("/dev/shm/dcres"))


def option(argv: list[str], name: str) -> str:
    return argv[argv.index(name) + 1]


def test_ram_is_a_shared_file_of_exactly_the_memory() -> None:
    argv = qemu_command(spec(), FILES, Accel.TCG)
    assert option(argv, "-object") == (
        "memory-backend-file,id=ram,size=524288K,mem-path=/dev/shm/dcres/demo.ram,"
        "share=on,discard-data=off"
    )
    assert option(argv, "-machine") == "q35,memory-backend=ram"
    assert option(argv, "-m") == "524288K"


def test_it_is_stopped_and_quiet() -> None:
    argv = qemu_command(spec(vcpus=3), FILES, Accel.TCG)
    assert {"-S", "-nodefaults", "-no-user-config"} <= set(argv)
    assert "-incoming" not in argv
    assert option(argv, "-display") == "none"
    assert option(argv, "-smp") == "3"
    assert option(argv, "-qmp") == "unix:/run/dcres/demo/qmp.sock,server=on,wait=off"
    assert option(argv, "-chardev") == "file,id=console,path=/run/dcres/demo/console.log,append=on"


@pytest.mark.parametrize(("accel", "words"), [("tcg", "tcg,thread=multi"), ("kvm", "kvm")])
def test_accel(accel: str, words: str) -> None:
    assert option(qemu_command(spec(), FILES, Accel(accel)), "-accel") == words


def test_auto_has_to_be_decided_before() -> None:
    with pytest.raises(ValueError, match="choose between kvm and tcg"):
        qemu_command(spec(), FILES, Accel.AUTO)


def test_kernel_initrd_and_append() -> None:
    argv = qemu_command(spec(initrd="/k/initrd", append="a b"), FILES, Accel.TCG)
    assert option(argv, "-kernel") == "/k/vmlinuz"
    assert option(argv, "-initrd") == "/k/initrd"
    assert option(argv, "-append") == "a b"


def test_disks() -> None:
    disks = [{"path": "/d/a,b.qcow2"}, {"path": "/d/c.qcow2"}]
    made = spec(kernel=None, disks=disks)
    argv = qemu_command(made, FILES, Accel.TCG)
    nodes = [json.loads(argv[i + 1]) for i, word in enumerate(argv) if word == "-blockdev"]
    assert [node["node-name"] for node in nodes] == ["disk0", "disk1"] == disk_nodes(made)
    assert nodes[0]["driver"] == "qcow2"
    assert nodes[0]["file"]["filename"] == "/d/a,b.qcow2"
    assert nodes[0]["cache"] == nodes[0]["file"]["cache"] == {"direct": False}
    assert "virtio-blk-pci,drive=disk1,id=virtio-disk1" in argv
    assert "-kernel" not in argv


def test_a_comma_in_a_path_is_doubled() -> None:
    argv = qemu_command(spec(), VmFiles.of("demo", Path("/r,n"), Path("/dev/shm")), Accel.TCG)
    assert "path=/r,,n/demo/console.log," in option(argv, "-chardev")


def test_incoming_and_extra_args_come_last() -> None:
    made = spec(extra_args=["-device", "virtio-rng-pci"])
    argv = qemu_command(made, FILES, Accel.TCG, incoming=True)
    assert option(argv, "-incoming") == "defer"
    assert argv[-2:] == ["-device", "virtio-rng-pci"]


def test_a_socket_path_that_is_too_long() -> None:
    longest = Path("/" + "x" * (107 - len("//demo/qmp.sock")))
    qemu_command(spec(), VmFiles.of("demo", longest, Path("/dev/shm")), Accel.TCG)
    too_long = longest.with_name(longest.name + "x")
    with pytest.raises(ConfigError, match=r"108 bytes.*at most 107; set DCRES_RUN"):
        qemu_command(spec(), VmFiles.of("demo", too_long, Path("/dev/shm")), Accel.TCG)


def test_memory_that_qemu_would_round() -> None:
    odd = spec(memory=(1 << 20) + 4096, layout={"main": "2MiB"})
    with pytest.raises(ConfigError, match="multiple of 8192"):
        qemu_command(odd, FILES, Accel.TCG)


def test_the_uuid_belongs_to_the_name() -> None:
    one, again = (option(qemu_command(spec(), FILES, Accel.TCG), "-uuid") for _ in range(2))
    other = option(qemu_command(spec(name="other"), FILES, Accel.TCG), "-uuid")
    assert one == again != other
