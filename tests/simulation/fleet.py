"""The fleet of a simulated cluster: see `dcres.actors.ports.Fleet`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Protocol

from dcres.actors.control.room import Around
from dcres.actors.messages import PlanOrder, Role
from dcres.actors.ports import Port
from dcres.actors.protocol import Presence
from dcres.errors import ClusterError, Conflict, DcresError, NoRoom, NotFound
from dcres.model.restore_plan import Flow
from tests.simulation.cluster import Actor, Cluster, SimulatedPort
from tests.support.hosts import FakeHost, FakeSub, FakeVisitor, parsed
from tests.support.main_host import FakeMain
from tests.support.world import World

_LOOK_S = 30.0


class Make(Protocol):
    """The class of a fake host."""

    def __call__(self, world: World, vm: str, host: str) -> FakeHost: ...


class SimulatedFleet:
    """Reservations are shares: a host has room for so many."""

    def __init__(self, cluster: Cluster, main: Make = FakeMain, sub: Make = FakeSub) -> None:
        self._cluster = cluster
        self._main, self._sub = main, sub
        self.reserved: dict[str, dict[int, str]] = {}  # the host, by VM and index
        self.unswept: set[tuple[str, str]] = set()  # where a VM may still be: the VM, the host

    def cluster(self) -> str:
        return "simulated"

    def _hop(self) -> None:
        self._cluster.clock.sleep(self._cluster.clock.random.uniform(0.001, 0.05))

    def _name(self, vm: str, index: int) -> str:
        return f"host/{vm}/{index}"

    def _free(self, host: str) -> bool:
        there = self._cluster.hosts[host]
        return there.room > 0 and not there.known_lost

    def _chosen(self, vm: str, count: int, hosts: Sequence[str] | None) -> list[str]:
        gone = [host for host in hosts or () if not self.alive(host)]
        if gone:
            raise NotFound(f"no host {', '.join(gone)} in the cluster")
        names = [host for host in hosts or self._shuffled() if self._free(host)][:count]
        if len(names) < count:
            raise NoRoom(f"VM {vm} wants {count} hosts and {len(names)} have room")
        return names

    def _shuffled(self) -> list[str]:
        names = list(self._cluster.hosts)
        self._cluster.clock.random.shuffle(names)
        return names

    def reserve(
        self,
        vm: str,
        shares: Sequence[int],
        hosts: Sequence[str] | None,
        roles: Sequence[Role] = (),
    ) -> list[str]:
        self._hop()
        if vm in self.reserved:
            raise Conflict(f"a reservation {vm} exists already; release it first")
        names = self._chosen(vm, len(shares), hosts)
        self.reserved[vm] = dict(enumerate(names))
        for host in names:
            self._cluster.hosts[host].room -= 1
        try:
            for index, host in enumerate(names):
                self._hop()
                self._spawn(vm, index, host)
            for port in self.find(vm):
                port.wait_ready(_LOOK_S)
        except DcresError:
            self.release(vm)
            raise
        return names

    def _spawn(self, vm: str, index: int, host: str) -> None:
        name, world = self._name(vm, index), self._cluster.vm(vm)
        kind = self._sub if index else self._main
        make: Callable[[str], object] = lambda host: kind(world, vm, host)  # noqa: E731
        self._cluster.actors[name] = Actor(self._cluster, name, vm, host, make)

    def driver_is_gone(self, driver: str) -> bool:
        return False

    def indices(self, vm: str) -> list[int]:
        self._cluster.clock.require_process()
        held = self.reserved.get(vm, {})
        return sorted(index for index in held if self._name(vm, index) in self._cluster.actors)

    def find(self, vm: str) -> list[Port]:
        return [SimulatedPort(self._cluster, self._name(vm, each)) for each in self.indices(vm)]

    def room_for(self, vm: str, extras: Mapping[int, int], shares: Sequence[int]) -> list[str]:
        self._hop()
        taken = set(self.reserved.get(vm, {}).values())
        free = [host for host in self._cluster.hosts if host not in taken and self._free(host)]
        if len(free) < len(shares):
            raise NoRoom(f"no host that is not the VM's already has {shares[-1]} bytes free")
        return free[: len(shares)]

    def require_room(self, vm: str, shares: Sequence[int], hosts: Sequence[str] | None) -> None:
        self._hop()
        held = set(self.reserved.get(vm, {}).values())
        names = [host for host in hosts or self._cluster.hosts if self._free(host) or host in held]
        if len([host for host in names if self.alive(host)]) < len(shares):
            raise NoRoom(f"VM {vm} wants {len(shares)} hosts")

    def extend(self, vm: str, index: int, extra: int) -> None:
        self._hop()

    def add(self, vm: str, share: int, host: str, role: Role = Role.SUB) -> Port:
        self._hop()
        if not self._free(host):
            raise NoRoom(f"{host} has no room")
        held = self.reserved[vm]
        index = max(held) + 1
        held[index] = host
        self._cluster.hosts[host].room -= 1
        self._spawn(vm, index, host)
        port = SimulatedPort(self._cluster, self._name(vm, index))
        try:
            port.wait_ready(_LOOK_S)
        except DcresError:
            self.dismiss(vm, index)
            raise
        return port

    def dismiss(self, vm: str, index: int) -> None:
        self._hop()
        self._dismiss(vm, index)

    def _dismiss(self, vm: str, index: int) -> None:
        actor = self._cluster.actors.pop(self._name(vm, index), None)
        if actor is not None:
            actor.remove()
        host = self.reserved[vm].pop(index, None)
        if host is not None:
            self._cluster.hosts[host].room += 1

    def release(self, vm: str) -> None:
        self._hop()
        self.leave(vm)
        for index in list(self.reserved.get(vm, {})):
            self._dismiss(vm, index)
        self.reserved.pop(vm, None)

    def alive(self, host: str) -> bool:
        self._cluster.clock.require_process()
        return host in self._cluster.hosts and not self._cluster.hosts[host].known_lost

    def hosts_of(self, vm: str, indices: Sequence[int]) -> list[str]:
        held = self.reserved.get(vm, {})
        return [held[index] for index in indices if index in held]

    def sweep(self, vm: str, host: str) -> None:
        self._hop()
        if not self._cluster.reachable(host):
            self.unswept.add((vm, host))
            self._cluster.clock.sleep(_LOOK_S)
            raise ClusterError(f"{host} does not answer")
        self._cluster.clock.note(f"{vm} is swept from {host}")
        self._cluster.vm(vm).end(host)

    def look_around(self, vm: str, manifest: str, *, take_over: bool) -> Around:
        raise NotImplementedError("no client of the simulation has hosts chosen for it")

    def flow_on(self, host: str, order: PlanOrder) -> Flow:
        raise NotImplementedError("no client of the simulation asks for a plan")

    def holders(self, manifest: str) -> dict[str, tuple[str, ...]]:
        self._hop()
        world = self._cluster.vm(parsed(manifest).vm)
        hosts = filter(self._cluster.reachable, self._cluster.hosts)
        found = {host: world.parts_at(host, manifest) for host in hosts}
        return {host: parts for host, parts in found.items() if parts}

    def visit(self, vm: str, host: str) -> Port:
        self._hop()
        name, world = f"parts/{vm}/{host}", self._cluster.vm(vm)
        make: Callable[[str], object] = lambda host: FakeVisitor(world, vm, host)  # noqa: E731
        self._cluster.actors[name] = Actor(self._cluster, name, vm, host, make)
        return SimulatedPort(self._cluster, name)

    def leave(self, vm: str) -> None:
        for name in [each for each in self._cluster.actors if each.startswith(f"parts/{vm}/")]:
            with suppress(DcresError):
                SimulatedPort(self._cluster, name).call(Presence.destroy)
            actor = self._cluster.actors.pop(name, None)
            if actor is not None:
                actor.remove()
