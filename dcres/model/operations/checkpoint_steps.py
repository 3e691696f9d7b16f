"""What a checkpoint over several hosts says and hears: its instructions and events."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from dcres.model.live import HostRound
from dcres.model.operations.events import Cancelled, Failed


@dataclass(frozen=True, slots=True)
class OnHost:
    """Something to be done on a host for a checkpoint."""

    host: str
    checkpoint: str


class Prepare(OnHost):
    """Make room, and track changes from now on."""


class Copy(OnHost):
    """Save what is marked, while the guest runs."""


@dataclass(frozen=True, slots=True)
class Synchronise(OnHost):
    """Get ready for the stop, with a last quick round if `once_more`."""

    once_more: bool


class Finish(OnHost):
    """The main host: stop the VM, save its core, freeze placement."""


class Stage(OnHost):
    """Take the rest into memory or to disk, so that the VM may go on."""


class Resume(OnHost):
    """The main host: leave the VM as it was found. May be repeated."""


@dataclass(frozen=True, slots=True)
class Save(OnHost):
    """Make this host's part durable, and vote."""

    tick: int


class Publish(OnHost):
    """The main host: write the manifest. May be repeated."""


class EndPublishing(OnHost):
    """The main host: let a publishing under way end, and refuse one that comes late."""


class LookForManifest(OnHost):
    """The main host: is it there, durably?"""


class Halt(OnHost):
    """Stop saving, for good. May be repeated."""


class Discard(OnHost):
    """Remove this host's part. May be repeated."""


Repeatable: TypeAlias = Resume | Publish | EndPublishing | LookForManifest | Halt | Discard
Instruction: TypeAlias = Prepare | Copy | Synchronise | Finish | Stage | Save | Repeatable
Plain: TypeAlias = Prepare | Copy | Finish | Stage | Repeatable


@dataclass(frozen=True, slots=True)
class OfHost:
    """Something that a host has done."""

    host: str


class Prepared(OfHost):
    """A host has room and tracks changes."""


@dataclass(frozen=True, slots=True)
class Copied(OfHost):
    """A host has done a round."""

    round: HostRound


@dataclass(frozen=True, slots=True)
class Synchronised(OfHost):
    """A host is ready for the stop, and what its last round did if it made one."""

    round: HostRound | None


@dataclass(frozen=True, slots=True)
class Finished(OfHost):
    """The VM is stopped since then, by the main host's clock; its core is saved."""

    tick: int
    stopped_at_s: float


class Staged(OfHost):
    """A host does not need the VM to be paused any more."""


@dataclass(frozen=True, slots=True)
class Resumed(OfHost):
    """The VM is as it was found, since then by the main host's clock."""

    since_s: float


class Saved(OfHost):
    """A host's vote: its part is durable."""


class Published(OfHost):
    """The manifest is durable."""


class PublishingEnded(OfHost):
    """No manifest is written from now on."""


@dataclass(frozen=True, slots=True)
class Looked(OfHost):
    """Whether the manifest is there."""

    there: bool


class Halted(OfHost):
    """A host does not save any more."""


class Discarded(OfHost):
    """A host's part is gone."""


Event: TypeAlias = (
    Prepared
    | Copied
    | Synchronised
    | Finished
    | Staged
    | Resumed
    | Saved
    | Published
    | PublishingEnded
    | Looked
    | Halted
    | Discarded
    | Failed[Instruction]
    | Cancelled
)
