"""What a host of a VM can be told to do, and what it answers: every order, typed.

A host takes orders in groups, each a protocol by itself, as far as its role has them:

=============  ===========  =====================================================
group          taken by     about
=============  ===========  =====================================================
`Presence`     all          what is there of the VM, and its end
`Parts`        all          parts of checkpoints in this host's store
`Saving`       main, sub    this host's part of a checkpoint
`Machine`      main         QEMU and its pager: start, stop, core, manifest
`Paging`       main         which sub hosts it pages with, and pages that move
`Serving`      sub          the memory server
=============  ===========  =====================================================

`Port.call` and `Port.submit` take an order by its function here, ``port.call(Saving.copy, name)``,
so that arguments and answers are checked. A host's actor takes all of them by its one method
`perform`, and refuses those that its role does not have. How long an answer may take is said here,
too, by `within`; without it that is a minute. Where an order may be repeated, its sentence says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, TypeAlias, TypeVar

from dcres.actors.messages import (
    Base,
    ChangeId,
    ClaimOrder,
    Description,
    Finished,
    Incarnation,
    MainPart,
    PageFlow,
    PartsOrder,
    Planned,
    PlanOrder,
    Prepared,
    Progress,
    Role,
    RunOrder,
    Saved,
    ServeOrder,
)
from dcres.config import Layout
from dcres.model.formats import MemoryFormat
from dcres.model.live import HostRound
from dcres.model.picture import Picture
from dcres.model.record import Record
from dcres.paging.settings import SubAddress
from dcres.paging.status import PagerStatus, ServerStatus

_F = TypeVar("_F", bound=Callable[..., object])

DEADLINE_S = 60.0
_LOOK_S = 20.0  # Ray notices a host that is cut off after 10 s
_PROGRESS_S = 5.0
_PLAN_S = 600.0
_PATIENT_S = 300.0  # what waits for work under way that ends first
_AS_LONG_AS_IT_TAKES_S = 24 * 3600.0  # of reading, writing or moving memory

_deadlines: dict[Callable[..., object], float] = {}


def within(seconds: float) -> Callable[[_F], _F]:
    """Say how long the answer to an order may take."""

    def note(order: _F) -> _F:
        _deadlines[order] = seconds
        return order

    return note


def deadline_s(order: Callable[..., object]) -> float:
    """How long the answer to `order` may take."""
    return _deadlines.get(order, DEADLINE_S)


def group_of(order: Callable[..., object]) -> str:
    """Which of a host's parts takes `order`, by the name of its group; empty for another actor's.

    `dcres.actors.host.agent.HostAgent.perform` has them by these names.
    """
    return order.__qualname__.partition(".")[0].lower() if order.__module__ == __name__ else ""


class MainStatus(PagerStatus):
    """A main host's status: the guest, and the pager's counters."""

    host: str
    role: Role
    generation: int
    run_state: str
    held: bool  # a checkpoint has stopped the guest and not let it go on
    failed_disks: list[str]
    accel: str
    accel_why: str
    console: str
    qemu_pid: int
    checkpoint: str | None
    restarts: int
    bringing_in: bool
    unclaimed: str  # why this life has no claim to the VM's name in the store
    unrecorded: str  # why the store has no record that it is to run


class SubStatus(ServerStatus):
    """A sub host's status: the memory server's counters."""

    host: str
    role: Role
    generation: int
    restarts: int


HostStatus: TypeAlias = MainStatus | SubStatus


class Presence(Protocol):
    """What is there of the VM on a host, and its end."""

    @within(_LOOK_S)
    def describe(self) -> Description:
        """What this host is and what its state file says of the VM."""

    def status(self) -> HostStatus:
        """The VM here as it is now. Raises NotFound, VmLost, VmOff."""

    @within(_PROGRESS_S)
    def progress(self) -> Progress:
        """How far a long operation here is."""

    def require_free(self, take_over: bool) -> None:
        """Conflict unless a start may `clear` what is here. Changes nothing."""

    @within(_AS_LONG_AS_IT_TAKES_S)
    def clear(self, take_over: bool) -> None:
        """Before a start: end and remove what an earlier life of the VM left here. Repeatable.

        Raises Conflict for a VM of another cluster that runs.
        """

    def destroy(self) -> None:
        """End all of the VM here, give its memory back. Repeatable; nothing starts here again."""


class Parts(Protocol):
    """Parts of a checkpoint in this host's store, read for others."""

    def parts_here(self, manifest: str) -> tuple[str, ...]:
        """The hosts whose parts are here; the checkpoint is pinned from now on."""

    @within(_PLAN_S)
    def plan(self, order: PlanOrder) -> Planned:
        """Where every page goes. Raises NoRoom, CheckpointCorrupt."""

    @within(_PLAN_S)
    def read_main_part(self, manifest: str) -> MainPart:
        """What another main host needs of the main host's part. Raises CheckpointCorrupt."""

    def serve_parts(self, order: PartsOrder) -> SubAddress:
        """Start a part server; where it listens. Raises PagingError, CheckpointCorrupt."""

    def parts_trouble(self) -> str:
        """What the part server found to be wrong with its files; empty if nothing."""

    def end_serving_parts(self) -> None:
        """End the part server, for good, and unpin. Repeatable."""


