"""The actor of the main host: QEMU, the pager, and this host's part of checkpoints.

Every method runs on the main host. What it does to the VM it does at most once per call; after
a failure the coordinator calls `abandon` or `destroy`, which may be repeated.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dcres.actors.host import (
    Daemon,
    Life,
    Meter,
    VmFolder,
    end_leftovers,
    load_parts,
    marker,
    read_state,
    require_store_room,
    require_tmpfs_room,
    write_state,
)
from dcres.actors.messages import Finished, Placed, RunOrder, Saved, Status
from dcres.actors.saving import SavingHost
from dcres.config import Accel, HostSettings, VmSpec, default_cache
from dcres.errors import (
    CheckpointCorrupt,
    Conflict,
    MonitorError,
    NotFound,
    PagesLost,
    PagingError,
    QemuFailed,
    VmError,
    VmLost,
)
from dcres.model.history import Ticks
from dcres.model.pages import PAGE_SIZE, pages_of
from dcres.model.placement import (
    MAIN,
    NOWHERE,
    Owners,
    digest,
    from_saved,
    sub_code,
    to_saved,
)
from dcres.paging import settings as paging_settings
from dcres.paging.settings import PagerSettings
from dcres.paging.table import PageTable
from dcres.storage import tables
from dcres.storage.atomic import write_durably
from dcres.storage.digest import file_sum
from dcres.storage.layout import HISTORY, PAGES, VMCORE
from dcres.storage.manifest import FileSum, Manifest, loads
from dcres.storage.memory_file import SavedMemory
from dcres.storage.store import Store
from dcres.vm import accel as accel_
from dcres.vm import disk, process, safety
from dcres.vm.command import MACHINE, VmFiles, disk_nodes
from dcres.vm.monitor import Monitor, RunState
from dcres.vm.process import QemuProcess, last_words

_LINKS_TIMEOUT_S = 20.0
_DRAIN_TIMEOUT_S = 60.0


class MainHost(SavingHost):
    """One VM on its main host."""

    def __init__(
        self, vm: str, address: str = "127.0.0.1", environ: Mapping[str, str] = os.environ
    ) -> None:
        self._settings = HostSettings.from_environ(environ, address)
        self._folder = VmFolder.of(self._settings, vm)
        self._pager = Daemon("dcres.paging.pager", self._folder, "pager", self._has_qemu)
        super().__init__(Store(self._settings.store), vm, self._settings.name, Meter())
        self._frozen: tuple[Owners, Ticks] | None = None
        self._frozen_pid = 0  # of the pager that froze
        self._orders = threading.Lock()
        self._stopping_vm = threading.Lock()
        self._remembering = threading.Lock()
        self._life = Life()
        self._monitor: Monitor | None = None
        self._state: dict[str, Any] = read_state(self._folder.state) or {}
        # Before its pager is there a VM that is being started is nothing to adopt.
        if self._state.get("paged") and self._has_qemu():
            self._pager.adopt()

    # What this host knows

    def describe(self) -> Status:
        """Who this host is, and the VM's state file as the actor before left it."""
        return {
            "host": self._settings.name,
            "role": "main",
            "present": bool(self._state),
            "spec": self._state.get("spec"),
            "generation": self._state.get("generation", 0),
            "checkpoint": self._state.get("checkpoint"),
            "accel": self._state.get("accel"),
            "accel_why": self._state.get("accel_why"),
            "qemu_version": self._state.get("qemu_version"),
            "machine": self._state.get("machine"),
            "reserved": self._state.get("reserved", 0),
            "running": self._state.get("running", False),
        }

    @property
    def _qemu(self) -> QemuProcess:
        if not self._state:
            raise NotFound(f"host {self._settings.name} does not run VM {self._vm}")
        return QemuProcess.from_dict(self._state["qemu"])

    def _has_qemu(self) -> bool:
        return bool(self._state) and self._qemu.alive

    @property
    def _spec(self) -> VmSpec:
        return VmSpec.model_validate(self._state["spec"])

    def _remember(self, **changes: Any) -> None:
        with self._remembering:
            self._state = {**self._state, **changes}
            write_state(self._folder.state, self._state)

    @contextmanager
    def _qmp(self) -> Iterator[Monitor]:
        """The monitor, connected; one user at a time. Raises VmLost when QEMU has ended."""
        with self._orders:
            qemu = self._qemu
            if self._monitor is None:
                self._monitor = qemu.connect()
            try:
                yield self._monitor
            except MonitorError:
                self._monitor.close()
                self._monitor = None
                if not qemu.alive:
                    raise VmLost(self._obituary(qemu)) from None
                raise

    def _obituary(self, qemu: QemuProcess) -> str:
        words = last_words(qemu.files.log)
        return f"QEMU of VM {self._vm} has ended ({words}); restore a checkpoint"

    @contextmanager
    def _blaming_qemu(self, blame: type[VmError]) -> Iterator[None]:
        """When QEMU has ended, that is the error, and not that its pager went with it."""
        try:
            yield
        except (PagingError, MonitorError):
            if self._state and not self._qemu.alive:
                raise blame(self._obituary(self._qemu)) from None
            raise

    def status(self) -> Status:
        """The VM and its paging as they are now. Raises VmLost when QEMU has ended."""
        qemu = self._qemu
        if not qemu.alive:
            raise VmLost(self._obituary(qemu))
        if self._pager.given_up:
            raise VmLost(f"VM {self._vm} cannot go on ({self._pager.given_up})")
        with self._qmp() as monitor:
            run_state = monitor.status()
        return {
            "host": self._settings.name,
            "role": "main",
            "run_state": str(run_state),
            "accel": self._state["accel"],
            "accel_why": self._state["accel_why"],
            "console": str(qemu.files.console),
            "qemu_pid": qemu.process.pid,
            "checkpoint": self._state.get("checkpoint"),
            "restarts": self._pager.restarts,
            **self._pager.call_patiently("status"),
        }

    # Start and restore

    def boot(self, order: RunOrder) -> None:
        """Start QEMU, with what `order.load` names in memory; the guest is stopped.

        `order.subs` need not be known yet: sub hosts load their parts at the same time. Raises
        ConfigError, NoRoom, QemuFailed, UnsafeDevice, CheckpointCorrupt. What was started until
        then is for `destroy` to end.
        """
        with self._life.beginning(), self._blaming_qemu(QemuFailed):
            self._boot(order)

    def run(self, order: RunOrder) -> None:
        """After `boot`: pager, then VM core. Raises PagingError, CheckpointCorrupt."""
        with self._life.beginning(), self._blaming_qemu(QemuFailed):
            self._start_pager(order)
            if order.load is not None:
                self._load_core(loads(order.load.manifest, Path("manifest.json")))

    def _boot(self, order: RunOrder) -> None:
        spec = order.spec
        spec.require_files()
        require_tmpfs_room(self._settings.ram, spec.layout.main)
        self._store.sweep(self._vm)
        manifest = None if order.load is None else loads(order.load.manifest, Path("manifest.json"))
        wanted = spec.accel if manifest is None else Accel(manifest.accel)
        chosen, why = accel_.choose(wanted, spec.kernel, default_cache())
        for each in () if manifest is None else manifest.disks:
            disk.require_snapshot(Path(each.path), each.snapshot)
        self._folder.make()
        machine = MACHINE if manifest is None else manifest.machine.get("type", MACHINE)
        self._start_qemu(order, chosen, why, machine)
        if order.load is not None and manifest is not None:
            load_parts(self._store, order.load, self._ram, self._meter)
            self._write_table(order, manifest)

    @property
    def _ram(self) -> Path:
        return self._folder.ram / "guest.ram"

    def _start_qemu(self, order: RunOrder, chosen: Accel, why: str, machine: str) -> None:
        run = self._folder.run
        vm_files = VmFiles(self._ram, run / "qmp.sock", run / "console.log", run / "qemu.log")
        vm_files.console.unlink(missing_ok=True)
        qemu, self._monitor = process.start(
            order.spec,
            vm_files,
            chosen,
            incoming=order.load is not None,
            env={**os.environ, **marker(self._folder)},
            machine=machine,
        )
        self._remember(
            machine=self._monitor.machine_type(machine),
            vm=self._vm,
            generation=order.incarnation.generation,
            spec=order.spec.model_dump(mode="json", by_alias=True),
            hosts=list(order.hosts),
            qemu=qemu.to_dict(),
            accel=str(chosen),
            accel_why=why,
            qemu_version=self._monitor.version,
            reserved=order.spec.layout.main,
            running=False,
            checkpoint=None,
        )
        safety.require_safe(self._monitor, qemu.process.pid, self._ram)
        self._monitor.learn()

    def _write_table(self, order: RunOrder, manifest: Manifest) -> None:
        """The network page table as the checkpoint has it, before the pager looks."""
        placement = self._store.read_placement(manifest)
        owners = from_saved(placement)
        if len(order.hosts) == 1:
            owners = np.where(owners != 0, MAIN, owners).astype(np.uint8)
        limit = pages_of(order.spec.layout.main)
        table = PageTable.create(self._folder.ram / "table", owners, limit)
        table.ticks[:] = self._store.read_history(manifest)

    def _start_pager(self, order: RunOrder) -> None:
        settings = PagerSettings(
            vm=order.incarnation.identity,
            generation=order.incarnation.generation,
            secret=order.incarnation.secret,
            page_count=pages_of(order.spec.memory),
            limit_pages=pages_of(order.spec.layout.main),
            qemu_pid=self._qemu.process.pid,
            ram=str(self._ram),
            outbox=str(self._folder.ram / "outbox.ram"),
            table=str(self._folder.ram / "table"),
            control=str(self._pager.control),
            subs=order.subs,
        )
        paging_settings.save(settings, self._folder.run / "pager.json")
        self._pager.start()
        self._remember(paged=True)
        self._await_links()

    def _await_links(self) -> None:
        deadline = time.monotonic() + _LINKS_TIMEOUT_S
        while True:
            status = self._pager.call("status")
            if status["state"] == "lost":
                raise PagingError(status["lost_why"])
            waiting = {h: link for h, link in status["links"].items() if link["state"] != "ready"}
            if not waiting:
                return
            if time.monotonic() > deadline:
                whys = ", ".join(f"{host} ({link['trouble']})" for host, link in waiting.items())
                raise PagingError(f"no connection to the memory servers of {whys}")
            time.sleep(0.01)

    def _load_core(self, manifest: Manifest) -> None:
        """The last step, and the first that cannot be undone: everything else was verified.

        A QEMU that waits for a VM core has its disks open but inactive, and reads their tables
        anew when it activates them; so they can be reverted this late.
        """
        core = self._store.vmcore(manifest)
        for each in manifest.disks:
            disk.revert(Path(each.path), each.snapshot)
        qemu = self._qemu
        try:
            with self._qmp() as monitor:
                monitor.load_core(core)
        except VmLost as error:
            words = last_words(qemu.files.log)
            raise CheckpointCorrupt(f"QEMU cannot load {core}: {words}") from error

    def go(self) -> None:
        """Let the guest run, from wherever it stands. Repeatable."""
        with self._qmp() as monitor:
            if monitor.status() is not RunState.RUNNING:
                monitor.cont()
        self._remember(running=True)

    def resize(self, limit_pages: int) -> None:
        """Change how much the main host keeps; pages move while the guest runs."""
        self._pager.call("resize", limit_pages=limit_pages)
        layout = {**self._state["spec"]["layout"], "main": limit_pages * PAGE_SIZE}
        self._remember(spec={**self._state["spec"], "layout": layout})

    # Checkpoint

    def next_generation(self) -> int:
        """A number that no earlier life of this VM had; durable."""
        return self._store.next_generation(self._vm)

    def prepare(self, checkpoint: str) -> dict[str, int]:
        """Sweep unfinished checkpoints, make room for this one, track changes from now on.

        The state file says so: an actor that is started again finds out what it left. Returns
        the paging counters as they are. Raises StoreFull, VmLost.
        """
        status = self.status()
        with self._qmp() as monitor:
            monitor.learn()  # it has, unless the connection is a new one
        # Sub hosts that share this store may have begun their part already.
        self._store.sweep(self._vm, keep=frozenset({checkpoint}))
        self._store.begin(self._vm, checkpoint)
        require_store_room(self._settings.store, status["pages"][0] * PAGE_SIZE)
        self._remember(checkpoint=checkpoint)
        self._begin_saving(checkpoint, self._ram, self._pager)
        return {"pages_in": status["pages_in"], "pages_out": status["pages_out"]}

    @property
    def _core(self) -> Path:
        """Where QEMU writes the VM core: on tmpfs, since the VM stands still meanwhile."""
        return self._folder.ram / VMCORE

    def finish(self, checkpoint: str) -> Finished:
        """Stop the VM, drain paging, snapshot the disks, save the core, freeze placement."""
        # `resume` waits for this: it must not thaw paging before it was frozen.
        with self._stopping_vm:
            return self._finish(checkpoint)

    def _finish(self, checkpoint: str) -> Finished:
        self._frozen_pid = self._pager.call("status")["pid"]
        with self._qmp() as monitor:
            laps = [("", stopped_at := time.monotonic())]
            monitor.stop()
            laps.append(("stop", time.monotonic()))
            before = self._pager.call("quiesce", _DRAIN_TIMEOUT_S)
            laps.append(("drain", time.monotonic()))
            monitor.snapshot_disks(disk_nodes(self._spec), checkpoint)
            laps.append(("disks", time.monotonic()))
            monitor.save_core(self._core)
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
            stopped_at=stopped_at,
            parts_s={name: at - laps[i][1] for i, (name, at) in enumerate(laps[1:])},
        )

    def stage(self, checkpoint: str, most_pages: int) -> None:
        """As on every host. Raises PagingError if placement did not stand still meanwhile."""
        with self._stopping_vm:
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
        folder = self._store.host_folder(self._vm, checkpoint, self._host)
        if self._frozen is None:
            raise Conflict(f"checkpoint {checkpoint} of VM {self._vm} was not finished")
        owners, ticks = self._frozen
        subs = len(self._state["hosts"]) - 1

        def write_tables(saved: SavedMemory) -> list[FileSum]:
            if not subs:  # nothing is ever missing, so the pager keeps no account of it
                owners[:] = np.where(saved.mask, MAIN, NOWHERE)
            wrong = int((saved.mask != (owners == MAIN)).sum())
            if wrong:
                raise PagesLost(f"the memory file and the page table disagree about {wrong} pages")
            hosts = tuple(self._state["hosts"])
            write_durably(folder / VMCORE, self._core.read_bytes())
            return [
                tables.write_placement(folder / PAGES, to_saved(owners), hosts),
                tables.write_history(folder / HISTORY, ticks, tick),
                file_sum(folder / VMCORE),
            ]

        saved = self._settle(write_tables)
        self._frozen = None
        masks = [owners == sub_code(index) for index in range(subs)]
        placed = tuple(Placed(int(mask.sum()), digest(mask)) for mask in masks)
        return replace(saved, placed=placed)

    def resume(self) -> float:
        """Thaw paging, let the guest run; the time on this host's monotonic clock.

        Also undoes a checkpoint that stopped half-way, so it is safe to call at any time.
        """
        with self._stopping_vm:
            with self._blaming_qemu(VmLost):
                self._pager.call_patiently("thaw")
            self.go()
            return time.monotonic()

    def publish(self, manifest: str) -> None:
        """Write the manifest: from now on the checkpoint exists. Repeatable."""
        published = loads(manifest, Path("manifest.json"))
        self._store.publish(published)
        self._forget(published.checkpoint)

    def published(self, checkpoint: str) -> bool:
        """Whether the checkpoint's manifest is there; if so there is nothing left to give up."""
        found = any(each.checkpoint == checkpoint for each in self._store.list(self._vm))
        if found:
            self._forget(checkpoint)
        return found

    def _forget(self, checkpoint: str) -> None:
        if self._state.get("checkpoint") == checkpoint:
            self._remember(checkpoint=None)

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
            self._pager.call_patiently("untrack")
            with self._qmp() as monitor:
                monitor.delete_snapshots(disk_nodes(spec), checkpoint)
            return
        for each in spec.disks:
            disk.delete(each.path, checkpoint)

    def destroy(self) -> None:
        """End QEMU and the pager, give all memory back. Repeatable; nothing starts here again."""
        with self._life.ending(self._hurry):
            with self._saving:
                self._end_saving()
            if self._monitor is not None:
                self._monitor.close()
                self._monitor = None
            if self._state:
                self._qemu.end(grace_s=2.0)
            end_leftovers(self._folder)
            self._state = {}
            self._folder.remove()

    def _hurry(self) -> None:
        self._meter.cancel()
        self._pager.stop()
        end_leftovers(self._folder)
