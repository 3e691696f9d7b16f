"""One host's part of a published checkpoint, read back and checked against the manifest."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import assert_never

import numpy as np

from dcres.errors import NotFound, StorageError
from dcres.linux.files import opened
from dcres.model.formats import MemoryFormat
from dcres.model.pages import PAGE_SIZE, Mask
from dcres.storage import layout
from dcres.storage.atomic import sync_folder, write_durably
from dcres.storage.damage import corrupt
from dcres.storage.digest import FileSum, bytes_sum, check_file
from dcres.storage.engine.expected import MemoryFile
from dcres.storage.engine.memory_file import SavedMemory
from dcres.storage.format import main_tables, tables
from dcres.storage.format.links import Links
from dcres.storage.format.main_tables import MainTables, write_changes
from dcres.storage.format.manifest import HostPart, Manifest, Role, Segment, listed
from dcres.storage.format.memory_part import MemoryPart, SegmentPart
from dcres.storage.format.merged import Merged, after

_SHARED = (layout.SEGMENT, layout.PAGES, layout.HISTORY)  # kinds of files that belong to segments


@dataclass(frozen=True, slots=True)
class Linked:
    """What a part has from its base: its segments, oldest first, and their small files."""

    segments: tuple[Segment, ...]
    files: tuple[FileSum, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """What `memory_file.load` needs, and where this host's files are."""

    host: str
    folder: Path
    memory: MemoryFile


def find_part(manifest: Manifest, host: str) -> HostPart:
    """The part of `host`. Raises NotFound."""
    for part in manifest.hosts:
        if part.host == host:
            return part
    names = ", ".join(part.host for part in manifest.hosts)
    raise NotFound(f"checkpoint {manifest.checkpoint} has no host {host!r}; its hosts are {names}")


def memory_part(folder: Path, manifest: Manifest, part: HostPart) -> MemoryPart:
    """What the manifest says of the memory files of `part`. Raises CheckpointCorrupt."""
    found = MemoryPart(folder, part.memory_file, manifest.page_count, part.pages)
    match manifest.memory_format:
        case MemoryFormat.SPARSE:
            return replace(found, sums=listed(manifest, part, layout.SUMS))
        case MemoryFormat.PACKED:
            index = listed(manifest, part, layout.INDEX)
            return replace(found, sums=listed(manifest, part, layout.SUMS), index=index)
        case MemoryFormat.SEGMENTED:
            segments = (
                SegmentPart(each.pack, each.pages, each.gone, each.places, sum_)
                for each in part.segments or ()
                for sum_ in (listed(manifest, part, each.table),)
            )
            return replace(found, segments=tuple(segments))
        case _:
            assert_never(manifest.memory_format)


def require_files(folder: Path, manifest: Manifest, part: HostPart) -> None:
    """Every file of `part` is in `folder`, and has the length that it had when it was written.

    Folder and files are opened, since over a network that is what shows them as they are now
    (close-to-open, nfs(5)); and the folder's names are durable afterwards. Raises StorageError.
    """
    lengths = {file.name: file.length_bytes for file in part.files}
    for name, length_bytes in lengths.items():
        _require_length(folder, name, length_bytes)
    sync_folder(folder)
    match manifest.memory_format:
        case MemoryFormat.SPARSE:
            lengths = {part.memory_file: manifest.memory_bytes}
        case MemoryFormat.PACKED:
            lengths = {part.memory_file: tables.count_index(folder / layout.INDEX) * PAGE_SIZE}
        case MemoryFormat.SEGMENTED:
            lengths = {each.pack: each.places * PAGE_SIZE for each in part.segments or ()}
        case _:
            assert_never(manifest.memory_format)
    for name, length_bytes in lengths.items():
        _require_length(folder, name, length_bytes)


def _require_length(folder: Path, name: str, length_bytes: int) -> None:
    path = folder / name
    try:
        with opened(folder, os.O_RDONLY | os.O_DIRECTORY), opened(path, os.O_RDONLY) as fd:
            found = f"has {os.fstat(fd).st_size} bytes instead of {length_bytes}"
            if os.fstat(fd).st_size == length_bytes:
                return
    except OSError as error:
        found = f"cannot be opened ({error.strerror})"
    who = "find out what else changes files in the store"
    if not folder.exists():
        copy = f"if the store of host {folder.name} is a copy of this one, with its mark"
        who = f"{copy}, remove {layout.MARKER} there; else {who}"
    raise StorageError(
        f"{path} was saved and now {found}, so the checkpoint is not published; {who}, and take "
        "another"
    )


