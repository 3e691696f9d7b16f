"""A VM's hosts by role: the one place that knows that the fleet's first is the main host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dcres.actors.ports import Fleet, Port
from dcres.errors import NotFound

_MAIN = 0  # the main host's index


@dataclass(frozen=True, slots=True)
class VmHosts:
    """Hosts by name, with their ports and their indices in the fleet, as far as they are found."""

    main: str = ""  # empty while there are none
    subs: tuple[str, ...] = ()
    ports: Mapping[str, Port] = field(default_factory=dict)
    indices: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def named(cls, names: Sequence[str]) -> VmHosts:
        """Of these names, the main host's first."""
        main, *subs = names or [""]
        return cls(main, tuple(subs))

    def found(self, vm: str, fleet: Fleet) -> VmHosts:
        """With the ports and indices that the fleet has of them now."""
        ports = dict(zip(self.names, fleet.find(vm), strict=False))
        indices = dict(zip(self.names, fleet.indices(vm), strict=False))
        return VmHosts(self.main, self.subs, ports, indices)

    @property
    def names(self) -> tuple[str, ...]:
        """All of them, the main host first."""
        return (self.main, *self.subs) if self.main else ()


def ports_by_index(vm: str, fleet: Fleet) -> dict[int, Port]:
    """Of all actors that there are of the VM."""
    return dict(zip(fleet.indices(vm), fleet.find(vm), strict=False))


def main_port(vm: str, fleet: Fleet) -> Port:
    """The main host's, whatever its name is. Raises NotFound."""
    ports = ports_by_index(vm, fleet)
    if _MAIN not in ports:
        raise NotFound(f"VM {vm} does not run; start it or restore a checkpoint")
    return ports[_MAIN]


def hosts_known(vm: str, fleet: Fleet) -> VmHosts:
    """By where the reservation is; one that is on no live host has no name."""
    return VmHosts.named(
        [next(iter(fleet.hosts_of(vm, [index])), f"(host {index})") for index in fleet.indices(vm)]
    )
