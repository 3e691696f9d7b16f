"""The end of a VM, carried out on its hosts as `dcres.model.operations.stop` says."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import assert_never

from dcres.actors.control.concurrency import Concurrency
from dcres.actors.control.executor import Doing, Errand, Executor, Patience, order
from dcres.actors.control.journal import Journal
from dcres.actors.ports import Fleet
from dcres.actors.protocol import Presence
from dcres.model.operations import stop as steps
from dcres.model.operations.events import Done
from dcres.model.operations.stop import Stop

log = logging.getLogger("dcres.coordinator")

_READY_TIMEOUT_S = 30.0  # an actor that was just started again adopts what runs before it answers
_DESTROY_TIMEOUT_S = 60.0


class TakingDown:
    """One end of everything of a VM on every host that is there. Repeatable.

    `hosts` are the VM's by name, as far as they are known: nobody waits for one that is dead.
    """

    def __init__(self, vm: str, fleet: Fleet, hosts: Sequence[str]) -> None:
        self._vm, self._fleet = vm, fleet
        self._ports = dict(zip(fleet.indices(vm), fleet.find(vm), strict=False))
        self._names = dict(zip(self._ports, hosts, strict=False))

    def run(self, journal: Journal, concurrency: Concurrency) -> None:
        """Bring it to its end. Raises what giving the hosts back raises."""
        places = [(index, self._names.get(index, "")) for index in self._ports]
        ended = Executor(journal, concurrency).run(self, Stop.begin(places))
        for kept in ended.kept:
            log.warning(
                "VM %s: what it left on %s may still be there: %s",
                self._vm,
                kept.host,
                kept.message,
            )
        if ended.outcome is not None:
            raise ended.outcome.error

    def doing(self, instruction: steps.Instruction) -> Doing:
        """How `instruction` is carried out."""
        match instruction:
            case steps.Destroy(index, host):
                destroy = order(host, self._ports[index], Presence.destroy)
                patience = Patience(_READY_TIMEOUT_S, lambda: self._is_there(host), tries=1)
                answer = destroy.then(lambda _: Done(instruction))
                return answer.within(_DESTROY_TIMEOUT_S).repeated(patience)
            case steps.Release(silent):
                return Errand(lambda: self._release(silent))
            case steps.Sweep(host):
                return Errand(lambda: self._sweep(instruction))
            case _:
                assert_never(instruction)

    def _is_there(self, host: str) -> bool:
        return not host or self._fleet.alive(host)

    def _release(self, silent: tuple[int, ...]) -> steps.Released:
        hosts = self._fleet.hosts_of(self._vm, silent)
        self._fleet.release(self._vm)
        return steps.Released(tuple(hosts))

    def _sweep(self, instruction: steps.Sweep) -> Done[steps.Sweep]:
        self._fleet.sweep(self._vm, instruction.host)
        return Done(instruction)
