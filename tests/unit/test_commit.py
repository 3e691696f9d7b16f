"""The commit of a checkpoint over every order of events, not only the usual one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache

import pytest

from dcres.errors import HostFailure
from dcres.model.live import HostRound, Target
from dcres.model.operations import checkpoint_steps as steps
from dcres.model.operations.checkpoint import Checkpoint, Guest, Phase, Step
from dcres.model.operations.checkpoint_steps import Instruction
from dcres.model.operations.events import Cancelled, Failed
from tests.support.explore import Explorer, Seen, Way, usual

HOSTS = ("m", "s")
LITTLE, MUCH = HostRound(0, 0.1, 1e9), HostRound(10**6, 0.1, 1e9)
FULL, GONE = ("StoreFull", "the disk is full"), ("ActorGone", "it has died")
STOPPED_AT_S, RESUMED_AT_S = 1.0, 1.5


def begin(*, live: bool, hosts: tuple[str, ...] = HOSTS, max_rounds: int = 3) -> Step:
    target = Target(downtime_s=0.1, max_rounds=max_rounds, fixed_s=0.01) if live else None
    return Checkpoint.begin("vm-1", hosts, "m", target)


def answers(instruction: Instruction) -> list[steps.Event]:
    host = instruction.host
    match instruction:
        case steps.Prepare():
            return [steps.Prepared(host)]
        case steps.Copy():
            return [steps.Copied(host, LITTLE), steps.Copied(host, MUCH)]
        case steps.Synchronise(once_more=True):
            return [steps.Synchronised(host, LITTLE), steps.Synchronised(host, MUCH)]
        case steps.Synchronise():
            return [steps.Synchronised(host, None)]
        case steps.Finish():
            return [steps.Finished(host, 7, STOPPED_AT_S)]
        case steps.Stage():
            return [steps.Staged(host)]
        case steps.Resume():
            return [steps.Resumed(host, RESUMED_AT_S)]
        case steps.Save():
            return [steps.Saved(host)]
        case steps.Publish():
            return [steps.Published(host)]
        case steps.EndPublishing():
            return [steps.PublishingEnded(host)]
        case steps.LookForManifest():
            return [steps.Looked(host, False), steps.Looked(host, True)]
        case steps.Halt():
            return [steps.Halted(host)]
        case steps.Discard():
            return [steps.Discarded(host)]


def failures(instruction: Instruction) -> Iterable[HostFailure]:
    yield HostFailure(instruction.host, *FULL)
    if isinstance(instruction, steps.Halt):
        yield HostFailure(instruction.host, *GONE)


def watch(
    seen: Seen, event: object, state: Checkpoint, said: Sequence[Instruction]
) -> Iterator[str]:
    """Asserts what holds at every moment; remembers "<event> <host>" and "told <instruction>"."""
    now = {*seen, *_heard(event)}
    told = {type(each) for each in said}
    every = set(state.hosts)
    assert state.waiting <= every
    if steps.Publish in told:
        assert {f"Saved {host}" for host in every} <= now, "published before every vote"
    if steps.Discard in told:
        assert "told Publish" not in now or "Looked False" in now, "it may be published"
        assert {f"Halt {host}" for host in every} <= now, "another one may still save"
    if steps.Resume in told:
        assert "told Finish" in now, "nobody had stopped it"
        assert "told Resume" not in now, "resumed twice"
        assert "told Halt" not in now or "Halt m" in now, "a host that saves keeps the VM waiting"
    if steps.Save in told:
        assert "told Resume" in now, "the VM stands for what needs it no more"
    yield from now - seen
    yield from (f"told {each.__name__}" for each in told)
    yield from (f"discards {each.host}" for each in said if isinstance(each, steps.Discard))


def _heard(event: object) -> Iterator[str]:
    match event:
        case steps.Saved(host):
            yield f"Saved {host}"
        case steps.Halted(host) | Failed(steps.Halt(host)):
            yield f"Halt {host}"
        case steps.Looked(_, there):
            yield f"Looked {there}"
        case steps.Published():
            yield "Published"


def require_right_end(way: Way[Checkpoint]) -> None:
    outcome, seen = way.operation.outcome, way.seen
    assert outcome is not None
    assert outcome.published == bool({"Published", "Looked True"} & seen)
    assert outcome.published != bool(outcome.failures or outcome.cancelled)
    assert ("told Finish" in seen) == ("told Resume" in seen), "stopped, and not told to go on"
    assert way.operation.guest in (Guest.UNTOUCHED, Guest.RESUMED, Guest.STANDS)
    discarded = {host for host in HOSTS if f"discards {host}" in seen}
    if outcome.published or outcome.unsure:
        assert not discarded
    else:
        stands = {"m"} if way.operation.guest is Guest.STANDS else set()
        assert discarded == set(HOSTS) - outcome.gone - stands


EXPLORER: Explorer[Checkpoint] = Explorer(answers, watch, failures)


@cache
def ends(live: bool) -> set[Way[Checkpoint]]:
    return EXPLORER.explore(begin(live=live, max_rounds=1))


def test_every_way_through_many_rounds_ends_well() -> None:
    for way in EXPLORER.explore(begin(live=True), most_failures=1, most_cancels=0):
        require_right_end(way)


@pytest.mark.parametrize("live", [True, False])
def test_every_way_ends_well(live: bool) -> None:
    found = ends(live)
    for way in found:
        require_right_end(way)
    outcomes = [way.operation.outcome for way in found if way.operation.outcome is not None]
    assert {each.published for each in outcomes} == {True, False}
    assert {each.unsure for each in outcomes} == {True, False}
    assert {bool(each.stuck) for each in outcomes} == {True, False}
    assert {len(each.gone) for each in outcomes} == {0, 1, 2}


@pytest.mark.parametrize("live", [True, False])
def test_without_trouble_it_is_published(live: bool) -> None:
    quiet = EXPLORER.explore(begin(live=live), most_failures=0, most_cancels=0)
    assert {way.operation.phase for way in quiet} == {Phase.PUBLISHED}


def steps_of(said: list[Instruction]) -> str:
    """In order, those to several hosts once."""
    names = [type(each).__name__ for each in said]
    return " ".join(
        name for index, name in enumerate(names) if index == 0 or names[index - 1] != name
    )


def test_the_usual_order_of_a_stopped_checkpoint() -> None:
    said = usual(begin(live=False), answers)
    assert steps_of(said) == "Prepare Synchronise Finish Stage Resume Save Publish"


def test_the_usual_order_of_a_live_checkpoint() -> None:
    said = usual(begin(live=True), answers)
    assert steps_of(said) == "Prepare Copy Synchronise Finish Stage Resume Save Publish"


def test_the_main_host_stages_by_itself_without_sub_hosts() -> None:
    said = usual(begin(live=False, hosts=("m",)), answers)
    assert [type(each) for each in said].count(steps.Stage) == 1


def test_a_guest_that_begins_to_write_is_copied_again_before_it_is_stopped() -> None:
    state, said = begin(live=True)
    for event in (*each(steps.Prepared), *each(steps.Copied, MUCH), *each(steps.Copied, LITTLE)):
        state, said = state.step(event)
    assert [type(one) for one in said] == [steps.Synchronise] * 2
    for event in each(steps.Synchronised, MUCH):
        state, said = state.step(event)
    assert (state.phase, len(state.rounds)) == (Phase.FINISHING, 3), "the bound is reached"
    assert said == [steps.Finish("m", "vm-1")]


def each(kind: type, *values: object) -> list[steps.Event]:
    return [kind(host, *values) for host in HOSTS]


def test_the_downtime_is_what_the_main_host_measured() -> None:
    published = [way for way in ends(False) if way.operation.phase is Phase.PUBLISHED]
    assert {
        way.operation.downtime_s for way in published if way.operation.guest is Guest.RESUMED
    } == {RESUMED_AT_S - STOPPED_AT_S}


def reach(phase: Phase) -> Checkpoint:
    """A stopped checkpoint that has just come so far."""
    state, said = begin(live=False)
    while state.phase is not phase:
        state, more = state.step(answers(said[0])[0])
        said = [*said[1:], *more]
    return state


def test_a_host_that_fails_after_its_vote_changes_nothing() -> None:
    voted, _ = reach(Phase.SAVING).step(steps.Saved("s"))
    late = Failed(steps.Save("s", "vm-1", 7), HostFailure("s", *GONE))
    assert voted.step(late) == (voted, [])
    assert voted.step(steps.Saved("m"))[1] == [steps.Publish("m", "vm-1")]


def test_a_cancel_while_the_vm_is_let_go_waits_for_that() -> None:
    state, said = reach(Phase.RESUMING).step(Cancelled("^C"))
    assert said == []
    state, said = state.step(steps.Resumed("m", RESUMED_AT_S))
    assert said == [steps.Halt("m", "vm-1"), steps.Halt("s", "vm-1")]
    assert state.guest is Guest.RESUMED


def test_a_cancel_while_it_is_published_comes_too_late() -> None:
    state = reach(Phase.PUBLISHING)
    assert state.step(Cancelled("^C")) == (state, [])


def test_what_may_be_published_is_kept_and_both_reasons_are_told() -> None:
    state = reach(Phase.PUBLISHING)
    for instruction, why in (
        (steps.Publish("m", "vm-1"), "no answer"),
        (steps.EndPublishing("m", "vm-1"), "it is gone"),
    ):
        state, _ = state.step(Failed(instruction, HostFailure("m", "ActorGone", why)))
    assert state.outcome is not None
    assert state.outcome.unsure
    assert [each.message for each in state.outcome.failures] == ["no answer; it is gone"]


def test_an_event_that_comes_twice_or_early_counts_for_nothing() -> None:
    state, _ = begin(live=True)
    once, _ = state.step(steps.Prepared("m"))
    assert once.step(steps.Prepared("m")) == (once, [])
    early: tuple[steps.Event, ...] = (
        steps.Saved("s"),
        steps.Finished("m", 7, STOPPED_AT_S),
        steps.Resumed("m", RESUMED_AT_S),
        steps.Looked("m", True),
        steps.Copied("s", LITTLE),
    )
    for event in early:
        assert state.step(event) == (state, [])


@pytest.mark.parametrize(("kind", "lost"), [("VmLost", "lost"), ("VmOff", "off")])
def test_what_the_vm_has_become_is_told_though_another_failure_came_first(
    kind: str, lost: str
) -> None:
    state = reach(Phase.SAVING)
    for host, what in (("s", "StoreFull"), ("m", kind)):
        state, _ = state.step(Failed(steps.Save(host, "vm-1", 7), HostFailure(host, what, "why")))
    assert (state.lost, [each.host for each in state.failures]) == (lost, ["s"])
