"""What a coordinator does about a VM that one before it left, over every order of events."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from dcres.errors import HostFailure
from dcres.model.operations import recovery as steps
from dcres.model.operations.events import Done, Failed
from dcres.model.operations.recovery import Instruction, MainIs, Recovery, SubIs
from dcres.model.phase import VmPhase
from tests.support.explore import Explorer, Seen, usual

NAMES = ("m", "s", "t")
RUNNING = MainIs("m", True, True, False, False, None, NAMES)
MAINS = {
    "it runs": RUNNING,
    "a checkpoint was under way": replace(RUNNING, checkpoint="vm-1"),
    "shares were being changed": replace(RUNNING, reshaping=True),
    "both": replace(RUNNING, reshaping=True, checkpoint="vm-1"),
    "pages still come": replace(RUNNING, moving=True),
    "its start was not finished": replace(RUNNING, running=False, hosts=()),
}


def answers_of(main: MainIs, *, present: bool = True) -> Callable[[Any], list[steps.Event]]:
    def answers(instruction: Instruction) -> list[steps.Event]:
        match instruction:
            case steps.Describe(0):
                return [main]
            case steps.Describe(index):
                return [SubIs(index, NAMES[index], present)]
            case steps.LookAtGuest():
                return [steps.GuestIs(False), steps.GuestIs(True)]
            case steps.LookForManifest():
                return [steps.Looked(False), steps.Looked(True)]
            case steps.Settle():
                return [steps.Settled((0, 1, 2))]
            case _:
                return [Done(instruction)]

    return answers


def failures(instruction: Instruction) -> Iterable[HostFailure]:
    yield HostFailure("", "ClusterError", "it does not answer")
    yield HostFailure("", "VmLost", "it is gone")


def watch(seen: Seen, event: object, state: Recovery, said: Sequence[Instruction]) -> Iterator[str]:
    now = set(seen)
    match event:
        case steps.Looked(there):
            now.add(f"Looked {there}")
        case Done(steps.Halt(index, _, briefly)):
            now.add(f"halted {index} {briefly}")
        case Failed(steps.Halt(_, _, True)):
            now.add("halted 0 True")
    for each in said:
        if isinstance(each, steps.Describe) and each.index:
            assert "told Resume" in now or not _guest_may_wait(state), "the guest waits for that"
        if isinstance(each, steps.Resume) and each.checkpoint:
            assert "halted 0 True" in now
        if isinstance(each, steps.LookForManifest):
            assert "halted 0 False" in now, "it may be published in this moment"
        if isinstance(each, steps.Discard):
            assert "Looked False" in now
            assert {"halted 1 False", "halted 2 False"} <= now, "they may share a store"
        if isinstance(each, steps.TakeDown):
            assert state.main is not None
            assert not state.main.running
        now.add(f"told {type(each).__name__}")
    yield from now


def _guest_may_wait(state: Recovery) -> bool:
    return state.main is not None and state.main.running and state.main.checkpoint is not None


@pytest.mark.parametrize("case", MAINS)
def test_every_way_ends_well(case: str) -> None:
    main = MAINS[case]
    explorer: Explorer[Recovery] = Explorer(answers_of(main), watch, failures)
    well = VmPhase.RUNNING if main.running else VmPhase.ABSENT
    found = set()
    for way in explorer.explore(Recovery.begin("vm", (0, 1, 2))):
        outcome = way.operation.outcome
        assert outcome is not None
        assert outcome.settled == (outcome.phase is well) != bool(outcome.why)
        assert outcome.moving == (outcome.settled and main.moving)
        assert not outcome.settled or main.running or "told TakeDown" in way.seen
        found.add(outcome.phase)
    assert found == {well, VmPhase.UNKNOWN, VmPhase.LOST}


def told(main: MainIs, *, present: bool = True) -> list[Instruction]:
    said: list[Instruction] = usual(
        Recovery.begin("vm", (0, 1, 2)), answers_of(main, present=present)
    )
    return said


def test_a_vm_that_runs_is_looked_at_and_no_more() -> None:
    assert told(RUNNING) == [
        *(steps.Describe(0), steps.LookAtGuest(), steps.Describe(1), steps.Describe(2)),
        steps.EndServing(),
    ]


def test_a_checkpoint_under_way_is_given_up_and_the_guest_goes_on_first() -> None:
    assert told(MAINS["a checkpoint was under way"]) == [
        steps.Describe(0),
        *(steps.Halt(0, "vm-1", briefly=True), steps.Resume("vm-1")),
        *(steps.Describe(1), steps.Describe(2)),
        *(steps.Halt(0, "vm-1"), steps.LookForManifest("vm-1")),
        *(steps.Halt(1, "vm-1"), steps.Halt(2, "vm-1")),
        *(steps.Discard(index, "vm-1") for index in range(3)),
        steps.EndServing(),
    ]


def test_shares_are_settled_once() -> None:
    """Though the main host goes on to say that they are being changed."""
    said = told(MAINS["shares were being changed"])
    assert said.count(steps.Settle()) == 1
    assert said[-1] == steps.EndServing()


def test_a_host_that_has_nothing_of_the_vm_is_a_loss() -> None:
    state, said = Recovery.begin("vm", (0, 1, 2))
    for instruction in said:
        state, more = state.step(answers_of(RUNNING, present=False)(instruction)[0])
        said += more
    assert state.outcome is not None
    assert state.outcome.phase is VmPhase.LOST
    assert "s, t has nothing of it" in state.outcome.why
    assert not state.outcome.settled


def test_a_vm_of_which_nothing_is_left_has_no_hosts() -> None:
    state, said = Recovery.begin("vm", (0, 1, 2))
    while said:
        (instruction, *said) = said
        state, more = state.step(answers_of(MAINS["its start was not finished"])(instruction)[0])
        said += more
    assert state.outcome == steps.Outcome(VmPhase.ABSENT)
    assert state.hosts == ()


def test_a_bare_reservation_is_given_back() -> None:
    assert usual(Recovery.begin("vm", ()), answers_of(RUNNING)) == [steps.Release()]


@pytest.mark.parametrize(
    ("kind", "phase"),
    [("VmOff", VmPhase.OFF), ("VmLost", VmPhase.LOST), ("PagingError", VmPhase.UNKNOWN)],
)
def test_what_a_failure_says_of_the_vm(kind: str, phase: VmPhase) -> None:
    state, said = Recovery.begin("vm", (0, 1, 2))
    state, _ = state.step(Failed(said[0], HostFailure("", kind, "why")))
    assert state.outcome is not None
    assert (state.outcome.phase, state.outcome.why) == (phase, "why")


@pytest.mark.parametrize(("kind", "goes_on"), [("ClusterError", True), ("VmLost", False)])
def test_the_guest_goes_on_though_the_disk_of_its_host_hangs(kind: str, goes_on: bool) -> None:
    state, said = Recovery.begin("vm", (0, 1, 2))
    state, said = state.step(MAINS["a checkpoint was under way"])
    _, said = state.step(Failed(said[0], HostFailure("", kind, "no answer in 20 s")))
    assert said == ([steps.Resume("vm-1")] if goes_on else [])
