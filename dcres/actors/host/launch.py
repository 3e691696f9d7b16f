"""The launch of a VM on its main host: QEMU, page table, pager, VM core."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

from dcres.actors.host.beginning import beginning_of
from dcres.actors.host.core_load import CoreLoad
from dcres.actors.host.disks import require_disks
from dcres.actors.host.name_in_store import NameInStore
from dcres.actors.host.page_loader import identity_of, load_pages, parse
from dcres.actors.host.pager import Pager
from dcres.actors.host.qemu import Qemu
from dcres.actors.host.room import require_ram
from dcres.actors.host.site import Site
from dcres.actors.host.state import VmState
from dcres.actors.host.vm_folder import marker
from dcres.actors.messages import LoadOrder, Resumption, RunOrder
from dcres.config import Accel, default_cache
from dcres.errors import QemuFailed
from dcres.model.pages import pages_of
from dcres.model.placement import sub_code
from dcres.vm import accel as accel_
from dcres.vm import devices, process, safety
from dcres.vm.arguments import require_whole_paths
from dcres.vm.command import MACHINE, VmFiles, owned_nodes
from dcres.vm.monitor import Monitor


class Launch:
    """Begins the VM. What was started until it fails is for the end of the VM to end."""

    def __init__(
        self, site: Site, qemu: Qemu, pager: Pager, core: CoreLoad, name: NameInStore
    ) -> None:
        self._site = site
        self._state = site.state
        self._qemu = qemu
        self._pager = pager
        self._core = core
        self._name = name

    def boot(self, order: RunOrder) -> None:
        """Start QEMU, with what `order.load` names in memory; the guest is stopped.

        `order.subs` and `order.resumption` need not be known yet: sub hosts load their parts and
        part servers start at the same time. Raises ConfigError, NoRoom, QemuFailed,
        UnsafeDevice, CheckpointCorrupt.
        """
        with self._site.life.beginning(), self._qemu.blamed(QemuFailed):
            self._boot(order)

    def run(self, order: RunOrder) -> None:
        """After `boot`: pager, then VM core. Raises PagingError, CheckpointCorrupt."""
        with self._site.life.beginning(), self._qemu.blamed(QemuFailed):
            if order.resumption is not None:
                self._begin_from(order.resumption, pages_of(order.spec.layout.main))
            self._start_pager(order)
            if order.resumption is not None:
                self._core.load(order.resumption)

    def _boot(self, order: RunOrder) -> None:
        spec, site = order.spec, self._site
        spec.require_files()
        if order.load is None:
            require_whole_paths(spec.extra_args)
        require_ram(site.settings, spec.layout.main)
        manifest = None if order.load is None else parse(order.load.manifest)
        if self._name.claimed:  # else nothing may be removed
            kept = frozenset() if manifest is None else frozenset({manifest.checkpoint})
            site.store.sweep(site.vm, keep=kept, whole_parts=False)
        wanted = spec.accel if manifest is None else Accel(manifest.accel)
        chosen, why = accel_.choose(wanted, spec.kernel, default_cache())
        require_disks(spec, manifest)
        site.folder.make()
        machine = MACHINE if manifest is None else manifest.machine.get("type", MACHINE)
        monitor = self._start_qemu(order, chosen, why, machine)
        # QEMU has put its firmware into memory by now, and touches none of it until it has a core.
        with self._loading(order):
            self._pager.daemon.prepare()
            # What comes back has the disks that it had; to refuse it would lose its memory, too.
            disks = owned_nodes(spec) if manifest is None else None
            pid = self._qemu.process.process.pid
            safety.require_safe(monitor, pid, site.guest_ram, disks)
            if manifest is None:
                devices.require_saveable(monitor)
            inventory = devices.inventory(monitor)
            self._state.change(lambda now: replace(now, devices=inventory))

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
            qemu = self._qemu.process
            if refused.is_set() or not qemu.alive:
                raise QemuFailed(self._qemu.obituary(qemu))

        site, identity = self._site, identity_of(order)
        load_pages(site.store, load, identity, site.guest_ram, site.meter, require_use)

    def _start_qemu(self, order: RunOrder, chosen: Accel, why: str, machine: str) -> Monitor:
        site, run = self._site, self._site.folder.run
        vm_files = VmFiles(site.guest_ram, run / "qmp.sock", run / "console.log", run / "qemu.log")
        site.folder.remove_file(vm_files.console)
        qemu, monitor = process.start(
            order.spec,
            vm_files,
            chosen,
            incoming=order.load is not None,
            env={**os.environ, **marker(site.folder)},
            machine=machine,
            inherited=site.folder.held,
        )
        self._qemu.connected(monitor)
        cluster = self._name.hand_over(order.incarnation.generation, monitor)
        site.state.begin(
            VmState(
                cluster=cluster,
                unclaimed=self._name.unclaimed,
                machine=monitor.machine_type(machine),
                vm=site.vm,
                generation=order.incarnation.generation,
                spec=order.spec,
                hosts=order.hosts,
                shares=dict(zip(order.hosts[1:], order.spec.layout.subs, strict=True)),
                codes=tuple(sub_code(index) for index in range(len(order.hosts) - 1)),
                qemu=qemu,
                accel=str(chosen),
                accel_why=why,
                qemu_version=monitor.version,
                reserved=order.spec.layout.main,
            )
        )
        return monitor

    def _begin_from(self, resumption: Resumption, limit_pages: int) -> None:
        """The network page table as the plan has it, before the pager looks."""
        codes = self._state.require().codes
        beginning = beginning_of(resumption, self._site.store, codes)
        self._pager.begin(beginning, limit_pages)
        self._state.change(lambda now: replace(now, sources=beginning.sources))

    def _start_pager(self, order: RunOrder) -> None:
        state, pid = self._state.require(), self._qemu.process.process.pid
        self._pager.start(order, state.codes, state.sources, pid, self._site.guest_ram)
        self._state.change(lambda now: replace(now, paged=True))
        self._pager.await_links()
