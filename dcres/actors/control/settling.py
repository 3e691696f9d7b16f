"""A change of shares that was not finished, ended as `dcres.model.operations.settle` says."""

from __future__ import annotations

from dataclasses import replace
from typing import assert_never

from dcres.actors.control.asking import describe
from dcres.actors.control.concurrency import Concurrency
from dcres.actors.control.executor import Doing, Errand, Executor, order
from dcres.actors.control.hosts import VmHosts, main_port, ports_by_index
from dcres.actors.control.journal import Journal
from dcres.actors.messages import ChangeId
from dcres.actors.ports import Fleet, Port
from dcres.actors.protocol import Machine, Paging, Presence, Serving
from dcres.config import Layout
from dcres.model.operations import settle as steps
from dcres.model.operations.events import Done
from dcres.model.operations.settle import Settling
from dcres.model.pages import PAGE_SIZE
from dcres.paging.settings import SubAddress


def settle_shape(vm: str, fleet: Fleet, journal: Journal, concurrency: Concurrency) -> VmHosts:
    """The VM's hosts, with their shares in full. Raises what a host raises."""
    hands = _Hands(vm, fleet)
    begun = Settling.begin(tuple(hands.ports))
    ended = Executor(journal, concurrency).run(hands, begun, hands.watch)
    if ended.failure is not None:
        raise ended.failure.error
    return VmHosts.named(ended.hosts)


class _Hands:
    def __init__(self, vm: str, fleet: Fleet) -> None:
        self._vm, self._fleet = vm, fleet
        self.ports = ports_by_index(vm, fleet)
        self._main = main_port(vm, fleet)
        self._addresses: dict[str, SubAddress] = {}
        self._id = ChangeId(0, 0)
        self._state, _ = Settling.begin(())

    def watch(self, state: Settling) -> None:
        """What is known by now."""
        self._state = state

    def doing(self, instruction: steps.Instruction) -> Doing:
        """How `instruction` is carried out."""
        match instruction:
            case steps.Describe():
                return Errand(self._described)
            case steps.AskName(index):
                return Errand(lambda: steps.Named(index, describe(self.ports[index]).host))
            case steps.Destroy(index):
                destroy = order("", self.ports[index], Presence.destroy)
                return destroy.then(lambda _: Done(instruction))
            case steps.Dismiss(index):
                return Errand(lambda: self._dismissed(instruction))
            case steps.Resize():
                return Errand(lambda: self._resized(instruction))
            case _:
                return self._to_main(instruction)

    def _described(self) -> steps.Described:
        main = self._main.call(Presence.describe)
        self._id = main.next_change
        hosts = VmHosts.named(main.hosts)
        changing = main.reshaping and main.spec is not None
        share = main.spec.layout.main if changing and main.spec is not None else None
        known = steps.Described(hosts.main, hosts.subs, share, tuple(main.shares.items()))
        if share is None or not known.has_left:
            return known
        pages = self._main.call(Machine.status)["limit_pages"]
        return replace(known, limit=pages * PAGE_SIZE)

    def _dismissed(self, instruction: steps.Dismiss) -> Done[steps.Dismiss]:
        self._fleet.dismiss(self._vm, instruction.index)
        return Done(instruction)

    def _resized(self, instruction: steps.Resize) -> Done[steps.Resize]:
        port, pages = self._port_of(instruction.host), instruction.pages
        if pages is None:
            pages = port.call(Serving.status)["capacity_pages"]
        self._addresses[instruction.host] = port.call(Serving.resize, self._id, pages)
        return Done(instruction)

    def _port_of(self, host: str) -> Port:
        indices = {name: index for index, name in self._state.names}
        return self.ports[indices[host]]

    def _to_main(
        self, instruction: steps.StopMoves | steps.Reshape | steps.Limit | steps.SetLayout
    ) -> Doing:
        hosts = self._state.hosts
        to = self._state.main, self._main
        match instruction:
            case steps.StopMoves():
                made = order(*to, Paging.stop_moves, self._id)
            case steps.Reshape(subs):
                addresses = tuple(self._addresses[host] for host in subs)
                made = order(*to, Paging.reshape, self._id, hosts, addresses)
            case steps.Limit(pages):
                made = order(*to, Paging.limit, self._id, pages)
            case steps.SetLayout(main_share, subs):
                given = tuple(self._addresses[host].capacity_pages * PAGE_SIZE for host in subs)
                layout = Layout.model_construct(main=main_share, subs=given)
                made = order(*to, Paging.set_layout, self._id, layout)
            case _:
                assert_never(instruction)
        return made.then(lambda _: Done(instruction))
