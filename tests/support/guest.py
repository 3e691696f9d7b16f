"""Real VMs for tests: started in folders of their own, gone afterwards whatever happened."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcres.config import Accel, VmSpec, default_home, vm_spec
from dcres.vm import process, witness
from dcres.vm.command import VmFiles
from dcres.vm.guest import GuestImage, prepare
from dcres.vm.monitor import Monitor
from dcres.vm.process import QemuProcess
from tests.support.wait import until

BOOT_TIMEOUT_S = 60.0


def guest_image() -> GuestImage:
    """The witness guest, fetched and built at first use and kept for later runs."""
    return prepare(default_home() / "guest")


def witness_spec(memory: str = "128MiB", fill_mib: int | str = 16, **more: Any) -> VmSpec:
    """A VM whose witness fills `fill_mib` (or ``off``), with every other key as given."""
    image = guest_image()
    values: dict[str, Any] = {
        "name": "witness",
        "memory": memory,
        "kernel": image.kernel,
        "initrd": image.initrd,
        "append": f"console=ttyS0 quiet panic=-1 witness={fill_mib} witness_chunk=1",
        "accel": "tcg",
        "layout": {"main": memory},
    }
    return vm_spec(values | more)


def create_disk(path: Path, size: str = "16M") -> Path:
    """An empty QCOW2 file."""
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, size], check=True)
    return path


@dataclass(frozen=True, slots=True)
class Guest:
    """A running QEMU and its monitor."""

    qemu: QemuProcess
    monitor: Monitor

    def report(self) -> witness.WitnessReport:
        """The witness's report so far."""
        return witness.read(self.qemu.files.console)

    def await_checks(self, more: int = 1, timeout_s: float = BOOT_TIMEOUT_S) -> None:
        """Wait until the witness is ready and has made `more` checks than now."""
        until(lambda: self.report().ready, timeout_s, "the witness is ready")
        target = self.report().checks + more
        until(
            lambda: self.report().checks >= target, timeout_s, f"the witness made {target} checks"
        )


@contextmanager
def folders() -> Iterator[VmFiles]:
    """Run-time files of a VM in short-named folders, RAM on tmpfs."""
    run = Path(tempfile.mkdtemp(prefix="dcres-vm-"))
    ram = Path(tempfile.mkdtemp(prefix="dcres-vm-", dir="/dev/shm"))
    try:
        yield VmFiles.of("witness", run, ram)
    finally:
        shutil.rmtree(run)
        shutil.rmtree(ram)


@contextmanager
def guest(spec: VmSpec, files: VmFiles, *, incoming: bool = False) -> Iterator[Guest]:
    """QEMU, stopped before its first instruction (or waiting for a VM core)."""
    qemu, monitor = process.start(spec, files, Accel.TCG, incoming=incoming)
    try:
        with monitor:
            yield Guest(qemu, monitor)
    finally:
        qemu.end()
