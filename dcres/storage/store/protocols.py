"""What dcres needs of a store of checkpoints; `dcres.storage.store.store` is one in a folder.

A checkpoint exists if and only if its manifest does. Every host has a store, and several may share
one: the main host's has the manifest, each has the parts of its own hosts. tests/contracts/
test_checkpoint_store.py is what every implementation is held to.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dcres.storage.engine.transfer import Progress
from dcres.storage.format.checks import VerifiedPart, VerifyReport
from dcres.storage.format.host_part import Linked, Part
from dcres.storage.format.main_tables import MainTables
from dcres.storage.format.manifest import Manifest
from dcres.storage.format.memory_part import MemoryPart
from dcres.storage.format.merged import Merged
from dcres.storage.store.lives import Lives
from dcres.storage.store.pins import Hold


@dataclass(frozen=True, slots=True)
class Listed:
    """A published checkpoint: its manifest, or why that cannot be read."""

    checkpoint: str
    vm: str
    manifest: Manifest | None
    error: str | None


# Inside the classes, `list` is a method.
Listing = list[Listed]
Names = list[str]


class Taking(Protocol):
    """What taking a checkpoint needs: begin, fill each host's folder, publish or discard."""

    def begin(self, vm: str, checkpoint: str, hold: Hold) -> None:
        """Make room for a checkpoint, and have `hold` pin it from now on.

        May be repeated until it is published. Nothing that comes later makes it: a host that finds
        it gone has lost files. Raises Conflict for a published one, NotFound for names that cannot
        be, StoreFull, StoreReadOnly.
        """

    def host_folder(self, vm: str, checkpoint: str, host: str) -> Path:
        """The folder for the files of `host` in a checkpoint that was begun; may be repeated.

        Raises NotFound if the checkpoint was discarded, Conflict if it was published.
        """

    def publish(self, manifest: Manifest, here: Collection[str] | None = None) -> None:
        """Make the checkpoint exist; all its files must be durable by now.

        The parts of the hosts `here`, without it of all, lie in this store: each of their files is
        there, and as long as it was written, or nothing is published. May be repeated with the
        same manifest. Raises Conflict if another was published, NotFound if the checkpoint was
        never begun, StorageError for a file that is not whole, StoreFull.
        """

    def confirm(self, checkpoint: str) -> bool:
        """As `is_published`; then it stays published after a power failure. Raises OSError."""

    def discard(self, vm: str, checkpoint: str) -> None:
        """Remove an unpublished checkpoint's files; does nothing if there are none.

        Raises Conflict for a published one, and for one that is pinned.
        """

    def sweep(
        self, vm: str, keep: frozenset[str] = frozenset(), *, whole_parts: bool = True
    ) -> Names:
        """Remove unpublished checkpoints of `vm`, but for `keep` and pinned ones; their ids.

        What sub hosts have saved in a store of their own stays: its manifest is in the store of
        the main host. Without `whole_parts` nothing goes that has a part which its host has ended:
        on network storage a host may not see yet that another has published it (nfs(5), acdirmin).
        Call it only where no other checkpoint than those in `keep` is being taken.
        """

    def identity(self) -> str:
        """Which store this is: hosts with the same one share it; empty if it was never written."""


class Continuing(Protocol):
    """Parts of checkpoints that later ones have as well."""

    def link_part(self, base: Manifest, host: str, folder: Path, checkpoint: str) -> Linked:
        """Give the part of `host` in `checkpoint`, at `folder`, all that it has of `base`.

        What is merged in a checkpoint of the base's chain, in place of the segments up to that.
        May be repeated. Raises StorageError where that cannot be, and NotFound.
        """

    def merged_part(self, manifest: Manifest, host: str) -> Merged | None:
        """What takes the place of most segments of `host` in the next checkpoint, if anything."""

    def merge_part(
        self, manifest: Manifest, host: str, threads: int, progress: Progress | None = None
    ) -> Merged:
        """Merge all that the part of `host` has, and have it pinned meanwhile.

        That checkpoint stays as it is, and can be deleted as ever. What was merged in earlier ones
        of its chain is removed then. One call at a time for a host. Raises CheckpointCorrupt,
        StoreFull, NotFound, Conflict, and what `progress` raises.
        """


