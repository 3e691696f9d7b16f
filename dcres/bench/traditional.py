"""QEMU's own way: a stopped VM's migration stream, with all its memory, into one file and back.

QEMU 7.2 has no ``file:`` and no O_DIRECT, so the stream goes through ``exec:`` and dd(1), which
QEMU starts and which therefore is on the VM's host. Two of them: one waits for the disk while the
other collects the next piece, so that neither QEMU nor the disk waits for a copy. The file is
written and read with O_DIRECT, which the rate of the host's disk applies to, and it counts as
saved when it is durable. QEMU's own limit of 128 MiB/s is lifted, and dcres's ``x-ignore-shared``
is taken back, which leaves memory out of the stream.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from pathlib import Path

from dcres.bench.rig import wait_for
from dcres.errors import MonitorError
from dcres.vm.monitor import Monitor, RunState

_TIMEOUT_S = 600.0
_BANDWIDTH_BYTES_PER_S = 1 << 40
_PIECE = "bs=4M iflag=fullblock status=none"


def save(monitor: Monitor, image: Path, least_bytes: int) -> float:
    """Seconds to stop the VM and write all of it to the new file `image`, until it is durable.

    The VM stands still afterwards. Raises MonitorError when QEMU fails, or has written less
    than `least_bytes`, so that its memory cannot be there.
    """
    image.unlink(missing_ok=True)
    _prepare(monitor)
    part = image.with_suffix(".part")
    there, ready = shlex.quote(str(part)), shlex.quote(str(image))
    write = f"dd of={there} {_PIECE} oflag=direct conv=fsync && mv {there} {ready}"
    began = time.monotonic()
    monitor.stop()
    monitor.execute("migrate", {"uri": f"exec:dd {_PIECE} | {{ {write}; }}"})
    _await(monitor, image.exists, "QEMU has saved the VM")
    seconds = time.monotonic() - began
    _await(monitor, lambda: _migration(monitor) == "completed", "QEMU is done")
    length_bytes = image.stat().st_size
    if length_bytes < least_bytes:
        raise MonitorError(f"QEMU's stream has {length_bytes} bytes; it left memory out")
    return seconds


def load(monitor: Monitor, image: Path, then: RunState) -> None:
    """Load `image` into a QEMU that waits for it; returns when it is in the state `then`."""
    _prepare(monitor)
    there = shlex.quote(str(image))
    read = f"dd if={there} {_PIECE} iflag=direct | dd {_PIECE}"
    monitor.execute("migrate-incoming", {"uri": f"exec:{read}"})
    _await(monitor, lambda: monitor.status() is then, f"the VM is {then}")


def _prepare(monitor: Monitor) -> None:
    ignore_shared = {"capability": "x-ignore-shared", "state": False}
    monitor.execute("migrate-set-capabilities", {"capabilities": [ignore_shared]})
    monitor.execute("migrate-set-parameters", {"max-bandwidth": _BANDWIDTH_BYTES_PER_S})


def _migration(monitor: Monitor) -> str:
    return str(monitor.execute("query-migrate").get("status"))


def _await(monitor: Monitor, done: Callable[[], bool], what: str) -> None:
    def done_or_failed() -> bool:
        if _migration(monitor) == "failed":
            raise MonitorError(f"QEMU's own migration failed before this: {what}")
        return done()

    wait_for(done_or_failed, _TIMEOUT_S, what)
