"""The store: a folder of checkpoints, ``STORE/VM/CHECKPOINT``.

A checkpoint exists if and only if its manifest does: it is written last and removed first.
Everything without a manifest is unfinished work, which `Store.sweep` removes. Every host has a
store; the main host's holds the manifest, and several hosts may share one.
"""

from __future__ import annotations

import contextlib
import difflib
import re
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from dcres.errors import CheckpointCorrupt, Conflict, NotFound
from dcres.linux.files import free_in
from dcres.linux.removal import CheckpointFolder
from dcres.storage import layout
from dcres.storage.atomic import make_private_dirs, store_written, sync_folder, write_durably
from dcres.storage.damage import corrupt, unreadable
from dcres.storage.digest import check_file
from dcres.storage.engine.transfer import Progress
from dcres.storage.format import host_part, tables
from dcres.storage.format.checks import VerifiedPart, Verifier, VerifyReport
from dcres.storage.format.manifest import Manifest, dumps, loads
from dcres.storage.format.memory_part import MemoryPart
from dcres.storage.store import marker
from dcres.storage.store.lives import Lives
from dcres.storage.store.pins import Hold, pinned, unpinned


@dataclass(frozen=True, slots=True)
class Listed:
    """A published checkpoint: its manifest, or why that cannot be read."""

    checkpoint: str
    vm: str
    manifest: Manifest | None
    error: str | None


_TRIES, _AGAIN_S = 5, 0.05

# Inside the class, `list` is its method.
Listing = list[Listed]
Names = list[str]


