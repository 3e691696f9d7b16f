"""Which copies of a checkpoint were made: a small file for each, beside its manifest.

It only helps to find copies, and is lost with its store: the URL alone tells what is there.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from dcres.storage.atomic import write_durably
from dcres.storage.format.manifest import TIME_FORMAT, Manifest
from dcres.storage.store.copy_url import CopyUrl
from dcres.storage.store.protocols import CheckpointStore

_VERSION = 1


@dataclass(frozen=True, slots=True)
class CopyRecord:
    """A copy that was made: its URL without credentials, and when, as in a manifest."""

    url: str
    since: str


def write(store: CheckpointStore, manifest: Manifest, url: CopyUrl, now: datetime) -> None:
    """Have it on record that a copy was made; the checkpoint is pinned. Raises StoreReadOnly."""
    values = {"format_version": _VERSION, "since": now.strftime(TIME_FORMAT), "url": url.shown}
    name = f"copy-{hashlib.sha256(url.shown.encode()).hexdigest()[:16]}.json"
    text = json.dumps(values, sort_keys=True) + "\n"
    write_durably(_folder(store, manifest) / name, text.encode())


def read(store: CheckpointStore, manifest: Manifest) -> list[CopyRecord]:
    """Those on record, the oldest first; what is no such record is left out."""
    found = []
    for path in sorted(_folder(store, manifest).glob("copy-*.json")):
        with suppress(OSError, ValueError, TypeError, KeyError):
            values = json.loads(path.read_bytes())
            if values["format_version"] == _VERSION:
                found.append(CopyRecord(str(values["url"]), str(values["since"])))
    return sorted(found, key=lambda each: (each.since, each.url))


def _folder(store: CheckpointStore, manifest: Manifest) -> Path:
    return store.memory_part(manifest, manifest.main.host).folder.parent