class Naming(Protocol):
    """Whose the name of a VM is, which generations there were, and whether it is to run."""

    def lives(self, vm: str) -> Lives:
        """The lives of a VM, as this store knows them, and the record of whether it is to run."""

    def latest_generation(self, vm: str) -> int:
        """The greatest that was given out, is in a manifest or on record.

        Raises CheckpointCorrupt.
        """


class Published(Protocol):
    """Published checkpoints: which there are, whether they are whole, and how they go."""

    def list(self, vm: str | None = None) -> Listing:
        """Published checkpoints of one VM or all, newest last; unreadable ones with their error."""

    def is_published(self, checkpoint: str) -> bool:
        """Whether the checkpoint's manifest is here, readable or not."""

    def get(self, checkpoint: str) -> Manifest:
        """The manifest of a checkpoint.

        Raises NotFound, which names similar ids, and CheckpointCorrupt.
        """

    def delete(self, checkpoint: str) -> None:
        """Remove a published checkpoint, readable or not: its manifest first, then its files.

        Raises NotFound, StoreReadOnly, Conflict for one that is pinned, HostError where something
        is mounted in it. After a crash in between, `sweep` removes the rest.
        """

    def pin(self, checkpoint: str) -> AbstractContextManager[None]:
        """Keep what this store has of a checkpoint from being removed inside the ``with`` block.

        Raises NotFound if it has nothing of it, Conflict while it is being deleted.
        """

    def require_unpinned(self, checkpoint: str) -> None:
        """Raises Conflict for a checkpoint that is pinned; one that is not here is not."""

    def verify(
        self, checkpoint: str, progress: Progress | None = None, strict: bool = False
    ) -> VerifyReport:
        """Read every byte of a checkpoint and compare; check that the hosts' parts fit together.

        `progress` gets pages done since its last call. Raises NotFound; CheckpointCorrupt for an
        unreadable manifest, and if `strict` for the first problem of any file.
        """

    def verify_part(
        self, manifest: Manifest, host: str, progress: Progress | None = None, strict: bool = False
    ) -> VerifiedPart:
        """The first half of `verify`, for the files of one host; its store has them."""

    def verify_together(
        self, manifest: Manifest, parts: Sequence[VerifiedPart], strict: bool = False
    ) -> VerifyReport:
        """The second half: that the parts fit together. The main host's part is in this store."""


class Reading(Protocol):
    """What a restore reads: what the hosts saved, each file compared with the manifest."""

    def parts_here(self, manifest: Manifest) -> tuple[str, ...]:
        """The hosts whose parts this store has; whether they are whole, reading them says."""

    def part_folder(self, manifest: Manifest, host: str) -> Path:
        """Where the files of `host` are, if they are here; it lies in the VM's folder."""

    def read_part(self, manifest: Manifest, host: str) -> Part:
        """What `host` saved, its tables checked. Raises CheckpointCorrupt and NotFound."""

    def memory_part(self, manifest: Manifest, host: str) -> MemoryPart:
        """What the memory file of `host` must be; nothing is read. Raises NotFound."""

    def read_main_tables(self, manifest: Manifest) -> MainTables:
        """For every page an index in ``manifest.hosts``, or `tables.NOWHERE`: whose part has it.

        And the tick of its last access. Raises CheckpointCorrupt.
        """

    def vmcore(self, manifest: Manifest) -> Path:
        """The VM core's file, once it was checked. Raises CheckpointCorrupt."""


class CheckpointStore(Taking, Naming, Published, Reading, Protocol):
    """All of it: what a host's store is."""

    @property
    def continuing(self) -> Continuing:
        """Parts of its checkpoints that later ones have as well."""