class Store:
    """Checkpoints below the folder `root`, which is created when first written to."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @staticmethod
    def new_id(vm: str, now: datetime, token: str) -> str:
        """The id of a checkpoint of `vm` begun at `now`; `token` is four hexadecimal digits."""
        return layout.checkpoint_id(vm, now, token)

    def begin(self, vm: str, checkpoint: str, hold: Hold) -> None:
        """Create the checkpoint's folder, mode 0700, and have `hold` pin it from now on.

        May be repeated until it is published. Nothing that comes later creates it: who finds it
        gone has lost files. Raises Conflict for a published one, NotFound for names that cannot
        be, StoreFull, StoreReadOnly.
        """
        for tries_left in reversed(range(_TRIES)):
            marker.mark(self.root)
            folder = self._unpublished(vm, checkpoint)
            make_private_dirs(folder)
            try:
                hold.take(checkpoint, pinned(folder))
                return
            except (Conflict, NotFound):  # somebody sweeps it who came before the pin
                if not tries_left:
                    raise
                time.sleep(_AGAIN_S)

    def host_folder(self, vm: str, checkpoint: str, host: str) -> Path:
        """The folder for the files of `host` in a checkpoint that was begun; may be repeated.

        Raises NotFound if the checkpoint was discarded, Conflict if it was published.
        """
        parent = self._unpublished(vm, checkpoint)
        folder = parent / layout.checked_host(host)
        with contextlib.suppress(FileExistsError), store_written(folder):
            try:
                folder.mkdir(mode=0o700)
            except FileNotFoundError:
                raise discarded(checkpoint) from None
            sync_folder(parent)
        return folder

    def _unpublished(self, vm: str, checkpoint: str) -> Path:
        folder = self._folder(vm, checkpoint)
        if (folder / layout.MANIFEST).exists():
            raise Conflict(f"checkpoint {checkpoint} is published already; begin a new one")
        return folder

    def publish(self, manifest: Manifest, here: Collection[str] | None = None) -> None:
        """Make the checkpoint exist; all its files must be durable by now.

        The parts of the hosts `here`, without it of all, lie in this store: each of their files is
        there, and as long as it was written, or nothing is published. May be repeated with the
        same manifest. Raises Conflict if another was published, NotFound if the checkpoint was
        never begun, StorageError for a file that is not whole, StoreFull.
        """
        folder = self._folder(manifest.vm, manifest.checkpoint)
        path = folder / layout.MANIFEST
        text = dumps(manifest).encode("ascii")
        try:
            with pinned(folder):
                if not path.exists():
                    _require_whole(folder, manifest, here)
                    write_durably(path, text)
                elif path.read_bytes() != text:
                    what = f"checkpoint {manifest.checkpoint} is published with other content"
                    raise Conflict(what)
                sync_folder(folder)
        except NotFound:
            raise discarded(manifest.checkpoint) from None

    def list(self, vm: str | None = None) -> Listing:
        """Published checkpoints of one VM or all, newest last; unreadable ones with their error."""
        vms = self._vms() if vm is None else [layout.checked_vm(vm)]
        return sorted((self._listed(name) for vm in vms for name in self._published(vm)), key=_age)

    def is_published(self, checkpoint: str) -> bool:
        """Whether the checkpoint's manifest is here, readable or not."""
        with contextlib.suppress(NotFound):
            folder = self._folder(layout.vm_of(checkpoint), checkpoint)
            return (folder / layout.MANIFEST).exists()
        return False

    def confirm(self, checkpoint: str) -> bool:
        """As `is_published`; then it stays published after a power failure. Raises OSError."""
        found = self.is_published(checkpoint)
        if found:
            sync_folder(self._folder(layout.vm_of(checkpoint), checkpoint))
        return found

    def get(self, checkpoint: str) -> Manifest:
        """The manifest of a checkpoint.

        Raises NotFound, which names similar ids, and CheckpointCorrupt.
        """
        path = self._require_published(checkpoint) / layout.MANIFEST
        try:
            text = path.read_bytes().decode("ascii")
        except OSError as error:
            raise unreadable(path, error) from None
        except UnicodeDecodeError:
            raise corrupt(path, "it was altered: it is not ASCII") from None
        manifest = loads(text, path)
        if manifest.checkpoint != checkpoint or manifest.vm != path.parent.parent.name:
            raise CheckpointCorrupt(
                f"{path} belongs to checkpoint {manifest.checkpoint}; move it back to its folder"
            )
        return manifest

    def discard(self, vm: str, checkpoint: str) -> None:
        """Remove an unpublished checkpoint's files; does nothing if there are none.

        Raises Conflict for a published one, and for one that is pinned.
        """
        folder = self._folder(vm, checkpoint)
        if (folder / layout.MANIFEST).exists():
            raise Conflict(f"checkpoint {checkpoint} is published; delete it instead")
        with contextlib.suppress(FileNotFoundError), unpinned(folder):
            self._unpublished(vm, checkpoint)  # it may have been published until now
            _remove(folder)

    def delete(self, checkpoint: str) -> None:
        """Remove a published checkpoint, readable or not: its manifest first, then its files.

        Raises NotFound, StoreReadOnly, Conflict for one that is pinned, HostError where something
        is mounted in it. After a crash in between, `sweep` removes the rest.
        """
        folder = self._require_published(checkpoint)
        try:
            with unpinned(folder), store_written(folder / layout.MANIFEST):
                (ours := CheckpointFolder(folder)).require_removable()
                ours.remove_file(folder / layout.MANIFEST)
                sync_folder(folder)
                _remove(folder)
        except FileNotFoundError:
            raise NotFound(f"checkpoint {checkpoint} was deleted meanwhile") from None

    def pin(self, checkpoint: str) -> contextlib.AbstractContextManager[None]:
        """Keep what this store has of a checkpoint from being removed; see `pins.pinned`."""
        return pinned(self._folder(layout.vm_of(checkpoint), checkpoint))

    def require_unpinned(self, checkpoint: str) -> None:
        """Raises Conflict for a checkpoint that is pinned; one that is not here is not."""
        folder = self._folder(layout.vm_of(checkpoint), checkpoint)
        with contextlib.suppress(FileNotFoundError), unpinned(folder):
            pass

    def parts_here(self, manifest: Manifest) -> tuple[str, ...]:
        """The hosts whose parts this store has; whether they are whole, reading them says."""
        parts = (part.host for part in manifest.hosts)
        return tuple(host for host in parts if self._part(manifest, host).is_dir())

    def sweep(
        self, vm: str, keep: frozenset[str] = frozenset(), *, whole_parts: bool = True
    ) -> Names:
        """Remove unpublished checkpoints of `vm`, but for `keep` and pinned ones; their ids.

        What sub hosts have saved in a store of their own stays: its manifest is in the store of
        the main host. Without `whole_parts` nothing goes that has a part which its host has ended:
        on network storage a host may not see yet that another has published it (nfs(5), acdirmin).
        Call it only where no other checkpoint than those in `keep` is being taken.
        """
        may_be_published = _is_apart if whole_parts else _has_whole_part

        def is_left(path: Path) -> bool:
            return not (path / layout.MANIFEST).exists() and not may_be_published(path)

        swept = []
        for path in _folders(self.root / layout.checked_vm(vm)):
            mine = layout.is_checkpoint_of(vm, path.name) and path.name not in keep
            if mine and is_left(path):
                # Hosts that share the store may sweep at the same time.
                with contextlib.suppress(Conflict, FileNotFoundError), unpinned(path):
                    if is_left(path):  # still, now that nobody else is at it
                        _remove(path)
                        swept.append(path.name)
        return swept

    def lives(self, vm: str) -> Lives:
        """The lives of a VM, as this store knows them."""
        return Lives(self.root, vm)

    def latest_generation(self, vm: str) -> int:
        """The greatest that was given out or is in a manifest. Raises CheckpointCorrupt."""
        known = [entry.manifest.generation for entry in self.list(vm) if entry.manifest]
        return max([self.lives(vm).counter(), *known])

    def identity(self) -> str:
        """Which store this is: hosts with the same one share it; see `marker`."""
        return marker.identity(self.root)

    def room(self, vm: str) -> int:
        """Bytes that are free for checkpoints of `vm`."""
        return free_in(self.root / layout.checked_vm(vm))

    def read_part(self, manifest: Manifest, host: str) -> host_part.Part:
        """What `host` saved, its tables checked. Raises CheckpointCorrupt and NotFound."""
        return host_part.read_part(self._part(manifest, host), manifest, host)

    def memory_part(self, manifest: Manifest, host: str) -> MemoryPart:
        """What the memory file of `host` must be; nothing is read. Raises NotFound."""
        part = host_part.find_part(manifest, host)
        return host_part.memory_part(self._part(manifest, host), manifest, part)

    def read_placement(self, manifest: Manifest) -> tables.Placement:
        """For every page an index in ``manifest.hosts``, or `tables.NOWHERE`."""
        return host_part.read_placement(self._part(manifest, manifest.main.host), manifest)

    def read_history(self, manifest: Manifest) -> tables.Ticks:
        """For every page the tick of its last access. Raises CheckpointCorrupt."""
        path = self._part(manifest, manifest.main.host) / layout.HISTORY
        expected = host_part.listed(manifest, manifest.main, layout.HISTORY)
        return tables.read_history(path, manifest.page_count, expected)[0]

    def vmcore(self, manifest: Manifest) -> Path:
        """The VM core's file, once it was checked. Raises CheckpointCorrupt."""
        path = self._part(manifest, manifest.main.host) / manifest.vmcore.name
        check_file(path, manifest.vmcore)
        return path

    def verify(
        self, checkpoint: str, progress: Progress | None = None, strict: bool = False
    ) -> VerifyReport:
        """Read every byte of a checkpoint and compare; check that the hosts' parts fit together.

        `progress` gets pages done since its last call. Raises NotFound; CheckpointCorrupt for an
        unreadable manifest, and if `strict` for the first problem of any file.
        """
        manifest = self.get(checkpoint)
        parts = [self.verify_part(manifest, part.host, progress, strict) for part in manifest.hosts]
        return self.verify_together(manifest, parts, strict)

    def verify_part(
        self, manifest: Manifest, host: str, progress: Progress | None = None, strict: bool = False
    ) -> VerifiedPart:
        """The first half of `verify`, for the files of one host; its store has them."""
        verifier = Verifier(manifest, progress, strict)
        mask = verifier.part(self._part(manifest, host), host)
        return VerifiedPart.of(host, verifier.report(), mask)

    def verify_together(
        self, manifest: Manifest, parts: Sequence[VerifiedPart], strict: bool = False
    ) -> VerifyReport:
        """The second half: that the parts fit together. The main host's part is in this store."""
        verifier = Verifier(manifest, strict=strict)
        masks = {}
        for part in parts:
            verifier.include(part)
            mask = part.mask(manifest.page_count)
            if mask is not None:
                masks[part.host] = mask
        verifier.agreement(self._part(manifest, manifest.main.host), masks)
        return verifier.report()

    def _folder(self, vm: str, checkpoint: str) -> Path:
        if layout.vm_of(checkpoint) != layout.checked_vm(vm):
            raise NotFound(f"checkpoint {checkpoint} is not one of VM {vm}")
        return self.root / vm / checkpoint

    def _part(self, manifest: Manifest, host: str) -> Path:
        return self._folder(manifest.vm, manifest.checkpoint) / layout.checked_host(host)

    def _vms(self) -> Names:
        names = (path.name for path in _folders(self.root))
        return [name for name in names if re.fullmatch(layout.VM_PATTERN, name)]

    def _published(self, vm: str) -> Iterator[str]:
        for path in _folders(self.root / vm):
            if layout.is_checkpoint_of(vm, path.name) and (path / layout.MANIFEST).exists():
                yield path.name

    def _listed(self, checkpoint: str) -> Listed:
        vm = layout.vm_of(checkpoint)
        try:
            return Listed(checkpoint, vm, self.get(checkpoint), None)
        except CheckpointCorrupt as error:
            return Listed(checkpoint, vm, None, str(error))

    def _require_published(self, checkpoint: str) -> Path:
        if self.is_published(checkpoint):
            return self._folder(layout.vm_of(checkpoint), checkpoint)
        known = [name for vm in self._vms() for name in self._published(vm)]
        near = difflib.get_close_matches(checkpoint, known, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "see `dcres checkpoints`"
        raise NotFound(f"there is no checkpoint {checkpoint!r} in {self.root}; {hint}")


def _age(entry: Listed) -> tuple[str, int, str]:
    """Checkpoints of one second are in order of their generations."""
    generation = entry.manifest.generation if entry.manifest else 0
    return layout.stamp_of(entry.checkpoint), generation, entry.checkpoint


def _folders(parent: Path) -> list[Path]:
    if not parent.is_dir():
        return []
    return sorted(path for path in parent.iterdir() if path.is_dir() and not path.is_symlink())


def _is_apart(folder: Path) -> bool:
    """Whether all that is here are whole parts of sub hosts, whose main host has another store."""
    parts = _folders(folder)
    of_main_host = any((part / layout.HISTORY).exists() for part in parts)
    return bool(parts) and all(map(_is_whole, parts)) and not of_main_host


def _has_whole_part(folder: Path) -> bool:
    return any(map(_is_whole, _folders(folder)))


def _is_whole(part: Path) -> bool:
    """Whether its host has written all of it: each of these is written after all but the other."""
    return (part / layout.PAGES).exists() and (part / layout.SUMS).exists()


def discarded(checkpoint: str) -> NotFound:
    """The error for a checkpoint under way whose folder is gone."""
    return NotFound(f"checkpoint {checkpoint} was discarded; take a new one")


def _require_whole(folder: Path, manifest: Manifest, here: Collection[str] | None) -> None:
    for part in manifest.hosts:
        if here is None or part.host in here:
            host_part.require_files(folder / part.host, manifest, part)


def _remove(folder: Path) -> None:
    if folder.exists():
        CheckpointFolder(folder).remove()
        sync_folder(folder.parent)