def write_memory_tables(folder: Path, saved: SavedMemory) -> tuple[FileSum, ...]:
    """Write what `MemoryPart.read` reads, the sums last: durable on return. Raises StoreFull."""
    file, written = saved.file, []
    if file.order is not None:
        index = tables.write_index(folder / layout.INDEX, file.order, len(file.mask))
        written.append(index)
    written.append(tables.write_sums(folder / layout.SUMS, file.mask, file.sums))
    return tuple(written)


def write_main_files(
    folder: Path,
    core: bytes,
    history: tuple[tables.Ticks, int],
    placement: tables.Placement,
    hosts: tuple[str, ...],
) -> tuple[FileSum, ...]:
    """Write what only the main host has, page placement last: durable on return.

    `history` is the tick of each page's last access and the tick now. A part whose page placement
    and sums are there is whole (`Store.sweep`). Raises StoreFull.
    """
    write_durably(folder / layout.VMCORE, core)
    return (
        bytes_sum(layout.VMCORE, core),
        tables.write_history(folder / layout.HISTORY, *history),
        tables.write_placement(folder / layout.PAGES, placement, hosts),
    )


def write_segment(
    folder: Path, checkpoint: str, saved: SavedMemory, gone: Mask, page_count: int
) -> FileSum:
    """Write the table of what a host saved, the last of all its files: durable on return.

    With it the part is whole (`Store.sweep`), so `link_base` and `write_main_changes` come before.
    `gone` are pages that the host's part of the base has and this one has not, since they were
    saved elsewhere or are nowhere; what was saved cannot be among them (ValueError). Raises
    StoreFull.
    """
    if (saved.mask & gone).any() or len(saved.mask) != page_count:
        raise ValueError("what was saved is gone as well, or is of another VM")
    path = folder / layout.by_origin(checkpoint, layout.SEGMENT)
    return tables.write_segment(path, segment_rows(saved, gone), page_count)


def segment_rows(saved: SavedMemory, gone: Mask) -> tables.SegmentRows:
    """The table of what was saved, and is gone. Raises ValueError for a sparse file."""
    file = saved.file
    if file.order is None:
        raise ValueError(f"{file.path} is not packed")
    pages = np.flatnonzero(saved.mask | gone)
    places = np.full(len(pages), tables.ZEROS, dtype=np.uint32)
    places[np.searchsorted(pages, file.order)] = np.arange(len(file.order))
    places[gone[pages]] = tables.GONE
    return tables.SegmentRows(pages, places, np.where(gone[pages], np.uint64(0), file.sums[pages]))


def segment_of(checkpoint: str, saved: SavedMemory, gone: Mask) -> Segment:
    """What a manifest says of the segment that `write_segment` writes."""
    order = saved.file.order
    return Segment(
        checkpoint=checkpoint,
        pages=saved.pages,
        gone=int(np.count_nonzero(gone)),
        places=0 if order is None else len(order),
    )


def write_main_changes(
    folder: Path,
    checkpoint: str,
    core: bytes,
    now: MainTables,
    tick: int,
    saved: int,
    base: MainTables | None,
) -> tuple[FileSum, ...]:
    """As `write_main_files` for a segmented checkpoint: see `main_tables.write_changes`.

    `base` are the tables of the checkpoint that `link_base` has linked, if it was called.
    """
    write_durably(folder / layout.VMCORE, core)
    changes = write_changes(folder, checkpoint, now, tick, saved, base)
    return (bytes_sum(layout.VMCORE, core), *changes)


