"""The commit machine over every order of events, not only the usual one."""

from __future__ import annotations

from itertools import permutations

import pytest

from dcres.model.commit import (
    Barrier,
    Cancelled,
    Commit,
    Event,
    Failed,
    Instruction,
    Passed,
    Phase,
    Published,
    PublishFailed,
)

HOSTS = ("m", "s")


def run(events: tuple[Event, ...]) -> tuple[Commit, list[Instruction]]:
    commit, said = Commit.begin(HOSTS, "m")
    said = list(said)
    for event in events:
        commit, more = commit.step(event)
        said += more
    return commit, said


def usual() -> tuple[Event, ...]:
    return (
        Passed("m", Barrier.SYNCHRONISE),
        Passed("s", Barrier.SYNCHRONISE),
        Passed("m", Barrier.FINISH),
        Passed("s", Barrier.SAVED),
        Passed("m", Barrier.SAVED),
        Published(),
    )


def test_the_usual_order_publishes() -> None:
    commit, said = run(usual())
    assert commit.phase is Phase.PUBLISHED
    assert said == [
        Instruction.PREPARE,
        Instruction.FINISH,
        Instruction.SAVE,
        Instruction.RESUME,
        Instruction.PUBLISH,
    ]


@pytest.mark.parametrize("at", range(6))
@pytest.mark.parametrize("trouble", [Failed("s", "gone"), Failed("m", "gone"), Cancelled("^C")])
def test_trouble_at_any_moment(at: int, trouble: Event) -> None:
    events = usual()
    commit, said = run((*events[:at], trouble, *events[at:]))
    # s has voted after four events, and both after five.
    harmless = at >= 5 or (at == 4 and trouble == Failed("s", "gone"))
    assert commit.phase is (Phase.PUBLISHED if harmless else Phase.ABANDONED)
    assert (Instruction.DISCARD in said) is not harmless
    assert (Instruction.PUBLISH in said) is harmless
    if Instruction.FINISH in said:
        assert said.count(Instruction.RESUME) == 1


def test_every_order_of_votes_failures_and_publishing_is_safe() -> None:
    start = usual()[:3]
    events: tuple[Event, ...] = (
        Passed("m", Barrier.SAVED),
        Passed("s", Barrier.SAVED),
        Failed("s", "gone"),
        Failed("m", "gone"),
        Cancelled("^C"),
    )
    for order in permutations(events):
        commit, said = run((*start, *order))
        assert not (Instruction.PUBLISH in said and Instruction.DISCARD in said), order
        assert said.count(Instruction.RESUME) == 1, order
        assert commit.phase in (Phase.PUBLISHING, Phase.ABANDONED), order


def test_a_manifest_that_cannot_be_written_discards() -> None:
    commit, said = run((*usual()[:5], PublishFailed("disk full")))
    assert commit.phase is Phase.ABANDONED
    assert said[-1] is Instruction.DISCARD
    assert commit.failures == {"m": "disk full"}


def test_a_barrier_passed_twice_or_early_counts_once() -> None:
    commit, said = run((Passed("m", Barrier.SYNCHRONISE), Passed("m", Barrier.SYNCHRONISE)))
    assert commit.phase is Phase.PREPARING
    commit, said = run((Passed("s", Barrier.SAVED), Passed("m", Barrier.FINISH)))
    assert (commit.phase, said) == (Phase.PREPARING, [Instruction.PREPARE])
