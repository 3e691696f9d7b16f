"""The manifest: the one durable fact that a checkpoint exists, and all that restore must know.

On disk it is JSON with a ``checksum`` key, the SHA-256 of the canonical JSON of all other keys.
`loads` accepts exactly what `dumps` writes, so that no altered byte goes unnoticed. Both go by the
keys of the manifest's version: one that gets a default here is in no file of an earlier version.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    model_validator,
)

from dcres.model.formats import MemoryFormat
from dcres.model.pages import PAGE_SIZE
from dcres.model.run_state import RunState
from dcres.storage.damage import corrupt
from dcres.storage.digest import FileSum
from dcres.storage.format.versions import VERSIONS, WRITTEN, Version, framed, unframed
from dcres.storage.layout import (
    CHECKPOINT_PATTERN,
    FILE_PATTERN,
    HOST_PATTERN,
    MEMORY,
    MERGED,
    SEGMENT,
    SEGMENT_PACK,
    VM_PATTERN,
    by_origin,
    memory_file,
    vm_of,
)

# Four places: the shortest decimal of such a number never has an exponent, in any language.
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False), AfterValidator(lambda s: round(s, 4))]
Count = Annotated[int, Field(ge=0)]
TIME_PATTERN = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z$"
RUN_STATE, STOPPED = "run_state", "stopped"  # keys of `machine`; earlier checkpoints have none
TIME_FORMAT = "%Y-%m-%dT%H:%M:%SZ"  # UTC


class Role(StrEnum):
    """What a host was to the VM."""

    MAIN = "main"
    SUB = "sub"
    PARTS = "parts"  # none of its hosts any more, and has pages of earlier checkpoints


class Mode(StrEnum):
    """How the checkpoint was taken: while the VM ran, or stopped."""

    LIVE = "live"
    STOP = "stop"


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DiskSnapshot(_Model):
    """A disk and the name of the internal snapshot in it."""

    path: str
    format: str
    snapshot: str


class PagingDuring(_Model):
    """Pages that the VM's own remote paging moved while the checkpoint was taken."""

    pages_in: Count = 0
    pages_out: Count = 0


class Segment(_Model):
    """What a host saved in one checkpoint: rows of its table that are `pages`, and those `gone`.

    So many of the pages have `places` in its pack; the others are pages of zeros. A `merged` one
    has all that the host's part of that checkpoint had, from segments before it as well.
    """

    checkpoint: str = Field(pattern=CHECKPOINT_PATTERN)
    pages: Count
    gone: Count
    places: Count
    merged: bool = False

    def file(self, name: str) -> str:
        """The file of that kind which was written with it."""
        return by_origin(self.checkpoint, f"{MERGED}.{name}" if self.merged else name)

    @property
    def table(self) -> str:
        """Its table's file."""
        return self.file(SEGMENT)

    @property
    def pack(self) -> str:
        """Its memory file."""
        return self.file(SEGMENT_PACK)


class MergedSet(_Model):
    """What a host says of a merged segment that no manifest names yet: its small `files`, too."""

    segment: Segment
    files: tuple[FileSum, ...]


class HostPart(_Model):
    """What one host saved: its memory file, and every small file in its folder.

    In a segmented checkpoint it has `segments`, oldest first, of which the last is its own:
    `memory_file` is that one's pack, and follows.
    """

    host: str = Field(pattern=HOST_PATTERN)
    role: Role
    share_bytes: Count
    pages: Count
    bytes_written: Count
    file_bytes_allocated: Count
    seconds: Seconds
    memory_file: str = Field(default=MEMORY, pattern=FILE_PATTERN)
    segments: tuple[Segment, ...] | None = None
    files: tuple[FileSum, ...]

    @model_validator(mode="before")
    @classmethod
    def _derived(cls, values: Any) -> Any:
        segments = values.get("segments") if isinstance(values, dict) else None
        if isinstance(segments, list | tuple) and segments:
            return {**values, "memory_file": Segment.model_validate(segments[-1]).pack}
        return values

    def file(self, name: str) -> FileSum | None:
        """The checksum of the small file `name`, if this host saved one."""
        return next((file for file in self.files if file.name == name), None)


