"""Other shares for a running VM: hosts that keep more or less, sub hosts that join, or leave.

::

    grow and add ──▶ tell the pager ──▶ move pages ──▶ those that leave are empty ──▶ end them
    reserve, serve    new capacities     hottest first   the pager forgets them

Until the last step every host still serves, so that a failure in the middle leaves a VM that
runs over the hosts it has. `settle_shape` then gives everybody the share that it had.
Whatever can be known before the first step is asked before it, and a dry run asks the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dcres.actors.control.asking import describe
from dcres.actors.messages import Foreseen, PageFlow, ServeOrder
from dcres.actors.ports import Fleet, Port
from dcres.actors.protocol import Machine, Paging, Presence, Serving
from dcres.config import Layout, VmSpec, layout_of
from dcres.errors import DcresError, PagingError, VmLost
from dcres.model.pages import PAGE_SIZE, pages_of
from dcres.paging.settings import SubAddress

_POLL_S = 0.05
_TRIES = 20
_SERVE_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Shares:
    """Other shares for a VM, in bytes: of sub hosts that there are, 0 for one that leaves, and
    of those that join.
    """

    main: int
    wanted: tuple[int, ...]
    added: tuple[int, ...] = ()

    @classmethod
    def of(cls, now: Layout, main: int | None, subs: Sequence[int] | None) -> Shares:
        """As they are now, but for what is given. The last sub hosts leave, others join."""
        wanted = now.subs if subs is None else tuple(subs)
        count = len(now.subs)
        leaving = (0,) * (count - len(wanted))
        added = tuple(filter(None, wanted[count:]))
        return cls(now.main if main is None else main, wanted[:count] + leaving, added)

    @property
    def subs(self) -> tuple[int, ...]:
        """Of all sub hosts, those that leave and those that join among them."""
        return self.wanted + self.added

    @property
    def layout(self) -> Layout:
        """What the VM has afterwards. Raises ConfigError for what no VM can have."""
        return layout_of(self.main, [*filter(None, self.subs)])


@dataclass(frozen=True, slots=True)
class Checked:
    """What `Replacing.check` has found out."""

    growth: Mapping[int, int]  # bytes to be set aside beyond the first reservation, by index
    joining: tuple[str, ...]
    flows: tuple[PageFlow, ...]


@dataclass(slots=True)
class Replacing:
    """One change of shares. `require_wanted` raises once it was cancelled."""

    vm: str
    fleet: Fleet
    spec: VmSpec
    hosts: tuple[str, ...]
    shares: Shares
    require_wanted: Callable[[], None] = lambda: None

    def foresee(self) -> Foreseen:
        """What `run` would do, or why it would not begin; changes and reserves nothing."""
        try:
            checked = self.check()
        except DcresError as error:
            nobody = ("",) * len(self.shares.added)
            return Foreseen(self._before_and_after(nobody), problem=str(error))
        return Foreseen(self._before_and_after(checked.joining), checked.flows)

    def _before_and_after(self, joining: tuple[str, ...]) -> tuple[tuple[str, int, int], ...]:
        before = self.spec.layout.shares + (0,) * len(joining)
        after = (self.shares.main, *self.shares.subs)
        return tuple(zip(self.hosts + joining, before, after, strict=True))

    def check(self) -> Checked:
        """Whether all is as `run` needs it, as far as that can be known without reserving.

        Raises ConfigError for shares that do not hold the VM's memory, VmLost, NoRoom.
        """
        self.shares.layout.require_room_for(self.spec.memory)
        for host in self.hosts:
            if not self.fleet.alive(host):
                raise VmLost(f"host {host} of VM {self.vm} is gone; restore a checkpoint")
        growth = self._growth()
        joining = tuple(self.fleet.room_for(self.vm, growth, self.shares.added))
        capacities = self._capacities(self.hosts + joining)
        order = (capacities, pages_of(self.shares.main), self._replaces)
        flows = self.fleet.find(self.vm)[0].call(Paging.plan_moves, *order)
        return Checked(growth, joining, flows)

    def run(self, checked: Checked) -> tuple[str, ...]:
        """Do it; the VM's hosts afterwards.

        Raises NoRoom, VmLost, Conflict when it was cancelled; `settle_shape` ends what is
        half-done.
        """
        ports = self.fleet.find(self.vm)
        main = ports[0]
        main.call(Paging.begin_reshape)
        for index, extra in checked.growth.items():
            self.fleet.extend(self.vm, index, extra)
        if self.shares.main > self.spec.layout.main:
            main.call(Paging.limit, pages_of(self.shares.main))
        hosts = self._replace(ports, checked.joining) if self._replaces else self.hosts
        if self.shares.main < self.spec.layout.main:
            main.call(Paging.limit, pages_of(self.shares.main))
        main.call(Paging.set_layout, self.shares.layout)
        return hosts

    @property
    def _replaces(self) -> bool:
        return self.shares.subs != self.spec.layout.subs

    def _growth(self) -> dict[int, int]:
        """Bytes by index, beyond what was set aside when the host became one of the VM's."""
        before, after = self.spec.layout.shares, (self.shares.main, *self.shares.wanted)
        indices, ports = self.fleet.indices(self.vm), self.fleet.find(self.vm)
        growth = {}
        for index, port, now, share in zip(indices, ports, before, after, strict=True):
            if share > now:
                growth[index] = max(0, share - port.call(Presence.describe).reserved)
        return growth

    def _capacities(self, hosts: Sequence[str]) -> dict[str, int]:
        """Pages by sub host."""
        return dict(zip(hosts[1:], map(pages_of, self.shares.subs), strict=True))

    def _replace(self, ports: Sequence[Port], joining: Sequence[str]) -> tuple[str, ...]:
        subs = [
            self._resized(port, share)
            for port, share in zip(ports[1:], self.shares.wanted, strict=True)
        ]
        for host, share in zip(joining, self.shares.added, strict=True):
            port = self.fleet.add(self.vm, share, host)
            subs.append(self._served(ports[0], port, share))
        hosts = (*self.hosts, *joining)
        ports[0].call(Paging.reshape, hosts, tuple(subs))
        self._move(ports[0], self._capacities(hosts))
        return self._without_leavers(ports[0], hosts, tuple(subs))

    def _resized(self, port: Port, share: int) -> SubAddress:
        return port.call(Serving.resize, pages_of(share))

    def _served(self, main: Port, port: Port, share: int) -> SubAddress:
        incarnation = main.call(Machine.incarnation)
        order = ServeOrder(incarnation, pages_of(self.spec.memory), pages_of(share))
        return port.within(_SERVE_TIMEOUT_S).call(Serving.serve, order)

    def _move(self, main: Port, capacities: dict[str, int]) -> None:
        """Move until nobody holds too much; the guest pages out meanwhile, so ask again."""
        for _ in range(_TRIES):
            if not main.call(Paging.move_into, capacities):
                return
            while main.call(Machine.status)["moving"]:
                self.require_wanted()
                time.sleep(_POLL_S)
        raise PagingError(f"the pages of VM {self.vm} do not come to rest; try again")

    def _without_leavers(
        self, main: Port, hosts: tuple[str, ...], subs: tuple[SubAddress, ...]
    ) -> tuple[str, ...]:
        shares = self.shares.subs
        staying = [index for index, share in enumerate(shares) if share]
        left = (hosts[0], *(hosts[1 + index] for index in staying))
        if len(left) == len(hosts):
            return left
        main.call(Paging.reshape, left, tuple(subs[index] for index in staying))
        ports, indices = self.fleet.find(self.vm), self.fleet.indices(self.vm)
        for position, share in enumerate(shares):
            if not share:
                ports[1 + position].call(Presence.destroy)
                self.fleet.dismiss(self.vm, indices[1 + position])
        return left


