"""What actors tell each other: small, plain, picklable values. Pages never travel here."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, assert_never

import numpy as np
import numpy.typing as npt

from dcres.config import VmSpec
from dcres.model.pages import Mask
from dcres.model.restore_plan import PlannedHost
from dcres.model.run_state import RunState
from dcres.paging.settings import SubAddress

_FAST = 1  # zlib's level: such arrays are long runs


def pack_mask(mask: Mask) -> bytes:
    """A mask as a message carries it: one bit a page, compressed."""
    return zlib.compress(np.packbits(mask).tobytes(), _FAST)


def unpack_mask(packed: bytes, page_count: int) -> Mask:
    """The mask of `page_count` pages."""
    bits = np.frombuffer(zlib.decompress(packed), dtype=np.uint8)
    return np.unpackbits(bits, count=page_count).view(np.bool_)


def pack_array(values: npt.NDArray[Any]) -> bytes:
    """An array of numbers per page as a message carries it."""
    return zlib.compress(np.ascontiguousarray(values).data, _FAST)


def unpack_array(packed: bytes, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """The array again; the caller knows what it is of."""
    return np.frombuffer(zlib.decompress(packed), dtype=dtype)


class Role(StrEnum):
    """What a host is of a VM."""

    MAIN = "main"
    SUB = "sub"
    PARTS = "parts"  # it only has parts of a checkpoint in its store

    @property
    def words(self) -> str:
        """For people, before "of VM …"."""
        match self:
            case Role.MAIN:
                return "the main host"
            case Role.SUB:
                return "a sub host"
            case Role.PARTS:
                return "a host with parts of checkpoints"
            case _:
                assert_never(self)


def roles_of(hosts: int) -> tuple[Role, ...]:
    """The roles of so many hosts of a VM that starts."""
    return (Role.MAIN, *[Role.SUB] * (hosts - 1))


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
class Description:
    """What a host is and what its state file says of the VM; a main host's says most.

    `reserved` is what was set aside for the VM when the host became one of its own, in bytes, and
    `shares` what sub hosts may keep, in bytes by host.
    """

    host: str
    role: Role
    present: bool  # whether there is anything of the VM
    generation: int = 0
    reserved: int = 0
    spec: VmSpec | None = None
    checkpoint: str | None = None  # under way
    accel: str = ""
    accel_why: str = ""
    qemu_version: str = ""
    machine: str = ""
    running: bool = False  # its start or restore has come to its end
    moving: bool = False  # a lazy restore is bringing in pages
    reshaping: bool = False
    change: int = 0  # of shares, whose orders it took last
    hosts: tuple[str, ...] = ()
    shares: Mapping[str, int] = field(default_factory=dict)

    @property
    def next_change(self) -> ChangeId:
        """Of a change of shares that begins, or that ends another."""
        return ChangeId(self.generation, self.change + 1)


@dataclass(frozen=True, slots=True)
class ChangeId:
    """Which change of shares an order belongs to: a life of the VM, and a number in it.

    A host that took orders of one takes no more of those before it.
    """

    generation: int
    number: int


@dataclass(frozen=True, slots=True)
class PagingCounters:
    """Pages that a pager has moved since its process began; 0 on a sub host."""

    pages_in: int = 0
    pages_out: int = 0


@dataclass(frozen=True, slots=True)
class Base:
    """The checkpoint that the next one can be an increment upon, or why there is none."""

    manifest: str = field(default="", repr=False)
    why_none: str = ""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A host is ready to save.

    `changed` is the main host's: the pages that changed since the base so far (see `pack_mask`),
    on whichever host they are.
    """

    paging: PagingCounters = PagingCounters()
    changed: bytes = field(default=b"", repr=False)


@dataclass(frozen=True, slots=True)
class ClaimOrder:
    """For the main host: begin a life of the VM, with a generation greater than `above`.

    `cluster` is whose the VM's name in the store is from then on. `take_over` it from another one
    that may have ended, but not from one that runs. A VM that `needs_name` does not begin without.
    """

    cluster: str
    above: int = 0
    take_over: bool = False
    needs_name: bool = True


@dataclass(frozen=True, slots=True)
class ServeOrder:
    """For a sub host: start a memory server for this VM."""

    incarnation: Incarnation
    page_count: int
    capacity_pages: int
    load: LoadOrder | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """Pages of one part of a checkpoint that a host loads."""

    part: str  # the host that saved it
    pages: bytes = field(repr=False)  # see `pack_mask`
    source: SubAddress | None = None  # a part server; None: this host's own store has the part


