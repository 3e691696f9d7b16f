"""Changes of shares, and their ends, over every order of events."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import pytest

from dcres.errors import HostFailure
from dcres.model.operations import settle, shares
from dcres.model.operations.events import Cancelled, Done
from dcres.model.operations.settle import Described, Settling
from dcres.model.operations.shares import Change, ChangeOfShares
from tests.support.explore import Explorer, Seen, usual

MIB = 1 << 20
CHANGES = {
    "all at once": Change(
        "m",
        ("s", "t"),
        before=(32 * MIB, 16 * MIB, 16 * MIB),
        main_share=48 * MIB,
        wanted=(0, 24 * MIB),
        joining=(("x", 8 * MIB),),
        growth=((0, 16 * MIB), (2, 8 * MIB)),
    ),
    "a smaller main host": Change("m", ("s",), (32 * MIB, 16 * MIB), 16 * MIB, (32 * MIB,)),
    "the main host alone": Change("m", ("s",), (32 * MIB, 16 * MIB), 48 * MIB, (16 * MIB,)),
}


def answers(instruction: shares.Instruction) -> list[shares.Event]:
    match instruction:
        case shares.MoveInto():
            return [shares.Moving(0), shares.Moving(9)]
        case shares.LookAtMoves():
            return [shares.LookedAtMoves(False), shares.LookedAtMoves(True)]
        case shares.Settle():
            return [shares.Settled(("m", "s"))]
        case _:
            return [Done(instruction)]


def failures(instruction: shares.Instruction) -> Iterable[HostFailure]:
    yield HostFailure(getattr(instruction, "host", ""), "NoRoom", "no room")


def watch(
    seen: Seen, event: object, state: ChangeOfShares, said: Sequence[shares.Instruction]
) -> Iterator[str]:
    """Asserts that nothing is taken from a host that may still have pages."""
    assert len(said) <= 1, "one after the other"
    yield from seen
    if event == shares.Moving(0):
        yield "at rest"
    for each in said:
        if isinstance(each, shares.Destroy):
            assert "at rest" in seen, "it still has pages"
        if isinstance(each, shares.Dismiss):
            assert f"told Destroy {each.host}" in seen
        if isinstance(each, shares.SetLayout):
            assert "told Settle " not in seen
        yield f"told {type(each).__name__} {getattr(each, 'host', '')}"


@pytest.mark.parametrize("case", CHANGES)
def test_every_way_ends_well(case: str) -> None:
    change = CHANGES[case]
    ends = Explorer(answers, watch, failures).explore(ChangeOfShares.begin("vm", change))
    kinds = set()
    for way in ends:
        outcome = way.operation.outcome
        assert outcome is not None
        done = f"told SetLayout {change.main}" in way.seen and "told Settle " not in way.seen
        assert done == (not outcome.failure and not outcome.cancelled)
        assert outcome.hosts in ((), ("m", "s"), change.hosts)
        kinds.add((bool(outcome.failure), bool(outcome.cancelled), bool(outcome.hosts)))
    assert {(False, False, True), (True, False, True), (False, True, True)} <= kinds
    assert (True, False, False) in kinds, "what cannot be undone now"


def test_the_usual_order() -> None:
    told = names_of("all at once")
    assert told == [
        *("BeginReshape", "Extend", "Extend", "Limit", "Resize", "Resize", "Join", "Serve"),
        *("Reshape", "MoveInto", "Reshape", "Destroy", "Dismiss", "SetLayout"),
    ]
    smaller = names_of("a smaller main host")
    assert smaller.index("Limit") > smaller.index("MoveInto"), "pages have to have a place first"


def names_of(case: str) -> list[str]:
    said = usual(ChangeOfShares.begin("vm", CHANGES[case]), answers)
    return [type(each).__name__ for each in said]


def test_pages_that_never_come_to_rest_are_left_where_they_are() -> None:
    state, said = ChangeOfShares.begin("vm", CHANGES["all at once"])
    while said != [shares.Settle()]:
        (instruction,) = said
        busy = [each for each in answers(instruction) if each != shares.Moving(0)]
        state, said = state.step(busy[0])
    assert state.failure is not None
    assert "do not come to rest" in state.failure.message


def test_a_cancel_that_comes_when_a_host_is_leaving_is_too_late() -> None:
    state, said = ChangeOfShares.begin("vm", CHANGES["all at once"])
    while not isinstance(said[0], shares.Destroy):
        state, said = state.step(answers(said[0])[0])
    assert state.step(Cancelled("^C")) == (state, [])


# The end of a change

KNOWN = Described("m", ("s", "t"), 32 * MIB, (("s", 16 * MIB),))
NAMES = {0: "m", 1: "s", 2: "t", 3: "x"}


def settled_by(known: Described, instruction: settle.Instruction) -> list[settle.Event]:
    match instruction:
        case settle.Describe():
            return [known]
        case settle.AskName(index):
            return [settle.Named(index, NAMES[index])]
        case _:
            return [Done(instruction)]


def told_to_settle(known: Described) -> list[settle.Instruction]:
    said = usual(Settling.begin((0, 1, 2, 3)), lambda each: settled_by(known, each))
    return [each for each in said if not isinstance(each, settle.Describe | settle.AskName)]


def test_who_was_about_to_join_ends_and_others_get_their_share_back() -> None:
    assert told_to_settle(KNOWN) == [
        settle.Destroy(3),
        settle.Dismiss(3),
        settle.Resize("s", 4096),
        settle.Resize("t", None),  # it has joined, and pages may be there
        settle.StopMoves(),
        settle.Reshape(("s", "t")),
        settle.Limit(8192),
        settle.SetLayout(32 * MIB, ("s", "t")),
    ]


def test_shares_that_are_not_being_changed_are_left_alone() -> None:
    told = told_to_settle(Described("m", ("s", "t"), None, ()))
    assert told == [settle.Destroy(3), settle.Dismiss(3)]


def test_once_a_host_has_left_there_is_no_way_back() -> None:
    """The others could not hold what they were given in its place."""
    shares = (("s", 16 * MIB), ("x", 16 * MIB))
    told = told_to_settle(Described("m", ("s", "t"), 32 * MIB, shares, limit=48 * MIB))
    assert told == [
        settle.Destroy(3),
        settle.Dismiss(3),
        settle.Resize("s", None),
        settle.Resize("t", None),
        settle.StopMoves(),
        settle.Reshape(("s", "t")),
        settle.Limit(12288),
        settle.SetLayout(48 * MIB, ("s", "t")),
    ]


def quiet(
    seen: Seen, event: object, state: Settling, said: Sequence[settle.Instruction]
) -> Iterator[str]:
    for each in said:
        if isinstance(each, settle.Destroy | settle.Dismiss):
            assert each.index == 3, "it is one of the VM's"
    yield from seen


def test_every_way_of_settling_ends() -> None:
    explorer: Explorer[Settling] = Explorer(
        lambda each: settled_by(KNOWN, each),
        quiet,
        lambda _: [HostFailure("s", "ActorGone", "it has died")],
    )
    ends = explorer.explore(Settling.begin((0, 1, 2, 3)))
    assert {way.operation.is_settled for way in ends} == {True, False}
    assert all(way.operation.is_settled != bool(way.operation.failure) for way in ends)