def link_base(
    base_folder: Path,
    folder: Path,
    base: Manifest,
    host: str,
    checkpoint: str,
    merged: Merged | None = None,
) -> Linked:
    """Give the part of `host` in `checkpoint`, at `folder`, the files of its part of `base`.

    That one's segments, and the main host's tables: by hard links, each with the length and
    checksum that `base` says, durable on return. What is `merged` in a checkpoint of the base's
    chain takes the place of the segments up to that one. To be repeated is harmless, and where it
    fails it leaves no link that it made. Somebody keeps the base from being removed meanwhile.
    Raises NotFound if `host` has no part of it; StorageError, which says why, where only a full
    checkpoint can be taken, or one without what is merged.
    """
    part = find_part(base, host)
    if part.segments is None:
        raise StorageError(
            f"checkpoint {checkpoint} cannot continue {base.checkpoint}, whose memory files are "
            f"{base.memory_format}; take a full one"
        )
    later = after(part.segments, merged)
    names = {each.file(name) for each in later for name in _SHARED}
    small = [file for file in part.files if file.name in names]
    files = [(base_folder / file.name, file) for file in small]
    packs = [(base_folder / each.pack, each) for each in later]
    if merged is not None:
        files += [(merged.folder / file.name, file) for file in merged.files]
        packs.append((merged.folder / merged.segment.pack, merged.segment))
    with Links(folder) as links:
        for path, file in files:
            check_file(path, file)
            links.add(path, file.length_bytes)
        for path, segment in packs:
            links.add(path, segment.places * PAGE_SIZE)
        sync_folder(folder)
        links.keep()
    first = () if merged is None else (merged.segment,)
    return Linked((*first, *later), tuple(file for _, file in files))


def read_here(folder: Path, manifest: Manifest, part: HostPart) -> Mask:
    """The pages here according to the page placement or page existence file."""
    if part.role is Role.MAIN:
        here: Mask = read_placement(folder, manifest) == 0
        return here
    expected = listed(manifest, part, layout.PAGES)
    return tables.read_existence(folder / layout.PAGES, manifest.page_count, expected)


def read_placement(folder: Path, manifest: Manifest) -> tables.Placement:
    """The main host's page placement: per page an index in `manifest.hosts`, or nowhere.

    That says whose part has the page's bytes; in a whole checkpoint the page was there.
    """
    if manifest.memory_format is MemoryFormat.SEGMENTED:
        return main_tables.read_placement(folder, manifest)
    expected = listed(manifest, manifest.main, layout.PAGES)
    path = folder / layout.PAGES
    placement, hosts = tables.read_placement(path, manifest.page_count, expected)
    if hosts != tuple(part.host for part in manifest.hosts):
        raise corrupt(path, f"its hosts {', '.join(hosts)} are not the manifest's")
    return placement


def read_history(folder: Path, manifest: Manifest) -> tables.Ticks:
    """The main host's access history: per page the tick of its last access."""
    if manifest.memory_format is MemoryFormat.SEGMENTED:
        return main_tables.read_history(folder, manifest)
    expected = listed(manifest, manifest.main, layout.HISTORY)
    return tables.read_history(folder / layout.HISTORY, manifest.page_count, expected)[0]


def read_main_tables(folder: Path, manifest: Manifest) -> MainTables:
    """Both, for a checkpoint that continues this one."""
    hosts = tuple(part.host for part in manifest.hosts)
    return MainTables(read_placement(folder, manifest), hosts, read_history(folder, manifest))


def placement_file(manifest: Manifest) -> str:
    """The main host's file that says where pages are, at least those that changed."""
    if manifest.memory_format is MemoryFormat.SEGMENTED:
        return layout.by_origin(manifest.checkpoint, layout.PAGES)
    return layout.PAGES


def read_part(folder: Path, manifest: Manifest, host: str) -> Part:
    """The part of `host` in `folder`. Raises CheckpointCorrupt and NotFound."""
    part = find_part(manifest, host)
    memory = memory_part(folder, manifest, part).read()
    if part.role is Role.MAIN or manifest.memory_format is not MemoryFormat.SEGMENTED:
        here = read_here(folder, manifest, part)
        require_same(folder / placement_file(manifest), here, memory.mask, host)
    return Part(host, folder, memory)


def require_same(path: Path, here: Mask, mask: Mask, host: str) -> None:
    """CheckpointCorrupt unless the table at `path` gives `host` exactly the saved pages `mask`."""
    differing = np.flatnonzero(here != mask)
    if differing.size:
        page = int(differing[0])
        what = (
            "was saved by {} and does not belong to it"
            if mask[page]
            else "belongs to {} and was not saved there"
        )
        raise corrupt(path, f"page {page} {what.format(host)}")
