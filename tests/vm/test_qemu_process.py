"""QEMU itself: started, failing, steered by one client after another, adopted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dcres.config import Accel
from dcres.errors import Conflict, MonitorError, QemuFailed, UnsafeDevice, VmLost
from dcres.linux.process import ProcessId
from dcres.model.run_state import RunState
from dcres.vm import accel, process, safety
from dcres.vm.command import VmFiles, owned_nodes
from dcres.vm.monitor import Monitor
from tests.support.guest import create_disk, folders, guest, guest_image, witness_spec
from tests.support.speed import patience

pytestmark = pytest.mark.vm


@pytest.fixture
def files() -> Iterator[VmFiles]:
    with folders() as made:
        yield made


def test_it_is_stopped_and_its_ram_file_private(files: VmFiles) -> None:
    with guest(witness_spec(), files) as vm:
        assert vm.monitor.status() is RunState.PRELAUNCH
        assert vm.monitor.version[0].isdigit()
        assert files.ram.stat().st_size == 128 << 20
        assert files.ram.stat().st_mode & 0o777 == 0o600
    assert not vm.qemu.alive
    assert not files.monitor.exists()


def test_failing_at_once_shows_qemu_s_words(files: VmFiles) -> None:
    spec = witness_spec(extra_args=["-device", "no-such-device"])
    with pytest.raises(QemuFailed, match=r"VM witness ended at once: .*no-such-device"):
        process.start(spec, files, Accel.TCG)


def test_a_ram_file_of_another_length_is_refused(files: VmFiles) -> None:
    files.ram.write_bytes(bytes(4096))
    with pytest.raises(Conflict, match="belongs to another VM"):
        process.start(witness_spec(), files, Accel.TCG)


def test_one_client_after_another(files: VmFiles) -> None:
    with guest(witness_spec(), files) as vm:
        with pytest.raises(MonitorError, match="another client is connected"):
            Monitor.connect(files.monitor, timeout_s=0.2)
        vm.monitor.close()
        vm.monitor.close()
        with pytest.raises(MonitorError, match="closed"):
            vm.monitor.status()
        for _ in range(3):
            with vm.qemu.connect() as again:
                assert again.status() is RunState.PRELAUNCH


def test_a_command_that_qemu_refuses(files: VmFiles) -> None:
    with guest(witness_spec(), files) as vm:
        with pytest.raises(MonitorError, match=r"QEMU refused no-such: .*not been found"):
            vm.monitor.execute("no-such")
        assert vm.monitor.status() is RunState.PRELAUNCH


def test_a_qemu_that_dies_is_noticed(files: VmFiles) -> None:
    with guest(witness_spec(), files) as vm:
        vm.qemu.process.kill()
        assert vm.qemu.process.wait_gone(patience(10))
        with pytest.raises(MonitorError, match=r"the connection to .* broke during query-status"):
            vm.monitor.status()
        with pytest.raises(VmLost, match="has ended"):
            vm.qemu.connect(timeout_s=1)
        with pytest.raises(VmLost, match="restore a checkpoint"):
            process.adopt(vm.qemu.to_dict())


def pipes_of(owner: ProcessId) -> set[str]:
    folder = f"/proc/{owner.pid}/fd"
    links = (os.readlink(f"{folder}/{fd}") for fd in os.listdir(folder))
    return {link for link in links if link.startswith("pipe:")}


def test_a_descriptor_given_outlives_the_connection(files: VmFiles) -> None:
    read_end, write_end = os.pipe()
    ours = os.readlink(f"/proc/self/fd/{read_end}")
    try:
        with guest(witness_spec(fill_mib="off"), files) as vm:
            vm.monitor.send_fd("reader", read_end)
            vm.monitor.send_fd("writer", write_end)
            vm.monitor.cont()
            vm.monitor.close()
            with vm.qemu.connect() as again:
                assert again.status() is RunState.RUNNING
                assert ours in pipes_of(vm.qemu.process)
                for name in ("reader", "writer"):
                    again.execute("closefd", {"fdname": name})
                assert ours not in pipes_of(vm.qemu.process)
    finally:
        os.close(read_end)
        os.close(write_end)


def test_a_vm_outlives_who_started_it_and_is_adopted(files: VmFiles) -> None:
    program = (
        "import json, os, signal, sys\n"
        "from pathlib import Path\n"
        "from dcres.config import Accel\n"
        "from dcres.vm import process\n"
        "from dcres.vm.command import VmFiles\n"
        "from tests.support.guest import witness_spec\n"
        "files = VmFiles.of('witness', *map(Path, sys.argv[1:3]))\n"
        "qemu, monitor = process.start(witness_spec(fill_mib='off'), files, Accel.TCG)\n"
        "monitor.cont()\n"
        "print(json.dumps(qemu.to_dict()), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    run, ram = files.log.parent.parent, files.ram.parent
    argv = [sys.executable, "-c", program, str(run), str(ram)]
    done = subprocess.run(argv, capture_output=True, check=False)
    qemu = process.adopt(json.loads(done.stdout))
    try:
        with qemu.connect() as monitor:
            assert monitor.status() is RunState.RUNNING
    finally:
        qemu.end()
    assert qemu.files == files


def test_an_ordinary_vm_is_safe(files: VmFiles, tmp_path: Path) -> None:
    disk, other = (create_disk(tmp_path / name) for name in ("disk.qcow2", "other.qcow2"))
    read = ["-drive", f"file={other},format=qcow2,if=virtio,readonly=on"]
    spec = witness_spec(
        disks=[{"path": disk}], extra_args=["-nic", "user,model=virtio-net-pci", "-smp", "2", *read]
    )
    with guest(spec, files) as vm:
        safety.require_safe(vm.monitor, vm.qemu.process.pid, files.ram, owned_nodes(spec))


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["-device", "virtio-balloon-pci"], r"device\[0\] \(virtio-balloon-pci\)"),
        (["-device", "virtio-balloon-pci,id=b0"], r"peripheral/b0 \(virtio-balloon-pci\)"),
        (["-overcommit", "mem-lock=on"], "KiB of memory, which page-out cannot move"),
    ],
)
def test_unsafe_vms_are_refused(files: VmFiles, extra: list[str], words: str) -> None:
    with (
        guest(witness_spec(extra_args=extra), files) as vm,
        pytest.raises(UnsafeDevice, match=words),
    ):
        safety.require_safe(vm.monitor, vm.qemu.process.pid, files.ram)


def test_cache_direct_is_refused(files: VmFiles, tmp_path: Path) -> None:
    disk = create_disk(tmp_path / "disk.qcow2")
    node = f"driver=qcow2,node-name=x,file.driver=file,file.filename={disk}"
    extra = ["-blockdev", f"{node},cache.direct=on,file.cache.direct=on"]
    with (
        guest(witness_spec(extra_args=extra), files) as vm,
        pytest.raises(UnsafeDevice, match=r"block node x .*cache.direct=on.*set cache.direct=off"),
    ):
        safety.require_safe(vm.monitor, vm.qemu.process.pid, files.ram)


def test_the_probe_guest_reaches_user_mode_under_tcg() -> None:
    probe = accel.boot(guest_image().kernel, Accel.TCG, timeout_s=patience(60))
    assert probe.works, probe.reason


def test_a_probe_that_does_not_get_there_says_so(tmp_path: Path) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(b"no kernel")
    assert not accel.boot(kernel, Accel.TCG).works
    probe = accel.boot(guest_image().kernel, Accel.TCG, timeout_s=0.05)
    assert probe.reason == "a Linux guest did not reach user mode under TCG in 0.05 s"


def test_auto_decides(tmp_path: Path) -> None:
    chosen, sentence = accel.choose(Accel.AUTO, guest_image().kernel, tmp_path)
    assert chosen in (Accel.KVM, Accel.TCG)
    assert sentence.startswith(chosen.value.upper())
