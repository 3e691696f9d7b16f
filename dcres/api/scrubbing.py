"""Scrubbing all stores of a cluster, or one that this machine reaches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from dcres.api.beside import Beside
from dcres.api.catalogue import Catalogue
from dcres.api.operation import ProgressOption
from dcres.errors import NotFound
from dcres.model.rate import age_s, bytes_per_s
from dcres.storage import layout
from dcres.storage.format.checks import FileState
from dcres.storage.format.host_part import placement_file
from dcres.storage.format.manifest import TIME_FORMAT, Manifest
from dcres.storage.store import scrubbing
from dcres.storage.store.protocols import CheckpointStore, Listing
from dcres.storage.store.scrubbed import Damage, PartSeen, Scrubbed, VmScrubbed

_KEPT = "what was read until then is remembered, and the next time begins with the rest"
_HERE = "store"


@dataclass(frozen=True, slots=True)
class Scrubbing:
    """What was read in each store, by host, and what was found to be damaged.

    `changed` are checkpoints that were deleted meanwhile; nothing is said of them.
    """

    stores: dict[str, Scrubbed]
    damaged: tuple[Damage, ...]
    changed: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is damaged of all that was read."""
        return not self.damaged

    def to_dict(self) -> dict[str, Any]:
        """As ``dcres scrub --json`` prints it."""
        every = [each for found in self.stores.values() for each in found.vms]
        return {
            "ok": self.ok,
            "files": sum(each.files for each in every),
            "bytes": sum(each.read_bytes for each in every),
            "skipped": sum(each.skipped for each in every),
            "stores": [
                {"store": name, "seconds": found.seconds, "vms": [*map(_facts, found.vms)]}
                for name, found in self.stores.items()
            ],
            "damaged": [asdict(each) for each in self.damaged],
            "changed": list(self.changed),
        }


def _facts(each: VmScrubbed) -> dict[str, Any]:
    return {
        "vm": each.vm,
        "files": each.files,
        "bytes": each.read_bytes,
        "skipped": each.skipped,
        "damaged": each.damaged,
        "oldest_read": None if each.oldest is None else each.oldest.strftime(TIME_FORMAT),
        "not_remembered": each.trouble or None,
    }


def scrub(
    catalogue: Catalogue,
    vm: str | None = None,
    rate: str | float | None = None,
    older: str | float | None = None,
    progress: ProgressOption = None,
) -> Scrubbing:
    """Read all that is in the stores, each in its place; see `Cluster.scrub`."""
    limit, age = bytes_per_s(rate), age_s(older)
    listing = catalogue.list(vm)
    if vm is not None and not listing:
        raise NotFound(f"VM {vm} has no checkpoint here; `dcres checkpoints` lists all there are")
    manifests = [each.manifest for each in listing if each.manifest is not None]
    begin = {
        place or _HERE: partial(catalogue.stream, place, _scrub, manifests, limit, age)
        for place in catalogue.places()
    }
    title = "scrub of the stores" if vm is None else f"scrub of VM {vm}"
    stores = Beside[Scrubbed](title, vm or "", "scrubbing", _KEPT).run(begin, progress)
    parts = [part for found in stores.values() for part in found.parts]
    changed = {each: None for found in stores.values() for each in found.changed}
    still = {each.checkpoint for each in catalogue.list(vm)}
    damaged = [each for found in stores.values() for each in found.damaged]
    for each in (
        *_unreadable(listing),
        *_lacking(manifests, parts),
        *_disagreeing(manifests, parts),
    ):
        (checkpoint,) = each.checkpoints
        if checkpoint not in still:
            changed[checkpoint] = None
        elif checkpoint not in changed:
            damaged.append(each)
    return Scrubbing(stores, tuple(damaged), tuple(changed))


def _unreadable(listing: Listing) -> Iterator[Damage]:
    for each in listing:
        if each.error is not None:
            ids = (each.checkpoint,)
            yield Damage(each.vm, "", layout.MANIFEST, FileState.CORRUPT, each.error, ids)


def _lacking(manifests: Sequence[Manifest], parts: Iterable[PartSeen]) -> Iterator[Damage]:
    """Parts that are in no store."""
    seen = {(part.checkpoint, part.host) for part in parts}
    for manifest in manifests:
        for part in manifest.hosts:
            if (manifest.checkpoint, part.host) not in seen:
                why = f"the part of host {part.host} is in no store that answers"
                ids = (manifest.checkpoint,)
                yield Damage(manifest.vm, part.host, "", FileState.MISSING, why, ids)


def _disagreeing(manifests: Sequence[Manifest], parts: Iterable[PartSeen]) -> Iterator[Damage]:
    """Parts that are whole, and have other pages than the main host's placement says."""
    pages = {(part.checkpoint, part.host): part.pages for part in parts if part.pages}
    placed = {part.checkpoint: part.placed for part in parts if part.placed}
    for manifest in manifests:
        checkpoint = manifest.checkpoint
        for host, expected in placed.get(checkpoint, ()):
            if pages.get((checkpoint, host), expected) != expected:
                why = (
                    f"{host} saved other pages than it says; `dcres verify {checkpoint}` names one"
                )
                name, main = placement_file(manifest), manifest.main.host
                yield Damage(manifest.vm, main, name, FileState.CORRUPT, why, (checkpoint,))


# What follows runs on a host.


def _scrub(
    store: CheckpointStore,
    manifests: Sequence[Manifest],
    bytes_per_s: float | None,
    older_s: float | None,
) -> Iterator[Scrubbed]:
    return scrubbing.scrub(store, manifests, bytes_per_s, older_s)
