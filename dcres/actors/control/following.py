"""What goes on after a lazy restore: watching until every page is where it belongs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from dcres.actors.control.concurrency import Concurrency
from dcres.actors.ports import Port
from dcres.actors.protocol import Machine, Paging, Parts
from dcres.errors import ActorGone, ClusterError, DcresError, VmLost

log = logging.getLogger("dcres.coordinator")

_POLL_S = 0.5
_ASK_TIMEOUT_S = 10.0


class Follower:
    """A task that waits for the main host's moves and then calls `done`."""

    def __init__(
        self,
        vm: str,
        main: Port,
        servers: Mapping[str, Port],
        done: Callable[[], None],
        concurrency: Concurrency,
    ) -> None:
        self._vm = vm
        self._main = main
        self._done = done
        self._servers = servers
        self.trouble = ""  # what keeps pages from coming
        self._over = concurrency.signal()
        self._ending = concurrency.lock()
        concurrency.spawn(self._follow, f"follow-{vm}")

    def stop(self) -> None:
        """Wait no longer: the VM ends. `done` is not called after this. Repeatable."""
        with self._ending:
            self._over.set()

    def _follow(self) -> None:
        while not self._over.wait(_POLL_S):
            try:
                if self._main.within(_ASK_TIMEOUT_S).call(Machine.status)["moving"]:
                    self._look_for_trouble()
                    continue
                self._main.within(_ASK_TIMEOUT_S).call(Paging.settle_moves)
            except VmLost as error:
                log.error("VM %s: %s", self._vm, error)
                return
            except (ActorGone, ClusterError):
                continue  # it is being started again
            except DcresError as error:
                log.warning("VM %s, after its lazy restore: %s", self._vm, error)
                continue
            with self._ending:  # hosts go by the VM's name: it must not end those of its next life
                if not self._over.is_set():
                    self._done()
            return

    def _look_for_trouble(self) -> None:
        found = []
        for host, port in self._servers.items():
            try:
                found.append(port.within(_ASK_TIMEOUT_S).call(Parts.parts_trouble))
            except DcresError as error:
                found.append(f"{host}, which has parts of its memory, does not answer ({error})")
        self.trouble = "; ".join(filter(None, found))