@dataclass(frozen=True, slots=True)
class LoadOrder:
    """What of a checkpoint a host loads into its memory before anything runs there."""

    manifest: str
    readings: tuple[Reading, ...]


@dataclass(frozen=True, slots=True)
class PlanOrder:
    """For a host that has the main host's part: where shall every page go?

    `capacities` are pages per target host, the main host first; `holds` says per part which
    target hosts have it in their store.
    """

    manifest: str
    capacities: tuple[int, ...]
    holds: tuple[tuple[bool, ...], ...]
    masks: bool = False  # say which pages, and not only how many


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan: pages per part and target host, and their masks (see `pack_mask`)."""

    flow: tuple[tuple[int, ...], ...]
    masks: dict[tuple[int, int], bytes] = field(repr=False)
    targets: bytes = field(repr=False)  # the target host's index per page; see `pack_array`


@dataclass(frozen=True, slots=True)
class MainPart:
    """What a new main host needs of the old one's part, where its own store does not have it."""

    placement: bytes = field(repr=False)
    history: bytes = field(repr=False)
    vmcore: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Resumption:
    """For the main host of a restore: what the guest goes on from.

    `sources` are the part servers of a lazy restore, by part; without them every host has
    loaded its pages before the pager starts.
    """

    manifest: str
    targets: bytes = field(repr=False)
    main_part: MainPart | None
    sources: dict[str, SubAddress]


@dataclass(frozen=True, slots=True)
class PartsOrder:
    """For a host: serve these parts of a checkpoint to the VM's other hosts."""

    incarnation: Incarnation
    manifest: str
    parts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RunOrder:
    """For the main host: start QEMU and the pager; the guest does not run yet."""

    incarnation: Incarnation
    spec: VmSpec
    hosts: tuple[str, ...]  # all hosts of the VM, the main host first
    subs: tuple[SubAddress, ...]
    load: LoadOrder | None = None
    resumption: Resumption | None = None


@dataclass(frozen=True, slots=True)
class PageFlow:
    """Pages that go from one host of a VM to another."""

    source: str
    target: str
    pages: int


@dataclass(frozen=True, slots=True)
class Foreseen:
    """What a change of shares would do, or the `problem` for which it would be refused.

    `hosts` are host, bytes it may keep, and bytes it would: 0 before it joins, 0 after it has
    left. The main host is the first; one that would join has no name while there is none for it.
    """

    hosts: tuple[tuple[str, int, int], ...]
    flows: tuple[PageFlow, ...] = ()
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Look:
    """What a host says of itself before a restore: free memory, and parts of the checkpoint."""

    free_bytes: int
    parts: tuple[str, ...]
    trouble: str = ""  # why it could not be the main host


@dataclass(frozen=True, slots=True)
class ForeseenRestore:
    """What a restore would do, or the `problems` for which it would be refused.

    `hosts` begins with the VM's, the main host first; then come those that only have parts.
    """

    hosts: tuple[PlannedHost, ...]
    problems: tuple[str, ...]
    chosen: str = ""  # why these hosts
    left_out: tuple[str, ...] = ()  # a sentence for each host that could not be asked


@dataclass(frozen=True, slots=True)
class Finished:
    """The main host after FINISH: VM stopped, core saved, placement frozen, the rest staged."""

    tick: int
    moved: int  # pages that crossed the network between the stop and the freeze
    pages_in: int
    pages_out: int
    stopped_at: float  # on the main host's monotonic clock
    stopped: datetime  # when the guest was paused, UTC, by the main host's clock
    run_state: RunState  # in which the VM was found, and in which it is left
    parts_s: dict[str, float] = field(default_factory=dict)  # what the stop was spent on
    changed: bytes = field(default=b"", repr=False)  # since the base, see `pack_mask`


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
    store: str = ""  # the identity of the store that it was saved to
    pages_saved: int = 0  # of `pages`, the others' bytes are in segments of earlier checkpoints
    pages_changed: int = 0  # from the main host: on all hosts, since the base
    segments: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a long operation of one host is, in bytes, and how fast it has gone so far."""

    what: str = ""
    done_bytes: int = 0
    total_bytes: int = 0
    bytes_per_s: float = 0.0
