"""What a main host knows of its VM: state file, QEMU, pager."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from dcres.actors.host.host import Daemon, Life, Meter, state_of, write_state
from dcres.actors.host.loading import PartServing
from dcres.actors.host.naming import NameInStore
from dcres.actors.host.picturing import look
from dcres.actors.host.saving import LATE_ORDERS, SavingHost
from dcres.actors.host.standing import Standing
from dcres.actors.host.vm_folder import VmFolder
from dcres.actors.messages import Description
from dcres.actors.protocol import MainStatus
from dcres.config import HostSettings, VmSpec
from dcres.errors import (
    MonitorError,
    NotFound,
    PagingError,
    VmError,
    VmLost,
    VmOff,
)
from dcres.model.history import Ticks
from dcres.model.pages import pages_of
from dcres.model.picture import Picture
from dcres.model.placement import (
    LEAVING,
    MAIN,
    Owners,
)
from dcres.model.run_state import RunState
from dcres.paging.status import PagerStatus
from dcres.storage.store.store import Store
from dcres.vm.monitor import Monitor
from dcres.vm.process import QemuProcess

_END_S = 0.3  # from a broken connection to QEMU until the kernel has ended it


class QemuHost(SavingHost, PartServing):
    """One VM's QEMU and pager, and the state file that tells of them."""

    def __init__(
        self,
        vm: str,
        address: str = "127.0.0.1",
        cluster: str = "",
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self._settings = HostSettings.from_environ(environ, address)
        self._folder = VmFolder.of(self._settings, vm, cluster)
        self._folder.resume()
        self._pager = Daemon("dcres.paging.pager", self._folder, "pager", self._has_qemu)
        store = Store(self._settings.store)
        SavingHost.__init__(self, store, vm, self._settings.name, Meter())
        PartServing.__init__(self, self._settings, self._folder, store)
        self._frozen: tuple[Owners, Ticks] | None = None
        self._frozen_pid = 0  # of the pager that froze
        self._orders = threading.Lock()
        self._stopping_vm = threading.Lock()
        # Checkpoints for which the VM was told to go on.
        self._resumed: deque[str] = deque(maxlen=LATE_ORDERS)
        self._remembering = threading.Lock()
        self._standing = Standing(vm, lambda: self._state, self._remember)
        self._life = Life()
        record = self._settings.run / f"{vm}.generation"
        self._name = NameInStore(store, vm, self._settings.name, record)
        self._monitor: Monitor | None = None
        self._state: dict[str, Any] = state_of(self._folder) or {}
        # Before its pager is there a VM that is being started is nothing to adopt.
        if self._state.get("paged") and self._has_qemu():
            self._pager.adopt()

    # What this host knows

    def describe(self) -> Description:
        """Who this host is, and the VM's state file as the actor before left it."""
        host, state = self._settings.name, self._state
        if not state:
            return Description(host, "main", present=False)
        return Description(
            host=host,
            role="main",
            present=True,
            spec=self._spec,
            generation=state["generation"],
            checkpoint=state.get("checkpoint"),
            accel=state["accel"],
            accel_why=state["accel_why"],
            qemu_version=state["qemu_version"],
            machine=state.get("machine", ""),  # not known of a VM that an earlier dcres started
            reserved=state.get("reserved", 0),
            running=state.get("running", False),
            moving=bool(state.get("sources")),
            hosts=tuple(state["hosts"]),
            shares=state.get("shares", {}),
            reshaping=state.get("reshaping", False),
        )

    @property
    def _qemu(self) -> QemuProcess:
        if not self._state:
            raise NotFound(f"host {self._settings.name} does not run VM {self._vm}")
        return QemuProcess.from_dict(self._state["qemu"])

    @property
    def _ram(self) -> Path:
        return self._folder.ram / "guest.ram"

    def _has_qemu(self) -> bool:
        return bool(self._state) and self._qemu.alive

    def _require_qemu(self) -> QemuProcess:
        """The VM's QEMU, which runs. Raises NotFound, VmLost."""
        qemu = self._qemu
        if not qemu.alive:
            raise self._ended(qemu)
        return qemu

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
                try:
                    self._monitor = qemu.connect()
                except VmLost:
                    raise self._ended(qemu) from None
            try:
                yield self._monitor
            except MonitorError:
                self._monitor.close()
                self._monitor = None
                if qemu.process.wait_gone(_END_S):
                    raise self._ended(qemu) from None
                raise

    def _ended(self, qemu: QemuProcess) -> VmLost:
        """The end of a QEMU that has ended: by order, or else."""
        if qemu.was_told_to_end:
            return VmOff(
                f"QEMU of VM {self._vm} was told to end ({qemu.words}); `dcres start` boots the VM "
                "anew, `dcres restore` takes it back to a checkpoint"
            )
        return VmLost(self._obituary(qemu))

    def _obituary(self, qemu: QemuProcess) -> str:
        words = qemu.words or "it was killed, or said nothing"
        return f"QEMU of VM {self._vm} has ended ({words}); restore a checkpoint"

    @contextmanager
    def _blaming_qemu(self, blame: type[VmError]) -> Iterator[None]:
        """When QEMU has ended, that is the error, and not that its pager went with it."""
        try:
            yield
        except (PagingError, MonitorError, OSError):
            if self._state and self._qemu.process.wait_gone(_END_S):
                raise blame(self._obituary(self._qemu)) from None
            raise

    def status(self) -> MainStatus:
        """The VM and its paging as they are now. Raises VmLost when QEMU has ended."""
        qemu = self._require_qemu()
        if self._pager.given_up:
            raise VmLost(f"VM {self._vm} cannot go on ({self._pager.given_up})")
        with self._qmp() as monitor:
            now = monitor.status()
            run_state = self._standing.told(now)
            failed = monitor.failed_disks() if run_state is RunState.IO_ERROR else []
        return MainStatus(
            host=self._settings.name,
            role="main",
            generation=self._state["generation"],
            run_state=str(run_state),
            held=self._standing.is_held(now),
            failed_disks=list(failed),
            accel=self._state["accel"],
            accel_why=self._state["accel_why"],
            console=str(qemu.files.console),
            qemu_pid=qemu.process.pid,
            checkpoint=self._state.get("checkpoint"),
            restarts=self._pager.restarts,
            bringing_in=bool(self._state.get("sources")),
            unclaimed=self._state.get("unclaimed", ""),
            unrecorded=self._state.get("unrecorded", ""),
            **self._pager_status(),
        )

    def _pager_status(self) -> PagerStatus:
        return cast(PagerStatus, self._pager.call_patiently("status"))

    def picture(self, buckets: int) -> Picture:
        """Where memory is and how hot, in at most `buckets` stretches. Raises NotFound, VmLost."""
        self._require_qemu()
        page_count = pages_of(self._spec.memory)
        main, *subs = self._state["hosts"]
        by_code = dict(zip(self._state["codes"], subs, strict=True))
        codes = {MAIN: main, LEAVING: main, **by_code}
        return look(self._folder.ram / "table", self._ram, page_count, codes, buckets)
