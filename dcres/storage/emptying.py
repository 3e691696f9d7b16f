"""Whether a folder is a store, and how to remove what a store has put there, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from dcres.errors import NotOurs
from dcres.linux.removal import STORE_MARK, StoreFile, remove_if_empty, remove_store_mark
from dcres.storage import layout
from dcres.storage.store import Store


def is_store(root: Path) -> bool:
    """Whether `root` carries the mark of a store, or has what an earlier dcres, without, left."""
    return (root / STORE_MARK).is_file() or any(True for _ in _own(root))


def empty(root: Path) -> bool:
    """Remove a store's checkpoints and its other files, and `root` if that was all.

    Whether it is gone: what else is there stays. Raises Conflict for a checkpoint in use, OSError.
    """
    store = Store(root)
    for path in list(_own(root)):
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
    if root.is_symlink() or not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.is_symlink())
