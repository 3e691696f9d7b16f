"""Other shares for a running VM: hosts that keep more or less, sub hosts that join, or leave.

::

    grow and add ──▶ tell the pager ──▶ move pages ──▶ those that leave are empty ──▶ end them
    reserve, serve    new capacities     hottest first   the pager forgets them

Until the last step every host still serves, so that a failure in the middle leaves a VM that
runs over the hosts it has. `settle_shape` then gives everybody the share that it had.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dcres.actors.asking import describe
from dcres.actors.messages import ServeOrder, Status
from dcres.actors.ports import Fleet, Port
from dcres.config import Layout, VmSpec
from dcres.errors import PagingError
from dcres.model.pages import PAGE_SIZE, pages_of
from dcres.paging.settings import SubAddress

_POLL_S = 0.05
_TRIES = 20
_SERVE_TIMEOUT_S = 60.0


@dataclass(slots=True)
class Replacing:
    """One change of shares. `wanted` is bytes per sub host that there is; 0: it leaves.

    `added` are the shares of sub hosts that join. `require_wanted` raises once it was cancelled.
    """

    vm: str
    fleet: Fleet
    spec: VmSpec
    hosts: tuple[str, ...]
    main_bytes: int
    wanted: Sequence[int]
    added: Sequence[int]
    require_wanted: Callable[[], None]

    def run(self) -> tuple[str, ...]:
        """Do it; the VM's hosts afterwards.

        Raises ConfigError for shares that do not hold the VM's memory, NoRoom, Conflict when it
        was cancelled; `settle_shape` ends what is half-done.
        """
        layout = Layout(main=self.main_bytes, subs=tuple(filter(None, [*self.wanted, *self.added])))
        layout.require_room_for(self.spec.memory)
        ports = self.fleet.find(self.vm)
        main = ports[0]
        main.call("begin_reshape")
        self._reserve_growth(ports)
        if self.main_bytes > self.spec.layout.main:
            main.call("resize", pages_of(self.main_bytes))
        hosts = self.hosts
        if [*self.wanted, *self.added] != list(self.spec.layout.subs):
            hosts = self._replace(ports)
        if self.main_bytes < self.spec.layout.main:
            main.call("resize", pages_of(self.main_bytes))
        main.call("set_layout", layout.model_dump())
        return hosts

    def _reserve_growth(self, ports: Sequence[Port]) -> None:
        """Beyond what was set aside when the host became one of the VM's."""
        before, after = self.spec.layout.shares, (self.main_bytes, *self.wanted)
        indices = self.fleet.indices(self.vm)
        for index, port, now, share in zip(indices, ports, before, after, strict=True):
            if share > now:
                reserved = int(port.call("describe")["reserved"])
                self.fleet.extend(self.vm, index, max(0, share - reserved))

    def _replace(self, ports: Sequence[Port]) -> tuple[str, ...]:
        subs = [
            self._resized(port, share) for port, share in zip(ports[1:], self.wanted, strict=True)
        ]
        hosts = list(self.hosts)
        for share in self.added:
            host, port = self.fleet.add(self.vm, share)
            hosts.append(host)
            subs.append(self._served(ports[0], port, share))
        ports[0].call("reshape", tuple(hosts), tuple(subs))
        self._move(ports[0], {sub.host: sub.capacity_pages for sub in subs})
        return self._without_leavers(ports[0], tuple(hosts), tuple(subs))

    def _resized(self, port: Port, share: int) -> SubAddress:
        address: SubAddress = port.call("resize", pages_of(share))
        return address

    def _served(self, main: Port, port: Port, share: int) -> SubAddress:
        incarnation = main.call("incarnation")
        order = ServeOrder(incarnation, pages_of(self.spec.memory), pages_of(share))
        address: SubAddress = port.call("serve", order, timeout_s=_SERVE_TIMEOUT_S)
        return address

    def _move(self, main: Port, capacities: dict[str, int]) -> None:
        """Move until nobody holds too much; the guest pages out meanwhile, so ask again."""
        for _ in range(_TRIES):
            if not main.call("move_into", capacities):
                return
            while main.call("status")["moving"]:
                self.require_wanted()
                time.sleep(_POLL_S)
        raise PagingError(f"the pages of VM {self.vm} do not come to rest; try again")

    def _without_leavers(
        self, main: Port, hosts: tuple[str, ...], subs: tuple[SubAddress, ...]
    ) -> tuple[str, ...]:
        shares = [*self.wanted, *self.added]
        staying = [index for index, share in enumerate(shares) if share]
        left = (hosts[0], *(hosts[1 + index] for index in staying))
        if len(left) == len(hosts):
            return left
        main.call("reshape", left, tuple(subs[index] for index in staying))
        ports, indices = self.fleet.find(self.vm), self.fleet.indices(self.vm)
        for position, share in enumerate(shares):
            if not share:
                ports[1 + position].call("destroy")
                self.fleet.dismiss(self.vm, indices[1 + position])
        return left


def settle_shape(vm: str, fleet: Fleet) -> tuple[str, ...]:
    """After a change of shares that was not finished: the VM's hosts, with their shares in full.

    Only hosts that the main host knows are the VM's; others were about to join, and end. Nothing
    moves any more. A host that has joined keeps what it was given, since pages may be there.
    """
    ports = fleet.find(vm)
    main = ports[0].call("describe")
    hosts: tuple[str, ...] = tuple(main["hosts"])
    for index, port in zip(fleet.indices(vm), ports, strict=True):
        if describe(port)["host"] not in hosts:
            port.call("destroy")
            fleet.dismiss(vm, index)
    if main["reshaping"]:
        _give_shares_back(fleet.find(vm), hosts, main)
    return hosts


def _give_shares_back(ports: Sequence[Port], hosts: tuple[str, ...], described: Status) -> None:
    main, shares_bytes = ports[0], described["shares"]
    subs: list[SubAddress] = []
    for host, port in zip(hosts[1:], ports[1:], strict=True):
        given = int(port.call("status")["capacity_pages"])
        share = pages_of(shares_bytes[host]) if host in shares_bytes else given
        subs.append(port.call("resize", share))
    main_bytes = described["spec"]["layout"]["main"]
    main.call("stop_moves")
    main.call("reshape", hosts, tuple(subs))
    main.call("resize", pages_of(main_bytes))
    given_bytes = [sub.capacity_pages * PAGE_SIZE for sub in subs]
    main.call("set_layout", {"main": main_bytes, "subs": given_bytes})
