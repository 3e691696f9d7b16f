"""The mark of a store: a small file that says a folder is one, and which.

Hosts compare it to find out whether they share a store. It is made when the store is first
written to, and what has none is no store of dcres.
"""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path

from dcres.errors import StorageError
from dcres.linux.removal import create
from dcres.storage.atomic import make_private_dirs, store_written, sync_folder
from dcres.storage.layout import MARKER

_VERSION = 1


def identity(root: Path) -> str:
    """The identity of the store `root`; empty if it has no mark."""
    try:
        values = json.loads((root / MARKER).read_bytes())
    except (OSError, ValueError):
        return ""
    return str(values.get("id", "")) if isinstance(values, dict) else ""


def mark(root: Path) -> str:
    """The same, for a store that is to be written to: made, and durable, if it was missing.

    Of several hosts that make one at the same time one is first, and its is the store's. Raises
    StoreFull, StoreReadOnly, StorageError for a damaged one.
    """
    make_private_dirs(root)
    found = identity(root)
    if found:
        return found
    token = secrets.token_hex(16)
    text = json.dumps({"id": token, "version": _VERSION}, sort_keys=True) + "\n"
    temporary = root / f".{MARKER}.{token}.tmp"
    with store_written(temporary):
        fd, ours = create(temporary, os.O_WRONLY)
        try:
            with open(fd, "w") as file:
                file.write(text)
                file.flush()
                os.fsync(fd)
            _name(temporary, root / MARKER)
        finally:
            ours.remove()
        sync_folder(root)
    found = identity(root)
    if not found:
        raise StorageError(f"{root / MARKER} is damaged; remove it, and dcres makes a new one")
    return found


def _name(temporary: Path, path: Path) -> None:
    """link(2) lets nobody replace what is there; some file systems have no links."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return
    except OSError:
        os.rename(temporary, path)
