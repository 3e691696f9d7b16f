"""What a host has of the base when it saves an increment: its part, linked, and which pages.

An increment has from each host what changed since the base, and the base's own segments for all
else. A page belongs to the part of the host that saved it last, wherever it is by now.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from dcres.errors import BaseUnusable, NotFound, StorageError
from dcres.model.pages import Mask
from dcres.storage.digest import FileSum
from dcres.storage.format.manifest import Manifest, Segment
from dcres.storage.store.store import Store


@dataclass(frozen=True, slots=True, eq=False)
class PartBase:
    """One host's part of the base; one without pages for a full checkpoint."""

    pages: Mask
    segments: tuple[Segment, ...] = ()
    files: tuple[FileSum, ...] = ()

    @classmethod
    def none(cls, page_count: int) -> Self:
        """What a full checkpoint is made upon."""
        return cls(np.zeros(page_count, dtype=np.bool_))

    @classmethod
    def linked(cls, store: Store, base: Manifest, host: str, folder: Path, checkpoint: str) -> Self:
        """The part of `host`, from now on in `folder`, too, for `checkpoint`.

        Raises BaseUnusable, and then a full checkpoint is what remains.
        """
        if all(part.host != host for part in base.hosts):
            return cls.none(base.page_count)  # it has come since
        try:
            with store.pin(base.checkpoint):
                linked = store.continuing.link_part(base, host, folder, checkpoint)
                pages = store.read_part(base, host).memory.mask
        except (StorageError, NotFound) as error:
            raise BaseUnusable(f"no increment upon {base.checkpoint}: {error}") from None
        return cls(pages, linked.segments, linked.files)

    def kept(self, saved: Mask, changed: Mask) -> Mask:
        """The pages whose bytes this host has in the new checkpoint, of which it `saved` some."""
        kept: Mask = (self.pages & ~changed) | saved
        return kept

    def gone(self, saved: Mask, changed: Mask) -> Mask:
        """The pages whose bytes it had in the base, and has no longer."""
        gone: Mask = self.pages & changed & ~saved
        return gone
