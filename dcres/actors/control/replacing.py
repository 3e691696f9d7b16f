"""Other shares for a running VM: what is checked first, and how a change is carried out.

`dcres.model.operations.shares` says what is done in which order. Whatever can be known before the
first step is asked before it, and a dry run asks the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import assert_never

from dcres.actors.control.concurrency import Concurrency
from dcres.actors.control.executor import Doing, Errand, Executor, order
from dcres.actors.control.hosts import VmHosts
from dcres.actors.control.settling import settle_shape
from dcres.actors.messages import ChangeId, Foreseen, PageFlow, ServeOrder
from dcres.actors.ports import Fleet, Port
from dcres.actors.protocol import Machine, MainStatus, Paging, Presence, Serving
from dcres.config import Layout, VmSpec, layout_of
from dcres.errors import Conflict, DcresError, VmLost
from dcres.model.operations import shares as steps
from dcres.model.operations.events import Done
from dcres.model.operations.shares import Change, ChangeOfShares
from dcres.model.pages import pages_of
from dcres.paging.settings import SubAddress

_POLL_S = 0.05
_LOOK_EVERY_S = 1.0
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
class Replacing:
    """A change of shares before it begins. `hosts` are found ones."""

    vm: str
    fleet: Fleet
    spec: VmSpec
    hosts: VmHosts
    shares: Shares
    id: ChangeId

    def foresee(self) -> Foreseen:
        """What it would do, or why it would not begin; changes and reserves nothing."""
        try:
            change, flows = self.check()
        except DcresError as error:
            nobody = ("",) * len(self.shares.added)
            return Foreseen(self._before_and_after(nobody), problem=str(error))
        return Foreseen(self._before_and_after([host for host, _ in change.joining]), flows)

    def _before_and_after(self, joining: Sequence[str]) -> tuple[tuple[str, int, int], ...]:
        before = self.spec.layout.shares + (0,) * len(joining)
        after = (self.shares.main, *self.shares.subs)
        return tuple(zip((*self.hosts.names, *joining), before, after, strict=True))

    def check(self) -> tuple[Change, tuple[PageFlow, ...]]:
        """The change, if all is as it needs it as far as that can be known without reserving.

        Raises ConfigError for shares that do not hold the VM's memory, VmLost, NoRoom.
        """
        self.shares.layout.require_room_for(self.spec.memory)
        self.require_hosts()
        growth = self._growth()
        joining = self.fleet.room_for(self.vm, growth, self.shares.added)
        change = Change(
            main=self.hosts.main,
            subs=self.hosts.subs,
            before=self.spec.layout.shares,
            main_share=self.shares.main,
            wanted=self.shares.wanted,
            joining=tuple(zip(joining, self.shares.added, strict=True)),
            growth=tuple(growth.items()),
        )
        return change, self._flows(change)

    def require_hosts(self) -> None:
        """Raises VmLost where one of the VM's hosts is gone."""
        for host in self.hosts.names:
            if not self.fleet.alive(host):
                raise VmLost(f"host {host} of VM {self.vm} is gone; restore a checkpoint")

    def _flows(self, change: Change) -> tuple[PageFlow, ...]:
        capacities = {host: pages_of(share) for host, share in change.shares}
        replaced = self.shares.subs != self.spec.layout.subs
        main = self.hosts.ports[self.hosts.main]
        return main.call(Paging.plan_moves, capacities, pages_of(self.shares.main), replaced)

    def _growth(self) -> dict[int, int]:
        """Bytes by index, beyond what was set aside when the host became one of the VM's."""
        before, after = self.spec.layout.shares, (self.shares.main, *self.shares.wanted)
        growth = {}
        for host, now, share in zip(self.hosts.names, before, after, strict=True):
            if share > now:
                reserved = self.hosts.ports[host].call(Presence.describe).reserved
                growth[self.hosts.indices[host]] = max(0, share - reserved)
        return growth


