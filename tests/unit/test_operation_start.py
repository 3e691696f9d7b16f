"""A start or restore over every order of events."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import pytest

from dcres.errors import HostFailure
from dcres.model.operations import start_steps as steps
from dcres.model.operations.events import Cancelled, Done, Failed
from dcres.model.operations.start import Phase, Restore, Start
from dcres.model.operations.start_steps import Instruction
from dcres.model.phase import HostState
from tests.support.explore import Explorer, Seen, Way, usual

HOSTS = ("m", "s")
NAMES = ("m", "s")
EAGER = Restore("vm-1", NAMES, NAMES, lazy=False)
LAZY = Restore("vm-1", NAMES, NAMES, lazy=True)
OWN: dict[str, tuple[str, ...]] = {"m": ("m",), "s": ("s",)}
# The part of s is on a host outside the VM alone, and both hosts load pages of it.
ELSEWHERE: dict[str, tuple[str, ...]] = {"m": ("m",), "s": ()}
FLOW = ((5, 0), (2, 5))
OFF = (HostState.OFF, HostState.SILENT)
BEGINNING = ("Boot", "Serve", "Run", "Go")


class World:
    """Answers as hosts with these parts give them."""

    def __init__(
        self,
        here: Mapping[str, tuple[str, ...]] = OWN,
        states: tuple[HostState, ...] = (),
        flow: tuple[tuple[int, ...], ...] = FLOW,
    ) -> None:
        self.here, self.states, self.flow = here, states, flow

    def answers(self, instruction: Instruction) -> list[steps.Event]:
        match instruction:
            case steps.LookAround():
                return [steps.Looked(self.states)]
            case steps.Reserve():
                return [steps.Reserved("m", ("s",))]
            case steps.FindParts(host):
                return [steps.Found(host, self.here[host])]
            case steps.FindHolders():
                return [steps.FoundHolders((("x", ("s",)), ("y", ("s",))))]
            case steps.Plan(host):
                return [steps.Planned(host, self.flow)]
            case _:
                return [Done(instruction)]

    @property
    def explorer(self) -> Explorer[Start]:
        return Explorer(self.answers, watch, failures)


def failures(instruction: Instruction) -> Iterable[HostFailure]:
    yield HostFailure(getattr(instruction, "host", ""), "NoRoom", "no room")


def watch(seen: Seen, event: object, state: Start, said: Sequence[Instruction]) -> Iterator[str]:
    """Asserts what holds at every moment; remembers what was told, and what was done."""
    now = {*seen, *_done(event)}
    for each in said:
        name, host = type(each).__name__, getattr(each, "host", "")
        assert f"told {name} {host}" not in seen, f"told twice: {each}"
        assert not any(told.startswith("told TakeDown") for told in seen), "begun after the end"
        if name == "Clear":
            assert {f"done RequireFree {one}" for one in HOSTS} <= now, "not all have looked"
        if name in BEGINNING:
            assert {f"done Clear {one}" for one in HOSTS} <= now, "what was left may be there"
            assert "done Claim m" in now
        if name in ("Boot", "Serve") and state.restore == EAGER:
            assert not (state.where.waits(host, state.flow) and unserved(now)), "nobody serves it"
        if name in ("Run", "Go"):
            assert {"done Boot m", "done Serve s"} <= now
            assert name == "Run" or "done Run m" in now
            assert not unserved(now)
            assert state.restore is None or any(one.startswith("done Plan") for one in now)
        if name == "MakeWay":
            assert "done RequireRoom " in now or "nothing was left" in now
    yield from now - seen
    yield from (f"told {type(each).__name__} {getattr(each, 'host', '')}" for each in said)


def unserved(seen: Iterable[str]) -> set[str]:
    """Hosts that were told to serve parts and do not yet."""
    told, done = (
        {each.rpartition(" ")[2] for each in seen if each.startswith(f"{what} ServeParts")}
        for what in ("told", "done")
    )
    return told - done


def _done(event: object) -> Iterator[str]:
    match event:
        case Done(what):
            yield f"done {type(what).__name__} {getattr(what, 'host', '')}"
        case steps.Planned(host):
            yield f"done Plan {host}"
        case steps.Looked(states) if not states:
            yield "nothing was left"


def require_right_end(way: Way[Start]) -> None:
    outcome, seen = way.operation.outcome, way.seen
    assert outcome is not None
    began = "told Reserve " in seen
    assert outcome.up == (way.operation.phase is Phase.UP)
    assert outcome.up != bool(outcome.failure or outcome.cancelled)
    assert ("told TakeDown " in seen) == (began and not outcome.up), "told to begin, not to end"
    assert outcome.settled == (way.operation.phase is not Phase.STUCK)
    if way.operation.phase is Phase.REFUSED:
        assert "told MakeWay " not in seen or outcome.cancelled, "half an earlier life may be left"
        assert not began
        assert not outcome.torn_down
    if outcome.torn_down:
        assert {"done TakeDown ", "done MakeWay "} & seen


WAYS = {
    "start": (None, World()),
    "start over what is off": (None, World(states=OFF)),
    "restore": (EAGER, World()),
    "restore with a helper": (EAGER, World(ELSEWHERE)),
    "restore of which one host waits": (EAGER, World(ELSEWHERE, flow=((5, 0), (0, 5)))),
    "lazy restore": (LAZY, World()),
    "lazy restore with a helper": (LAZY, World(ELSEWHERE)),
}


@pytest.mark.parametrize("case", WAYS)
def test_every_way_ends_well(case: str) -> None:
    restore, world = WAYS[case]
    found = world.explorer.explore(Start.begin("vm", restore))
    for way in found:
        require_right_end(way)
    assert {way.operation.phase for way in found} == {
        Phase.UP,
        Phase.DOWN,
        Phase.REFUSED,
        Phase.STUCK,
    }


@pytest.mark.parametrize("case", WAYS)
def test_without_trouble_it_is_up(case: str) -> None:
    restore, world = WAYS[case]
    found = world.explorer.explore(Start.begin("vm", restore), most_failures=0, most_cancels=0)
    assert {way.operation.phase for way in found} == {Phase.UP}


def told(restore: Restore | None, world: World) -> list[str]:
    return [
        f"{type(each).__name__} {getattr(each, 'host', '')}".strip()
        for each in usual(Start.begin("vm", restore), world.answers)
    ]


def test_the_usual_order_of_a_start() -> None:
    assert told(None, World()) == [
        *("LookAround", "MakeWay", "Reserve"),
        *("RequireFree m", "RequireFree s", "Clear m", "Clear s", "Claim m"),
        *("Boot m", "Serve s", "Run m", "Go m"),
    ]


def test_who_needs_another_hosts_pages_boots_when_they_are_served() -> None:
    flow = ((5, 0), (0, 5))  # m needs none of them
    state, said = Start.begin("vm", EAGER)
    world = World(ELSEWHERE)
    while state.phase is not Phase.PLANNING:
        state, more = state.step(world.answers(said[0])[0])
        said = [*said[1:], *more]
    assert said == [steps.KeepParts("x"), steps.Plan("m")], "no more helpers than it takes"
    state, _ = state.step(Done(steps.KeepParts("x")))
    state, said = state.step(steps.Planned("m", flow))
    assert said == [steps.ServeParts("x", ("s",)), steps.Boot("m")]
    _, said = state.step(Done(steps.ServeParts("x", ("s",))))
    assert said == [steps.Serve("s")]


def test_a_new_main_host_reads_the_old_ones_part() -> None:
    assert "ReadMainPart s" in told(EAGER, World({"m": ("s",), "s": ("m",)}))


def test_nothing_is_booted_for_a_part_that_is_nowhere() -> None:
    state, said = Start.begin("vm", Restore("vm-1", ("m", "s", "t"), (), lazy=False))
    world = World(ELSEWHERE)
    while said and state.phase is not Phase.TAKING_DOWN:
        state, more = state.step(world.answers(said[0])[0])
        said = [*said[1:], *more]
    assert said == [steps.TakeDown()]
    assert state.failure is not None
    assert (state.failure.kind, "that t saved" in state.failure.message) == ("NotFound", True)


def test_what_may_run_is_in_the_way() -> None:
    state, _ = Start.begin("vm")
    state, said = state.step(steps.Looked((HostState.ANSWERS, HostState.SILENT)))
    assert (state.phase, said) == (Phase.REFUSED, [])
    assert state.failure is not None
    assert state.failure.kind == "Conflict"


def test_a_reservation_that_was_cancelled_is_given_back_when_it_is_there() -> None:
    state, _ = Start.begin("vm")
    for event in (steps.Looked(()), Done(steps.MakeWay()), Cancelled("^C")):
        state, said = state.step(event)
    assert said == [], "it cannot be broken off"
    assert state.step(steps.Reserved("m", ("s",)))[1] == [steps.TakeDown()]
    failed = Failed(steps.Reserve(), HostFailure("", "NoRoom", "no room"))
    assert state.step(failed)[1] == [steps.TakeDown()]
