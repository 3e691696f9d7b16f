"""One VM as all its operations see it: its hosts, what they last said, and what follows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dcres.actors.control.asking import Roll
from dcres.actors.control.concurrency import Concurrency
from dcres.actors.control.following import Follower, end_serving
from dcres.actors.control.hosts import VmHosts, main_port
from dcres.actors.control.journal import Journal
from dcres.actors.control.settling import settle_shape
from dcres.actors.control.taking_down import TakingDown
from dcres.actors.ports import Fleet, Port


class VmHandle:
    """A VM by name, and what is known of it."""

    def __init__(self, name: str, fleet: Fleet, concurrency: Concurrency) -> None:
        self.name, self.fleet, self.concurrency = name, fleet, concurrency
        self.roll = Roll(name, fleet.alive, concurrency=concurrency)
        self._hosts = VmHosts()
        self._follower: Follower | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Its hosts, as far as they are known; the main host first."""
        return self._hosts.names

    @property
    def hosts(self) -> VmHosts:
        """Its hosts with their ports, as far as they are there now."""
        return self._hosts.found(self.name, self.fleet)

    @property
    def main(self) -> Port:
        """The main host's port. Raises NotFound."""
        return main_port(self.name, self.fleet)

    def know(self, names: Sequence[str]) -> None:
        """These are its hosts, the main host first; nothing new if there are none."""
        if names:
            self._hosts = VmHosts.named(names)

    def settle_shares(self, journal: Journal) -> None:
        """Bring a change of shares to an end. Raises what a host raises."""
        self.know(settle_shape(self.name, self.fleet, journal, self.concurrency).names)

    def take_down(self, journal: Journal) -> None:
        """End everything of the VM on every host that is still there; release the hosts."""
        self._leave_off()
        TakingDown(self.name, self.fleet, self.names).run(journal, self.concurrency)
        self.roll.forget()
        self._hosts = VmHosts()

    def follow(self, servers: Mapping[str, Port], *, moving: bool) -> None:
        """Watch a restore until all pages are there and nobody serves parts any more."""
        self._leave_off()
        self._follower = Follower(
            self.name, self.main, servers, self.end_serving, moving, self.concurrency
        )

    def end_serving(self) -> bool:
        """See `following.end_serving`."""
        return end_serving(self.name, self.fleet, self.hosts.ports)

    def _leave_off(self) -> None:
        if self._follower is not None:
            self._follower.stop()
            self._follower = None

    @property
    def trouble(self) -> str:
        """What keeps the pages of a lazy restore from coming."""
        return "" if self._follower is None else self._follower.trouble
