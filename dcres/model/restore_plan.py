"""What a restore would read and move on each host, and an estimate of the time that takes.

The estimate is from the rates below; nothing is measured for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

STORE_BYTES_PER_S = 1000e6  # `load_1` to `load_3` in docs/measurements.md
NETWORK_BYTES_PER_S = 110e6  # what 1 Gbit/s leaves for pages
START_S = 1.0  # reserving memory, QEMU's start and the VM core
ASSUMPTION = (
    f"assumed: {STORE_BYTES_PER_S / 1e6:.0f} MB/s from each host's store, "
    f"{NETWORK_BYTES_PER_S / 1e6:.0f} MB/s in and out of each host, "
    f"{START_S:.0f} s to start QEMU"
)

Flow = tuple[tuple[int, ...], ...]  # pages per part and target host


@dataclass(frozen=True, slots=True)
class PlannedHost:
    """One host of a restore. `role` is main or sub, or parts: it only has parts of the checkpoint.

    All that a host reads is verified there: `read_bytes` for itself, small files included, and
    `served_bytes` of pages for others.
    """

    host: str
    role: str
    memory_bytes: int
    pages: int
    read_bytes: int = 0  # from its own store, for itself
    moved_from: Mapping[str, int] = field(default_factory=dict)  # host → bytes over the network
    served_bytes: int = 0  # from its own store, for other hosts

    @property
    def moved_bytes(self) -> int:
        """What comes over the network."""
        return sum(self.moved_from.values())

    @property
    def verify_bytes(self) -> int:
        """What is compared with checksums here."""
        return self.read_bytes + self.served_bytes

    @property
    def seconds(self) -> float:
        """The estimated time for all this; see `ASSUMPTION`."""
        crossing = max(self.moved_bytes, self.served_bytes)
        return max(self.verify_bytes / STORE_BYTES_PER_S, crossing / NETWORK_BYTES_PER_S)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            **asdict(self),
            "moved_bytes": self.moved_bytes,
            "verify_bytes": self.verify_bytes,
            "seconds": round(self.seconds, 3),
        }
