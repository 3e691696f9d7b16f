"""Starting a VM on its main host: QEMU, page table, pager, VM core; and its end."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dcres.actors.host.disks import begun, has_its_disks, put_disks_back, require_disks
from dcres.actors.host.host import require_ram
from dcres.actors.host.loading import identity_of, load_pages, parse
from dcres.actors.host.qemu_host import QemuHost
from dcres.actors.host.resuming import beginning_of, vmcore_of
from dcres.actors.host.vm_folder import end_leftovers, marker
from dcres.actors.messages import (
    ClaimOrder,
    Incarnation,
    LoadOrder,
    Resumption,
    RunOrder,
)
from dcres.config import Accel, Layout, default_cache
from dcres.errors import (
    CheckpointCorrupt,
    ConfigError,
    DcresError,
    MonitorError,
    PagingError,
    QemuFailed,
    VmLost,
    VmOff,
)
from dcres.model.pages import pages_of
from dcres.model.placement import (
    sub_code,
)
from dcres.paging import moves as paging_moves
from dcres.paging import settings as paging_settings
from dcres.paging.pager.table import PageTable
from dcres.paging.settings import PagerSettings, SubAddress
from dcres.vm import accel as accel_
from dcres.vm import devices, process, safety
from dcres.vm.arguments import require_whole_paths
from dcres.vm.command import MACHINE, VmFiles, disk_node, owned_nodes
from dcres.vm.monitor import Monitor
from dcres.vm.reverting import Reverting

log = logging.getLogger("dcres.host")

_LINKS_TIMEOUT_S = 60.0


class StartingHost(QemuHost):
    """The part of the main host's actor that begins and ends a VM."""

    def clear(self, take_over: bool = False) -> None:
        """Before `boot`: end and remove what an earlier life of the VM left on this host.

        A QEMU that nobody ended would run on over this life's memory and disks. Repeatable.
        Raises Conflict, see `VmFolder.take`.
        """
        with self._life.beginning():
            self._folder.take(take_over=take_over)
            undo = has_its_disks(self._folder)
            self._pager.stop()
            self._stop_slices()
            end_leftovers(self._folder)
            if undo:
                put_disks_back(self._folder)
            self._state = {}
            self._folder.remove()

    def claim(self, order: ClaimOrder) -> int:
        """After `clear`: begin a life, whose name in the store it is from now on; its generation.

        `destroy` releases it. Raises Conflict, see `NameInStore.claim`.
        """
        with self._life.beginning():
            return self._name.claim(order)

    def boot(self, order: RunOrder) -> None:
        """Start QEMU, with what `order.load` names in memory; the guest is stopped.

        `order.subs` and `order.resumption` need not be known yet: sub hosts load their parts and
        slice servers start at the same time. Raises ConfigError, NoRoom, QemuFailed,
        UnsafeDevice, CheckpointCorrupt. What was started until then is for `destroy` to end.
        """
        with self._life.beginning(), self._blaming_qemu(QemuFailed):
            self._boot(order)

    def run(self, order: RunOrder) -> None:
        """After `boot`: pager, then VM core. Raises PagingError, CheckpointCorrupt."""
        with self._life.beginning(), self._blaming_qemu(QemuFailed):
            if order.resumption is not None:
                self._begin_from(order.resumption, pages_of(order.spec.layout.main))
            self._start_pager(order)
            if order.resumption is not None:
                self._load_core(order.resumption)

    def _boot(self, order: RunOrder) -> None:
        spec = order.spec
        spec.require_files()
        if order.load is None:
            require_whole_paths(spec.extra_args)
        require_ram(self._settings, spec.layout.main)
        manifest = None if order.load is None else parse(order.load.manifest)
        if self._name.claimed:  # else nothing may be removed
            kept = frozenset() if manifest is None else frozenset({manifest.checkpoint})
            self._store.sweep(self._vm, keep=kept, whole_parts=False)
        wanted = spec.accel if manifest is None else Accel(manifest.accel)
        chosen, why = accel_.choose(wanted, spec.kernel, default_cache())
        require_disks(spec, manifest)
        self._folder.make()
        machine = MACHINE if manifest is None else manifest.machine.get("type", MACHINE)
        monitor = self._start_qemu(order, chosen, why, machine)
        # QEMU has put its firmware into memory by now, and touches none of it until it has a core.
        with self._loading(order):
            self._pager.prepare()
            # Who comes back has the disks that it had; to refuse it would lose its memory, too.
            disks = owned_nodes(spec) if manifest is None else None
            safety.require_safe(monitor, self._qemu.process.pid, self._ram, disks)
            if manifest is None:
                devices.require_saveable(monitor)
            self._remember(devices=devices.inventory(monitor))

    @contextmanager
    def _loading(self, order: RunOrder) -> Iterator[None]:
        """Pages are loaded while the block runs, and are there when it ends, unless it fails."""
        if order.load is None:
            yield
            return
        refused = threading.Event()
        with ThreadPoolExecutor(1, "loading") as pool:
            under_way = pool.submit(self._load, order, order.load, refused)
            try:
                yield
            except BaseException:
                refused.set()
                raise
            under_way.result()

    def _load(self, order: RunOrder, load: LoadOrder, refused: threading.Event) -> None:
        def require_use() -> None:
            if refused.is_set() or not self._qemu.alive:
                raise QemuFailed(self._obituary(self._qemu))

        identity = identity_of(order)
        load_pages(self._store, load, identity, self._ram, self._meter, require_use)

    def _start_qemu(self, order: RunOrder, chosen: Accel, why: str, machine: str) -> Monitor:
        run = self._folder.run
        vm_files = VmFiles(self._ram, run / "qmp.sock", run / "console.log", run / "qemu.log")
        self._folder.remove_file(vm_files.console)
        qemu, monitor = process.start(
            order.spec,
            vm_files,
            chosen,
            incoming=order.load is not None,
            env={**os.environ, **marker(self._folder)},
            machine=machine,
            inherited=self._folder.held,
        )
        self._monitor = monitor
        cluster = self._name.hand_over(order.incarnation.generation, monitor)
        self._remember(
            cluster=cluster,
            unclaimed=self._name.unclaimed,
            machine=monitor.machine_type(machine),
            vm=self._vm,
            generation=order.incarnation.generation,
            spec=order.spec.model_dump(mode="json", by_alias=True),
            hosts=list(order.hosts),
            shares=dict(zip(order.hosts[1:], order.spec.layout.subs, strict=True)),
            codes=[sub_code(index) for index in range(len(order.hosts) - 1)],
            sources=[],
            qemu=qemu.to_dict(),
            accel=str(chosen),
            accel_why=why,
            qemu_version=monitor.version,
            reserved=order.spec.layout.main,
            running=False,
            checkpoint=None,
            found=None,
            stood=None,
        )
        return monitor

    def _begin_from(self, resumption: Resumption, limit_pages: int) -> None:
        """The network page table as the plan has it, before the pager looks."""
        beginning = beginning_of(resumption, self._store, self._state["codes"])
        table = PageTable.create(self._folder.ram / "table", beginning.owners, limit_pages)
        table.ticks[:] = beginning.ticks
        paging_moves.save(self._moves_path, beginning.moves)
        self._remember(sources=[asdict(each) for each in beginning.sources])

    @property
    def _moves_path(self) -> Path:
        return self._folder.ram / "moves"

    def _start_pager(self, order: RunOrder) -> None:
        codes = self._state["codes"]
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
            subs=tuple(
                replace(sub, code=code) for sub, code in zip(order.subs, codes, strict=True)
            ),
            moves=str(self._moves_path),
            sources=tuple(SubAddress(**each) for each in self._state["sources"]),
        )
        paging_settings.save(settings, self._pager_path)
        self._pager.start()
        self._remember(paged=True)
        self._await_links()

    @property
    def _pager_path(self) -> Path:
        return self._folder.run / "pager.json"

    def _repage(self, **changes: Any) -> None:
        """Have the pager go on with other sub hosts, slice servers or moves.

        What it refuses is taken back: another pager would have to start with it.
        """
        settings = paging_settings.load(PagerSettings, self._pager_path)
        paging_settings.save(replace(settings, **changes), self._pager_path)
        try:
            self._pager.call_patiently("reload")
        except PagingError:
            paging_settings.save(settings, self._pager_path)
            raise

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

    def _load_core(self, resumption: Resumption) -> None:
        """The last step, with the first that changes disks: everything else was verified.

        A QEMU that waits for a VM core has its disks open but inactive, and reads their tables
        anew when it activates them; so they can be reverted this late. If it fails they are as
        they were.
        """
        core = vmcore_of(resumption, self._store, self._folder.ram / "incoming")
        manifest = parse(resumption.manifest)
        paths = tuple(Path(each.path) for each in manifest.disks)
        reverting = Reverting(manifest.checkpoint, paths)
        if paths:
            self._remember(reverting=begun(reverting))
        try:
            reverting.do(manifest.checkpoint)
            self._give_core(core)
        except DcresError as error:
            self._qemu.end(grace_s=2.0)  # it may have activated them
            try:
                reverting.undo()
            except DcresError as failed:
                raise ConfigError(f"{error}; {failed}") from error
            raise
        self._remember(stood=manifest.stopped_at.isoformat())

    def _give_core(self, core: Path) -> None:
        qemu = self._qemu
        try:
            with self._qmp() as monitor:
                monitor.load_core(core)
        except VmLost as error:
            # It was killed or told to end; who cannot load a core says why.
            if isinstance(error, VmOff) or not qemu.words:
                raise QemuFailed(str(error)) from None
            raise CheckpointCorrupt(f"QEMU cannot load {core}: {qemu.words}") from error
        except MonitorError as error:
            raise QemuFailed(f"QEMU did not load {core}: {error}") from None

    def _settle_disks(self, monitor: Monitor) -> None:
        """The guest is about to run: the disks cannot go back to before the restore any more."""
        if (state := self._state.get("reverting")) is None:
            return

        def drop(index: int, name: str) -> None:
            monitor.delete_snapshots([disk_node(index)], name)

        for trouble in Reverting.from_dict(state).settle(drop):
            log.warning("VM %s: %s", self._vm, trouble)
        self._remember(reverting=None)

    def go(self, paused: bool = False) -> None:
        """The VM is up: let the guest run, or leave it as it stands. Repeatable.

        Also lets one run that stands still. Raises Conflict where it cannot.
        """
        with self._qmp() as monitor:
            self._settle_disks(monitor)
            if not paused:
                self._standing.run(monitor)
        self._remember(running=True)

    def pause(self) -> None:
        """Stop the guest until `go`; one that stands still already stays as it is. Repeatable."""
        with self._qmp() as monitor:
            self._standing.pause(monitor)

    def limit(self, limit_pages: int) -> None:
        """Change how much the main host keeps; pages move while the guest runs."""
        self._pager.call("resize", limit_pages=limit_pages)

    def set_layout(self, layout: Layout) -> None:
        """Remember what the hosts may keep from now on."""
        self._remember(
            spec={**self._state["spec"], "layout": layout.model_dump(mode="json")},
            shares=dict(zip(self._state["hosts"][1:], layout.subs, strict=True)),
            reshaping=False,
        )

    def incarnation(self) -> Incarnation:
        """What a host that joins the VM must know."""
        settings = paging_settings.load(PagerSettings, self._pager_path)
        return Incarnation(self._vm, settings.generation, settings.secret)

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
            self.end_serving_parts()
            self._pager.stop()  # once more: a start under way may have prepared another
            end_leftovers(self._folder)
            put_disks_back(self._folder)
            ended, self._state = self._state, {}
            self._folder.remove()
            self._name.release_last()
            if ended:  # by an actor before this one
                self._name.release(ended.get("cluster", ""), ended["generation"])
            self._folder.release()

    def _hurry(self) -> None:
        self._meter.cancel()
        self._pager.stop()
        end_leftovers(self._folder)
