"""How much memory guests may still fill, as the kernel sees it."""

from __future__ import annotations

from pathlib import Path

from dcres.linux.files import free_in

_MEMINFO = Path("/proc/meminfo")


def available_bytes() -> int:
    """Memory that can be had without swapping: MemAvailable, of the whole machine."""
    lines = _MEMINFO.read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))


def free_for_guests(tmpfs: Path, reserve_bytes: int = 0) -> int:
    """Bytes that guests may fill in a folder of a tmpfs, which need not exist yet.

    A tmpfs may promise more than there is, so what is available counts too, less
    `reserve_bytes` for the processes that come with a guest.
    """
    return max(min(available_bytes() - reserve_bytes, free_in(tmpfs)), 0)
