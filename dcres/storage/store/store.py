"""The store: a folder of checkpoints, ``STORE/VM/CHECKPOINT``.

A checkpoint exists if and only if its manifest does: it is written last and removed first.
Everything without a manifest is unfinished work, which `Store.sweep` removes. Every host has a
store; the main host's holds the manifest, and several hosts may share one. What the methods promise
is in `dcres.storage.store.protocols`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path

from dcres.errors import CheckpointCorrupt, Conflict, NotFound
from dcres.linux.removal import CheckpointFolder
from dcres.storage import layout
from dcres.storage.atomic import make_private_dirs, store_written, sync_folder, write_durably
from dcres.storage.damage import corrupt, unreadable
from dcres.storage.digest import check_file
from dcres.storage.engine.transfer import Progress
from dcres.storage.format import host_part
from dcres.storage.format.checks import FileResult, VerifiedPart, Verifier, VerifyReport
from dcres.storage.format.main_tables import MainTables
from dcres.storage.format.manifest import Manifest, dumps, loads
from dcres.storage.format.memory_part import MemoryPart
from dcres.storage.store import marker
from dcres.storage.store.continuing import LocalContinuing
from dcres.storage.store.folders import Folders, below
from dcres.storage.store.lives import Lives
from dcres.storage.store.pins import Hold, pinned, unpinned
from dcres.storage.store.protocols import Continuing, Listed, Listing, Names

_TRIES, _AGAIN_S = 5, 0.05


class Store:
    """Checkpoints below the folder `root`, which is created when first written to."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._folders = Folders(root)
        self.continuing: Continuing = LocalContinuing(self._folders)

    def begin(self, vm: str, checkpoint: str, hold: Hold) -> None:
        """See `Taking`."""
        for tries_left in reversed(range(_TRIES)):
            marker.mark(self.root)
            folder = self._folders.unpublished(vm, checkpoint)
            make_private_dirs(folder)
            try:
                hold.take(checkpoint, pinned(folder))
                return
            except (Conflict, NotFound):  # somebody sweeps it who came before the pin
                if not tries_left:
                    raise
                time.sleep(_AGAIN_S)

    def host_folder(self, vm: str, checkpoint: str, host: str) -> Path:
        """See `Taking`."""
        parent = self._folders.unpublished(vm, checkpoint)
        folder = parent / layout.checked_host(host)
        with contextlib.suppress(FileExistsError), store_written(folder):
            try:
                folder.mkdir(mode=0o700)
            except FileNotFoundError:
                raise discarded(checkpoint) from None
            sync_folder(parent)
        return folder

    def publish(self, manifest: Manifest, here: Collection[str] | None = None) -> None:
        """See `Taking`."""
        folder = self._folders.checkpoint(manifest.vm, manifest.checkpoint)
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
        """See `Published`."""
        vms = self._folders.vms() if vm is None else [layout.checked_vm(vm)]
        found = (name for vm in vms for name in self._folders.published_of(vm))
        return sorted((_listed(self, name) for name in found), key=_age)

    def is_published(self, checkpoint: str) -> bool:
        """See `Published`."""
        return self._folders.is_published(checkpoint)

    def confirm(self, checkpoint: str) -> bool:
        """See `Taking`."""
        found = self.is_published(checkpoint)
        if found:
            sync_folder(self._folders.named(checkpoint))
        return found

    def get(self, checkpoint: str) -> Manifest:
        """See `Published`."""
        path = self._folders.published(checkpoint) / layout.MANIFEST
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
        """See `Taking`."""
        folder = self._folders.checkpoint(vm, checkpoint)
        if (folder / layout.MANIFEST).exists():
            raise Conflict(f"checkpoint {checkpoint} is published; delete it instead")
        with contextlib.suppress(FileNotFoundError), unpinned(folder):
            self._folders.unpublished(vm, checkpoint)  # it may have been published until now
            _remove(folder)

    def delete(self, checkpoint: str) -> None:
        """See `Published`."""
        folder = self._folders.published(checkpoint)
        try:
            with unpinned(folder), store_written(folder / layout.MANIFEST):
                (ours := CheckpointFolder(folder)).require_removable()
                ours.remove_file(folder / layout.MANIFEST)
                sync_folder(folder)
                _remove(folder)
        except FileNotFoundError:
            raise NotFound(f"checkpoint {checkpoint} was deleted meanwhile") from None

    def pin(self, checkpoint: str) -> contextlib.AbstractContextManager[None]:
        """See `Published`."""
        return pinned(self._folders.named(checkpoint))

    def require_unpinned(self, checkpoint: str) -> None:
        """See `Published`."""
        folder = self._folders.named(checkpoint)
        with contextlib.suppress(FileNotFoundError), unpinned(folder):
            pass

    def part_folder(self, manifest: Manifest, host: str) -> Path:
        """See `Reading`."""
        return self._folders.part(manifest, host)

    def parts_here(self, manifest: Manifest) -> tuple[str, ...]:
        """See `Reading`."""
        parts = (part.host for part in manifest.hosts)
        return tuple(host for host in parts if self._folders.part(manifest, host).is_dir())

    def sweep(
        self, vm: str, keep: frozenset[str] = frozenset(), *, whole_parts: bool = True
    ) -> Names:
        """See `Taking`."""
        may_be_published = _is_apart if whole_parts else _has_whole_part

        def is_left(path: Path) -> bool:
            return not (path / layout.MANIFEST).exists() and not may_be_published(path)

        swept = []
        for path in below(self.root / layout.checked_vm(vm)):
            mine = layout.is_checkpoint_of(vm, path.name) and path.name not in keep
            if mine and is_left(path):
                # Hosts that share the store may sweep at the same time.
                with contextlib.suppress(Conflict, FileNotFoundError), unpinned(path):
                    if is_left(path):  # still, now that nobody else is at it
                        _remove(path)
                        swept.append(path.name)
        return swept

    def lives(self, vm: str) -> Lives:
        """See `Naming`."""
        return Lives(self.root, vm)

    def latest_generation(self, vm: str) -> int:
        """See `Naming`."""
        known = [entry.manifest.generation for entry in self.list(vm) if entry.manifest]
        record = self.lives(vm).records.read()
        recorded = 0 if record is None else record.generation
        return max([self.lives(vm).counter(), recorded, *known])

    def identity(self) -> str:
        """See `Taking`."""
        return marker.identity(self.root)

    def read_part(self, manifest: Manifest, host: str) -> host_part.Part:
        """See `Reading`."""
        return host_part.read_part(self._folders.part(manifest, host), manifest, host)

    def memory_part(self, manifest: Manifest, host: str) -> MemoryPart:
        """See `Reading`."""
        part = host_part.find_part(manifest, host)
        return host_part.memory_part(self._folders.part(manifest, host), manifest, part)

    def read_main_tables(self, manifest: Manifest) -> MainTables:
        """See `Reading`."""
        folder = self._folders.part(manifest, manifest.main.host)
        return host_part.read_main_tables(folder, manifest)

    def vmcore(self, manifest: Manifest) -> Path:
        """See `Reading`."""
        path = self._folders.part(manifest, manifest.main.host) / manifest.vmcore.name
        check_file(path, manifest.vmcore)
        return path

    def verify(
        self, checkpoint: str, progress: Progress | None = None, strict: bool = False
    ) -> VerifyReport:
        """See `Published`."""
        manifest = self.get(checkpoint)
        parts = [self.verify_part(manifest, part.host, progress, strict) for part in manifest.hosts]
        return self.verify_together(manifest, parts, strict)

    def verify_part(
        self, manifest: Manifest, host: str, progress: Progress | None = None, strict: bool = False
    ) -> VerifiedPart:
        """See `Published`."""
        verifier = Verifier(manifest, progress, strict)
        mask = verifier.part(self._folders.part(manifest, host), host)
        report = verifier.report().naming(partial(_others_with, self._folders, manifest))
        return VerifiedPart.of(host, report, mask)

    def verify_together(
        self, manifest: Manifest, parts: Sequence[VerifiedPart], strict: bool = False
    ) -> VerifyReport:
        """See `Published`."""
        verifier = Verifier(manifest, strict=strict)
        masks = {}
        for part in parts:
            verifier.include(part)
            mask = part.mask(manifest.page_count)
            if mask is not None:
                masks[part.host] = mask
        verifier.agreement(self._folders.part(manifest, manifest.main.host), masks)
        return verifier.report().naming(partial(_others_with, self._folders, manifest))


