"""What goes on after a lazy restore: watching until every page is where it belongs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from dcres.actors.control.concurrency import Concurrency
from dcres.actors.ports import Fleet, Port
from dcres.actors.protocol import Machine, Paging, Parts
from dcres.errors import ActorGone, ClusterError, DcresError, NotFound, VmLost

log = logging.getLogger("dcres.coordinator")

_POLL_S = 0.5
_AGAIN_S = 5.0
_ASK_TIMEOUT_S = 10.0


class Follower:
    """A task that waits for the main host's moves, then calls `end` until that is done."""

    def __init__(
        self,
        vm: str,
        main: Port,
        servers: Mapping[str, Port],
        end: Callable[[], bool],
        moving: bool,
        concurrency: Concurrency,
    ) -> None:
        self._vm = vm
        self._main = main
        self._end = end
        self._moving = moving
        self._servers = servers
        self.trouble = ""  # what keeps pages from coming
        self._over = concurrency.signal()
        self._ending = concurrency.lock()
        concurrency.spawn(self._follow, f"follow-{vm}")

    def stop(self) -> None:
        """Wait no longer: the VM ends. `end` is not called after this. Repeatable."""
        with self._ending:
            self._over.set()

    def _follow(self) -> None:
        while not self._over.wait(_POLL_S if self._moving else _AGAIN_S):
            try:
                if self._moving and self._is_moving():
                    self._look_for_trouble()
                    continue
            except (VmLost, NotFound) as error:
                log.error("VM %s: %s", self._vm, error)
                return
            except (ActorGone, ClusterError):
                continue  # it is being started again
            except DcresError as error:
                log.warning("VM %s, after its lazy restore: %s", self._vm, error)
                continue
            self._moving, self.trouble = False, ""
            with self._ending:  # hosts go by the VM's name: it must not end those of its next life
                if self._over.is_set() or self._end():
                    return

    def _is_moving(self) -> bool:
        main = self._main.within(_ASK_TIMEOUT_S)
        if main.call(Machine.status)["moving"]:
            return True
        main.call(Paging.settle_moves)
        return False

    def _look_for_trouble(self) -> None:
        found = []
        for host, port in self._servers.items():
            try:
                found.append(port.within(_ASK_TIMEOUT_S).call(Parts.parts_trouble))
            except DcresError as error:
                found.append(f"{host}, which has parts of its memory, does not answer ({error})")
        self.trouble = "; ".join(filter(None, found))


def end_serving(vm: str, fleet: Fleet, hosts: Mapping[str, Port]) -> bool:
    """End the part servers of a restore and unpin; whether every host that is there has done it.

    `hosts` are the VM's own. Repeatable.
    """
    left = [host for host, port in hosts.items() if not _ends(host, port) and fleet.alive(host)]
    try:
        fleet.leave(vm)
    except DcresError as error:
        log.warning("VM %s: a host that had parts is not left: %s", vm, error)
        return False
    return not left


def _ends(host: str, port: Port) -> bool:
    try:
        port.within(_ASK_TIMEOUT_S).call(Parts.end_serving_parts)
    except DcresError as error:
        log.warning("%s keeps the checkpoint or its part server: %s", host, error)
        return False
    return True
