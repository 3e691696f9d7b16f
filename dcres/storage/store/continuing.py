"""Parts of checkpoints that later ones have as well: linked, and merged into one segment."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from dcres.errors import StorageError
from dcres.storage.engine.transfer import Progress
from dcres.storage.format.host_part import Linked, find_part, link_base
from dcres.storage.format.manifest import Manifest
from dcres.storage.format.merged import Merged, newest_merged, remove_merged
from dcres.storage.format.merging import merge_part
from dcres.storage.store.folders import Folders
from dcres.storage.store.pins import pinned

log = logging.getLogger("dcres.storage")


@dataclass(frozen=True, slots=True)
class LocalContinuing:
    """See `dcres.storage.store.protocols.Continuing`; in the folders of a store."""

    folders: Folders

    def link_part(self, base: Manifest, host: str, folder: Path, checkpoint: str) -> Linked:
        """See `Continuing`."""
        base_folder = self.folders.part(base, host)
        if (merged := self.merged_part(base, host)) is not None:
            try:
                return link_base(base_folder, folder, base, host, checkpoint, merged)
            except StorageError as error:  # it may be deleted just now, and all else is there
                log.warning("segments of %s are linked one by one: %s", base.checkpoint, error)
        return link_base(base_folder, folder, base, host, checkpoint)

    def merged_part(self, manifest: Manifest, host: str) -> Merged | None:
        """See `Continuing`."""
        segments = find_part(manifest, host).segments or ()
        return newest_merged(lambda name: self.folders.named(name) / host, segments)

    def merge_part(
        self, manifest: Manifest, host: str, threads: int, progress: Progress | None = None
    ) -> Merged:
        """See `Continuing`."""
        segments = find_part(manifest, host).segments or ()
        with pinned(self.folders.named(manifest.checkpoint)):
            folder = self.folders.part(manifest, host)
            merged = merge_part(folder, manifest, host, threads, progress)
        for segment in segments[:-1]:
            remove_merged(self.folders.named(segment.checkpoint) / host, segment.checkpoint)
        return merged