def _others_with(folders: Folders, manifest: Manifest, file: FileResult) -> tuple[str, ...]:
    return folders.others_with(manifest, file.host, file.name)


def _listed(store: Store, checkpoint: str) -> Listed:
    vm = layout.vm_of(checkpoint)
    try:
        return Listed(checkpoint, vm, store.get(checkpoint), None)
    except CheckpointCorrupt as error:
        return Listed(checkpoint, vm, None, str(error))


def _age(entry: Listed) -> tuple[str, int, str]:
    """Checkpoints of one second are in order of their generations."""
    generation = entry.manifest.generation if entry.manifest else 0
    return layout.stamp_of(entry.checkpoint), generation, entry.checkpoint


def _is_apart(folder: Path) -> bool:
    """Whether all that is here are whole parts of sub hosts, whose main host has another store."""
    parts = below(folder)
    histories = (layout.HISTORY, layout.by_origin(folder.name, layout.HISTORY))
    of_main_host = any((part / name).exists() for part in parts for name in histories)
    return bool(parts) and all(map(_is_whole, parts)) and not of_main_host


def _has_whole_part(folder: Path) -> bool:
    return any(map(_is_whole, below(folder)))


def _is_whole(part: Path) -> bool:
    """Whether its host has written all of it.

    The table of its own segment is its last file. In a whole checkpoint, each of two is written
    after all but the other.
    """
    if (part / layout.by_origin(part.parent.name, layout.SEGMENT)).exists():
        return True
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
