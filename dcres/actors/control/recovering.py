"""What a coordinator does about a VM that another left: see `dcres.model.operations.recovery`."""

from __future__ import annotations

import logging
from functools import partial
from typing import assert_never

from dcres.actors.control.asking import describe
from dcres.actors.control.checkpointing import HALT_TIMEOUT_S
from dcres.actors.control.executor import Doing, Errand, Executor, order
from dcres.actors.control.hosts import hosts_known, ports_by_index
from dcres.actors.control.recording import catch_up
from dcres.actors.control.vm_handle import VmHandle
from dcres.actors.protocol import Machine, MainStatus, Saving
from dcres.model.operations import recovery as steps
from dcres.model.operations.events import Done
from dcres.model.operations.recovery import Recovery
from dcres.model.phase import VmPhase
from dcres.model.situation import Situation

log = logging.getLogger("dcres.coordinator")

_RESUME_TIMEOUT_S = 180.0  # it waits for a stop that is under way


def recover(vm: VmHandle, executor: Executor) -> Situation:
    """Bring to an end what is left of an operation; where the VM stands then."""
    hands = Recovering(vm, executor)
    outcome = hands.run().outcome
    assert outcome is not None, "it has ended"
    if outcome.phase is VmPhase.RUNNING:
        catch_up(vm)
    if outcome.moving:
        vm.follow(vm.hosts.ports, moving=True)
    return Situation(outcome.phase, outcome.why, settled=outcome.settled)


class Recovering:
    """One recovery."""

    def __init__(self, vm: VmHandle, executor: Executor) -> None:
        self._handle, self._vm, self._fleet = vm, vm.name, vm.fleet
        self._executor = executor
        self._ports = ports_by_index(vm.name, vm.fleet)
        if not vm.names:
            vm.know(hosts_known(vm.name, vm.fleet).names)

    def run(self) -> Recovery:
        """Bring it to its end."""
        begun = Recovery.begin(self._vm, tuple(self._ports))
        return self._executor.run(self, begun, lambda state: self._handle.know(state.hosts))

    def doing(self, instruction: steps.Instruction) -> Doing:
        """How `instruction` is carried out."""
        match instruction:
            case steps.Release() | steps.TakeDown() | steps.Settle() | steps.EndServing():
                return Errand(lambda: self._call(instruction))
            case _:
                return self._to_host(instruction)

    def _call(self, instruction: steps.Calling) -> steps.Event:
        match instruction:
            case steps.Release():
                self._fleet.release(self._vm)
            case steps.TakeDown():
                log.warning("VM %s: taking down a start that was not finished", self._vm)
                self._handle.take_down(self._executor.journal)
            case steps.Settle():
                log.warning("VM %s: giving up a change of shares", self._vm)
                self._handle.settle_shares(self._executor.journal)
                self._ports = ports_by_index(self._vm, self._fleet)
                return steps.Settled(tuple(self._ports))
            case steps.EndServing():
                if not self._handle.end_serving():
                    self._handle.follow(self._handle.hosts.ports, moving=False)
            case _:
                assert_never(instruction)
        return Done(instruction)

    def _to_host(self, instruction: steps.ToHost) -> Doing:
        main = "", self._ports[min(self._ports)]
        match instruction:
            case steps.Describe(index):
                return Errand(partial(self._described, index))
            case steps.Halt(index, checkpoint, briefly):
                if briefly:
                    log.warning("VM %s: giving up checkpoint %s", self._vm, checkpoint)
                made = order("", self._ports[index], Saving.halt, checkpoint)
                made = made.within(HALT_TIMEOUT_S if briefly else _RESUME_TIMEOUT_S)
            case steps.Resume(checkpoint):
                resume = order(*main, Machine.resume, checkpoint).within(_RESUME_TIMEOUT_S)
                return resume.then(lambda _: Done(instruction))
            case steps.LookAtGuest():
                return order(*main, Machine.status).then(_held)
            case steps.LookForManifest(checkpoint):
                return order(*main, Machine.published, checkpoint).then(steps.Looked)
            case steps.Discard(index, checkpoint):
                made = order("", self._ports[index], Saving.abandon, checkpoint)
            case _:
                assert_never(instruction)
        return made.then(lambda _: Done(instruction))

    def _described(self, index: int) -> steps.Event:
        known = describe(self._ports[index])
        if index != min(self._ports):
            return steps.SubIs(index, known.host, known.present)
        return steps.MainIs(
            known.host,
            known.present,
            known.running,
            known.reshaping,
            known.moving,
            known.checkpoint,
            known.hosts,
        )


def _held(status: MainStatus) -> steps.GuestIs:
    held = status["held"] or status["state"] in ("quiet", "frozen")
    if held:
        log.warning("a VM is paused for a checkpoint that is over; it goes on")
    return steps.GuestIs(held)
