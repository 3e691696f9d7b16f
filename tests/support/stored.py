"""A small VM over three hosts, and a checkpoint of it in a store."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from dcres.config import vm_spec
from dcres.linux.files import opened
from dcres.model.formats import MemoryFormat
from dcres.model.pages import PAGE_SIZE, Mask, extents_of_mask
from dcres.storage import layout
from dcres.storage.digest import FileSum
from dcres.storage.engine.memory_file import MemoryFileWriter, SavedMemory
from dcres.storage.format import tables
from dcres.storage.format.host_part import (
    segment_of,
    write_main_changes,
    write_main_files,
    write_memory_tables,
    write_segment,
)
from dcres.storage.format.main_tables import MainTables
from dcres.storage.format.manifest import DiskSnapshot, HostPart, Manifest, Mode, Role, Segment
from dcres.storage.store.pins import Hold
from dcres.storage.store.protocols import CheckpointStore
from dcres.storage.store.store import Store

NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
HOSTS = ("h0", "h1", "h2")
PAGE_COUNT = 96


def memory(path: Path, mask: Mask, seed: int = 1) -> Path:
    """A RAM file with random content where `mask` is true and holes elsewhere."""
    random = np.random.default_rng(seed)
    with opened(path, os.O_RDWR | os.O_CREAT) as fd:
        os.ftruncate(fd, len(mask) * PAGE_SIZE)
        for page in np.flatnonzero(mask).tolist():
            os.pwrite(fd, random.bytes(PAGE_SIZE), page * PAGE_SIZE)
    return path


def save(
    path: Path, source: Path, mask: Mask, memory_format: MemoryFormat = MemoryFormat.SPARSE
) -> SavedMemory:
    """`source`'s pages in `mask` as a sealed memory file at `path`."""
    with (
        opened(source, os.O_RDONLY) as fd,
        MemoryFileWriter(path, len(mask), memory_format=memory_format) as writer,
    ):
        writer.save(fd, extents_of_mask(mask))
        return writer.seal()


def placement(page_count: int = PAGE_COUNT, seed: int = 2) -> tables.Placement:
    """Pages at random on the hosts, and some nowhere."""
    choices = np.array([0, 1, 2, tables.NOWHERE], dtype=np.uint8)
    return np.random.default_rng(seed).choice(choices, page_count)


def take(
    store: CheckpointStore,
    ram: Path,
    *,
    generation: int = 1,
    vm: str = "demo",
    now: datetime = NOW,
    token: str = "00ab",
    memory_format: MemoryFormat = MemoryFormat.SPARSE,
) -> Manifest:
    """All files of a checkpoint of the RAM file `ram`, and its manifest, not yet published."""
    where = placement()
    checkpoint = layout.checkpoint_id(vm, now, token)
    _begin(store, vm, checkpoint)
    parts = tuple(
        _slice(store.host_folder(vm, checkpoint, host), ram, where, index, memory_format)
        for index, host in enumerate(HOSTS)
    )
    vmcore = parts[0].file(layout.VMCORE)
    assert vmcore is not None
    return Manifest(
        checkpoint=checkpoint,
        vm=vm,
        created=f"{now:%Y-%m-%dT%H:%M:%SZ}",
        mode=Mode.STOP,
        memory_format=memory_format,
        memory_bytes=PAGE_COUNT * PAGE_SIZE,
        generation=generation,
        vm_spec={"name": vm, "memory": PAGE_COUNT * PAGE_SIZE, "append": "é=\u2028"},
        qemu_version="7.2.22",
        accel="tcg",
        tick=7,
        hosts=parts,
        vmcore=vmcore,
        chain=(checkpoint,) if memory_format is MemoryFormat.SEGMENTED else (),
        disks=(DiskSnapshot(path="/d.qcow2", format="qcow2", snapshot=checkpoint),),
        seconds=1.23456,
        downtime_seconds=0.00001,
        rounds=1,
    )


def begin(store: CheckpointStore, manifest: Manifest) -> None:
    """Make the folder of a checkpoint, and leave it unpinned."""
    _begin(store, manifest.vm, manifest.checkpoint)


