"""The fleet on Ray: reservations, and the actors of one VM.

A VM starts with one placement group over all its hosts. What is set aside later, on a host that
is to hold more or on one that joins, is a group of its own, since groups cannot change.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

from dcres.actors.control.room import (
    Around,
    HostInfo,
    Seen,
    host_named,
    hosts_to_join,
    require_room,
)
from dcres.actors.host import looking_around
from dcres.actors.host.agent import HostAgent
from dcres.actors.host.disks import put_disks_back
from dcres.actors.host.page_loader import parse
from dcres.actors.host.room import require_ram
from dcres.actors.host.site import name_of_parts
from dcres.actors.host.vm_folder import VmFolder, end_leftovers
from dcres.actors.messages import Look, PlanOrder, Role, roles_of
from dcres.actors.ports import Pending, Port
from dcres.actors.protocol import Presence
from dcres.actors.ray import gateway
from dcres.config import HostSettings
from dcres.errors import DcresError, NotFound
from dcres.model.restore_plan import Flow
from dcres.storage.store.store import Store

R = TypeVar("R")

_READY_TIMEOUT_S = 300.0  # an actor's process starts in 0.5 s, or when the machine gets to it
_LOOK_TIMEOUT_S = 30.0
_LOOK_AROUND_TIMEOUT_S = 60.0
_PLAN_TIMEOUT_S = 600.0
_AT_ONCE = 16


def coordinator_name(vm: str) -> str:
    """The name of a VM's coordinator actor."""
    return f"dcres/{vm}"


def host_actor_name(vm: str, index: int) -> str:
    """The name of the agent on a VM's host."""
    return f"dcres-host/{vm}/{index}"


def _visitor_name(vm: str, host: str) -> str:
    return f"dcres-parts/{vm}/{host}"


def _reservation_name(vm: str) -> str:
    return f"dcres/{vm}"


def _extra_name(vm: str, index: int) -> str:
    return f"dcres-extra/{vm}/{index}"


def _own_name(vm: str, index: int) -> str:
    return f"dcres-more/{vm}/{index}"


