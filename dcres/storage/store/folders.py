"""Where a store has what: its folders of VMs, checkpoints and parts, and which there are."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dcres.errors import Conflict, NotFound
from dcres.storage import layout
from dcres.storage.format.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Folders:
    """Folders below the store's `root`. Names that cannot be raise NotFound."""

    root: Path

    def checkpoint(self, vm: str, checkpoint: str) -> Path:
        """The folder of a checkpoint of `vm`, there or not."""
        if layout.vm_of(checkpoint) != layout.checked_vm(vm):
            raise NotFound(f"checkpoint {checkpoint} is not one of VM {vm}")
        return self.root / vm / checkpoint

    def named(self, checkpoint: str) -> Path:
        """The same for the VM that its id names."""
        return self.root / layout.vm_of(checkpoint) / checkpoint

    def part(self, manifest: Manifest, host: str) -> Path:
        """The folder of what `host` saved."""
        return self.checkpoint(manifest.vm, manifest.checkpoint) / layout.checked_host(host)

    def others_with(self, manifest: Manifest, host: str, name: str) -> tuple[str, ...]:
        """Other checkpoints that have a file of `host`: links to it. None if it is not here.

        Where the manifest lies elsewhere it cannot be seen which of them are published.
        """
        mine = self.part(manifest, host) / name
        here = self.is_published(manifest.checkpoint)
        return tuple(
            other.name
            for other in below(self.root / manifest.vm)
            if layout.is_checkpoint_of(manifest.vm, other.name)
            and other.name != manifest.checkpoint
            and (not here or self.is_published(other.name))
            and is_same(mine, other / layout.checked_host(host) / name)
        )

    def unpublished(self, vm: str, checkpoint: str) -> Path:
        """The folder of a checkpoint under way. Raises Conflict for a published one."""
        folder = self.checkpoint(vm, checkpoint)
        if (folder / layout.MANIFEST).exists():
            raise Conflict(f"checkpoint {checkpoint} is published already; begin a new one")
        return folder

    def is_published(self, checkpoint: str) -> bool:
        """Whether the checkpoint's manifest is there."""
        with suppress(NotFound):
            return (self.named(checkpoint) / layout.MANIFEST).exists()
        return False

    def published(self, checkpoint: str) -> Path:
        """The folder of a published checkpoint. Raises NotFound, which names similar ids."""
        if self.is_published(checkpoint):
            return self.named(checkpoint)
        known = [name for vm in self.vms() for name in self.published_of(vm)]
        near = difflib.get_close_matches(checkpoint, known, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "see `dcres checkpoints`"
        raise NotFound(f"there is no checkpoint {checkpoint!r} in {self.root}; {hint}")

    def published_of(self, vm: str) -> Iterator[str]:
        """The published checkpoints of a VM, readable or not."""
        for path in below(self.root / vm):
            if layout.is_checkpoint_of(vm, path.name) and (path / layout.MANIFEST).exists():
                yield path.name

    def vms(self) -> list[str]:
        """The VMs that have a folder."""
        names = (path.name for path in below(self.root))
        return [name for name in names if re.fullmatch(layout.VM_PATTERN, name)]


def is_same(path: Path, other: Path) -> bool:
    """Whether both are there, and are one file."""
    with suppress(OSError):
        return os.path.samestat(path.lstat(), other.lstat())
    return False


def below(parent: Path) -> list[Path]:
    """The folders in `parent`, sorted; links are none, and nothing is in what is not there."""
    if not parent.is_dir():
        return []
    return sorted(path for path in parent.iterdir() if path.is_dir() and not path.is_symlink())
