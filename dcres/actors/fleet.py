"""The fleet on Ray: reservations, and the host actors of one VM."""

from __future__ import annotations

from collections.abc import Sequence

from dcres.actors import _ray
from dcres.actors.main_host import MainHost
from dcres.actors.ports import Port
from dcres.actors.sub_host import SubHost
from dcres.errors import NotFound

_READY_TIMEOUT_S = 60.0


def coordinator_name(vm: str) -> str:
    """The name of a VM's coordinator actor."""
    return f"dcres/{vm}"


def host_actor_name(vm: str, index: int) -> str:
    """The name of a VM's host actor; 0 is the main host's."""
    return f"dcres-host/{vm}/{index}"


def _reservation_name(vm: str) -> str:
    return f"dcres/{vm}"


def _extra_name(vm: str) -> str:
    return f"dcres-extra/{vm}"


class RayFleet:
    """See `dcres.actors.ports.Fleet`."""

    def reserve(self, vm: str, shares: Sequence[int], hosts: Sequence[str] | None) -> list[str]:
        """One placement group bundle and one actor per share, each on a host of its own."""
        reservation = _ray.reserve(_reservation_name(vm), shares, hosts)
        try:
            names = list(reservation.hosts)
            addresses = {host.name: host.address for host in _ray.hosts()}
            ports = [
                _ray.spawn(
                    MainHost if index == 0 else SubHost,
                    host_actor_name(vm, index),
                    (vm, addresses[name]),
                    reservation=reservation,
                    bundle=index,
                )
                for index, name in enumerate(names)
            ]
            for port in ports:
                port.wait_ready(_READY_TIMEOUT_S)
        except BaseException:
            self.release(vm)
            raise
        return names

    def find(self, vm: str) -> list[Port]:
        """The ports by name: the actors restart on their own."""
        prefix = f"dcres-host/{vm}/"
        found = _ray.list_actors(prefix)
        return [
            _ray.ActorPort(name)
            for name in sorted(found, key=lambda name: int(name.rpartition("/")[2]))
        ]

    def extend(self, vm: str, share: int, extra: int) -> None:
        """A second reservation on the main host for what the first lacks."""
        _ray.release(_extra_name(vm))
        if extra > 0:
            reservation = _ray.reservation(_reservation_name(vm))
            if reservation is None:
                raise NotFound(f"VM {vm} has no reservation")
            _ray.reserve(_extra_name(vm), [extra], [reservation.host_of(0)])

    def release(self, vm: str) -> None:
        """Actors first: Ray restarts an actor whose group is gone for ever."""
        for name in _ray.list_actors(f"dcres-host/{vm}/"):
            _ray.kill(name)
        _ray.release(_extra_name(vm))
        _ray.release(_reservation_name(vm))
