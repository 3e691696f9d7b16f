"""The end of a VM on all its hosts, whatever state they are in."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from dcres.actors.control.asking import await_ready
from dcres.actors.ports import Fleet, Port
from dcres.actors.protocol import Presence
from dcres.errors import DcresError

log = logging.getLogger("dcres.coordinator")

_READY_TIMEOUT_S = 30.0  # an actor that was just started again adopts what runs before it answers
_DESTROY_TIMEOUT_S = 60.0


def take_down(vm: str, fleet: Fleet, hosts: Sequence[str] = ()) -> None:
    """End everything of `vm` on every host that is there, and release the hosts. Repeatable.

    `hosts` are the VM's by name, as far as they are known: nobody waits for one that is dead.
    A host whose actor does not answer is swept once the actor cannot start anything any more:
    a QEMU that was left there would run on over memory and disks of the VM's next life.
    """
    ports = dict(zip(fleet.indices(vm), fleet.find(vm), strict=False))
    names = dict(zip(ports, hosts, strict=False))

    def alive(index: int) -> bool:
        return index not in names or fleet.alive(names[index])

    silent = fleet.hosts_of(vm, _not_destroyed(vm, ports, alive))
    fleet.release(vm)
    for host in silent:
        try:
            fleet.sweep(vm, host)
        except DcresError as error:
            log.warning("VM %s: what it left on %s may still be there: %s", vm, host, error)


def _not_destroyed(vm: str, ports: Mapping[int, Port], alive: Callable[[int], bool]) -> list[int]:
    """Destroy at all hosts at the same time; the indices of those that did not answer."""

    def destroyed(index: int) -> bool:
        try:
            await_ready(ports[index], lambda: alive(index), _READY_TIMEOUT_S)
            ports[index].within(_DESTROY_TIMEOUT_S).call(Presence.destroy)
        except DcresError as error:
            log.warning("VM %s: %s", vm, error)
            return False
        return True

    with ThreadPoolExecutor(max(len(ports), 1)) as pool:
        done = pool.map(destroyed, ports)
        return [index for index, well in zip(ports, done, strict=True) if not well]
