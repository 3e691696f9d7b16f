"""QEMU's own way: a stopped VM's migration stream, with all its memory, into one file and back.

QEMU 7.2 has no ``file:`` and no O_DIRECT, so the stream goes through a pipe and dd(1) on the VM's
host. Two of them: one waits for the disk while the other collects the next piece, so that neither
QEMU nor the disk waits for a copy. The file is written and read with O_DIRECT, which the rate of
the host's disk applies to, and it counts as saved when it is durable. QEMU's own limit of 128 MiB/s
is lifted, and dcres's ``x-ignore-shared`` is taken back, which leaves memory out of the stream.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from dcres.bench.rig import wait_for
from dcres.errors import MonitorError
from dcres.model.run_state import RunState
from dcres.vm.monitor import Monitor

_TIMEOUT_S = 600.0
_BANDWIDTH_BYTES_PER_S = 1 << 40
_FD = "dcres-image"
_DD = ("dd", "bs=4M", "iflag=fullblock", "status=none")


@dataclass(frozen=True, slots=True)
class Image:
    """A file for one VM's stream; `launcher` begins a command on the host that it is written on."""

    path: Path
    launcher: Sequence[str] = ()

    def _writing(self) -> list[str]:
        return [*self.launcher, *_DD, f"of={self.path}", "oflag=direct", "conv=fsync"]

    def _reading(self) -> list[str]:
        return [*self.launcher, *_DD, f"if={self.path}", "iflag=direct"]

    def save(self, monitor: Monitor, least_bytes: int) -> float:
        """Seconds to stop the VM and write all of it, anew, until it is durable.

        The VM is stopped afterwards. Raises MonitorError when QEMU or dd fails, or when there
        are less than `least_bytes`, so that memory cannot be in it.
        """
        self.path.unlink(missing_ok=True)
        _prepare(monitor)
        began = time.monotonic()
        monitor.stop()
        collect = [*self.launcher, *_DD]
        with _piped(collect, self._writing(), monitor, towards_qemu=False) as done:
            monitor.execute("migrate", {"uri": f"fd:{_FD}"})
            _await(monitor, done, "all of the VM is on disk")
        seconds = time.monotonic() - began
        _await(monitor, lambda: _migration(monitor) == "completed", "QEMU is done")
        if self.length_bytes < least_bytes:
            raise MonitorError(f"QEMU's stream has {self.length_bytes} bytes; it left memory out")
        return seconds

    @property
    def length_bytes(self) -> int:
        """Of the file."""
        return self.path.stat().st_size

    def load(self, monitor: Monitor) -> None:
        """Load it into a QEMU that waits, and let the guest run.

        The stream says that the VM was stopped when it was saved, so it is afterwards.
        """
        _prepare(monitor)
        spread = [*self.launcher, *_DD]
        with _piped(self._reading(), spread, monitor, towards_qemu=True) as done:
            monitor.execute("migrate-incoming", {"uri": f"fd:{_FD}"})
            _await(monitor, lambda: monitor.status() is RunState.PAUSED, "QEMU has loaded the VM")
            _await(monitor, done, "all of the file was read")
        monitor.cont()


def _prepare(monitor: Monitor) -> None:
    ignore_shared = {"capability": "x-ignore-shared", "state": False}
    monitor.execute("migrate-set-capabilities", {"capabilities": [ignore_shared]})
    monitor.execute("migrate-set-parameters", {"max-bandwidth": _BANDWIDTH_BYTES_PER_S})


@contextmanager
def _piped(
    first: Sequence[str], second: Sequence[str], monitor: Monitor, *, towards_qemu: bool
) -> Iterator[Callable[[], bool]]:
    """``first | second`` with QEMU before or behind it; QEMU knows its end of the pipe as `_FD`.

    Gives whether both have ended; that raises MonitorError when one of them failed.
    """
    read_end, write_end = os.pipe()
    qemu_s, ours = (read_end, write_end) if towards_qemu else (write_end, read_end)
    nothing = subprocess.DEVNULL
    with ExitStack() as held:
        try:
            one = _spawn(held, first, nothing if towards_qemu else ours, subprocess.PIPE)
            other = _spawn(held, second, one.stdout, ours if towards_qemu else nothing)
            monitor.send_fd(_FD, qemu_s)
        finally:
            # Whoever keeps a copy keeps the others from seeing the end of the stream.
            os.close(read_end)
            os.close(write_end)
        if one.stdout is not None:
            one.stdout.close()

        def done() -> bool:
            # The second first: when it fails the other gets SIGPIPE, which says nothing.
            ended = [_ended(each) for each in (other, one)]
            return all(ended)

        yield done


def _spawn(
    held: ExitStack, argv: Sequence[str], stdin: int | IO[bytes] | None, stdout: int
) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(argv, stdin=stdin, stdout=stdout, stderr=subprocess.PIPE)
    held.enter_context(process)
    held.callback(process.kill)
    return process


def _ended(process: subprocess.Popen[bytes]) -> bool:
    code = process.poll()
    if code and process.stderr is not None:
        words = process.stderr.read().decode(errors="replace").strip()
        raise MonitorError(f"dd ended with {code}: {words}")
    return code is not None


def _migration(monitor: Monitor) -> str:
    return str(monitor.execute("query-migrate").get("status"))


def _await(monitor: Monitor, done: Callable[[], bool], what: str) -> None:
    def done_or_failed() -> bool:
        if done():
            return True
        if _migration(monitor) == "failed":
            raise MonitorError(f"QEMU's own migration failed before this: {what}")
        return False

    wait_for(done_or_failed, _TIMEOUT_S, what)
