"""The VM's QEMU on its main host: which process it is, the connection to it, what its end means."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from dcres.actors.host.state import StateFile
from dcres.config import VmSpec
from dcres.errors import MonitorError, NotFound, PagingError, VmError, VmLost, VmOff
from dcres.vm import devices
from dcres.vm.monitor import Monitor
from dcres.vm.process import QemuProcess

_END_S = 0.3  # from a broken connection to QEMU until the kernel has ended it


class Qemu:
    """The QEMU that the state file tells of."""

    def __init__(self, vm: str, state: StateFile) -> None:
        self._vm = vm
        self._state = state
        self._orders = threading.Lock()
        self._monitor: Monitor | None = None

    @property
    def process(self) -> QemuProcess:
        """The process, which may have ended. Raises NotFound."""
        qemu = self._state.require().qemu
        if qemu is None:
            raise NotFound(f"no QEMU of VM {self._vm} was started here")
        return qemu

    @property
    def spec(self) -> VmSpec:
        """The VM that it runs. Raises NotFound."""
        spec = self._state.require().spec
        if spec is None:
            raise NotFound(f"no QEMU of VM {self._vm} was started here")
        return spec

    @property
    def is_running(self) -> bool:
        """Whether it is there."""
        now = self._state.now
        return now is not None and now.qemu is not None and now.qemu.alive

    def require_running(self) -> QemuProcess:
        """The process, which runs. Raises NotFound, VmLost."""
        qemu = self.process
        if not qemu.alive:
            raise self._ended(qemu)
        return qemu

    def connected(self, monitor: Monitor) -> None:
        """QEMU was started with this connection."""
        self._monitor = monitor

    @contextmanager
    def monitor(self) -> Iterator[Monitor]:
        """The connection, one user at a time. Raises NotFound, VmLost when QEMU has ended."""
        with self._orders:
            qemu = self.process
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

    def require_saveable(self) -> None:
        """UnsafeDevice when the VM is not what it was at its start, or QEMU could not save it."""
        at_start = self._state.require().devices
        if at_start is not None:
            with self.monitor() as monitor:
                devices.require_saveable(monitor, at_start)

    def disconnect(self) -> None:
        """Close the connection. Repeatable."""
        if self._monitor is not None:
            self._monitor.close()
            self._monitor = None

    def end(self) -> None:
        """End it and the connection to it. Repeatable."""
        self.disconnect()
        now = self._state.now
        if now is not None and now.qemu is not None:
            now.qemu.end(grace_s=2.0)

    def _ended(self, qemu: QemuProcess) -> VmLost:
        """The end of a QEMU that has ended: by order, or else."""
        if qemu.was_told_to_end:
            return VmOff(
                f"QEMU of VM {self._vm} was ended by a signal ({qemu.words}); `dcres start` boots "
                "the VM, `dcres restore` takes it back to a checkpoint"
            )
        return VmLost(self.obituary(qemu))

    def obituary(self, qemu: QemuProcess) -> str:
        """What is told of a QEMU that has ended."""
        words = qemu.words or "it was killed, or its log is empty"
        return f"QEMU of VM {self._vm} has ended ({words}); restore a checkpoint"

    @contextmanager
    def blamed(self, blame: type[VmError]) -> Iterator[None]:
        """When QEMU has ended, that is the error, and not that its pager went with it."""
        try:
            yield
        except (PagingError, MonitorError, OSError):
            now = self._state.now
            if now is not None and now.qemu is not None and now.qemu.process.wait_gone(_END_S):
                raise blame(self.obituary(now.qemu)) from None
            raise
