"""The load of a VM core into QEMU, and the disks that go back with it."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from dcres.actors.host.beginning import vmcore_of
from dcres.actors.host.page_loader import parse
from dcres.actors.host.qemu import Qemu
from dcres.actors.host.site import Site
from dcres.actors.host.state import BegunRevert
from dcres.actors.messages import Resumption
from dcres.errors import (
    CheckpointCorrupt,
    ConfigError,
    DcresError,
    MonitorError,
    QemuFailed,
    VmLost,
    VmOff,
)
from dcres.linux.machine import boot_id
from dcres.vm.command import disk_node
from dcres.vm.monitor import Monitor
from dcres.vm.reverting import Reverting

log = logging.getLogger("dcres.host")


class CoreLoad:
    """Gives QEMU the VM core of a checkpoint; disks are taken back if it fails."""

    def __init__(self, site: Site, qemu: Qemu) -> None:
        self._site = site
        self._state = site.state
        self._qemu = qemu

    def load(self, resumption: Resumption) -> None:
        """The last step, with the first that changes disks: everything else was verified.

        A QEMU that waits for a VM core has its disks open but inactive, and reads their tables
        anew when it activates them; so they can be reverted this late. If it fails they are as
        they were.
        """
        core = vmcore_of(resumption, self._site.store, self._site.folder.ram / "incoming")
        manifest = parse(resumption.manifest)
        paths = tuple(Path(each.path) for each in manifest.disks)
        reverting = Reverting(manifest.checkpoint, paths)
        if paths:
            begun = BegunRevert(reverting, boot_id())
            self._state.change(lambda now: replace(now, reverting=begun))
        try:
            reverting.do(manifest.checkpoint)
            self._give(core)
        except DcresError as error:
            self._qemu.process.end(grace_s=2.0)  # it may have activated them
            try:
                reverting.undo()
            except DcresError as failed:
                raise ConfigError(f"{error}; {failed}") from error
            raise
        self._state.change(lambda now: replace(now, stood=manifest.stopped_at))

    def _give(self, core: Path) -> None:
        qemu = self._qemu.process
        try:
            with self._qemu.monitor() as monitor:
                monitor.load_core(core)
        except VmLost as error:
            # It was killed or told to end; one that cannot load a core says why.
            if isinstance(error, VmOff) or not qemu.words:
                raise QemuFailed(str(error)) from None
            raise CheckpointCorrupt(f"QEMU cannot load {core}: {qemu.words}") from error
        except MonitorError as error:
            raise QemuFailed(f"QEMU did not load {core}: {error}") from None

    def settle_disks(self, monitor: Monitor) -> None:
        """The guest is about to run: the disks cannot go back to before the restore any more."""
        if (begun := self._state.require().reverting) is None:
            return

        def drop(index: int, name: str) -> None:
            monitor.delete_snapshots([disk_node(index)], name)

        for trouble in begun.reverting.settle(drop):
            log.warning("VM %s: %s", self._site.vm, trouble)
        self._state.change(lambda now: replace(now, reverting=None))