class Manifest(_Model):
    """A published checkpoint. `hosts` begins with the main host, in order of their indices."""

    format_version: int = 1
    checkpoint: str = Field(pattern=CHECKPOINT_PATTERN)
    vm: str = Field(pattern=VM_PATTERN)
    created: str = Field(pattern=TIME_PATTERN)
    mode: Mode
    memory_format: MemoryFormat = MemoryFormat.SPARSE
    memory_bytes: int = Field(gt=0, multiple_of=PAGE_SIZE)
    page_size: Literal[4096] = 4096
    generation: Count
    vm_spec: dict[str, JsonValue]
    qemu_version: str
    accel: str
    machine: dict[str, str] = {}
    tick: Count
    hosts: tuple[HostPart, ...] = Field(min_length=1)
    vmcore: FileSum
    disks: tuple[DiskSnapshot, ...] = ()
    seconds: Seconds
    downtime_seconds: Seconds
    pages_moved_for_checkpoint: Count = 0
    paging_during: PagingDuring = PagingDuring()
    rounds: Count = 0
    base: str | None = None
    chain: tuple[Annotated[str, Field(pattern=CHECKPOINT_PATTERN)], ...] = ()
    pages_changed: Count = 0
    pages_saved: Count = 0

    @model_validator(mode="before")
    @classmethod
    def _versioned(cls, values: Any) -> Any:
        """The version follows from the format, where it is not given."""
        if isinstance(values, dict) and "format_version" not in values:
            memory_format = MemoryFormat(values.get("memory_format", MemoryFormat.SPARSE))
            return {**values, "format_version": WRITTEN[memory_format]}
        return values

    @model_validator(mode="after")
    def _check(self) -> Self:
        version = VERSIONS.get(self.format_version)
        if version is None or self.memory_format not in version.memory_formats:
            raise ValueError(f"{self.memory_format} memory files are not of this format version")
        if self.machine.get(RUN_STATE, RunState.RUNNING) not in set(RunState):
            raise ValueError("the VM's run state is not known")
        if not re.fullmatch(TIME_PATTERN, self.machine.get(STOPPED, self.created)):
            raise ValueError("the time when the VM was paused is missing or malformed")
        names = [part.host for part in self.hosts]
        if len(set(names)) != len(names):
            raise ValueError("a host is named twice")
        roles = [part.role for part in self.hosts]
        others = roles.count(Role.PARTS)
        if roles != [Role.MAIN] + [Role.SUB] * (len(roles) - 1 - others) + [Role.PARTS] * others:
            raise ValueError("the first host is the main host, and the only one")
        name = memory_file(self.memory_format, self.checkpoint)
        if any(part.memory_file != name for part in self.hosts):
            raise ValueError(f"a memory file does not have the name of {self.memory_format} ones")
        self._check_chain()
        for part in self.hosts:
            if len({file.name for file in part.files}) < len(part.files):
                raise ValueError(f"a file of {part.host} is listed twice")
        if self.pages > self.page_count:
            raise ValueError("the hosts saved more pages than the VM has")
        if self.vmcore not in self.main.files:
            raise ValueError("the VM core is not among the main host's files")
        return self

    def _check_chain(self) -> None:
        """Raises ValueError unless all segments are of the chain, and the chain ends here."""
        if self.memory_format is not MemoryFormat.SEGMENTED:
            if self.base is not None or self.chain or self.pages_changed or self.pages_saved:
                raise ValueError("only segmented checkpoints have a base, a chain and its pages")
            if any(part.segments is not None for part in self.hosts):
                raise ValueError("only segmented checkpoints have segments")
            if any(part.role is Role.PARTS for part in self.hosts):
                raise ValueError("only segmented checkpoints have hosts that are not the VM's")
            return
        places = {checkpoint: at for at, checkpoint in enumerate(self.chain)}
        if len(places) < len(self.chain) or {*map(vm_of, self.chain)} != {self.vm}:
            raise ValueError("its chain is not of different checkpoints of this VM")
        if self.chain[-2:] != (*([] if self.base is None else [self.base]), self.checkpoint):
            raise ValueError("its chain does not end with its base and itself")
        for part in self.hosts:
            at = [places.get(segment.checkpoint, -1) for segment in part.segments or ()]
            if -1 in at or at != sorted({*at}):
                raise ValueError(f"the segments of {part.host} are not of the chain, in its order")
            if any(segment.merged for segment in (part.segments or ())[1:]):
                raise ValueError(f"a merged segment of {part.host} is not its first")
        self._check_main_segments(places)

    def _check_main_segments(self, places: dict[str, int]) -> None:
        """The main host's tables are those of its segments, so none may be left out."""
        segments = self.main.segments or ()
        first = places[segments[0].checkpoint]
        if len(segments) < len(places) - first or (first and not segments[0].merged):
            raise ValueError("the main host lacks segments of the chain")

    @property
    def main(self) -> HostPart:
        """The main host's part."""
        return self.hosts[0]

    @property
    def most_segments(self) -> int:
        """How many segments the host has that has the most."""
        return max(len(part.segments or ()) for part in self.hosts)

    @property
    def pages(self) -> int:
        """The number of pages saved, on all hosts."""
        return sum(part.pages for part in self.hosts)

    @property
    def run_state(self) -> RunState:
        """In which the VM was when it was saved; before this was kept, all ran afterwards."""
        return RunState(self.machine.get(RUN_STATE, RunState.RUNNING))

    @property
    def stopped_at(self) -> datetime:
        """When its guest was paused for it, or nearly: when it was begun, if that is not kept."""
        return datetime.fromisoformat(self.machine.get(STOPPED, self.created))

    @property
    def page_count(self) -> int:
        """The number of pages of the VM's memory, saved or never touched."""
        return self.memory_bytes // PAGE_SIZE


def chain_upon(base: Manifest | None, checkpoint: str, named: Collection[str]) -> tuple[str, ...]:
    """The chain of a `checkpoint` upon `base`, of whose segments those of `named` are left."""
    before = () if base is None else base.chain
    return (*(each for each in before if each in named), checkpoint)


def listed(manifest: Manifest, part: HostPart, name: str) -> FileSum:
    """The checksum of file `name`. Raises CheckpointCorrupt if the manifest does not list it."""
    found = part.file(name)
    if found is None:
        what = f"the manifest of {manifest.checkpoint} does not list it"
        raise corrupt(Path(part.host, name), what)
    return found


def dumps(manifest: Manifest) -> str:
    """The manifest file's content, in the version that the manifest has."""
    return _dumps(manifest, VERSIONS[manifest.format_version])


def _dumps(manifest: Manifest, version: Version) -> str:
    return framed(manifest.model_dump(mode="json", include=dict(version.keys)))


def loads(text: str, path: Path) -> Manifest:
    """The manifest in `text`. Raises CheckpointCorrupt, which names `path`, for any other text."""
    version, values = unframed(text, path)
    try:
        manifest = Manifest.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise corrupt(path, f"{where or 'it'}: {first['msg']}") from None
    if _dumps(manifest, version) != text:
        raise corrupt(path, "its values are encoded differently, so it was altered")
    return manifest
