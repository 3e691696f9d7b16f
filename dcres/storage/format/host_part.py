"""One host's part of a published checkpoint, read back and checked against the manifest."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dcres.errors import NotFound, StorageError
from dcres.linux.files import opened
from dcres.model.formats import MemoryFormat
from dcres.model.pages import PAGE_SIZE, Mask
from dcres.storage import layout
from dcres.storage.atomic import sync_folder, write_durably
from dcres.storage.damage import corrupt
from dcres.storage.digest import FileSum, bytes_sum
from dcres.storage.engine.expected import MemoryFile
from dcres.storage.engine.memory_file import SavedMemory
from dcres.storage.format import tables
from dcres.storage.format.manifest import HostPart, Manifest, Role
from dcres.storage.format.memory_part import MemoryPart


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


def listed(manifest: Manifest, part: HostPart, name: str) -> FileSum:
    """The checksum of file `name`. Raises CheckpointCorrupt if the manifest does not list it."""
    found = part.file(name)
    if found is None:
        what = f"the manifest of {manifest.checkpoint} does not list it"
        raise corrupt(Path(part.host, name), what)
    return found


def memory_part(folder: Path, manifest: Manifest, part: HostPart) -> MemoryPart:
    """What the manifest says of the memory file of `part`. Raises CheckpointCorrupt."""
    packed = manifest.memory_format is MemoryFormat.PACKED
    return MemoryPart(
        folder=folder,
        memory_file=part.memory_file,
        page_count=manifest.page_count,
        pages=part.pages,
        sums=listed(manifest, part, layout.SUMS),
        index=listed(manifest, part, layout.INDEX) if packed else None,
    )


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
            wanted = manifest.memory_bytes
        case MemoryFormat.PACKED:
            wanted = tables.count_index(folder / layout.INDEX) * PAGE_SIZE
    _require_length(folder, part.memory_file, wanted)


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


def read_here(folder: Path, manifest: Manifest, part: HostPart) -> Mask:
    """The pages here according to the page placement or page existence file."""
    expected = listed(manifest, part, layout.PAGES)
    path = folder / layout.PAGES
    match part.role:
        case Role.MAIN:
            here: Mask = read_placement(folder, manifest) == 0
            return here
        case Role.SUB:
            return tables.read_existence(path, manifest.page_count, expected)


def read_placement(folder: Path, manifest: Manifest) -> tables.Placement:
    """The main host's page placement file: per page an index in `manifest.hosts`, or nowhere."""
    expected = listed(manifest, manifest.main, layout.PAGES)
    path = folder / layout.PAGES
    placement, hosts = tables.read_placement(path, manifest.page_count, expected)
    if hosts != tuple(part.host for part in manifest.hosts):
        raise corrupt(path, f"its hosts {', '.join(hosts)} are not the manifest's")
    return placement


def read_part(folder: Path, manifest: Manifest, host: str) -> Part:
    """The part of `host` in `folder`. Raises CheckpointCorrupt and NotFound."""
    part = find_part(manifest, host)
    memory = memory_part(folder, manifest, part).read()
    require_same(folder / layout.PAGES, read_here(folder, manifest, part), memory.mask, host)
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
