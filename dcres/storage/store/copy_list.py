"""Which copies are at a URL, and whether one of them has all of its objects."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum

from dcres.errors import CheckpointCorrupt, NotFound
from dcres.storage import layout
from dcres.storage.format.manifest import Manifest
from dcres.storage.store import copy_layout
from dcres.storage.store.copy_url import CopyUrl
from dcres.storage.store.objects import Objects
from dcres.storage.store.protocols import Listed, Listing


class CopyState(StrEnum):
    """What was found of a copy."""

    WHOLE = "whole"  # every object is there, as long as it must be
    INCOMPLETE = "incomplete"
    DAMAGED = "damaged"
    OTHER = "other"  # another checkpoint of that name
    ABSENT = "absent"
    UNKNOWN = "unknown"  # the place did not answer


@dataclass(frozen=True, slots=True)
class CopyFound:
    """A copy's state, and in words what is wrong with it."""

    state: CopyState
    why: str = ""


def list_copies(url: CopyUrl, vm: str | None = None) -> Listing:
    """The checkpoints of one VM or all of which a copy is at `url`, as `Store.list` has them.

    Raises ConfigError, StorageError.
    """
    objects = Objects(url)
    objects.require_place()
    vms = objects.folders() if vm is None else [layout.checked_vm(vm)]
    found = []
    for each in vms:
        if re.fullmatch(layout.VM_PATTERN, each):
            names = objects.folders(each)
            found += [name for name in names if layout.is_checkpoint_of(each, name)]
    listed = [entry for name in found if (entry := _listed(objects, name))]
    return sorted(listed, key=lambda entry: (layout.stamp_of(entry.checkpoint), entry.checkpoint))


def _listed(objects: Objects, checkpoint: str) -> Listed | None:
    vm = layout.vm_of(checkpoint)
    with suppress(NotFound):  # one that was not ended
        try:
            return Listed(checkpoint, vm, copy_layout.read_manifest(objects, checkpoint), None)
        except CheckpointCorrupt as error:
            return Listed(checkpoint, vm, None, str(error))
    return None


def get_copy(url: CopyUrl, checkpoint: str) -> Manifest:
    """The manifest of a copy. Raises NotFound, CheckpointCorrupt, ConfigError, StorageError."""
    objects = Objects(url)
    objects.require_place()
    return copy_layout.read_manifest(objects, layout.checked_checkpoint(checkpoint))


def look_at(url: CopyUrl, manifest: Manifest) -> CopyFound:
    """Whether the copy of a checkpoint is whole, by the lengths of its objects.

    Raises ConfigError, StorageError.
    """
    objects = Objects(url)
    try:
        if copy_layout.read_manifest(objects, manifest.checkpoint) != manifest:
            return CopyFound(CopyState.OTHER, "another checkpoint of that name")
        lengths = copy_layout.read_lengths(objects, manifest)
    except NotFound:
        return CopyFound(CopyState.ABSENT, "it is not there, or was not ended")
    except CheckpointCorrupt as error:
        return CopyFound(CopyState.DAMAGED, str(error))
    missing = copy_layout.missing_pieces(objects, manifest, lengths)
    if not missing:
        return CopyFound(CopyState.WHOLE)
    why = f"{len(missing)} objects are missing or have another length, {missing[0]} for one"
    return CopyFound(CopyState.INCOMPLETE, why)