def _begin(store: CheckpointStore, vm: str, checkpoint: str) -> None:
    hold = Hold()
    store.begin(vm, checkpoint, hold)
    hold.drop()


def folder(store: Store, manifest: Manifest) -> Path:
    """Where `store` has the checkpoint."""
    return store.root / manifest.vm / manifest.checkpoint


def rewritten(
    store: Store, manifest: Manifest, host: int, **files: Callable[[Path], FileSum]
) -> Manifest:
    """`manifest` after the tables of `host` were replaced by others, as a faulty host might."""
    place = folder(store, manifest) / HOSTS[host]
    part = manifest.hosts[host]
    sums = [write(place / name) for name, write in files.items()]
    kept = [file for file in part.files if file.name not in {new.name for new in sums}]
    new_part = part.model_copy(update={"files": (*kept, *sums)})
    hosts = tuple(new_part if other is part else other for other in manifest.hosts)
    return manifest.model_copy(update={"hosts": hosts})


def republish(store: Store, manifest: Manifest) -> None:
    """Publish `manifest` in place of the one that is there."""
    (folder(store, manifest) / layout.MANIFEST).unlink()
    store.publish(manifest, ())


def store_with_demo(folder: Path) -> Store:
    """A store with one checkpoint of VM demo over three hosts, without disks."""
    store = Store(folder / "store")
    taken = take(store, memory(folder / "ram", np.ones(PAGE_COUNT, dtype=bool)))
    half = PAGE_COUNT * PAGE_SIZE // 2
    layout = {"main": half, "subs": [half, half]}
    spec = vm_spec(
        {"name": "demo", "memory": 2 * half, "kernel": "/vmlinuz", "layout": layout}
    ).model_dump(mode="json", by_alias=True)
    store.publish(taken.model_copy(update={"vm_spec": spec, "disks": ()}))
    return store


def _slice(
    folder: Path,
    ram: Path,
    where: tables.Placement,
    index: int,
    memory_format: MemoryFormat,
) -> HostPart:
    checkpoint = folder.parent.name
    name = layout.memory_file(memory_format, checkpoint)
    saved = save(folder / name, ram, where == index, memory_format)
    files, segments = list[FileSum](), None
    if memory_format is MemoryFormat.SEGMENTED:
        files, segments = _segment_files(folder, saved, where, index)
    else:
        files += write_memory_tables(folder, saved)
        if index == 0:
            files += _main_files(folder, where)
        else:
            files.append(tables.write_existence(folder / layout.PAGES, where == index))
    return HostPart(
        host=HOSTS[index],
        role=Role.MAIN if index == 0 else Role.SUB,
        share_bytes=PAGE_COUNT * PAGE_SIZE // 2,
        pages=saved.pages,
        bytes_written=saved.bytes_written,
        file_bytes_allocated=saved.allocated_bytes,
        seconds=saved.seconds,
        memory_file=name,
        segments=segments,
        files=tuple(files),
    )


CORE = np.random.default_rng(3).bytes(10_000)
TICKS = np.arange(PAGE_COUNT, dtype=np.uint32)


def _main_files(folder: Path, where: tables.Placement) -> list[FileSum]:
    return [*write_main_files(folder, CORE, (TICKS, 7), where, HOSTS)]


def _segment_files(
    folder: Path, saved: SavedMemory, where: tables.Placement, index: int
) -> tuple[list[FileSum], tuple[Segment, ...]]:
    """Those of a full checkpoint: there is nothing before it."""
    checkpoint, gone = folder.parent.name, np.zeros(PAGE_COUNT, dtype=np.bool_)
    files = list[FileSum]()
    if index == 0:
        now = MainTables(where, HOSTS, TICKS)
        files += write_main_changes(folder, checkpoint, CORE, now, 7, PAGE_COUNT, None)
    files.append(write_segment(folder, checkpoint, saved, gone, PAGE_COUNT))
    return files, (segment_of(checkpoint, saved, gone),)
