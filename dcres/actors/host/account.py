"""The pager's account of what changed, as the main host's saving uses it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Self

import numpy as np

from dcres.actors.host.pager import Pager
from dcres.actors.messages import Base
from dcres.errors import CheckpointCorrupt, DcresError, NotFound, PagesLost, PagingError
from dcres.model.formats import MemoryFormat
from dcres.model.pages import Mask
from dcres.model.placement import SAVED_NOWHERE, Owners
from dcres.paging.content import ContentChanges, content_file
from dcres.storage.format.main_tables import MainTables
from dcres.storage.format.manifest import Manifest, dumps
from dcres.storage.layout import MOST_SEGMENTS
from dcres.storage.store.store import Store

log = logging.getLogger("dcres.host")


class Account:
    """Since which checkpoint changes are known, and what has changed."""

    def __init__(self, pager: Pager, store: Store) -> None:
        self._pager = pager
        self._store = store

    def _look(self, page_count: int) -> ContentChanges:
        path = content_file(self._pager.table_path)
        try:
            return ContentChanges(path, page_count, writable=False)
        except FileNotFoundError:
            raise PagingError("the VM runs with a pager of an earlier dcres") from None

    def changed(self, page_count: int) -> Mask:
        """The pages whose contents have changed since the base, as far as the pager has looked."""
        return self._look(page_count).changed()

    def changed_pages(self, base: MainBase) -> int:
        """How many they are, on all hosts."""
        return int(np.count_nonzero(self.changed(base.placement.size)))

    def base(self, page_count: int, hosts: tuple[str, ...]) -> Base:
        """What the next checkpoint of a VM on `hosts` can be an increment upon."""
        try:
            name = self._look(page_count).base
            if not name:
                return Base(why_none="what has changed since an earlier checkpoint is not known")
            manifest = self._store.get(name)
        except NotFound:
            return Base(why_none=f"{name}, the last checkpoint, is not there any more")
        except (PagingError, CheckpointCorrupt) as error:
            return Base(why_none=str(error))
        why = _why_not(manifest, hosts)
        return Base(why_none=why) if why else Base(manifest=dumps(manifest))

    def cut(self, checkpoint: str) -> None:
        """The VM is paused and paging frozen: what changes from now on is not in `checkpoint`."""
        self._pager.control.cut(checkpoint)

    def rebase(self, checkpoint: str) -> None:
        """`checkpoint` is published. Where the pager cannot be told the base before it stays."""
        try:
            self._pager.control.rebase(checkpoint)
        except DcresError as error:
            log.warning("the next checkpoint after %s will save more: %s", checkpoint, error)


def _why_not(manifest: Manifest, hosts: tuple[str, ...]) -> str:
    """Why no increment can be made upon `manifest`; empty if one can."""
    if manifest.memory_format is not MemoryFormat.SEGMENTED:
        return f"{manifest.checkpoint} has {manifest.memory_format} memory files"
    if manifest.main.host != hosts[0]:
        return f"{manifest.main.host} was the main host of {manifest.checkpoint}"
    if gone := [part.host for part in manifest.hosts if part.pages and part.host not in hosts]:
        return f"pages of {manifest.checkpoint} are on {', '.join(gone)}, not of the VM any more"
    if manifest.most_segments >= MOST_SEGMENTS:
        return f"{manifest.checkpoint} has {MOST_SEGMENTS} segments that were not merged"
    return ""


@dataclass(frozen=True, slots=True, eq=False)
class MainBase:
    """What the main host has of the base besides its part: whose every page is, and the history.

    `placement` has indices of the VM's hosts as they are now.
    """

    tables: MainTables
    placement: Owners

    @classmethod
    def read(cls, store: Store, base: Manifest, hosts: tuple[str, ...]) -> Self:
        """Of a base that `Account.base` has chosen. Raises CheckpointCorrupt."""
        tables = store.read_main_tables(base)
        index = np.full(256, SAVED_NOWHERE, dtype=np.uint8)
        index[: len(tables.hosts)] = [
            hosts.index(host) if host in hosts else SAVED_NOWHERE for host in tables.hosts
        ]
        return cls(tables, index[tables.placement])

    def changed(self, marked: Mask, here: Mask) -> Mask:
        """The pages to save, of those `marked`: with those that are anywhere and were not.

        A page of zeros may come into being without a mark, where nothing is ever missing.
        """
        was = self.placement != SAVED_NOWHERE
        changed: Mask = (marked & (here | was)) | (here & ~was)
        return changed

    def place(self, now: Owners, changed: Mask) -> Owners:
        """Which host has each page's bytes: of a page that has changed the host where it is now.

        Raises PagesLost if one has come or gone, and nobody has marked it.
        """
        odd = ~changed & ((now == SAVED_NOWHERE) != (self.placement == SAVED_NOWHERE))
        if odd.any():
            raise PagesLost(f"page {int(np.flatnonzero(odd)[0])} has come or gone without a mark")
        placement: Owners = np.where(changed, now, self.placement)
        return placement