class RayFleet:
    """See `dcres.actors.ports.Fleet`."""

    def cluster(self) -> str:
        """Ray's name for the cluster."""
        return gateway.cluster_id()

    def reserve(
        self,
        vm: str,
        shares: Sequence[int],
        hosts: Sequence[str] | None,
        roles: Sequence[Role] = (),
    ) -> list[str]:
        """One placement group bundle and one actor per share, each on a host of its own."""
        reservation = gateway.reserve(_reservation_name(vm), shares, hosts)
        try:
            names = list(reservation.hosts)
            chosen = zip(names, roles or roles_of(len(names)), strict=True)
            ports = [
                self._spawn(vm, index, name, role, reservation, index)
                for index, (name, role) in enumerate(chosen)
            ]
            for port in ports:
                port.wait_ready(_READY_TIMEOUT_S)
        except BaseException:
            self.release(vm)
            raise
        return names

    def _spawn(
        self,
        vm: str,
        index: int,
        host: str,
        role: Role,
        reservation: gateway.Reservation,
        bundle: int,
    ) -> Port:
        return gateway.spawn(
            HostAgent,
            host_actor_name(vm, index),
            (vm, role, _address_of(host), self.cluster()),
            reservation=reservation,
            bundle=bundle,
        )

    def driver_is_gone(self, driver: str) -> bool:
        """As Ray's table of jobs has it."""
        return gateway.driver_is_gone(driver)

    def find(self, vm: str) -> list[Port]:
        """The ports by name: the actors restart on their own."""
        return [gateway.ActorPort(host_actor_name(vm, index)) for index in self.indices(vm)]

    def indices(self, vm: str) -> list[int]:
        """From the names of the actors that there are."""
        found = gateway.list_actors(f"dcres-host/{vm}/")
        return sorted(int(name.rpartition("/")[2]) for name in found)

    def room_for(self, vm: str, extras: Mapping[int, int], shares: Sequence[int]) -> list[str]:
        """By the table of reservations, and by the tmpfs of a host that is to join."""
        for index, extra in extras.items():
            if extra > 0:
                self._require_room_to_extend(vm, index, extra)
        if not shares:
            return []
        taken = {self._host_of(vm, index) for index in self.indices(vm)}
        hosts = hosts_to_join(shares, taken, _alive())
        for host, share in zip(hosts, shares, strict=True):
            gateway.run_on(host, require_ram_here, share, timeout_s=_LOOK_TIMEOUT_S)
        return hosts

    def _require_room_to_extend(self, vm: str, index: int, extra: int) -> None:
        """An earlier extension there is given back for it."""
        name, before = self._host_of(vm, index), gateway.reservation(_extra_name(vm, index))
        host = host_named(name, _alive())
        given_back = 0 if before is None else before.length_bytes
        roomier = replace(host, memory_free_bytes=host.memory_free_bytes + given_back)
        others = [each for each in _alive() if each.name != name]
        require_room([extra], [name], sorted([*others, roomier], key=lambda each: each.name))

    def held(self, vm: str) -> dict[str, int]:
        """By the table of reservations."""
        held: Counter[str] = Counter()
        for name in _reservations_of(vm):
            found = gateway.reservation(name)
            held.update({} if found is None else found.held)
        return dict(held)

    def require_room(self, vm: str, shares: Sequence[int], hosts: Sequence[str] | None) -> None:
        """By the table of reservations, and by the tmpfs of the hosts that are named."""
        held = self.held(vm)
        require_room(shares, hosts, [roomier(each, held) for each in _alive()])
        for host, share in zip(hosts or (), shares, strict=False):
            gateway.run_on(
                host, require_ram_here, share, vm, self.cluster(), timeout_s=_LOOK_TIMEOUT_S
            )

    def extend(self, vm: str, index: int, extra: int) -> None:
        """A second reservation on that host for what the first lacks."""
        gateway.release(_extra_name(vm, index))
        if extra > 0:
            gateway.reserve(_extra_name(vm, index), [extra], [self._host_of(vm, index)])

    def _host_of(self, vm: str, index: int) -> str:
        own = gateway.reservation(_own_name(vm, index))
        if own is not None:
            return own.host_of(0)
        reservation = gateway.reservation(_reservation_name(vm))
        if reservation is None:
            raise NotFound(f"VM {vm} has no reservation")
        return reservation.host_of(index)

    def add(self, vm: str, share: int, host: str, role: Role = Role.SUB) -> Port:
        """In a placement group of its own."""
        index = max(self.indices(vm)) + 1
        gateway.release(_own_name(vm, index))  # of one that was to join, and whose answer came late
        reservation = gateway.reserve(_own_name(vm, index), [share], [host])
        try:
            port = self._spawn(vm, index, host, role, reservation, 0)
            port.wait_ready(_READY_TIMEOUT_S)
        except BaseException:
            self.dismiss(vm, index)
            raise
        return port

    def dismiss(self, vm: str, index: int) -> None:
        """A bundle of the first placement group stays set aside until the VM ends."""
        gateway.kill(host_actor_name(vm, index))
        gateway.release(_extra_name(vm, index))
        gateway.release(_own_name(vm, index))

    def release(self, vm: str) -> None:
        """Actors first: Ray restarts an actor whose group is gone for ever."""
        self.leave(vm)
        for index in self.indices(vm):
            gateway.kill(host_actor_name(vm, index))
        for name in _reservations_of(vm):
            gateway.release(name)

    def alive(self, host: str) -> bool:
        """Ray's word: it notices within seconds that a host does not answer any more."""
        return any(each.name == host for each in _alive())

    def hosts_of(self, vm: str, indices: Sequence[int]) -> list[str]:
        """Where their bundles are: an actor that is not there has no better address."""
        found = []
        for index in indices:
            with suppress(NotFound):
                found.append(self._host_of(vm, index))
        return found

    def sweep(self, vm: str, host: str) -> None:
        """By a task on the host."""
        gateway.run_on(host, end_what_is_left, vm, self.cluster(), timeout_s=_LOOK_TIMEOUT_S)

    def holders(self, manifest: str) -> dict[str, tuple[str, ...]]:
        """Asked by a task on every host; one that does not answer has nothing."""
        found = {}
        for host, parts in _on_all_hosts(parts_in_store, manifest).items():
            with suppress(DcresError):
                found[host] = parts.result(_LOOK_TIMEOUT_S)
        return {host: parts for host, parts in found.items() if parts}

    def look_around(self, vm: str, manifest: str, *, take_over: bool) -> Around:
        """By a task on every host, all at the same time."""
        held, asked = self.held(vm), (manifest, self.cluster(), take_over)
        seen, left_out = [], []
        alive = [roomier(host, held) for host in _alive()]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            looked = [(host, pool.submit(_look_at, host, asked)) for host in alive]
        for host, answer in looked:
            try:
                seen.append(answer.result())
            except DcresError as error:
                left_out.append(f"host {host.name} is left out: {error}")
        return Around(tuple(seen), tuple(left_out))

    def flow_on(self, host: str, order: PlanOrder) -> Flow:
        """By a task on the host."""
        return gateway.run_on(host, flow_here, order, timeout_s=_PLAN_TIMEOUT_S)

    def visit(self, vm: str, host: str) -> Port:
        """An actor without memory for VMs, pinned to the host.

        What it is told first waits until it is there; so several come up at the same time.
        """
        args = (vm, Role.PARTS, _address_of(host), self.cluster())
        return gateway.spawn(HostAgent, _visitor_name(vm, host), args, on_host=host)

    def leave(self, vm: str) -> None:
        """The actors end what they started, then they are ended.

        Where one does not answer the host is swept: a part server that was left would keep its
        checkpoint from being deleted.
        """
        silent = []
        for name in gateway.list_actors(_visitor_name(vm, "")):
            try:
                gateway.ActorPort(name).call(Presence.destroy)
            except DcresError:
                silent.append(name.removeprefix(_visitor_name(vm, "")))
            finally:
                gateway.kill(name)
        for host in filter(self.alive, silent):
            with suppress(DcresError):
                self.sweep(name_of_parts(vm), host)


