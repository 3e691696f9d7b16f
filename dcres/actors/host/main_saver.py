"""The main host's part of checkpoints, and their manifests in its store."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np

from dcres.actors.host.account import Account, MainBase
from dcres.actors.host.checkpoint_stop import CheckpointStop
from dcres.actors.host.host_saver import HostSaver
from dcres.actors.host.name_in_store import NameInStore
from dcres.actors.host.page_loader import parse
from dcres.actors.host.pager import Pager
from dcres.actors.host.qemu import Qemu
from dcres.actors.host.room import require_store_room
from dcres.actors.host.site import Site
from dcres.actors.host.standing import Standing
from dcres.actors.host.vm_view import VmView
from dcres.actors.messages import Base, PagingCounters, Placed, Prepared, Saved, pack_mask
from dcres.errors import BaseUnusable, Conflict, PagesLost, StorageError
from dcres.model.formats import MemoryFormat
from dcres.model.live import HostRound
from dcres.model.pages import PAGE_SIZE, Mask, pages_of
from dcres.model.placement import NOWHERE, SAVED_NOWHERE, digest, to_saved
from dcres.model.run_state import RunState
from dcres.storage.digest import FileSum
from dcres.storage.engine.memory_file import SavedMemory
from dcres.storage.format.host_part import write_main_changes, write_main_files
from dcres.storage.format.main_tables import MainTables
from dcres.vm import disk
from dcres.vm.command import disk_nodes

_MOVES_POLL_S = 0.05


class MainSaver:
    """See `dcres.actors.protocol.Saving`. After a failure `abandon` may be repeated."""

    def __init__(
        self,
        site: Site,
        saver: HostSaver,
        qemu: Qemu,
        pager: Pager,
        view: VmView,
        standing: Standing,
        stop: CheckpointStop,
        name: NameInStore,
        account: Account,
    ) -> None:
        self._site = site
        self._state = site.state
        self._saver = saver
        self._qemu = qemu
        self._pager = pager
        self._view = view
        self._standing = standing
        self._stop = stop
        self._name = name
        self._account = account

    def prepare(self, checkpoint: str, memory_format: MemoryFormat, base: str = "") -> Prepared:
        """Sweep unfinished checkpoints, make room for this one, track changes from now on.

        The state file says so: an actor that is started again finds out what it left. Raises
        StoreFull, StoreReadOnly, UnsafeDevice, VmLost, Conflict if it was cancelled and for a life
        that another has followed, BaseUnusable.
        """
        site = self._site
        with self._saver.saving:
            self._saver.require_wanted(checkpoint)
            status = self._view.status()
            self._standing.require_savable(RunState(status["run_state"]))
            self._qemu.require_saveable()
            self._keep_name()
            self._saver.end()  # what nobody has halted must not keep its own part
            # Sub hosts that share this store may have begun their part already.
            site.store.sweep(site.vm, keep=frozenset({checkpoint}))
            upon = self._base(base)
            pages = status["pages"][0]
            if upon is not None:
                pages = min(pages, self._account.changed_pages(upon))
            require_store_room(site.settings.store, pages * PAGE_SIZE)
            self._state.change(lambda now: replace(now, checkpoint=checkpoint))
            self._saver.begin(checkpoint, memory_format, base)
            self._stop.base = upon
        counters = PagingCounters(status["pages_in"], status["pages_out"])
        changed = self._changed()
        return Prepared(counters, b"" if changed is None else pack_mask(changed))

    def _base(self, base: str) -> MainBase | None:
        if not base:
            return None
        try:
            return MainBase.read(self._site.store, parse(base), self._state.require().hosts)
        except StorageError as error:
            raise BaseUnusable(str(error)) from None

    def _changed(self) -> Mask | None:
        """What an increment saves, as far as is known; None for all."""
        base = self._stop.base
        return None if base is None else self._account.changed(base.placement.size)

    def base(self) -> Base:
        """What the next checkpoint can be an increment upon."""
        now = self._state.require()
        return self._account.base(pages_of(self._qemu.spec.memory), now.hosts)

    def _keep_name(self) -> None:
        """This life may save: the name in the store is its own, and no life came after it."""
        life = self._state.require()
        claimed = self._name.keep(life.cluster, life.generation)
        if claimed is not None:
            with self._qemu.monitor() as monitor:
                self._name.hold_anew(life.cluster, claimed, monitor)
            self._state.change(lambda now: replace(now, unclaimed=""))

    def copy(self, checkpoint: str, changed: bytes = b"") -> HostRound:
        """A round; the first one of a lazily restored VM lasts until all its pages are here.

        What has `changed` the pager knows better by now.
        """
        done = self._saver.copy(checkpoint, self._changed)
        self._await_moves(checkpoint)
        return done

    def synchronise(self, checkpoint: str, once_more: bool, most_pages: int) -> HostRound | None:
        """See `HostSaver.synchronise`."""
        self._await_moves(checkpoint)
        return self._saver.synchronise(checkpoint, once_more, most_pages, self._changed)

    def _await_moves(self, checkpoint: str) -> None:
        """Until a lazy restore has brought all pages: a checkpoint holds what its hosts have.

        Raises Conflict when the checkpoint is cancelled meanwhile.
        """
        while (now := self._state.now) is not None and now.sources:
            if not self._pager.patient.status()["moving"]:
                return
            self._saver.require_wanted(checkpoint)
            time.sleep(_MOVES_POLL_S)

    def stage(self, checkpoint: str, most_pages: int, changed: bytes = b"") -> None:
        """The VM is paused: take the rest. Raises PagingError if pages may have moved meanwhile.

        `resume` need not wait for it: a disk may hang, and the VM is not to hang with it.
        """
        self._saver.stage(checkpoint, most_pages, changed)
        self._stop.require_frozen()

    def save(self, checkpoint: str, tick: int) -> Saved:
        """Make this host's part durable, with page placement, access history and VM core.

        Raises StoreFull, PagesLost when what was saved is not what the page table says.
        """
        with self._saver.current(checkpoint) as saver:
            folder, part_base, changed = saver.folder, saver.base, saver.changed
        frozen, base = self._stop.frozen, self._stop.base
        if frozen is None:
            raise Conflict(f"checkpoint {checkpoint} of VM {self._site.vm} was not finished")
        if self._qemu.is_running:  # once more, for what happened while the guest was paused
            self._qemu.require_saveable()
        life = self._state.require()
        # Where nothing is ever missing the pager keeps no owners, unless the cut has looked.
        unkept = part_base is None and not life.codes
        owners = np.full_like(frozen.owners, NOWHERE) if unkept else frozen.owners
        placement = to_saved(owners, life.codes)

        def write_files(saved: SavedMemory) -> tuple[FileSum, ...]:
            if unkept:
                placement[:] = np.where(saved.mask, 0, SAVED_NOWHERE)
            _require_same(saved.mask, (placement == 0) & changed)
            core, history = self._stop.core.read_bytes(), (frozen.ticks, tick)
            if part_base is None:
                return write_main_files(folder, core, history, placement, life.hosts)
            if base is not None:
                placement[:] = base.place(placement, changed)
            _require_same(part_base.kept(saved.mask, changed), placement == 0)
            now = MainTables(placement, life.hosts, frozen.ticks)
            before = None if base is None else base.tables
            some = int(changed.sum())
            return write_main_changes(folder, checkpoint, core, now, tick, some, before)

        saved = self._saver.settle(checkpoint, write_files)
        self._stop.forget()
        masks = [placement == index for index in range(1, len(life.hosts))]
        placed = tuple(Placed(int(mask.sum()), digest(mask)) for mask in masks)
        everything = placement != SAVED_NOWHERE
        counted = everything if base is None else changed
        return replace(saved, placed=placed, pages_changed=int(counted.sum()))

    def publish(self, manifest: str, here: tuple[str, ...]) -> None:
        """Write the manifest: from now on the checkpoint exists. Repeatable.

        The parts of the hosts `here` are in this store, and whole. Raises Conflict once the
        checkpoint was halted, which waits for a publishing under way, and for a life that another
        has followed; StorageError for a part that is not whole.
        """
        published, store = parse(manifest), self._site.store
        with self._saver.saving:
            self._saver.require_wanted(published.checkpoint)
            if (now := self._state.now) is not None:
                store.lives(self._site.vm).require_latest(now.generation)
            store.publish(published, here)
            self._forget(published.checkpoint)
        if published.memory_format is MemoryFormat.SEGMENTED:
            self._account.rebase(published.checkpoint)

    def published(self, checkpoint: str) -> bool:
        """Whether the checkpoint's manifest is there, durably; if so nothing is left to cancel.

        Its writing may have failed after the name was there. Raises OSError if it fails again.
        """
        found = self._site.store.confirm(checkpoint)
        if found:
            self._forget(checkpoint)
        return found

    def _forget(self, checkpoint: str) -> None:
        self._saver.kept.let_go(checkpoint)
        if (now := self._state.now) is not None and now.checkpoint == checkpoint:
            self._state.change(lambda now: replace(now, checkpoint=None))

    def compact(self, manifest: str) -> None:
        """See `Compactor.compact`."""
        self._saver.compactor.compact(manifest)

    def halt(self, checkpoint: str) -> None:
        """See `HostSaver.halt`."""
        self._saver.halt(checkpoint)

    def abandon(self, checkpoint: str) -> None:
        """Halt, and remove what is left of the checkpoint, disk snapshots too. Repeatable.

        A checkpoint whose manifest is there keeps all it has: an actor may have died after it
        published and before it could say so.
        """
        self._saver.halt(checkpoint)
        self._stop.forget()
        if self.published(checkpoint):
            return
        if self._state.now is not None:
            self._delete_snapshots(checkpoint)
        self._saver.discard(checkpoint)
        self._forget(checkpoint)

    def _delete_snapshots(self, checkpoint: str) -> None:
        spec = self._qemu.spec
        if self._qemu.is_running:
            with self._qemu.monitor() as monitor:
                active = not monitor.has_saved_core
                if active:
                    monitor.delete_snapshots(disk_nodes(spec), checkpoint)
            if active:
                return
        for each in spec.disks:
            disk.delete(each.path, checkpoint)


def _require_same(saved: Mask, placed: Mask) -> None:
    """PagesLost unless a part has the pages that it must have."""
    wrong = int((saved != placed).sum())
    if wrong:
        raise PagesLost(f"the memory file and the page table disagree about {wrong} pages")