class Saving(Protocol):
    """One host's part of a checkpoint.

    Orders name the checkpoint: one that comes late is refused with Conflict.
    """

    def prepare(self, checkpoint: str, memory_format: MemoryFormat, base: str = "") -> Prepared:
        """Sweep what is unfinished, make room, track changes from now on.

        With the manifest of a `base` it is an increment. Raises StoreFull, StoreReadOnly,
        UnsafeDevice, VmLost, Conflict, BaseUnusable.
        """

    @within(_AS_LONG_AS_IT_TAKES_S)
    def copy(self, checkpoint: str, changed: bytes = b"") -> HostRound:
        """One round while the guest runs. Raises StoreFull, PagingError, Conflict.

        Of an increment the first saves those pages here that have `changed`, as far as is known.
        """

    @within(_AS_LONG_AS_IT_TAKES_S)
    def synchronise(self, checkpoint: str, once_more: bool, most_pages: int) -> HostRound | None:
        """The barrier before the stop, with a last quick round if `once_more`: what that did."""

    @within(_AS_LONG_AS_IT_TAKES_S)
    def stage(self, checkpoint: str, most_pages: int, changed: bytes = b"") -> None:
        """The guest is paused: take the rest, at most `most_pages` of it into memory.

        Of an increment this host saves the pages here that have `changed`, and no others.
        """

    @within(_AS_LONG_AS_IT_TAKES_S)
    def save(self, checkpoint: str, tick: int) -> Saved:
        """Make this host's part durable: the vote. Raises StoreFull, PagesLost, Conflict."""

    def compact(self, manifest: str) -> None:
        """A published checkpoint is the last: merge this host's segments, if there are many.

        Returns at once, and tells nobody how it ends; the checkpoint stays as it is. Repeatable.
        What is under way for one of its chain goes on, for another it ends. `halt` ends it, too.
        """

    @within(_PATIENT_S)
    def halt(self, checkpoint: str) -> None:
        """Stop saving, for good: orders that come later are refused. Repeatable."""

    @within(_PATIENT_S)
    def abandon(self, checkpoint: str) -> None:
        """Halt, and remove what is left of the checkpoint, unless it is published. Repeatable."""


