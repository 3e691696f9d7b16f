"""fio's sequential rate, the limit of a disk: 1 MiB pieces, O_DIRECT, eight at a time."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

from dcres.errors import StorageError, UnsupportedHost

_OPTIONS = ("--bs=1m", "--direct=1", "--iodepth=8", "--ioengine=libaio", "--output-format=json")
_TIMEOUT_S = 600


def require() -> None:
    """Raises UnsupportedHost when fio is not installed."""
    if shutil.which("fio") is None:
        raise UnsupportedHost("this benchmark compares with fio; apt install fio")


def write(path: Path, length_bytes: int) -> float:
    """Bytes per second at which a new file of `length_bytes` is written, until it is durable.

    fio makes the file and takes its blocks before its clock runs.
    """
    path.unlink(missing_ok=True)
    return _rate("write", path, length_bytes, "--end_fsync=1")


def read(path: Path, length_bytes: int) -> float:
    """Bytes per second at which the file that `write` left is read from the disk."""
    return _rate("read", path, length_bytes)


def _rate(what: str, path: Path, length_bytes: int, *more: str) -> float:
    require()
    target = f"--filename={path}", f"--size={length_bytes}"
    argv = ["fio", "--name=bench", f"--rw={what}", *target, *_OPTIONS, *more]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S)
    if done.returncode:
        raise StorageError(f"fio failed: {done.stderr.strip()[-300:]}")
    return rate_of(done.stdout, what)


def rate_of(report: str, what: str) -> float:
    """The rate in bytes per second in fio's JSON `report`, which warnings may precede."""
    job: dict[str, Any] = json.loads(report[report.index("{") :])["jobs"][0]
    io_bytes, milliseconds = float(job[what]["io_bytes"]), float(job[what]["runtime"])
    return io_bytes / milliseconds * 1000
