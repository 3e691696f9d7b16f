"""A VM over several hosts that is checkpointed again and again, each time only what changed.

The hosts save what a pager would have them save: the pages that were written since the last
checkpoint, from the host that has them now. What each page must hold is kept beside it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dcres.linux.files import opened
from dcres.model.formats import MemoryFormat
from dcres.model.pages import PAGE_SIZE, Mask, extents_of_mask
from dcres.storage import layout
from dcres.storage.digest import FileSum
from dcres.storage.engine.memory_file import MemoryFileWriter
from dcres.storage.format.host_part import (
    read_main_tables,
    segment_of,
    write_main_changes,
    write_segment,
)
from dcres.storage.format.main_tables import MainTables
from dcres.storage.format.manifest import HostPart, Manifest, Mode, Role, Segment, chain_upon
from dcres.storage.format.tables import NOWHERE
from dcres.storage.store.pins import Hold
from dcres.storage.store.store import Store

CORE = b"core"


@dataclass(frozen=True, slots=True)
class Change:
    """What happens to pages `first` to `stop` - 1; see `Chain.change`."""

    kind: str
    first: int
    stop: int
    host: int = 0


class Chain:
    """A VM `vm` of `pages` pages on the hosts h0, h1 …, with its RAM in one file."""

    def __init__(self, folder: Path, pages: int = 64, hosts: int = 3) -> None:
        self.store = Store(folder / "store")
        self.pages = pages
        self.ram = np.zeros((pages, PAGE_SIZE // 8), dtype=np.uint64)
        self.taken: list[Manifest] = []
        self.ticks = np.zeros(pages, dtype=np.uint32)
        self._names = [f"h{index}" for index in range(hosts)]
        self._left: list[str] = []
        self._here = np.full(pages, NOWHERE, dtype=np.uint8)  # by number of the host
        self._saved = self._here.copy()  # who has a page's bytes in the last checkpoint
        self._dirty: Mask = np.zeros(pages, dtype=np.bool_)
        self._ram_path = folder / "ram"
        self._random = np.random.default_rng(1)

    def change(self, change: Change) -> None:
        """Write pages, make them zeros, move them, discard them; let a host leave or join."""
        pages = slice(change.first, change.stop)
        here = self._here[pages]
        match change.kind:
            case "write" | "zero":
                here[here == NOWHERE] = self._host(change.host)
                words = self._random.integers(1, 1 << 63, self.ram[pages].shape, dtype=np.uint64)
                self.ram[pages] = words if change.kind == "write" else 0
                self._dirty[pages] = True
                self.ticks[pages] = len(self.taken) + 1
            case "move":
                here[here != NOWHERE] = self._host(change.host)
            case "discard":
                here[:] = NOWHERE
                self.ram[pages] = 0
                self._dirty[pages] = True
            case "leave":
                self._leave(self._host(change.host))
            case "join":
                self._names.append(f"h{len(self._names)}")

    def _host(self, number: int) -> int:
        """One of the hosts that the VM has."""
        there = [at for at, name in enumerate(self._names) if name not in self._left]
        return there[number % len(there)]

    def _leave(self, host: int) -> None:
        """Its pages go to the main host, which does not leave."""
        if host:
            self._here[self._here == host] = 0
            self._left.append(self._names[host])

    def take(self, publish: bool = True) -> Manifest:
        """A checkpoint based on the last one, if there is one."""
        base = self.taken[-1] if self.taken else None
        checkpoint = f"vm-20260301-120000-{len(self.taken):04x}"
        self.store.begin("vm", checkpoint, Hold())
        self._ram_path.write_bytes(self.ram.tobytes())
        nowhere = self._here == NOWHERE
        saved = np.where(nowhere, self._here, np.where(self._dirty, self._here, self._saved))
        order = [*self._alive(), *(host for host in self._gone_hosts(saved))]
        names = tuple(self._names[host] for host in order)
        codes = np.full(256, NOWHERE, dtype=np.uint8)
        codes[order] = np.arange(len(order))
        now = MainTables(codes[saved], names, self.ticks.copy())
        parts = tuple(self._part(base, checkpoint, host, saved, now) for host in order)
        self._saved, self._dirty = saved, np.zeros(self.pages, dtype=np.bool_)
        manifest = self._manifest(base, checkpoint, parts)
        if publish:
            self.store.publish(manifest)
        self.taken.append(manifest)
        return manifest

    def _alive(self) -> list[int]:
        return [at for at, name in enumerate(self._names) if name not in self._left]

    def _gone_hosts(self, saved: np.ndarray) -> list[int]:
        """Hosts that have left and have pages still."""
        left = [at for at, name in enumerate(self._names) if name in self._left]
        return [host for host in left if (saved == host).any()]

    def _part(
        self, base: Manifest | None, checkpoint: str, host: int, saved: np.ndarray, now: MainTables
    ) -> HostPart:
        name = self._names[host]
        folder = self.store.host_folder("vm", checkpoint, name)
        before: tuple[Segment, ...] = ()
        files: list[FileSum] = []
        part = None if base is None else next((p for p in base.hosts if p.host == name), None)
        if base is not None and part is not None:
            linked = self.store.continuing.link_part(base, name, folder, checkpoint)
            before, files = linked.segments, [*linked.files]
        mask = self._dirty & (saved == host)
        gone = (self._saved == host) & (saved != host)
        with (
            opened(self._ram_path, os.O_RDONLY) as fd,
            MemoryFileWriter(
                folder / layout.memory_file(MemoryFormat.SEGMENTED, checkpoint),
                self.pages,
                memory_format=MemoryFormat.SEGMENTED,
            ) as writer,
        ):
            writer.save(fd, extents_of_mask(mask))
            sealed = writer.seal()
        if host == 0:
            count = int(self._dirty.sum())
            tick = len(self.taken) + 1
            tables = None if base is None else read_main_tables(self.folder(base, name), base)
            files += write_main_changes(folder, checkpoint, CORE, now, tick, count, tables)
        files.append(write_segment(folder, checkpoint, sealed, gone, self.pages))
        return HostPart(
            host=name,
            role=Role.PARTS if name in self._left else Role.SUB if host else Role.MAIN,
            share_bytes=0 if name in self._left else self.pages * PAGE_SIZE,
            pages=int((saved == host).sum()),
            bytes_written=sealed.bytes_written,
            file_bytes_allocated=sealed.allocated_bytes,
            seconds=sealed.seconds,
            segments=(*before, segment_of(checkpoint, sealed, gone)),
            files=tuple(files),
        )

    def _manifest(
        self, base: Manifest | None, checkpoint: str, parts: tuple[HostPart, ...]
    ) -> Manifest:
        core = parts[0].file(layout.VMCORE)
        assert core is not None
        saved = sum(part.segments[-1].pages for part in parts if part.segments)
        return Manifest(
            checkpoint=checkpoint,
            vm="vm",
            created="2026-03-01T12:00:00Z",
            mode=Mode.LIVE,
            memory_format=MemoryFormat.SEGMENTED,
            memory_bytes=self.pages * PAGE_SIZE,
            generation=1,
            vm_spec={"name": "vm"},
            qemu_version="7.2.22",
            accel="tcg",
            tick=len(self.taken) + 1,
            hosts=parts,
            vmcore=core,
            seconds=1.0,
            downtime_seconds=0.1,
            base=None if base is None else base.checkpoint,
            chain=chain_upon(
                base, checkpoint, {s.checkpoint for p in parts for s in p.segments or ()}
            ),
            pages_changed=saved,
            pages_saved=saved,
        )

    def folder(self, manifest: Manifest, host: str) -> Path:
        """Where the store has a host's part."""
        return self.store.root / "vm" / manifest.checkpoint / host

    def placed(self, host: str) -> Mask:
        """The pages whose bytes are in the part of `host` in the last checkpoint."""
        found: Mask = self._saved == self._names.index(host)
        return found