class Machine(Protocol):
    """QEMU and its pager on the main host, and the manifest in its store."""

    def claim(self, order: ClaimOrder) -> int:
        """Begin a life of the VM; its generation. Raises Conflict."""

    @within(_AS_LONG_AS_IT_TAKES_S)
    def boot(self, order: RunOrder) -> None:
        """Start QEMU, with what `order.load` names in memory; the guest is stopped."""

    @within(_AS_LONG_AS_IT_TAKES_S)
    def run(self, order: RunOrder) -> None:
        """After `boot`: the pager, then the VM core. Raises PagingError, CheckpointCorrupt."""

    @within(_AS_LONG_AS_IT_TAKES_S)
    def go(self, paused: bool = False) -> None:
        """The VM is up: let the guest run, or leave it as it is. Repeatable. Raises Conflict."""

    def pause(self) -> None:
        """Stop the guest until `go`. Repeatable."""

    def base(self) -> Base:
        """What the next checkpoint can be an increment upon. Changes nothing."""

    @within(_AS_LONG_AS_IT_TAKES_S)
    def finish(self, checkpoint: str) -> Finished:
        """Stop the guest, drain paging, snapshot disks, save the core, freeze placement."""

    @within(_PATIENT_S)
    def resume(self, checkpoint: str) -> float:
        """Thaw paging, leave the guest as it was found; when, on this host's monotonic clock.

        Undoes a checkpoint that stopped half-way, so it is safe to call at any time. Repeatable.
        """

    @within(_PATIENT_S)
    def publish(self, manifest: str, here: tuple[str, ...]) -> None:
        """Write the manifest; the parts of the hosts `here` are in this store. Repeatable.

        Raises Conflict, StorageError for a part that is not whole.
        """

    @within(_PATIENT_S)
    def published(self, checkpoint: str) -> bool:
        """Whether the manifest is there, durably."""

    def recorded(self) -> Record | None:
        """The record of what is to run, in this host's store. Raises CheckpointCorrupt."""

    def record(self, record: Record) -> None:
        """Let `record` replace the one before, durably; on a store to read only the status says so.

        Raises Conflict for a version or generation that has been overtaken, StoreFull,
        CheckpointCorrupt.
        """

    def status(self) -> MainStatus:
        """The guest and its pager as they are now. Raises NotFound, VmLost, VmOff."""

    def incarnation(self) -> Incarnation:
        """What a host that joins the VM must know."""

    def picture(self, buckets: int) -> Picture:
        """Where memory is and how hot, in at most `buckets` stretches. Raises NotFound, VmLost."""


class Paging(Protocol):
    """Which hosts the main host pages with, how much it keeps, and pages that move.

    Orders name the change of shares that they belong to: one that comes late, when another change
    has begun or this one was undone, is refused with Conflict.
    """

    def begin_reshape(self, change: ChangeId) -> None:
        """Shares are being changed until `set_layout`; a later coordinator will see that."""

    def limit(self, change: ChangeId, limit_pages: int) -> None:
        """Change how much the main host keeps; pages move while the guest runs."""

    def reshape(
        self, change: ChangeId, hosts: tuple[str, ...], subs: tuple[SubAddress, ...]
    ) -> None:
        """Page with these sub hosts from now on. Raises PagingError for pages without a host."""

    def set_layout(self, change: ChangeId, layout: Layout) -> None:
        """Remember what the hosts may keep from now on."""

    def plan_moves(
        self, capacities: Mapping[str, int], limit_pages: int, replaced: bool
    ) -> tuple[PageFlow, ...]:
        """Which pages would go where if shares became these. Changes nothing. Raises NoRoom."""

    def move_into(self, change: ChangeId, capacities: Mapping[str, int]) -> int:
        """Begin to move pages so that no sub host has more than this; how many move."""

    def stop_moves(self, change: ChangeId) -> None:
        """Leave every page where it is."""

    def settle_moves(self) -> None:
        """The pages of a lazy restore are all here: page without part servers from now on."""


class Serving(Protocol):
    """The memory server of a sub host."""

    @within(_AS_LONG_AS_IT_TAKES_S)
    def serve(self, order: ServeOrder) -> SubAddress:
        """Load this host's part, if ordered, and start the memory server; where it listens.

        Raises NoRoom, CheckpointCorrupt, PagingError.
        """

    def status(self) -> SubStatus:
        """The memory server as it is now. Raises NotFound."""

    def resize(self, change: ChangeId, capacity_pages: int) -> SubAddress:
        """Change how much this host may hold; what is there already stays.

        Raises Conflict for a change of shares that has been overtaken.
        """