def _look_at(host: HostInfo, asked: tuple[str, str, bool]) -> Seen:
    found = gateway.run_on(host.name, look_here, *asked, timeout_s=_LOOK_AROUND_TIMEOUT_S)
    free = min(host.memory_free_bytes, found.free_bytes)
    return Seen(replace(host, memory_free_bytes=free), found.parts, found.trouble)


def _on_all_hosts(function: Callable[..., R], *args: Any) -> dict[str, Pending[R]]:
    """Begin to run `function` on every host that is there; one that just went is left out."""
    begun: dict[str, Pending[R]] = {}
    for host in _alive():
        with suppress(DcresError):
            begun[host.name] = gateway.start_on(host.name, function, *args)
    return begun


def _reservations_of(vm: str) -> list[str]:
    """The names of all that may be set aside for the VM, what it started with last."""
    added = [
        name
        for prefix in (_extra_name(vm, 0), _own_name(vm, 0))
        for name in gateway.list_reservations(prefix.rstrip("0"))
    ]
    return [*added, _reservation_name(vm)]


def roomier(host: HostInfo, held: Mapping[str, int]) -> HostInfo:
    """The host once what a VM holds there is given back."""
    return replace(host, memory_free_bytes=host.memory_free_bytes + held.get(host.name, 0))


def _alive() -> list[HostInfo]:
    return [host for host in gateway.hosts() if host.alive]


def _address_of(host: str) -> str:
    return host_named(host, gateway.hosts()).address


def require_ram_here(share: int, vm: str = "", cluster: str = "") -> None:
    """NoRoom unless the tmpfs of the host that this runs on can take the share.

    Once it has given back what is left of the cluster's `vm` there, if that is named.
    """
    settings = HostSettings.from_environ(os.environ)
    given_back = VmFolder.of(settings, vm, cluster).ram_bytes if vm else 0
    require_ram(settings, max(share - given_back, 0))


def end_what_is_left(vm: str, cluster: str) -> None:
    """End processes and remove memory of the cluster's VM on the host that this runs on."""
    sweep(VmFolder.of(HostSettings.from_environ(os.environ), vm, cluster))


def sweep(folder: VmFolder) -> None:
    """End and remove what is left there; another cluster's stays."""
    folder.resume()
    try:
        end_leftovers(folder)
        put_disks_back(folder)
        folder.remove()
    finally:
        folder.release()


def parts_in_store(manifest: str) -> tuple[str, ...]:
    """The parts of a checkpoint in the store of the host that this runs on."""
    return Store(HostSettings.from_environ(os.environ).store).parts_here(parse(manifest))


def look_here(manifest: str, cluster: str, take_over: bool) -> Look:
    """What the host that this runs on tells before a restore."""
    return looking_around.look(HostSettings.from_environ(os.environ), manifest, cluster, take_over)


def flow_here(order: PlanOrder) -> Flow:
    """The numbers of a plan, from the store of the host that this runs on."""
    return looking_around.flow(HostSettings.from_environ(os.environ), order)