def settle_shape(vm: str, fleet: Fleet) -> tuple[str, ...]:
    """After a change of shares that was not finished: the VM's hosts, with their shares in full.

    Only hosts that the main host knows are the VM's; others were about to join, and end. Nothing
    moves any more. A host that has joined keeps what it was given, since pages may be there.
    """
    ports = fleet.find(vm)
    main = ports[0].call(Presence.describe)
    hosts = main.hosts
    for index, port in zip(fleet.indices(vm), ports, strict=True):
        if describe(port).host not in hosts:
            port.call(Presence.destroy)
            fleet.dismiss(vm, index)
    if main.reshaping and main.spec is not None:
        _give_shares_back(fleet.find(vm), hosts, main.spec, main.shares)
    return hosts


def _give_shares_back(
    ports: Sequence[Port], hosts: tuple[str, ...], spec: VmSpec, shares_bytes: Mapping[str, int]
) -> None:
    main = ports[0]
    subs: list[SubAddress] = []
    for host, port in zip(hosts[1:], ports[1:], strict=True):
        given = port.call(Serving.status)["capacity_pages"]
        share = pages_of(shares_bytes[host]) if host in shares_bytes else given
        subs.append(port.call(Serving.resize, share))
    main_bytes = spec.layout.main
    main.call(Paging.stop_moves)
    main.call(Paging.reshape, hosts, tuple(subs))
    main.call(Paging.limit, pages_of(main_bytes))
    given_bytes = tuple(sub.capacity_pages * PAGE_SIZE for sub in subs)
    main.call(Paging.set_layout, Layout.model_construct(main=main_bytes, subs=given_bytes))
