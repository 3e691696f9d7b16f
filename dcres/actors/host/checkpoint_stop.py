"""The stop of a VM for a checkpoint: QEMU and paging at rest together, and on again."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass

import numpy as np

from dcres.actors.host.account import Account, MainBase
from dcres.actors.host.host_saver import LATE_ORDERS, HostSaver
from dcres.actors.host.pager import Pager
from dcres.actors.host.qemu import Qemu
from dcres.actors.host.site import Site
from dcres.actors.host.standing import Standing
from dcres.actors.messages import Finished, pack_mask
from dcres.errors import Conflict, PagingError, VmLost
from dcres.model.history import Ticks
from dcres.model.pages import pages_of
from dcres.model.placement import MAIN, NOWHERE, Owners
from dcres.storage.layout import VMCORE
from dcres.vm import disk
from dcres.vm.command import disk_nodes
from dcres.vm.monitor import Monitor


@dataclass(frozen=True, slots=True, eq=False)
class FrozenPages:
    """Page placement and access history as they were when the pager froze."""

    owners: Owners
    ticks: Ticks


class CheckpointStop:
    """Stops the VM for a checkpoint, at most once for each, and lets it go on."""

    def __init__(
        self,
        site: Site,
        saver: HostSaver,
        qemu: Qemu,
        pager: Pager,
        standing: Standing,
        account: Account,
    ) -> None:
        self._vm = site.vm
        self._state = site.state
        self._account = account
        self._saver = saver
        self._qemu = qemu
        self._pager = pager
        self._standing = standing
        self._stopping = threading.Lock()
        self._resumed: deque[str] = deque(maxlen=LATE_ORDERS)  # for which it was told to go on
        self._frozen_pid = 0  # of the pager that froze
        self.frozen: FrozenPages | None = None
        self.base: MainBase | None = None  # of the checkpoint under way, if it is an increment
        # Where QEMU writes the VM core: on tmpfs, since the VM is paused meanwhile.
        self.core = site.folder.ram / VMCORE

    def finish(self, checkpoint: str) -> Finished:
        """Stop the VM, drain paging, snapshot the disks, save the core, freeze placement.

        Raises Conflict when the VM was told to go on, which it is only afterwards or instead.
        """
        # `resume` waits for this: it must not thaw paging before it was frozen.
        with self._stopping:
            self._saver.require_wanted(checkpoint)
            if checkpoint in self._resumed:
                raise Conflict(
                    f"checkpoint {checkpoint} of VM {self._vm} is over; this order came too late"
                )
            self._qemu.require_saveable()
            return self._finish(checkpoint)

    def _finish(self, checkpoint: str) -> Finished:
        self._frozen_pid = self._pager.control.status()["pid"]
        with self._qemu.monitor() as monitor:
            stopped = self._standing.stop(monitor)
            laps = [("", stopped.began)]
            laps.append(("stop", time.monotonic()))
            before = self._pager.draining.quiesce()
            laps.append(("drain", time.monotonic()))
            again = monitor.has_saved_core
            self._take_snapshots(monitor, checkpoint, inactive=again)
            laps.append(("disks", time.monotonic()))
            monitor.require_core(self.core) if again else monitor.save_core(self.core)
            laps.append(("core", time.monotonic()))
        frozen = self._pager.draining.freeze()
        laps.append(("freeze", time.monotonic()))
        table = self._pager.table(pages_of(self._qemu.spec.memory))
        self.frozen = FrozenPages(table.owners.copy(), table.ticks.copy())
        changed = self._cut(checkpoint, self.frozen.owners)
        return Finished(
            tick=frozen.tick,
            moved=frozen.pages_in - before.pages_in + frozen.pages_out - before.pages_out,
            pages_in=frozen.pages_in,
            pages_out=frozen.pages_out,
            stopped_at=stopped.began,
            parts_s={name: at - laps[i][1] for i, (name, at) in enumerate(laps[1:])},
            run_state=stopped.found,
            stopped=stopped.since,
            changed=changed,
        )

    def _cut(self, checkpoint: str, owners: Owners) -> bytes:
        """What is in the checkpoint ends here; what has changed since its base."""
        with self._saver.current(checkpoint) as saver:
            segmented = saver.base is not None
        if not segmented:
            return b""
        if not self._state.require().codes:  # nothing is ever missing: the pager has no owners
            owners[:] = np.where(self._saver.here(), MAIN, NOWHERE)
        self._account.cut(checkpoint)
        if self.base is None:
            return b""
        return pack_mask(self.base.changed(self._account.changed(owners.size), owners != NOWHERE))

    def _take_snapshots(self, monitor: Monitor, checkpoint: str, *, inactive: bool) -> None:
        """Of all disks. After a failure `abandon` removes those that were made."""
        if not inactive:
            monitor.snapshot_disks(disk_nodes(self._qemu.spec), checkpoint)
            return
        for each in self._qemu.spec.disks:
            disk.take(each.path, checkpoint)

    def require_frozen(self) -> None:
        """PagingError if pages may have moved since the freeze.

        A pager that was started again knows nothing of the checkpoint: it may page out.
        """
        status = self._pager.control.status()
        if status["pid"] != self._frozen_pid or status["state"] != "frozen":
            raise PagingError("the pager was started again while the checkpoint was taken")

    def forget(self) -> None:
        """What was frozen is saved, or will not be."""
        self.frozen = self.base = None

    def resume(self, checkpoint: str) -> float:
        """Thaw paging, leave the guest as it was found; the time on this host's monotonic clock.

        Also undoes a checkpoint that stopped half-way, so it is safe to call at any time. The VM
        is not stopped for `checkpoint` any more.
        """
        with self._stopping:
            self._resumed.append(checkpoint)
            with self._qemu.blamed(VmLost):
                self._pager.patient.thaw()
            with self._qemu.monitor() as monitor:
                self._standing.let_go(monitor)
            return time.monotonic()
