"""A guest in a plain QEMU that saves and loads itself with QEMU's own means, beside dcres."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from dcres.bench.apart import await_word
from dcres.bench.backport import QemuProgram
from dcres.bench.move import forget
from dcres.bench.rig import wait_for
from dcres.config import Accel, VmSpec
from dcres.errors import MonitorError
from dcres.linux.files import allocated_bytes, opened
from dcres.storage.atomic import sync_folder
from dcres.vm import process
from dcres.vm.command import VmFiles
from dcres.vm.monitor import Monitor
from dcres.vm.process import QemuProcess

CHANNELS = 4
_TIMEOUT_S = 600.0
_FD = "bench-stream"


class Way(StrEnum):
    """How QEMU writes guest memory."""

    STREAM = "stream"  # through a descriptor of a file, which every version can
    MAPPED_RAM = "mapped_ram"  # pages at fixed places, several threads, O_DIRECT


@dataclass(frozen=True, slots=True)
class Took:
    """How long something took from the order on, and how many bytes it moved."""

    seconds: float
    length_bytes: int

    @property
    def rate(self) -> float:
        """Bytes per second."""
        return self.length_bytes / self.seconds


class QemuVm:
    """Starts the guest at once, with its memory in a file in `shm`; `image` is what it saves."""

    def __init__(self, program: QemuProgram, way: Way, spec: VmSpec, shm: Path, disk: Path) -> None:
        self._program = program
        self._way = way
        self._shm = shm
        self._folder = disk / str(way)
        self._folder.mkdir()
        self._image = self._folder / "image"
        arguments = (*program.arguments, *spec.extra_args)
        self._spec = spec.model_copy(update={"extra_args": arguments})
        self._files = self._files_of("first")
        self._qemu, self._monitor = self._start("first")
        self._monitor.cont()

    def _files_of(self, name: str) -> VmFiles:
        run = self._folder
        ram = self._shm / f"{self._way}-{name}.ram"
        return VmFiles(ram, run / f"{name}.sock", run / f"{name}.console", run / f"{name}.log")

    def _start(self, name: str, incoming: bool = False) -> tuple[QemuProcess, Monitor]:
        return process.start(
            self._spec,
            self._files_of(name),
            Accel.TCG,
            incoming=incoming,
            env={**os.environ, **self._program.env},
            qemu=self._program.path,
        )

    def await_filled(self) -> None:
        """Until the guest has filled its memory and rests. Raises VmError."""
        await_word(self._files.console, "FILLED")

    def save(self) -> Took:
        """Stop the guest, save it, make the file durable; the guest then goes on."""
        self._image.unlink(missing_ok=True)
        began = time.monotonic()
        self._monitor.stop()
        self._prepare(self._monitor)
        with opened(self._image, os.O_RDWR | os.O_CREAT) as fd:
            self._monitor.execute("migrate", {"uri": self._uri(self._monitor, fd)})
            _await_migrated(self._monitor)
            os.fsync(fd)
            sync_folder(self._folder)
            seconds = time.monotonic() - began
            took = Took(seconds, allocated_bytes(fd))
        self._monitor.cont()
        return took

    def restore(self) -> Took:
        """Start another QEMU and load what `save` wrote, from the disk, until that guest runs."""
        forget(self._image)
        with opened(self._image, os.O_RDONLY) as fd, self._another() as (began, monitor):
            self._prepare(monitor)
            monitor.execute("migrate-incoming", {"uri": self._uri(monitor, fd)})
            _await_migrated(monitor)
            monitor.cont()
            return Took(time.monotonic() - began, allocated_bytes(fd))

    @contextlib.contextmanager
    def _another(self) -> Iterator[tuple[float, Monitor]]:
        began = time.monotonic()
        qemu, monitor = self._start("second", incoming=True)
        try:
            yield began, monitor
        finally:
            monitor.close()
            qemu.end()
            qemu.files.ram.unlink()

    def _uri(self, monitor: Monitor, fd: int) -> str:
        if self._way is Way.MAPPED_RAM:
            return f"file:{self._image}"
        monitor.send_fd(_FD, fd)
        return f"fd:{_FD}"

    def _prepare(self, monitor: Monitor) -> None:
        parameters: dict[str, Any] = {"max-bandwidth": 1 << 40}
        if self._way is Way.MAPPED_RAM:
            wanted = [{"capability": name, "state": True} for name in ("mapped-ram", "multifd")]
            monitor.execute("migrate-set-capabilities", {"capabilities": wanted})
            parameters |= {"multifd-channels": CHANNELS, "direct-io": True}
        monitor.execute("migrate-set-parameters", parameters)

    def end(self) -> None:
        """End QEMU. Repeatable."""
        self._monitor.close()
        self._qemu.end()


def _await_migrated(monitor: Monitor) -> None:
    def migrated() -> bool:
        info = monitor.execute("query-migrate")
        if info.get("status") in ("failed", "cancelled"):
            raise MonitorError(f"QEMU could not migrate: {info.get('error-desc', 'no reason')}")
        return bool(info.get("status") == "completed")

    wait_for(migrated, _TIMEOUT_S, "QEMU has migrated")
