"""A main host's VM as it is now: for status, for pictures, for a coordinator that comes anew."""

from __future__ import annotations

from dcres.actors.host.pager import Pager
from dcres.actors.host.qemu import Qemu
from dcres.actors.host.site import Site
from dcres.actors.host.standing import Standing
from dcres.actors.host.vm_picture import look
from dcres.actors.messages import Description, Role
from dcres.actors.protocol import MainStatus
from dcres.errors import VmLost
from dcres.model.pages import pages_of
from dcres.model.picture import Picture
from dcres.model.placement import LEAVING, MAIN
from dcres.model.run_state import RunState


class VmView:
    """Looks at the VM, and changes nothing."""

    def __init__(self, site: Site, qemu: Qemu, pager: Pager, standing: Standing) -> None:
        self._site = site
        self._qemu = qemu
        self._pager = pager
        self._standing = standing

    def describe(self) -> Description:
        """What this host is, and the VM as the state file has it."""
        state = self._site.state.now
        if state is None:
            return Description(self._site.host, Role.MAIN, present=False)
        return Description(
            host=self._site.host,
            role=Role.MAIN,
            present=True,
            spec=state.spec,
            generation=state.generation,
            checkpoint=state.checkpoint,
            accel=state.accel,
            accel_why=state.accel_why,
            qemu_version=state.qemu_version,
            machine=state.machine,
            reserved=state.reserved,
            running=state.running,
            moving=bool(state.sources),
            hosts=state.hosts,
            shares=state.shares,
            reshaping=state.reshaping,
            change=state.change,
        )

    def status(self) -> MainStatus:
        """The VM and its paging as they are now. Raises VmLost when QEMU has ended."""
        qemu, daemon = self._qemu.require_running(), self._pager.daemon
        if daemon.given_up:
            raise VmLost(f"VM {self._site.vm} cannot go on ({daemon.given_up})")
        with self._qemu.monitor() as monitor:
            now = monitor.status()
            run_state = self._standing.told(now)
            failed = monitor.failed_disks() if run_state is RunState.IO_ERROR else []
        state = self._site.state.require()
        return MainStatus(
            host=self._site.host,
            role=Role.MAIN,
            generation=state.generation,
            run_state=str(run_state),
            held=self._standing.is_held(now),
            failed_disks=list(failed),
            accel=state.accel,
            accel_why=state.accel_why,
            console=str(qemu.files.console),
            qemu_pid=qemu.process.pid,
            checkpoint=state.checkpoint,
            restarts=daemon.restarts,
            bringing_in=bool(state.sources),
            unclaimed=state.unclaimed,
            unrecorded=state.unrecorded,
            **self._pager.patient.status(),
        )

    def picture(self, buckets: int) -> Picture:
        """Where memory is and how hot, in at most `buckets` stretches. Raises NotFound, VmLost."""
        self._qemu.require_running()
        page_count = pages_of(self._qemu.spec.memory)
        state = self._site.state.require()
        main, *subs = state.hosts
        by_code = dict(zip(state.codes, subs, strict=True))
        codes = {MAIN: main, LEAVING: main, **by_code}
        table, ram = self._pager.table_path, self._site.guest_ram
        return look(table, ram, page_count, codes, buckets)
