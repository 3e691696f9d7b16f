"""The life of coordinators: each VM's is found, spawned when first needed, and retired.

For any process of the cluster: a client of it, or what runs inside.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from dcres.actors.control.coordinator import Coordinator
from dcres.actors.ports import Port
from dcres.actors.ray import gateway
from dcres.actors.ray.coordinator import RayCoordinator
from dcres.actors.ray.fleet import coordinator_name
from dcres.errors import Conflict, DcresError
from dcres.linux.interrupt import uninterrupted

_PREFIX = coordinator_name("")
_READY_TIMEOUT_S = 300.0  # an actor's process starts in 0.5 s, or when the machine gets to it


class Coordinators:
    """The coordinators of the cluster that this process is in."""

    def names(self) -> list[str]:
        """The VMs that have one, whether they run or not."""
        return [name.removeprefix(_PREFIX) for name in gateway.list_actors(_PREFIX)]

    def port(self, vm: str) -> gateway.ActorPort:
        """The way to a VM's coordinator; whether it is there, a call tells."""
        return gateway.ActorPort(coordinator_name(vm))

    def peek(self, vm: str) -> Port | None:
        """The VM's coordinator, which may not answer; None if there is none."""
        return gateway.find(coordinator_name(vm))

    def find(self, vm: str) -> Port | None:
        """The same once it answers, through a restart if need be. Raises ActorGone."""
        port = self.peek(vm)
        if port is not None:
            port.wait_ready(_READY_TIMEOUT_S)
        return port

    def obtain(self, vm: str) -> Port:
        """The VM's coordinator, spawned unless there is one already. Raises ActorGone."""
        port: Port | None = self.peek(vm)
        if port is None:
            try:
                port = gateway.spawn(RayCoordinator, coordinator_name(vm), (vm,))
            except Conflict:
                # Another caller was faster; the coordinator lets one of us begin.
                port = self.port(vm)
        port.wait_ready(_READY_TIMEOUT_S)
        return port

    @contextmanager
    def bringing_up(self, vm: str) -> Iterator[Port]:
        """As `obtain`, to start or restore the VM; when that fails, no coordinator is left."""
        try:
            yield self.obtain(vm)
        except BaseException:
            with uninterrupted():
                self.retire(vm)
            raise

    def retire(self, vm: str) -> None:
        """End the VM's coordinator unless there is something to coordinate. Repeatable."""
        with suppress(DcresError):
            if self.port(vm).call(Coordinator.retire):
                gateway.kill(coordinator_name(vm))
