"""The QEMU process itself: started so that it outlives us, and found again later."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dcres.config import Accel, VmSpec, format_size
from dcres.errors import Conflict, MonitorError, QemuFailed, VmLost
from dcres.linux.files import open_own
from dcres.linux.process import ProcessId, spawn_detached
from dcres.linux.removal import remove_socket
from dcres.vm.command import MACHINE, QEMU, VmFiles, qemu_command
from dcres.vm.monitor import Monitor

_LAST_LINES = 6
_TOLD_TO_END = re.compile(r"terminating on signal \d+")  # system/runstate.c
_LOG_TAIL_BYTES = 4096


@dataclass(frozen=True, slots=True)
class QemuProcess:
    """A QEMU that was started: which process it is and where its files are."""

    process: ProcessId
    files: VmFiles
    log_start: int = 0  # where in its log it began; before are other lives of the VM

    def to_dict(self) -> dict[str, object]:
        """Plain values for a state file; `from_dict` reads them back."""
        return {
            "pid": self.process.pid,
            "start_time": self.process.start_time,
            "ram": str(self.files.ram),
            "monitor": str(self.files.monitor),
            "console": str(self.files.console),
            "log": str(self.files.log),
            "log_start": self.log_start,
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, object]) -> QemuProcess:
        """What `to_dict` wrote. Raises KeyError when something is missing."""
        ram, monitor, console, log = (
            Path(str(state[key])) for key in ("ram", "monitor", "console", "log")
        )
        process = ProcessId(int(str(state["pid"])), int(str(state["start_time"])))
        files = VmFiles(ram=ram, monitor=monitor, console=console, log=log)
        return cls(process, files, int(str(state.get("log_start", 0))))

    @property
    def words(self) -> str:
        """What it has said last; empty if it said nothing."""
        return last_words(self.files.log, self.log_start)

    @property
    def was_told_to_end(self) -> bool:
        """Whether the last that it said is that a signal told it to end, which it did in order.

        Its exit status is for its parent, which is gone.
        """
        return bool(_TOLD_TO_END.search(self.words.rpartition(" / ")[2]))

    @property
    def alive(self) -> bool:
        """Whether QEMU still runs."""
        return self.process.alive

    def connect(self, timeout_s: float = 10.0) -> Monitor:
        """Its monitor. Raises VmLost when QEMU has ended, MonitorError when it does not answer."""
        try:
            return Monitor.connect(self.files.monitor, timeout_s, alive=lambda: self.alive)
        except MonitorError:
            if self.alive:
                raise
            raise VmLost(self._obituary) from None

    @property
    def _obituary(self) -> str:
        words = self.words or "it said nothing"
        return f"QEMU (pid {self.process.pid}) has ended: {words}; restore a checkpoint"

    def end(self, grace_s: float = 5.0) -> None:
        """End QEMU (SIGTERM, then SIGKILL) and remove its socket; its RAM file stays."""
        self.process.end(grace_s)
        remove_socket(self.files.monitor)


def last_words(log: Path, offset_bytes: int = 0) -> str:
    """The last lines of a log from `offset_bytes` on, joined into one; empty if there are none."""
    try:
        with log.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(offset_bytes, end - _LOG_TAIL_BYTES))
            lines = file.read().decode(errors="replace").split("\n")
    except OSError as error:
        return f"its log {log} cannot be read ({error.strerror})"
    words = [line.strip() for line in lines if line.strip()][-_LAST_LINES:]
    return " / ".join(words)


def _prepare_ram(spec: VmSpec, ram: Path) -> None:
    """Make the RAM file, or accept the one that is there; QEMU would make it readable by all."""
    ram.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = open_own(ram, os.O_RDWR | os.O_CREAT)
    try:
        length_bytes = os.fstat(fd).st_size
        if length_bytes == 0:
            os.ftruncate(fd, spec.memory)
        elif length_bytes != spec.memory:
            raise Conflict(
                f"the RAM file {ram} has {format_size(length_bytes)} and VM {spec.name} wants "
                f"{format_size(spec.memory)}; it belongs to another VM, or remove it"
            )
    finally:
        os.close(fd)


def start(
    spec: VmSpec,
    files: VmFiles,
    accel: Accel,
    *,
    incoming: bool = False,
    env: Mapping[str, str] | None = None,
    qemu: str = QEMU,
    machine: str = MACHINE,
    timeout_s: float = 120.0,
    inherited: Sequence[int] = (),
) -> tuple[QemuProcess, Monitor]:
    """Start QEMU, detached and stopped before its first instruction, with a ready monitor.

    It keeps the descriptors that it `inherited` open.

    A RAM file of the VM's length that is there already is kept with its content (restore puts
    it there). Raises QemuFailed with QEMU's own words when it ends at once, ConfigError,
    Conflict or UnsupportedHost; on an error nothing is left running.
    """
    devices = {disk.path for disk in spec.disks if disk.path.is_block_device()}
    argv = qemu_command(
        spec, files, accel, incoming=incoming, devices=devices, qemu=qemu, machine=machine
    )
    for folder in {path.parent for path in (files.monitor, files.console, files.log)}:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _prepare_ram(spec, files.ram)
    remove_socket(files.monitor)
    said_before = files.log.stat().st_size if files.log.exists() else 0
    process = spawn_detached(argv, files.log, env, inherited=inherited)
    try:
        monitor = Monitor.connect(files.monitor, timeout_s, alive=lambda: process.alive)
    except BaseException as error:
        ended = not process.alive
        process.end()
        if isinstance(error, MonitorError) and ended:
            words = last_words(files.log, said_before) or "it said nothing"
            raise QemuFailed(f"QEMU for VM {spec.name} ended at once: {words}") from None
        raise
    return QemuProcess(process, files, said_before), monitor


def adopt(state: Mapping[str, object]) -> QemuProcess:
    """The QEMU that `QemuProcess.to_dict` described. Raises VmLost when it has ended."""
    qemu = QemuProcess.from_dict(state)
    if not qemu.alive:
        raise VmLost(qemu._obituary)
    return qemu
