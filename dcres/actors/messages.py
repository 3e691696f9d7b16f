"""What actors tell each other: small, plain, picklable values. Pages never travel here."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

from dcres.config import VmSpec
from dcres.paging.settings import SubAddress

Status = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Incarnation:
    """One life of a VM: from its start, or a restore, to its end.

    `generation` grows with each life, so that what is left of an earlier one is refused.
    """

    vm: str
    generation: int
    secret: str = field(repr=False)

    @property
    def identity(self) -> str:
        """The VM's 16 bytes in the paging protocol, as hex."""
        return hashlib.sha256(f"dcres vm {self.vm}".encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class ServeOrder:
    """For a sub host: start a memory server for this VM."""

    incarnation: Incarnation
    page_count: int
    capacity_pages: int
    load: LoadOrder | None = None


@dataclass(frozen=True, slots=True)
class LoadOrder:
    """Which parts of a checkpoint a host loads into its memory before anything runs there."""

    manifest: str
    hosts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RunOrder:
    """For the main host: start QEMU and the pager; the guest does not run yet."""

    incarnation: Incarnation
    spec: VmSpec
    hosts: tuple[str, ...]  # all hosts of the VM, the main host first
    subs: tuple[SubAddress, ...]
    load: LoadOrder | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    """The main host after FINISH: VM stopped, core saved, placement frozen, the rest staged."""

    tick: int
    moved: int  # pages that crossed the network between the stop and the freeze
    pages_in: int
    pages_out: int
    stopped_at: float  # on the main host's monotonic clock
    parts_s: dict[str, float] = field(default_factory=dict)  # what the stop was spent on


@dataclass(frozen=True, slots=True)
class Placed:
    """What the network page table says of one sub host."""

    pages: int
    digest: str


@dataclass(frozen=True, slots=True)
class Saved:
    """A host's vote: its part is durable."""

    host: str
    pages: int
    bytes_written: int
    allocated_bytes: int
    seconds: float
    digest: str
    files: tuple[dict[str, Any], ...]
    placed: tuple[Placed, ...] = ()  # from the main host: what every sub host must have saved


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a long operation of one host is, in bytes."""

    what: str = ""
    done_bytes: int = 0
    total_bytes: int = 0
