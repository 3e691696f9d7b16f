"""Whether a folder is a store, and how to remove what a store has put there, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from dcres.errors import Conflict, NotOurs
from dcres.linux.files import is_locked
from dcres.linux.marks import STORE_MARK
from dcres.linux.removal import StoreFile, remove_if_empty, remove_store_mark
from dcres.storage import layout
from dcres.storage.store.folders import below
from dcres.storage.store.store import Store


def is_store(root: Path) -> bool:
    """Whether `root` carries the mark of a store, or has what an earlier dcres, without, left."""
    return (root / STORE_MARK).is_file() or any(True for _ in _own(root))


def empty(root: Path) -> bool:
    """Remove a store's checkpoints and its other files, and `root` if that was all.

    Whether it is gone: what else is there stays. Raises Conflict for a checkpoint in use, or a VM
    that runs, with nothing removed; OSError.
    """
    store, own = Store(root), list(_own(root))
    _require_unused(store, own)
    for path in own:
        if isinstance(path, StoreFile):
            path.remove()
        elif store.is_published(path.name):
            store.delete(path.name)
        else:
            store.discard(path.parent.name, path.name)
    for folder in _folders(root):
        if re.fullmatch(layout.VM_PATTERN, folder.name):
            remove_if_empty(folder)
    return remove_store_mark(root)


def _require_unused(store: Store, own: Sequence[Path | StoreFile]) -> None:
    """Conflict for what another cluster, whose store it is as well, uses now."""
    for path in own:
        if not isinstance(path, StoreFile):
            store.require_unpinned(path.name)
        elif layout.generation_of(path.path.name) is not None and is_locked(path.path):
            raise Conflict(
                f"VM {path.path.parent.name} runs and has its checkpoints in {store.root}, so "
                "that is not removed; stop the VM first (`dcres stop`, in its cluster)"
            )


def _own(root: Path) -> Iterator[Path | StoreFile]:
    """Folders of checkpoints, and files beside them."""
    for vm in _folders(root):
        for path in sorted(vm.iterdir()):
            if path.is_symlink():
                continue
            if path.is_dir() and layout.is_checkpoint_of(vm.name, path.name):
                yield path
            elif path.is_file():
                try:
                    yield StoreFile(path)
                except NotOurs:
                    continue


def _folders(root: Path) -> list[Path]:
    return [] if root.is_symlink() else below(root)
