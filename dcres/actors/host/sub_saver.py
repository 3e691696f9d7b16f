"""A sub host's part of checkpoints."""

from __future__ import annotations

from dcres.actors.host.host_saver import HostSaver
from dcres.actors.host.memory_server import MemoryServer
from dcres.actors.host.room import require_store_room
from dcres.actors.host.site import Site
from dcres.actors.messages import Prepared, Saved
from dcres.model.formats import MemoryFormat
from dcres.model.live import HostRound
from dcres.model.pages import PAGE_SIZE
from dcres.storage.digest import FileSum
from dcres.storage.engine.memory_file import SavedMemory
from dcres.storage.format import tables
from dcres.storage.layout import PAGES


class SubSaver:
    """See `dcres.actors.protocol.Saving`. Whatever fails may be ordered again after `abandon`."""

    def __init__(self, site: Site, saver: HostSaver, server: MemoryServer) -> None:
        self._site = site
        self._saver = saver
        self._server = server

    def prepare(self, checkpoint: str, memory_format: MemoryFormat, base: str = "") -> Prepared:
        """Sweep what is unfinished, make room for a checkpoint, track changes from now on.

        Raises StoreFull, Conflict, BaseUnusable.
        """
        site = self._site
        with self._saver.saving:
            self._saver.require_wanted(checkpoint)
            held = self._server.counters()["held_pages"]
            self._saver.end()  # what nobody has halted must not keep its own part
            # The main host removes the rest, if that is in this store as well.
            site.store.sweep(site.vm, keep=frozenset({checkpoint}), whole_parts=False)
            if not base:  # how much of it has changed is told in the first round
                require_store_room(site.settings.store, held * PAGE_SIZE)
            self._saver.begin(checkpoint, memory_format, base)
        return Prepared()

    def copy(self, checkpoint: str, changed: bytes = b"") -> HostRound:
        """See `HostSaver.copy`."""
        mask = self._saver.mask(changed)
        return self._saver.copy(checkpoint, lambda: mask)

    def synchronise(self, checkpoint: str, once_more: bool, most_pages: int) -> HostRound | None:
        """See `HostSaver.synchronise`."""
        return self._saver.synchronise(checkpoint, once_more, most_pages)

    def stage(self, checkpoint: str, most_pages: int, changed: bytes = b"") -> None:
        """See `HostSaver.stage`."""
        self._saver.stage(checkpoint, most_pages, changed)

    def save(self, checkpoint: str, tick: int) -> Saved:
        """Make this host's part durable, with its page existence file: the vote.

        Raises StoreFull, Conflict when it was cancelled.
        """
        with self._saver.current(checkpoint) as saver:
            folder, segmented = saver.folder, saver.base is not None

        def write_tables(saved: SavedMemory) -> list[FileSum]:
            if segmented:  # its segments say as much
                return []
            return [tables.write_existence(folder / PAGES, saved.mask)]

        saved = self._saver.settle(checkpoint, write_tables)
        self._saver.kept.let_go(checkpoint)
        return saved

    def compact(self, manifest: str) -> None:
        """See `Compactor.compact`."""
        self._saver.compactor.compact(manifest)

    def halt(self, checkpoint: str) -> None:
        """See `HostSaver.halt`."""
        self._saver.halt(checkpoint)

    def abandon(self, checkpoint: str) -> None:
        """Halt, and remove what is left of the checkpoint. Repeatable."""
        self._saver.halt(checkpoint)
        self._saver.discard(checkpoint)
