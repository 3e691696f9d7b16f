"""The actor of the main host: QEMU, the pager, and this host's part of checkpoints.

Every method runs on the main host. What it does to the VM it does at most once per call; after
a failure the coordinator calls `abandon` or `destroy`, which may be repeated.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from dcres.actors.host.host import require_store_room
from dcres.actors.host.moving import MovingHost
from dcres.actors.host.record import write_record
from dcres.actors.messages import (
    Finished,
    PagingCounters,
    Placed,
    Saved,
)
from dcres.errors import (
    Conflict,
    PagesLost,
    PagingError,
    VmLost,
)
from dcres.model.formats import MemoryFormat
from dcres.model.pages import PAGE_SIZE, pages_of
from dcres.model.placement import (
    MAIN,
    NOWHERE,
    digest,
    to_saved,
)
from dcres.model.record import Record
from dcres.model.run_state import RunState
from dcres.paging.pager.table import PageTable
from dcres.storage.digest import FileSum
from dcres.storage.engine.memory_file import SavedMemory
from dcres.storage.format.host_part import write_main_files
from dcres.storage.format.manifest import loads
from dcres.storage.layout import VMCORE
from dcres.vm import devices, disk
from dcres.vm.command import disk_nodes
from dcres.vm.monitor import Monitor

_DRAIN_TIMEOUT_S = 60.0


class MainHost(MovingHost):
    """One VM on its main host; what is here takes checkpoints."""

    def prepare(self, checkpoint: str, memory_format: MemoryFormat) -> PagingCounters:
        """Sweep unfinished checkpoints, make room for this one, track changes from now on.

        The state file says so: an actor that is started again finds out what it left. Returns
        the paging counters as they are. Raises StoreFull, StoreReadOnly, UnsafeDevice, VmLost,
        Conflict if it was given up and for a life that another has followed.
        """
        with self._saving:  # so that what gives the checkpoint up comes before it all or after
            self._require_wanted(checkpoint)
            status = self.status()
            self._standing.require_savable(RunState(status["run_state"]))
            self._require_saveable()
            self._keep_name()
            # Sub hosts that share this store may have begun their part already.
            self._store.sweep(self._vm, keep=frozenset({checkpoint}))
            require_store_room(self._settings.store, status["pages"][0] * PAGE_SIZE)
            self._remember(checkpoint=checkpoint)
            self._begin_saving(checkpoint, memory_format, self._ram, self._pager)
        return PagingCounters(status["pages_in"], status["pages_out"])

    def _require_saveable(self) -> None:
        """UnsafeDevice when the VM is not what it was at its start, or QEMU could not save it."""
        at_start = self._state.get("devices")
        if at_start is not None:  # not known of a VM that an earlier dcres started
            with self._qmp() as monitor:
                devices.require_saveable(monitor, at_start)

    def _keep_name(self) -> None:
        """This life may save: the name in the store is its own, and no life came after it."""
        cluster = self._state.get("cluster", "")
        claimed = self._name.keep(cluster, self._state["generation"])
        if claimed is not None:
            with self._qmp() as monitor:
                self._name.hold_anew(cluster, claimed, monitor)
            self._remember(unclaimed="")

    def recorded(self) -> Record | None:
        """The record of what is to run, in this host's store. Raises CheckpointCorrupt."""
        return self._store.lives(self._vm).records.read()

    def record(self, record: Record) -> None:
        """Let `record` replace the one before; see `write_record`, which says what it raises."""
        state = self._state
        why = write_record(self._store, self._vm, record, unclaimed=bool(state.get("unclaimed")))
        if state and why != state.get("unrecorded", ""):
            self._remember(unrecorded=why)

    @property
    def _core(self) -> Path:
        """Where QEMU writes the VM core: on tmpfs, since the VM stands still meanwhile."""
        return self._folder.ram / VMCORE

    def finish(self, checkpoint: str) -> Finished:
        """Stop the VM, drain paging, snapshot the disks, save the core, freeze placement.

        Raises Conflict when the VM was told to go on, which it is only afterwards or instead.
        """
        # `resume` waits for this: it must not thaw paging before it was frozen.
        with self._stopping_vm:
            self._require_wanted(checkpoint)
            if checkpoint in self._resumed:
                raise Conflict(f"checkpoint {checkpoint} of VM {self._vm} comes too late")
            self._require_saveable()
            return self._finish(checkpoint)

    def _finish(self, checkpoint: str) -> Finished:
        self._frozen_pid = self._pager.call("status")["pid"]
        with self._qmp() as monitor:
            stopped = self._standing.stop(monitor)
            laps = [("", stopped.began)]
            laps.append(("stop", time.monotonic()))
            before = self._pager.call("quiesce", _DRAIN_TIMEOUT_S)
            laps.append(("drain", time.monotonic()))
            again = monitor.has_saved_core
            self._take_snapshots(monitor, checkpoint, inactive=again)
            laps.append(("disks", time.monotonic()))
            monitor.require_core(self._core) if again else monitor.save_core(self._core)
            laps.append(("core", time.monotonic()))
        frozen = self._pager.call("freeze", _DRAIN_TIMEOUT_S)
        laps.append(("freeze", time.monotonic()))
        table = PageTable(self._folder.ram / "table", pages_of(self._spec.memory), writable=False)
        self._frozen = table.owners.copy(), table.ticks.copy()
        return Finished(
            tick=frozen["tick"],
            moved=sum(frozen[key] - before[key] for key in ("pages_in", "pages_out")),
            pages_in=frozen["pages_in"],
            pages_out=frozen["pages_out"],
            stopped_at=stopped.began,
            parts_s={name: at - laps[i][1] for i, (name, at) in enumerate(laps[1:])},
            run_state=stopped.found,
            stopped=stopped.since,
        )

    def _take_snapshots(self, monitor: Monitor, checkpoint: str, *, inactive: bool) -> None:
        """Of all disks. After a failure `abandon` removes those that were made."""
        if not inactive:
            monitor.snapshot_disks(disk_nodes(self._spec), checkpoint)
            return
        for each in self._spec.disks:
            disk.take(each.path, checkpoint)

    def stage(self, checkpoint: str, most_pages: int) -> None:
        """As on every host. Raises PagingError if placement did not stand still meanwhile.

        `resume` need not wait for it: a disk may hang, and the VM is not to hang with it.
        """
        super().stage(checkpoint, most_pages)
        self._require_frozen(self._frozen_pid)

    def _require_frozen(self, pager_pid: int) -> None:
        """PagingError if pages may have moved since the freeze.

        A pager that was started again knows nothing of the checkpoint: it may page out.
        """
        status = self._pager.call("status")
        if status["pid"] != pager_pid or status["state"] != "frozen":
            raise PagingError("the pager was started again while the checkpoint was taken")

    def save(self, checkpoint: str, tick: int) -> Saved:
        """Make this host's part durable, with page placement, access history and VM core.

        Raises StoreFull, PagesLost when what was saved is not what the page table says.
        """
        with self._current(checkpoint) as saver:
            folder = saver.folder
        if self._frozen is None:
            raise Conflict(f"checkpoint {checkpoint} of VM {self._vm} was not finished")
        if self._qemu.alive:  # once more, for what happened while the guest stood still
            self._require_saveable()
        owners, ticks = self._frozen
        codes = self._state["codes"]

        def write_files(saved: SavedMemory) -> tuple[FileSum, ...]:
            if not codes:  # nothing is ever missing, so the pager keeps no account of it
                owners[:] = np.where(saved.mask, MAIN, NOWHERE)
            wrong = int((saved.mask != (owners == MAIN)).sum())
            if wrong:
                raise PagesLost(f"the memory file and the page table disagree about {wrong} pages")
            placement, hosts = to_saved(owners, codes), tuple(self._state["hosts"])
            core = self._core.read_bytes()
            return write_main_files(folder, core, (ticks, tick), placement, hosts)

        saved = self._settle(checkpoint, write_files)
        self._frozen = None
        masks = [owners == code for code in codes]
        placed = tuple(Placed(int(mask.sum()), digest(mask)) for mask in masks)
        return replace(saved, placed=placed)

    def resume(self, checkpoint: str) -> float:
        """Thaw paging, leave the guest as it was found; the time on this host's monotonic clock.

        Also undoes a checkpoint that stopped half-way, so it is safe to call at any time. The VM
        is not stopped for `checkpoint` any more.
        """
        with self._stopping_vm:
            self._resumed.append(checkpoint)
            with self._blaming_qemu(VmLost):
                self._pager.call_patiently("thaw")
            with self._qmp() as monitor:
                self._standing.let_go(monitor)
            return time.monotonic()

    def publish(self, manifest: str, here: tuple[str, ...]) -> None:
        """Write the manifest: from now on the checkpoint exists. Repeatable.

        The parts of the hosts `here` are in this store, and whole. Raises Conflict once the
        checkpoint was halted, which waits for a publishing under way, and for a life that another
        has followed; StorageError for a part that is not whole.
        """
        published = loads(manifest, Path("manifest.json"))
        with self._saving:
            self._require_wanted(published.checkpoint)
            if self._state:
                self._store.lives(self._vm).require_latest(self._state["generation"])
            self._store.publish(published, here)
            self._forget(published.checkpoint)

    def published(self, checkpoint: str) -> bool:
        """Whether the checkpoint's manifest is there, durably; if so nothing is left to give up.

        Its writing may have failed after the name was there. Raises OSError if it fails again.
        """
        found = self._store.confirm(checkpoint)
        if found:
            self._forget(checkpoint)
        return found

    def _forget(self, checkpoint: str) -> None:
        self._kept.let_go(checkpoint)
        if self._state.get("checkpoint") == checkpoint:
            self._remember(checkpoint=None)

    def halt(self, checkpoint: str) -> None:
        """As on every host; also when an actor before this one began the saving. Repeatable."""
        super().halt(checkpoint)
        if self._has_qemu():
            self._end_tracking(self._ram, self._pager)

    def abandon(self, checkpoint: str) -> None:
        """As on every host, and delete the checkpoint's disk snapshots. Repeatable.

        A checkpoint whose manifest is there keeps all it has: an actor may have died after it
        published and before it could say so.
        """
        self.halt(checkpoint)
        self._frozen = None
        if self.published(checkpoint):
            return
        if self._state:
            self._delete_snapshots(checkpoint)
        super().abandon(checkpoint)
        self._forget(checkpoint)

    def _delete_snapshots(self, checkpoint: str) -> None:
        spec = self._spec
        if self._qemu.alive:
            with self._qmp() as monitor:
                active = not monitor.has_saved_core
                if active:
                    monitor.delete_snapshots(disk_nodes(spec), checkpoint)
            if active:
                return
        for each in spec.disks:
            disk.delete(each.path, checkpoint)
