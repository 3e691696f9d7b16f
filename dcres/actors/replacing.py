"""Other shares for a running VM: sub hosts that hold more or less, join, or leave.

::

    grow and add ──▶ tell the pager ──▶ move pages ──▶ those that leave are empty ──▶ end them
    reserve, serve    new capacities     hottest first   the pager forgets them

Until the last step every host still serves, so that a failure in the middle leaves a VM that
runs over the hosts it has; the same order may be given again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dcres.actors.messages import Incarnation, ServeOrder
from dcres.actors.ports import Fleet, Port
from dcres.config import VmSpec
from dcres.errors import PagingError
from dcres.model.pages import PAGE_SIZE, pages_of
from dcres.paging.settings import SubAddress

_POLL_S = 0.05
_TRIES = 20
_SERVE_TIMEOUT_S = 60.0


def give_shares_back(
    vm: str, fleet: Fleet, hosts: tuple[str, ...], shares_bytes: Mapping[str, int]
) -> list[int]:
    """After a change that was not finished: nothing moves any more, every sub host may fill up.

    Hosts that have joined stay with what they were given, since pages may be there by now. The
    bytes of every sub host.
    """
    main, *ports = fleet.find(vm)
    subs: list[SubAddress] = []
    for host, port in zip(hosts[1:], ports, strict=True):
        given = int(port.call("status")["capacity_pages"])
        share = pages_of(shares_bytes[host]) if host in shares_bytes else given
        subs.append(port.call("resize", share))
    main.call("stop_moves")
    main.call("reshape", hosts, tuple(subs))
    return [sub.capacity_pages * PAGE_SIZE for sub in subs]


@dataclass(slots=True)
class Replacing:
    """One change of shares. `wanted` is bytes per sub host that there is; 0: it leaves."""

    vm: str
    fleet: Fleet
    spec: VmSpec
    hosts: tuple[str, ...]
    wanted: Sequence[int]
    added: Sequence[int]
    incarnation: Incarnation
    require_wanted: Callable[[], None]

    def run(self) -> tuple[str, ...]:
        """Do it; the VM's hosts afterwards. Raises NoRoom, Conflict when it was cancelled."""
        ports = self.fleet.find(self.vm)
        before = [int(each) for each in self.spec.layout.subs]
        ports[0].call("begin_reshape")
        self._reserve_growth(before)
        subs = [
            self._resized(port, share) for port, share in zip(ports[1:], self.wanted, strict=True)
        ]
        hosts = list(self.hosts)
        for share in self.added:
            host, port = self.fleet.add(self.vm, share)
            hosts.append(host)
            subs.append(self._served(port, share))
        codes = ports[0].call("reshape", tuple(hosts), tuple(subs))
        capacities = {code: sub.capacity_pages for code, sub in zip(codes, subs, strict=True)}
        self._move(ports[0], capacities)
        return self._without_leavers(ports[0], tuple(hosts), tuple(subs))

    def _reserve_growth(self, before: Sequence[int]) -> None:
        indices = self.fleet.indices(self.vm)[1:]
        for index, now, share in zip(indices, before, self.wanted, strict=True):
            if share > now:
                self.fleet.extend(self.vm, index, share - now)

    def _resized(self, port: Port, share: int) -> SubAddress:
        address: SubAddress = port.call("resize", pages_of(share))
        return address

    def _served(self, port: Port, share: int) -> SubAddress:
        order = ServeOrder(self.incarnation, pages_of(self.spec.memory), pages_of(share))
        address: SubAddress = port.call("serve", order, timeout_s=_SERVE_TIMEOUT_S)
        return address

    def _move(self, main: Port, capacities: dict[int, int]) -> None:
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
