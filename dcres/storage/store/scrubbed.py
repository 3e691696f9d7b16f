"""What scrubbing finds, as plain values."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from dcres.storage.format.checks import FileState


@dataclass(frozen=True, slots=True)
class Damage:
    """A file that is missing or not as it was written, and all checkpoints that have it."""

    vm: str
    host: str
    name: str
    state: FileState
    problem: str
    checkpoints: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class VmScrubbed:
    """What was read of a VM: files and their bytes; `skipped` files were read lately enough.

    `oldest` is when the one was read that was not read for longest, None if one never was;
    `trouble` why that is not remembered.
    """

    vm: str
    files: int
    read_bytes: int
    skipped: int
    damaged: int
    oldest: datetime | None
    trouble: str


@dataclass(frozen=True, slots=True)
class PartSeen:
    """Digests of the pages that a host saved, None where they are unknown.

    The main host's placement says which pages each host's must be: `placed`.
    """

    checkpoint: str
    host: str
    pages: str | None
    placed: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Scrubbed:
    """How far the scrubbing of a store is, and in the end what came of it.

    `changed` are checkpoints that were deleted, or were being deleted, when it was their turn.
    """

    total_bytes: int = 0
    done_bytes: int = 0
    seconds: float = 0.0
    vms: tuple[VmScrubbed, ...] = ()
    damaged: tuple[Damage, ...] = ()
    changed: tuple[str, ...] = ()
    parts: tuple[PartSeen, ...] = ()

    @property
    def sent_bytes(self) -> int:
        """Those that took the time: all that was read."""
        return self.done_bytes
