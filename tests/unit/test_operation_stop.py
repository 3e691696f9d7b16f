"""The end of a VM over every order of events."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from dcres.errors import HostFailure
from dcres.model.operations.events import Done, Failed
from dcres.model.operations.stop import (
    Destroy,
    Event,
    Instruction,
    Phase,
    Release,
    Released,
    Stop,
    Sweep,
)
from tests.support.explore import Explorer, Seen, usual

PLACES = [(0, "m"), (1, "s"), (4, "t")]
NAMES = dict(PLACES)


def answers(instruction: Instruction) -> list[Event]:
    match instruction:
        case Release(silent):
            return [Released(tuple(NAMES[index] for index in silent))]
        case _:
            return [Done(instruction)]


def failures(instruction: Instruction) -> Iterable[HostFailure]:
    yield HostFailure(getattr(instruction, "host", ""), "ActorGone", "it has died")


def watch(seen: Seen, event: object, state: Stop, said: Sequence[Instruction]) -> Iterator[str]:
    now = set(seen)
    match event:
        case Done(Destroy(_, host)):
            now.add(f"destroyed {host}")
        case Failed(Destroy(_, host)):
            now.add(f"silent {host}")
        case Released():
            now.add("released")
    for each in said:
        if isinstance(each, Release):
            assert len(now) == len(PLACES), "given back before every host was told"
        if isinstance(each, Sweep):
            assert "released" in now, "its actor may start something again"
            assert f"silent {each.host}" in now
            now.add(f"swept {each.host}")
    yield from now


def test_every_way_ends_well() -> None:
    found = Explorer(answers, watch, failures).explore(Stop.begin(PLACES), most_failures=3)
    for way in found:
        silent = {one.removeprefix("silent ") for one in way.seen if one.startswith("silent")}
        if way.operation.phase is Phase.DOWN:
            assert {f"swept {host}" for host in silent} <= way.seen
        else:
            assert way.operation.outcome is not None
    assert {way.operation.phase for way in found} == {Phase.DOWN, Phase.NOT_DOWN}
    assert {len(way.operation.kept) for way in found} == {0, 1}


def test_the_usual_order() -> None:
    assert usual(Stop.begin(PLACES), answers) == [*(Destroy(*each) for each in PLACES), Release(())]


def test_a_reservation_without_hosts_is_given_back() -> None:
    assert usual(Stop.begin([]), answers) == [Release(())]
