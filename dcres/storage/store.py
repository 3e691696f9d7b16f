"""The store: a folder of checkpoints, ``STORE/VM/CHECKPOINT``.

A checkpoint exists if and only if its manifest does: it is written last and removed first.
Everything without a manifest is unfinished work, which `Store.sweep` removes. Every host has a
store; the main host's holds the manifest, and several hosts may share one.
"""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from dcres.errors import CheckpointCorrupt, Conflict, NotFound
from dcres.linux.files import free_in, locked
from dcres.linux.removal import CheckpointFolder
from dcres.storage import layout, slices, tables
from dcres.storage.atomic import make_private_dirs, sync_folder, write_durably
from dcres.storage.checks import VerifiedPart, Verifier, VerifyReport
from dcres.storage.damage import corrupt, unreadable
from dcres.storage.digest import check_file
from dcres.storage.manifest import Manifest, dumps, loads
from dcres.storage.part import MemoryPart
from dcres.storage.pins import pinned, unpinned
from dcres.storage.transfer import Progress


@dataclass(frozen=True, slots=True)
class Listed:
    """A published checkpoint: its manifest, or why that cannot be read."""

    checkpoint: str
    vm: str
    manifest: Manifest | None
    error: str | None


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

    def begin(self, vm: str, checkpoint: str) -> Path:
        """Create the checkpoint's folder, mode 0700; may be repeated until it is published.

        Raises Conflict for a published one, NotFound for names that cannot be, StoreFull.
        """
        folder = self._folder(vm, checkpoint)
        if (folder / layout.MANIFEST).exists():
            raise Conflict(f"checkpoint {checkpoint} is published already; begin a new one")
        make_private_dirs(folder)
        return folder

    def host_folder(self, vm: str, checkpoint: str, host: str) -> Path:
        """`begin`, and the folder for the files of `host` in it; may be repeated."""
        folder = self.begin(vm, checkpoint) / layout.checked_host(host)
        make_private_dirs(folder)
        return folder

    def publish(self, manifest: Manifest) -> None:
        """Make the checkpoint exist; all its files must be durable by now.

        May be repeated with the same manifest. Raises Conflict if another was published,
        NotFound if the checkpoint was never begun, StoreFull.
        """
        folder = self._folder(manifest.vm, manifest.checkpoint)
        if not folder.is_dir():
            raise NotFound(f"checkpoint {manifest.checkpoint} was discarded; take a new one")
        path = folder / layout.MANIFEST
        text = dumps(manifest).encode("ascii")
        for host in manifest.hosts:
            if (folder / host.host).is_dir():
                sync_folder(folder / host.host)
        if not path.exists():
            write_durably(path, text)
        elif path.read_bytes() != text:
            raise Conflict(f"checkpoint {manifest.checkpoint} is published with other content")
        sync_folder(folder)

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
        if folder.is_dir():
            with unpinned(folder):
                _remove(folder)

    def delete(self, checkpoint: str) -> None:
        """Remove a published checkpoint, readable or not: its manifest first, then its files.

        Raises NotFound, and Conflict for one that is pinned. After a crash in between, `sweep`
        removes the rest.
        """
        folder = self._require_published(checkpoint)
        with unpinned(folder):
            CheckpointFolder(folder).remove_file(folder / layout.MANIFEST)
            sync_folder(folder)
            _remove(folder)

    def pin(self, checkpoint: str) -> contextlib.AbstractContextManager[None]:
        """Keep what this store has of a checkpoint from being removed; see `pins.pinned`."""
        return pinned(self._folder(layout.vm_of(checkpoint), checkpoint))

    def require_unpinned(self, checkpoint: str) -> None:
        """Raises Conflict for a checkpoint that is pinned; one that is not here is not."""
        folder = self._folder(layout.vm_of(checkpoint), checkpoint)
        if folder.is_dir():
            with unpinned(folder):
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
        swept = []
        for path in _folders(self.root / layout.checked_vm(vm)):
            mine = layout.is_checkpoint_of(vm, path.name) and path.name not in keep
            if mine and not (path / layout.MANIFEST).exists() and not may_be_published(path):
                # Hosts that share the store may sweep at the same time.
                with contextlib.suppress(Conflict, FileNotFoundError), unpinned(path):
                    _remove(path)
                    swept.append(path.name)
        return swept

    def next_generation(self, vm: str, above: int = 0) -> int:
        """A number greater than `above`, all given out before and all in manifests; durable.

        Callers in other processes wait for each other (flock). Raises CheckpointCorrupt if the
        counter cannot be read.
        """
        folder = self.root / layout.checked_vm(vm)
        make_private_dirs(folder)
        with locked(folder / layout.GENERATION_LOCK):
            known = [entry.manifest.generation for entry in self.list(vm) if entry.manifest]
            generation = max([above, _read_counter(folder / layout.GENERATION), *known]) + 1
            write_durably(folder / layout.GENERATION, b"%d\n" % generation)
        return generation

    def room(self, vm: str) -> int:
        """Bytes that are free for checkpoints of `vm`."""
        return free_in(self.root / layout.checked_vm(vm))

    def read_slice(self, manifest: Manifest, host: str) -> slices.Slice:
        """What `host` saved, its tables checked. Raises CheckpointCorrupt and NotFound."""
        return slices.read_slice(self._part(manifest, host), manifest, host)

    def memory_part(self, manifest: Manifest, host: str) -> MemoryPart:
        """What the memory file of `host` must be; nothing is read. Raises NotFound."""
        part = slices.find_slice(manifest, host)
        return slices.memory_part(self._part(manifest, host), manifest, part)

    def read_placement(self, manifest: Manifest) -> tables.Placement:
        """For every page an index in ``manifest.hosts``, or `tables.NOWHERE`."""
        return slices.read_placement(self._part(manifest, manifest.main.host), manifest)

    def read_history(self, manifest: Manifest) -> tables.Ticks:
        """For every page the tick of its last access. Raises CheckpointCorrupt."""
        path = self._part(manifest, manifest.main.host) / layout.HISTORY
        expected = slices.listed(manifest, manifest.main, layout.HISTORY)
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


def _remove(folder: Path) -> None:
    if folder.exists():
        CheckpointFolder(folder).remove()
        sync_folder(folder.parent)


def _read_counter(path: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        text = path.read_text("ascii", errors="replace").strip()
        if not (text.isascii() and text.isdigit()):
            raise CheckpointCorrupt(
                f"{path} is not a number; write one above all generations there"
            )
        return int(text)
    return 0
