"""The versions of the manifest: which keys each one has, and the frame that all of them share.

What a version has is fixed with the first file that was written in it: `dcres.storage.format.
manifest` may learn more keys, and those of an earlier version are read, and written again, as ever.
A later version gets an entry of its own in `VERSIONS`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcres.errors import CheckpointCorrupt
from dcres.model.formats import MemoryFormat
from dcres.storage.damage import corrupt, newer

Values = dict[str, Any]
Keys = Mapping[str, Any]  # True for a key with any value, else the keys of its value


def _keys(names: str, **nested: Keys) -> Keys:
    return {**dict.fromkeys(names.split(), True), **nested}


def _each(keys: Keys) -> Keys:
    """Of every member of an array."""
    return {"__all__": keys}


_FILE = _keys("name length_bytes sha256")
_ANY_HOST = _keys(
    "host role share_bytes pages bytes_written file_bytes_allocated seconds", files=_each(_FILE)
)
_HOST = _keys("memory_file", **_ANY_HOST)
_SEGMENTED_HOST = _keys(
    "", segments=_each(_keys("checkpoint pages gone places merged")), **_ANY_HOST
)
_FIRST_KEYS = _keys(
    "format_version checkpoint vm created mode memory_format memory_bytes page_size generation "
    "vm_spec qemu_version accel machine tick seconds downtime_seconds pages_moved_for_checkpoint "
    "rounds",
    hosts=_each(_HOST),
    vmcore=_FILE,
    disks=_each(_keys("path format snapshot")),
    paging_during=_keys("pages_in pages_out"),
)
_THIRD_KEYS = {
    **_FIRST_KEYS,
    **_keys("base chain pages_changed pages_saved", hosts=_each(_SEGMENTED_HOST)),
}


@dataclass(frozen=True, slots=True)
class Version:
    """One version: its keys, at every level, and the memory files that its checkpoints have."""

    keys: Keys
    memory_formats: frozenset[MemoryFormat]


VERSIONS = {
    1: Version(_FIRST_KEYS, frozenset({MemoryFormat.SPARSE})),
    2: Version(_FIRST_KEYS, frozenset({MemoryFormat.PACKED})),
    3: Version(_THIRD_KEYS, frozenset({MemoryFormat.SEGMENTED})),
}
WRITTEN = {  # the version of a new checkpoint
    MemoryFormat.SPARSE: 1,
    MemoryFormat.PACKED: 2,
    MemoryFormat.SEGMENTED: 3,
}


def canonical(values: Any) -> bytes:
    """Canonical JSON: keys sorted, no spaces, ASCII with escapes, shortest decimals."""
    return json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def framed(values: Values) -> str:
    """A manifest file's content: with `checksum`, sorted, indented by two, a final newline."""
    whole = {**values, "checksum": hashlib.sha256(canonical(values)).hexdigest()}
    return json.dumps(whole, sort_keys=True, indent=2, allow_nan=False) + "\n"


def unframed(text: str, path: Path) -> tuple[Version, Values]:
    """The version of a manifest file, and its values without `checksum`, which is right.

    Raises CheckpointCorrupt, which names `path`, for any other text, and for a version that a
    newer dcres wrote.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise corrupt(path, f"it is not JSON ({error})") from None
    if not isinstance(values, dict):
        raise corrupt(path, "it is not a JSON object")
    number = values.get("format_version")
    version = VERSIONS.get(number) if type(number) is int else None
    _require_sum(values, path)
    if version is None:
        raise _unknown(number, path)
    return version, values


def _require_sum(values: Values, path: Path) -> None:
    """The same in all versions, so that what is damaged is not taken for something newer."""
    claimed = values.pop("checksum", None)
    try:
        found = hashlib.sha256(canonical(values)).hexdigest()
    except ValueError as error:
        raise corrupt(path, f"it is not JSON ({error})") from None
    if claimed != found:
        raise corrupt(path, "it was altered: its checksum differs")


def _unknown(number: object, path: Path) -> CheckpointCorrupt:
    newest = max(VERSIONS)
    if type(number) is int and number > newest:
        return newer(path, number, newest)
    return corrupt(path, f"its format version is {number!r}, which no dcres wrote")