class Reshaping:
    """One change of shares, carried out."""

    def __init__(
        self, replacing: Replacing, change: Change, executor: Executor, concurrency: Concurrency
    ) -> None:
        self._vm, self._fleet = replacing.vm, replacing.fleet
        self._require_hosts, self._looked_s = replacing.require_hosts, 0.0
        self._spec, self._layout = replacing.spec, replacing.shares.layout
        self._change, self._id = change, replacing.id
        self._executor, self._concurrency = executor, concurrency
        self._ports: dict[str, Port] = dict(replacing.hosts.ports)
        self._addresses: dict[str, SubAddress] = {}
        self._indices: Mapping[str, int] = {}

    def run(self) -> tuple[tuple[str, ...], DcresError | None]:
        """The VM's hosts afterwards, none if nobody knows; why their shares are as they were."""
        outcome = self._executor.run(self, ChangeOfShares.begin(self._vm, self._change)).outcome
        assert outcome is not None, "it has ended"
        if outcome.failure is not None:
            return outcome.hosts, outcome.failure.error
        if outcome.cancelled:
            why = f"moving the pages of VM {self._vm} was cancelled; it runs on"
            return outcome.hosts, Conflict(why)
        return outcome.hosts, None

    def doing(self, instruction: steps.Instruction) -> Doing:
        """How `instruction` is carried out."""
        match instruction:
            case steps.Extend() | steps.Join() | steps.Dismiss() | steps.Settle():
                return Errand(lambda: self._call(instruction))
            case steps.Resize() | steps.Serve() | steps.Destroy():
                return self._to_sub(instruction)
            case _:
                return self._to_main(instruction)

    def _call(self, instruction: steps.Calling) -> steps.Event:
        match instruction:
            case steps.Extend(index, extra_bytes):
                self._fleet.extend(self._vm, index, extra_bytes)
            case steps.Join(host, share_bytes):
                self._ports[host] = self._fleet.add(self._vm, share_bytes, host)
            case steps.Dismiss(host):
                self._fleet.dismiss(self._vm, self._index_of(host))
            case steps.Settle():
                settled = settle_shape(
                    self._vm, self._fleet, self._executor.journal, self._concurrency
                )
                return steps.Settled(settled.names)
            case _:
                assert_never(instruction)
        return Done(instruction)

    def _index_of(self, host: str) -> int:
        """As it was before the first has left."""
        if not self._indices:
            every = (self._change.main, *(name for name, _ in self._change.shares))
            self._indices = VmHosts.named(every).found(self._vm, self._fleet).indices
        return self._indices[host]

    def _to_main(self, instruction: steps.ToMain) -> Doing:
        to = self._change.main, self._ports[self._change.main]
        match instruction:
            case steps.BeginReshape():
                made = order(*to, Paging.begin_reshape, self._id)
            case steps.Limit(pages=pages):
                made = order(*to, Paging.limit, self._id, pages)
            case steps.Reshape(main, subs):
                addresses = tuple(self._addresses[host] for host in subs)
                made = order(*to, Paging.reshape, self._id, (main, *subs), addresses)
            case steps.MoveInto(capacities=capacities):
                move = order(*to, Paging.move_into, self._id, dict(capacities))
                return move.then(steps.Moving)
            case steps.LookAtMoves():
                look = order(*to, Machine.status).after(_POLL_S if instruction.again else 0.0)
                return look.then(self._looked)
            case steps.SetLayout():
                made = order(*to, Paging.set_layout, self._id, self._layout)
            case _:
                assert_never(instruction)
        return made.then(lambda _: Done(instruction))

    def _looked(self, status: MainStatus) -> steps.LookedAtMoves:
        """Pages of a host that is gone would move for ever."""
        now_s = self._concurrency.now_s()
        if status["moving"] and now_s > self._looked_s + _LOOK_EVERY_S:
            self._require_hosts()
            self._looked_s = now_s
        return steps.LookedAtMoves(bool(status["moving"]))

    def _to_sub(self, instruction: steps.ToSub) -> Doing:
        host = instruction.host
        to = host, self._ports[host]
        match instruction:
            case steps.Resize(pages=pages):
                resize = order(*to, Serving.resize, self._id, pages)
                return resize.then(lambda address: self._serves(instruction, address))
            case steps.Serve(pages=pages):
                # Who the VM is in this life, only its main host knows.
                incarnation = self._ports[self._change.main].call(Machine.incarnation)
                make = ServeOrder(incarnation, pages_of(self._spec.memory), pages)
                serve = order(*to, Serving.serve, make).within(_SERVE_TIMEOUT_S)
                return serve.then(lambda address: self._serves(instruction, address))
            case steps.Destroy():
                return order(*to, Presence.destroy).then(lambda _: Done(instruction))
            case _:
                assert_never(instruction)

    def _serves(
        self, instruction: steps.Resize | steps.Serve, address: SubAddress
    ) -> Done[steps.Resize | steps.Serve]:
        self._addresses[instruction.host] = address
        return Done(instruction)
