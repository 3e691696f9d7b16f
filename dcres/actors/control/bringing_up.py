"""A start or restore, carried out as `dcres.model.operations.start` says."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import assert_never

from dcres.actors.control.concurrency import Concurrency
from dcres.actors.control.executor import Doing, Errand, Executor, Patience, order
from dcres.actors.control.restoring import Restoring
from dcres.actors.control.vm_handle import VmHandle
from dcres.actors.messages import (
    ClaimOrder,
    Incarnation,
    MainPart,
    PartsOrder,
    Planned,
    RunOrder,
    ServeOrder,
)
from dcres.actors.ports import Port
from dcres.actors.protocol import Machine, Parts, Presence, Serving
from dcres.config import VmSpec
from dcres.errors import ClusterError, Conflict, DcresError, OperationFailed
from dcres.model.operations import start_steps as steps
from dcres.model.operations.events import Done
from dcres.model.operations.start import Phase, Start
from dcres.model.pages import pages_of
from dcres.model.phase import HostState
from dcres.model.run_state import runs_restored
from dcres.paging.settings import SubAddress

_RESTART_TIMEOUT_S = 30.0  # of an actor whose process died
_RESERVING = (Phase.RESERVING, Phase.REQUIRING, Phase.CLEARING)
_FINDING = (Phase.CLAIMING, Phase.FINDING, Phase.SEEKING, Phase.VISITING, Phase.PLANNING)


class Laps:
    """What an operation was spent on: `seconds` by step, in order."""

    def __init__(self, concurrency: Concurrency) -> None:
        self.seconds: dict[str, float] = {}
        self._now_s = concurrency.now_s
        self._lap, self._since_s = "", self._now_s()

    def enter(self, lap: str) -> None:
        """The time from now on is for this one; for none if it is empty."""
        if lap == self._lap:
            return
        now_s = self._now_s()
        if self._lap:
            spent_s = self.seconds.get(self._lap, 0.0) + now_s - self._since_s
            self.seconds[self._lap] = spent_s
        self._lap, self._since_s = lap, now_s


class BringingUp:
    """One start or restore."""

    def __init__(
        self,
        vm: VmHandle,
        spec: VmSpec,
        executor: Executor,
        *,
        hosts: Sequence[str] | None = None,
        take_over: bool = False,
        restoring: Restoring | None = None,
    ) -> None:
        self.laps = Laps(vm.concurrency)
        self._handle, self._vm, self._fleet = vm, vm.name, vm.fleet
        self._spec, self._executor = spec, executor
        self._wanted_hosts, self._take_over = hosts, take_over
        self._restoring = restoring
        self._begun = Start.begin(vm.name, None if restoring is None else restoring.begin)
        self._state, _ = self._begun
        self._ports: dict[str, Port] = {}
        self._shares: dict[str, int] = {}  # bytes by host
        self._addresses: dict[str, SubAddress] = {}
        self._incarnation = Incarnation(vm.name, 0, "")

    def run(self) -> DcresError | None:
        """Bring the VM up; None, or what went wrong. Its sentence names its host."""
        self._state = self._executor.run(self, self._begun, self._watch)
        return self._error(self._state)

    @property
    def torn_down(self) -> bool:
        """Whether it ended with nothing left of the VM; if not, and not up, the VM is as it was."""
        outcome = self._state.outcome
        return outcome is not None and outcome.torn_down

    @property
    def settled(self) -> bool:
        """Whether nobody has to look what is left of the VM."""
        outcome = self._state.outcome
        return outcome is not None and outcome.settled

    def _error(self, ended: Start) -> DcresError | None:
        if ended.phase is Phase.UP:
            return None
        failure = ended.failure
        what = f"the {'start' if self._restoring is None else 'restore'} of VM {self._vm}"
        if failure is None or ended.cancelled:
            return Conflict(f"{what} was cancelled")
        if failure.host and failure.is_a(ClusterError):
            return OperationFailed.of(f"{what} was given up", [failure])
        return failure.error

    def _watch(self, state: Start) -> None:
        self._state = state
        self.laps.enter(self._lap(state))
        if self._restoring is not None:
            self._restoring.where = state.where
        if state.phase not in (Phase.TAKING_DOWN, Phase.DOWN):  # they are let go of
            self._handle.know(state.hosts)

    def _lap(self, state: Start) -> str:
        if state.phase in _RESERVING:
            return "reserve"
        if state.phase in _FINDING and self._restoring is not None:
            return "plan"
        if state.phase is Phase.CLAIMING or state.boots:
            return "boot"
        return "run" if state.phase in (Phase.BOOTING, Phase.RUNNING, Phase.GOING) else ""

    def doing(self, instruction: steps.Instruction) -> Doing:
        """How `instruction` is carried out."""
        match instruction:
            case (
                steps.LookAround()
                | steps.RequireRoom()
                | steps.MakeWay()
                | steps.Reserve()
                | steps.TakeDown()
            ):
                return Errand(partial(self._call, instruction))
            case (
                steps.FindParts()
                | steps.FindHolders()
                | steps.Visit()
                | steps.KeepParts()
                | steps.Plan()
                | steps.ReadMainPart()
                | steps.ServeParts()
            ):
                assert self._restoring is not None, "only a restore has to do with parts"
                return self._finding(instruction, self._restoring)
            case _:
                return self._bringing(instruction)

    def _call(self, instruction: steps.Calling) -> steps.Event:
        shares = self._spec.layout.shares
        match instruction:
            case steps.LookAround():
                return steps.Looked(self._look())
            case steps.RequireRoom():
                self._fleet.require_room(self._vm, shares, self._wanted_hosts)
            case steps.MakeWay() | steps.TakeDown():
                self._handle.take_down(self._executor.journal)
            case steps.Reserve():
                return self._reserve(shares)
            case _:
                assert_never(instruction)
        return Done(instruction)

    def _look(self) -> tuple[HostState, ...]:
        """What is there of a VM of that name; nothing, if it has no hosts."""
        if not self._fleet.find(self._vm):
            return ()
        return tuple(each.state for each in self._handle.roll.call(self._handle.hosts.ports))

    def _reserve(self, shares: Sequence[int]) -> steps.Reserved:
        names = self._fleet.reserve(self._vm, shares, self._wanted_hosts)
        self._ports = dict(zip(names, self._fleet.find(self._vm), strict=True))
        self._shares = dict(zip(names, shares, strict=True))
        if self._restoring is not None:
            self._restoring.ports.update(self._ports)
        main, *subs = names
        return steps.Reserved(main, tuple(subs))

    def _finding(self, instruction: steps.Finding, restoring: Restoring) -> Doing:
        text = restoring.text
        match instruction:
            case steps.FindHolders():
                return Errand(lambda: _holders(self._fleet.holders(text)))
            case steps.Visit(host):
                return Errand(lambda: self._visit(instruction, restoring))
            case _:
                host = instruction.host
        to = host, restoring.ports[host]
        match instruction:
            case steps.FindParts():
                return order(*to, Parts.parts_here, text).then(partial(steps.Found, host))
            case steps.KeepParts():
                return order(*to, Parts.parts_here, text).then(lambda _: Done(instruction))
            case steps.Plan():
                plan = order(*to, Parts.plan, restoring.plan_order(self._spec.layout.shares))
                return plan.then(partial(self._planned, restoring, host))
            case steps.ReadMainPart():
                read = order(*to, Parts.read_main_part, text)
                return read.then(partial(self._read, restoring, instruction))
            case steps.ServeParts(parts=parts):
                serve = order(*to, Parts.serve_parts, PartsOrder(self._incarnation, text, parts))
                return serve.then(partial(self._serves, restoring, instruction))
            case _:
                assert_never(instruction)

    def _visit(self, instruction: steps.Visit, restoring: Restoring) -> Done[steps.Visit]:
        host = instruction.host
        restoring.ports[host] = self._fleet.visit(self._vm, host)
        return Done(instruction)

    def _planned(self, restoring: Restoring, host: str, planned: Planned) -> steps.Planned:
        restoring.learn_plan(planned)
        return steps.Planned(host, planned.flow)

    def _read(
        self, restoring: Restoring, instruction: steps.ReadMainPart, part: MainPart
    ) -> Done[steps.ReadMainPart]:
        restoring.main_part = part
        return Done(instruction)

    def _serves(
        self, restoring: Restoring, instruction: steps.ServeParts, address: SubAddress
    ) -> Done[steps.ServeParts]:
        restoring.sources.update(dict.fromkeys(instruction.parts, address))
        return Done(instruction)

    def _bringing(self, instruction: steps.Bringing) -> Doing:
        host = instruction.host
        to = host, self._ports[host]
        match instruction:
            case steps.RequireFree():
                made = order(*to, Presence.require_free, self._take_over)
            case steps.Clear():
                made = order(*to, Presence.clear, self._take_over)
            case steps.Claim():
                claim = order(*to, Machine.claim, self._claim_order())
                return claim.then(partial(self._claimed, instruction))
            case steps.Boot():
                made = order(*to, Machine.boot, self._run_order(load=True))
            case steps.Serve():
                serve = order(*to, Serving.serve, self._serve_order(host))
                return serve.then(partial(self._served, instruction))
            case steps.Run():
                made = order(*to, Machine.run, self._run_order(load=False))
            case steps.Go():
                # However long it takes, and through restarts of the actor: its QEMU waits. Once
                # it has begun, the disks cannot go back to what they were before a restore.
                back = Patience(_RESTART_TIMEOUT_S, partial(self._may_come_back, host))
                go = order(*to, Machine.go, self._stays_paused())
                made = go.repeated(replace(back, outlasts_cancel=False))
            case _:
                assert_never(instruction)
        return made.then(lambda _: Done(instruction))

    def _claim_order(self) -> ClaimOrder:
        """A VM that is new harms no other of its name, and can wait for the name to be free.

        One that is restored would be a second of the one that it was saved from.
        """
        above = 0 if self._restoring is None else self._restoring.manifest.generation
        needs_name = self._restoring is not None
        return ClaimOrder(self._fleet.cluster(), above, self._take_over, needs_name)

    def _claimed(self, instruction: steps.Claim, generation: int) -> Done[steps.Claim]:
        self._incarnation = Incarnation(self._vm, generation, secrets.token_hex(32))
        return Done(instruction)

    def _run_order(self, *, load: bool) -> RunOrder:
        restoring, hosts = self._restoring, self._state.hosts
        made = RunOrder(self._incarnation, self._spec, hosts, ())
        if load:
            main = self._state.main
            return replace(made, load=None if restoring is None else restoring.load_order(main))
        subs = tuple(self._addresses[host] for host in self._state.subs)
        return replace(
            made, subs=subs, resumption=None if restoring is None else restoring.resumption
        )

    def _serve_order(self, host: str) -> ServeOrder:
        load = None if self._restoring is None else self._restoring.load_order(host)
        pages = pages_of(self._spec.memory), pages_of(self._shares[host])
        return ServeOrder(self._incarnation, *pages, load)

    def _served(self, instruction: steps.Serve, address: SubAddress) -> Done[steps.Serve]:
        self._addresses[instruction.host] = address
        return Done(instruction)

    def _stays_paused(self) -> bool:
        """Whether the guest was saved standing still, so that it does not run now either."""
        restoring = self._restoring
        return restoring is not None and not runs_restored(restoring.manifest.run_state)

    def _may_come_back(self, host: str) -> bool:
        """Whether an actor that has died is being started again, as far as is known."""
        return self._fleet.alive(host) and bool(self._fleet.find(self._vm))


def _holders(found: dict[str, tuple[str, ...]]) -> steps.FoundHolders:
    return steps.FoundHolders(tuple(found.items()))
