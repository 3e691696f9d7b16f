"""Names on disk: ``STORE/VM/CHECKPOINT/{manifest.json, HOST/…}``.

Every name that becomes part of a path is checked against these patterns, so none leaves the
store.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import assert_never

from dcres.errors import NotFound
from dcres.model.formats import MemoryFormat

MANIFEST = "manifest.json"
MEMORY = "memory.img"
PACK = "memory.pack"
PAGES = "pages.arrow"
SUMS = "sums.arrow"
INDEX = "index.arrow"
HISTORY = "history.arrow"
VMCORE = "vmcore"
MEMORY_FILES = {MemoryFormat.SPARSE: MEMORY, MemoryFormat.PACKED: PACK}
SEGMENT_PACK = "pack"  # this and the next, PAGES and HISTORY are called by their checkpoint
SEGMENT = "segment.arrow"
MERGED = "merged"  # before these, of what is merged in a checkpoint
MERGED_SET = "json"  # then there is such a set, and whole
MERGE_SEGMENTS = 8  # a host that has so many merges them
MOST_SEGMENTS = 16  # of a host; what would have more is a full checkpoint
GENERATION = "generation"
GENERATION_LOCK = ".generation.lock"
RECORD = "record.json"
SCRUBBED = "scrubbed.json"
MARKER = ".dcres-store"  # in the store itself
_LIFE = re.compile(r"\.life-([1-9][0-9]{0,18})")

VM_PATTERN = r"^[a-z0-9]([a-z0-9-]{0,46}[a-z0-9])?$"
HOST_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"
FILE_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,62}$"
CHECKPOINT_PATTERN = r"^[a-z0-9]([a-z0-9-]{0,46}[a-z0-9])?-[0-9]{8}-[0-9]{6}-[0-9a-f]{4}$"
_BY_ORIGIN = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{4}\.")
_TAIL_LENGTH = len("-YYYYmmdd-HHMMSS-xxxx")


def checkpoint_id(vm: str, now: datetime, token: str) -> str:
    """``VM-YYYYmmdd-HHMMSS-xxxx``, in UTC; `token` is four hexadecimal digits."""
    return checked_checkpoint(f"{checked_vm(vm)}-{now.astimezone(UTC):%Y%m%d-%H%M%S}-{token}")


def vm_of(checkpoint: str) -> str:
    """The VM that a checkpoint's id names."""
    return checked_checkpoint(checkpoint)[:-_TAIL_LENGTH]


def stamp_of(checkpoint: str) -> str:
    """``YYYYmmdd-HHMMSS`` of a checkpoint's id; sorts by age."""
    return checked_checkpoint(checkpoint)[1 - _TAIL_LENGTH : -len("-xxxx")]


def by_origin(checkpoint: str, name: str) -> str:
    """``YYYYmmdd-HHMMSS-xxxx.NAME``: a file that later checkpoints share with `checkpoint`."""
    return f"{checked_checkpoint(checkpoint)[1 - _TAIL_LENGTH :]}.{name}"


def has_origin(name: str) -> bool:
    """Whether `by_origin` has named a file, so that other checkpoints may have it as well."""
    return _BY_ORIGIN.match(name) is not None


def memory_file(memory_format: MemoryFormat, checkpoint: str) -> str:
    """The memory file that each host writes for `checkpoint`."""
    match memory_format:
        case MemoryFormat.SPARSE | MemoryFormat.PACKED:
            return MEMORY_FILES[memory_format]
        case MemoryFormat.SEGMENTED:
            return by_origin(checkpoint, SEGMENT_PACK)
        case _:
            assert_never(memory_format)


def is_checkpoint_of(vm: str, name: str) -> bool:
    """Whether `name` is the id of a checkpoint of `vm`."""
    return re.fullmatch(CHECKPOINT_PATTERN, name) is not None and vm_of(name) == vm


def life_file(generation: int) -> str:
    """The file that tells of a VM's life, beside its checkpoints."""
    return f".life-{generation}"


def generation_of(name: str) -> int | None:
    """The generation of a file that `life_file` named; None for another."""
    found = _LIFE.fullmatch(name)
    return None if found is None else int(found[1])


def checked_vm(vm: str) -> str:
    """`vm`, or NotFound if no VM can be called so."""
    return _checked(VM_PATTERN, vm, "VM")


def checked_checkpoint(checkpoint: str) -> str:
    """`checkpoint`, or NotFound if no checkpoint can be called so."""
    return _checked(CHECKPOINT_PATTERN, checkpoint, "checkpoint")


def checked_host(host: str) -> str:
    """`host`, or NotFound if no host can be called so."""
    return _checked(HOST_PATTERN, host, "host")


def _checked(pattern: str, name: str, what: str) -> str:
    if re.fullmatch(pattern, name) is None:
        raise NotFound(f"{name!r} cannot be the name of a {what}; see `dcres checkpoints`")
    return name
