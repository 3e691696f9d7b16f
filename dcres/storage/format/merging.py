"""Merging the segments of a host's part of a published checkpoint into one; see `merged`.

Pages are read from the packs as a restore reads them, each is compared with its checksum, and that
one is kept. Whoever is killed meanwhile leaves files that nobody believes in.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import numpy as np

from dcres.errors import StorageError
from dcres.model.formats import MemoryFormat
from dcres.storage.digest import FileSum
from dcres.storage.engine.expected import MemoryFile
from dcres.storage.engine.memory_file import MemoryFileWriter, SavedMemory
from dcres.storage.engine.transfer import Progress
from dcres.storage.format import tables
from dcres.storage.format.host_part import (
    find_part,
    memory_part,
    read_main_tables,
    segment_of,
    segment_rows,
)
from dcres.storage.format.main_tables import write_merged
from dcres.storage.format.manifest import Manifest, Role, Segment
from dcres.storage.format.merged import Merged, remove_merged


def merge_part(
    folder: Path, manifest: Manifest, host: str, threads: int, progress: Progress | None = None
) -> Merged:
    """Merge the part of `host` in `folder`: durable on return, and nothing is left if it fails.

    Somebody keeps the checkpoint from being removed meanwhile. `progress` gets pages done since
    its last call, and what it raises ends the work. Raises CheckpointCorrupt for a page or table
    that is not as it was saved, StoreFull, NotFound if `host` has no part.
    """
    part = find_part(manifest, host)
    remove_merged(folder, manifest.checkpoint)  # what another has left
    with ExitStack() as left:
        left.callback(remove_merged, folder, manifest.checkpoint)
        memory = memory_part(folder, manifest, part).read()
        saved, segment = _merge_pages(folder, manifest, memory, threads, progress)
        files: tuple[FileSum, ...] = (_write_table(folder, segment, saved),)
        if part.role is Role.MAIN:
            now = read_main_tables(folder, manifest)
            files += write_merged(folder, segment, now, manifest.tick)
        merged = Merged(folder, segment, files)
        merged.confirm()
        left.pop_all()
    return merged


def _merge_pages(
    folder: Path,
    manifest: Manifest,
    memory: MemoryFile,
    threads: int,
    progress: Progress | None,
) -> tuple[SavedMemory, Segment]:
    named = Segment(checkpoint=manifest.checkpoint, pages=0, gone=0, places=0, merged=True)
    path, page_count = folder / named.pack, manifest.page_count
    format_ = MemoryFormat.SEGMENTED
    with MemoryFileWriter(path, page_count, progress, memory_format=format_) as writer:
        writer.take_over(memory, threads)
        saved = writer.seal()
    if (saved.mask != memory.mask).any():
        raise StorageError(f"{path} has {saved.pages} pages, and others than its part")
    segment = segment_of(manifest.checkpoint, saved, np.zeros_like(saved.mask))
    return saved, segment.model_copy(update={"merged": True})


def _write_table(folder: Path, segment: Segment, saved: SavedMemory) -> FileSum:
    rows = segment_rows(saved, np.zeros_like(saved.mask))
    return tables.write_segment(folder / segment.table, rows, len(saved.mask))
