"""Copies of checkpoints at a URL: made by the hosts that have the parts, and looked for."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

from dcres.api.beside import Beside, Work
from dcres.api.catalogue import Catalogue
from dcres.api.operation import ProgressOption
from dcres.errors import DcresError
from dcres.model.rate import bytes_per_s
from dcres.storage.format.manifest import Manifest
from dcres.storage.store import copy_records, copy_url
from dcres.storage.store.copy_records import CopyRecord
from dcres.storage.store.copy_url import CopyUrl
from dcres.storage.store.pieces import PartCopied
from dcres.storage.store.protocols import CheckpointStore, Listing


@dataclass(frozen=True, slots=True)
class Copied:
    """What the copying of a checkpoint took, host by host; `place` is its URL without secrets."""

    checkpoint: str
    place: str
    parts: tuple[PartCopied, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As ``dcres copy --json`` prints it."""
        hosts = [
            {
                "host": part.host,
                "files": part.files,
                "bytes_sent": part.sent_bytes,
                "bytes_there": part.there_bytes,
                "seconds": part.seconds,
            }
            for part in self.parts
        ]
        return {
            "checkpoint": self.checkpoint,
            "to": self.place,
            "seconds": self.seconds,
            "bytes_sent": sum(part.sent_bytes for part in self.parts),
            "bytes_there": sum(part.there_bytes for part in self.parts),
            "hosts": hosts,
        }


@dataclass(frozen=True, slots=True)
class KnownCopy:
    """A copy of a checkpoint: where, since when, and in what state it was found."""

    url: str
    since: str | None
    state: str
    why: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As ``dcres copies --json`` prints it."""
        return asdict(self)


def copy(
    catalogue: Catalogue,
    checkpoint: str,
    to: str,
    rate: str | float | None = None,
    progress: ProgressOption = None,
) -> Copied:
    """Have the hosts send their parts to a URL, all at once; see `Checkpoint.copy`."""
    url, limit, began = copy_url.parse(to), bytes_per_s(rate), time.monotonic()
    where, manifest = catalogue.find(checkpoint)
    holders = catalogue.holders(manifest)
    places = sorted({where, *holders.values()})
    with ThreadPoolExecutor(len(places)) as pool:
        list(pool.map(lambda place: catalogue.run(place, _require_free, url, manifest), places))
    parts = Beside[PartCopied](f"copy of {checkpoint} to {url.shown}", manifest.vm, "copying").run(
        _senders(catalogue, manifest, holders, url, limit), progress
    )
    lengths = {host: part.memory_bytes for host, part in parts.items()}
    catalogue.run(where, _publish, manifest, url, lengths, datetime.now(UTC))
    ordered = tuple(parts[part.host] for part in manifest.hosts)
    return Copied(checkpoint, url.shown, ordered, time.monotonic() - began)


def _senders(
    catalogue: Catalogue,
    manifest: Manifest,
    holders: Mapping[str, str],
    url: CopyUrl,
    limit: float | None,
) -> dict[str, Callable[[], Work[PartCopied]]]:
    """How to begin to send each part; a place that sends several shares its rate among them."""
    shares = Counter(holders.values())
    return {
        host: partial(
            catalogue.stream,
            place,
            _send_part,
            manifest,
            host,
            url,
            None if limit is None else limit / shares[place],
        )
        for host, place in holders.items()
    }


def known_copies(catalogue: Catalogue, checkpoint: str) -> list[KnownCopy]:
    """The copies that are on record with a checkpoint, each as it is found now."""
    where, manifest = catalogue.find(checkpoint)
    return catalogue.run(where, _look_at_known, manifest)


def copy_at(checkpoint: str, source: str) -> KnownCopy:
    """What is at a URL of a checkpoint, as this machine sees it; no store is asked.

    Raises ConfigError, StorageError, and NotFound if there is no copy.
    """
    from dcres.storage.store import copy_list

    url = copy_url.parse(source)
    manifest = copy_list.get_copy(url, checkpoint)
    found = copy_list.look_at(url, manifest)
    return KnownCopy(url.shown, None, str(found.state), found.why)


def list_copies(source: str, vm: str | None = None) -> Listing:
    """The checkpoints that have a copy at a URL, as this machine sees it.

    Raises ConfigError, StorageError.
    """
    from dcres.storage.store import copy_list

    return copy_list.list_copies(copy_url.parse(source), vm)


# What follows runs where a store is. pyarrow's file systems are loaded there, and not before.


def _require_free(store: CheckpointStore, url: CopyUrl, manifest: Manifest) -> None:
    from dcres.storage.store import upload

    upload.require_free(url, manifest)


def _send_part(
    store: CheckpointStore, manifest: Manifest, host: str, url: CopyUrl, limit: float | None
) -> Iterator[PartCopied]:
    from dcres.storage.store import upload

    yield from upload.send_part(store, manifest, host, url, limit)


def _publish(
    store: CheckpointStore,
    manifest: Manifest,
    url: CopyUrl,
    lengths: Mapping[str, int],
    now: datetime,
) -> None:
    from dcres.storage.store import upload

    upload.publish(store, manifest, url, lengths, now)


def _look_at_known(store: CheckpointStore, manifest: Manifest) -> list[KnownCopy]:
    return [_known(manifest, record) for record in copy_records.read(store, manifest)]


def _known(manifest: Manifest, record: CopyRecord) -> KnownCopy:
    from dcres.storage.store import copy_list
    from dcres.storage.store.copy_list import CopyState

    try:
        found = copy_list.look_at(copy_url.parse(record.url), manifest)
    except DcresError as error:
        return KnownCopy(record.url, record.since, str(CopyState.UNKNOWN), str(error))
    return KnownCopy(record.url, record.since, str(found.state), found.why)
