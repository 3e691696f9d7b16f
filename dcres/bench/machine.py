"""What a benchmark ran on: read from the machine, so that a page of figures can be judged."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

from dcres.vm.command import QEMU

_PACKAGES = ("dcres", "ray", "numpy", "pyarrow", "xxhash")


def machine(folder: Path) -> dict[str, Any]:
    """Processor, memory, and the disk under `folder`; how busy it was when this was asked."""
    device, kind = _file_system(folder)
    return {
        "processor": _field(Path("/proc/cpuinfo"), "model name"),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "disk": device,
        "file_system": kind,
        "load_before": round(os.getloadavg()[0], 2),
    }


def versions() -> dict[str, str]:
    """Kernel, QEMU, Python and the packages that matter."""
    found = {
        "linux": platform.release(),
        "python": platform.python_version(),
        "qemu": _qemu_version(),
    }
    for package in _PACKAGES:
        found[package] = importlib.metadata.version(package)
    return found


def _field(path: Path, key: str) -> str:
    match = re.search(rf"^{key}\s*:\s*(.*)$", path.read_text(), re.MULTILINE)
    return match[1] if match else "unknown"


def _file_system(folder: Path) -> tuple[str, str]:
    """Device and type of the mount that holds `folder`: the longest mount point above it."""
    place = str(folder.resolve())
    best = ("", "unknown", "unknown")
    for line in Path("/proc/self/mounts").read_text().splitlines():
        device, point, kind = line.split()[:3]
        below = place == point or place.startswith(point.rstrip("/") + "/")
        if below and len(point) >= len(best[0]):
            best = (point, device, kind)
    return best[1], best[2]


def _qemu_version() -> str:
    try:
        said = subprocess.run([QEMU, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "not installed"
    match = re.search(r"version (\S+)", said.stdout)
    return match[1] if match else "unknown"
