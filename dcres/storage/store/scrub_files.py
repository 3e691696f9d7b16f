"""Which files a store has of some checkpoints: every one once, whatever it is called."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dcres.model.formats import MemoryFormat
from dcres.storage import layout
from dcres.storage.engine.expected import MemoryFile
from dcres.storage.format import host_part
from dcres.storage.format.manifest import Manifest
from dcres.storage.store.protocols import CheckpointStore
from dcres.storage.store.scrub_record import Known

Inode = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Part:
    """What a host has of a checkpoint; `published`: its manifest is in this store, too."""

    manifest: Manifest
    host: str
    folder: Path
    published: bool

    @property
    def small_names(self) -> list[str]:
        """Its tables, and the VM core."""
        return [file.name for file in host_part.find_part(self.manifest, self.host).files]

    @property
    def memory_names(self) -> list[str]:
        """Its files of pages."""
        found = host_part.find_part(self.manifest, self.host)
        if found.segments is None:
            return [found.memory_file]
        return [segment.pack for segment in found.segments]

    def memory(self, name: str) -> MemoryFile:
        """What a file of pages must hold by its own tables alone. Raises CheckpointCorrupt."""
        found = host_part.find_part(self.manifest, self.host)
        memory = host_part.memory_part(self.folder, self.manifest, found)
        for segment in memory.segments:
            if segment.pack == name:
                return memory.read_segment(segment)
        return memory.read()

    def known_name(self, name: str) -> str:
        """By which a record of files knows one of these."""
        shared = self.manifest.memory_format is MemoryFormat.SEGMENTED and name != layout.VMCORE
        return f"{self.host}/{name}" if shared else f"{self.manifest.checkpoint}/{self.host}/{name}"


@dataclass(slots=True)
class File:
    """A file that is called `name` in each of the parts `of`; `length_bytes` is without holes."""

    vm: str
    name: str
    known: Known
    length_bytes: int
    of: list[Part] = field(default_factory=list)

    @property
    def has_pages(self) -> bool:
        """Whether it is a memory file, and none of the small ones."""
        return self.name in self.of[0].memory_names


def parts_in(store: CheckpointStore, manifests: Sequence[Manifest]) -> list[Part]:
    """The parts that are in this store."""
    return [
        Part(manifest, host, store.part_folder(manifest, host), published)
        for manifest in manifests
        for published in (store.is_published(manifest.checkpoint),)
        for host in store.parts_here(manifest)
    ]


def files_of(parts: Sequence[Part]) -> dict[Inode, File]:
    """What is there of these parts."""
    found: dict[Inode, File] = {}
    for part in parts:
        for name in (*part.small_names, *part.memory_names):
            try:
                status = os.stat(part.folder / name)
            except OSError:
                continue
            known = Known(part.known_name(name), status.st_ino)
            length_bytes = min(status.st_size, status.st_blocks * 512) or status.st_size
            new = File(part.manifest.vm, name, known, length_bytes)
            found.setdefault((status.st_dev, status.st_ino), new).of.append(part)
    return found


def inode_of(path: Path) -> Inode | None:
    """Which file that is; None if there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino
