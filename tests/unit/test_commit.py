"""The commit machine over every order of events, not only the usual one."""

from __future__ import annotations

from collections import Counter
from itertools import permutations

import pytest

from dcres.model.commit import (
    AnotherRound,
    Barrier,
    Cancelled,
    Commit,
    Converged,
    Event,
    Failed,
    Instruction,
    Passed,
    Phase,
    Published,
    PublishFailed,
    PublishUnknown,
)

HOSTS = ("m", "s")
HOSTS_ALL = set(HOSTS)
SYNCHRONISED: tuple[Event, ...] = (
    Passed("m", Barrier.SYNCHRONISE),
    Passed("s", Barrier.SYNCHRONISE),
)
FINISH_TO_STAGED: tuple[Event, ...] = (
    Passed("m", Barrier.FINISH),
    Passed("m", Barrier.STAGED),
    Passed("s", Barrier.STAGED),
)
PREPARED: tuple[Event, ...] = (Passed("m", Barrier.PREPARED), Passed("s", Barrier.PREPARED))
COPIED: tuple[Event, ...] = (Passed("m", Barrier.COPIED), Passed("s", Barrier.COPIED))
VOTES: tuple[Event, ...] = (Passed("s", Barrier.SAVED), Passed("m", Barrier.SAVED))
STOPPED = (*PREPARED, *SYNCHRONISED, *FINISH_TO_STAGED, *VOTES, Published())
LIVE = (
    *PREPARED,
    *COPIED,
    AnotherRound(),
    *COPIED,
    Converged(),
    *SYNCHRONISED,
    AnotherRound(),
    *COPIED,
    Converged(),
    *SYNCHRONISED,
    Converged(),
    *FINISH_TO_STAGED,
    *VOTES,
    Published(),
)


def run(events: tuple[Event, ...], *, live: bool) -> tuple[Commit, list[Instruction]]:
    commit, first = Commit.begin(HOSTS, "m", live=live)
    said = list(first)
    for event in events:
        commit, more = commit.step(event)
        said += more
        assert_invariants(commit, said)
    return commit, said


def assert_invariants(commit: Commit, said: list[Instruction]) -> None:
    stopped = said.count(Instruction.FINISH) - said.count(Instruction.RESUME)
    standing = commit.phase in (Phase.FINISHING, Phase.STAGING)
    assert stopped == (1 if standing else 0), "the VM runs exactly when it should"
    assert not (Instruction.PUBLISH in said and commit.phase is Phase.SAVING)
    assert commit.waiting <= commit.hosts


def test_the_usual_order_of_a_stopped_checkpoint() -> None:
    commit, said = run(STOPPED, live=False)
    assert commit.phase is Phase.PUBLISHED
    assert " ".join(said) == "prepare synchronise finish stage resume save publish"


def test_the_usual_order_of_a_live_checkpoint() -> None:
    commit, said = run(LIVE, live=True)
    assert commit.phase is Phase.PUBLISHED
    assert " ".join(said) == (
        "prepare copy judge copy judge synchronise judge copy judge synchronise judge "
        "finish stage resume save publish"
    )


def test_the_main_host_stages_by_itself_without_sub_hosts() -> None:
    commit, _ = Commit.begin(("m",), "m", live=False)
    for barrier in (Barrier.PREPARED, Barrier.SYNCHRONISE):
        commit, _ = commit.step(Passed("m", barrier))
    commit, said = commit.step(Passed("m", Barrier.FINISH))
    assert said == [Instruction.STAGE]
    commit, said = commit.step(Passed("m", Barrier.STAGED))
    assert said == [Instruction.RESUME, Instruction.SAVE]


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("trouble", [Failed("s", "gone"), Failed("m", "gone"), Cancelled("^C")])
def test_trouble_at_any_moment(live: bool, trouble: Event) -> None:
    events = LIVE if live else STOPPED
    for at in range(len(events)):
        commit, said = run((*events[:at], trouble, *events[at:]), live=live)
        # s votes third from the end, m second from the end.
        harmless = at >= len(events) - 1 or (
            at == len(events) - 2 and trouble == Failed("s", "gone")
        )
        assert commit.phase is (Phase.PUBLISHED if harmless else Phase.ABANDONED), at
        assert (Instruction.DISCARD in said) is not harmless, at
        assert (Instruction.PUBLISH in said) is harmless, at


def test_every_order_of_votes_failures_and_cancel_is_safe() -> None:
    start = STOPPED[:7]
    events: tuple[Event, ...] = (*VOTES, Failed("s", "gone"), Failed("m", "gone"), Cancelled("^C"))
    outcomes = set()
    for order in permutations(events):
        commit, said = run((*start, *order), live=False)
        assert not (Instruction.PUBLISH in said and Instruction.DISCARD in said), order
        outcomes.add(commit.phase)
    assert outcomes == {Phase.PUBLISHING, Phase.ABANDONED}


def test_every_order_of_the_live_phase_with_a_failure_gives_up() -> None:
    events: tuple[Event, ...] = (
        *COPIED,
        AnotherRound(),
        Converged(),
        Failed("s", "gone"),
        Passed("s", Barrier.SYNCHRONISE),
    )
    for order in permutations(events):
        commit, said = run((*PREPARED, *order), live=True)
        assert commit.phase is Phase.ABANDONED, order
        assert said.count(Instruction.DISCARD) == 1, order


def phase_after(order: tuple[Event, ...]) -> Phase:
    """Where the live phase must be after `order`, told from the order alone.

    A judgement counts only when every host has copied, or synchronised, since the last one that
    counted.
    """
    copied: set[str] = set()
    synchronised: set[str] = set()
    phase = Phase.COPYING
    for event in order:
        match event:
            case Passed(host, Barrier.COPIED) if phase is Phase.COPYING:
                copied.add(host)
            case Passed(host, Barrier.SYNCHRONISE) if phase is Phase.SYNCHRONISING:
                synchronised.add(host)
            case AnotherRound() if HOSTS_ALL in (copied, synchronised):
                phase = Phase.COPYING
                copied.clear()
                synchronised.clear()
            case Converged() if copied == HOSTS_ALL:
                phase = Phase.SYNCHRONISING
                copied.clear()
            case Converged() if synchronised == HOSTS_ALL:
                phase = Phase.FINISHING
                synchronised.clear()
    return phase


def test_every_order_of_the_live_phase_without_a_failure() -> None:
    """Events may come early, late and twice: the VM stops only after what must come before."""
    events = (*COPIED, AnotherRound(), Converged(), Converged(), *SYNCHRONISED)
    rounds = (*COPIED, *COPIED, AnotherRound(), Converged(), *SYNCHRONISED)
    outcomes: Counter[Phase] = Counter()
    for order in {*permutations(events), *permutations(rounds)}:
        commit, said = run((*PREPARED, *order), live=True)
        assert commit.phase is phase_after(order), order
        assert commit.failures == {}
        assert Instruction.DISCARD not in said
        # What hosts did is judged once, and no host is told to go on before all are there.
        assert (Instruction.FINISH in said) == (commit.phase is Phase.FINISHING), order
        steps = (Instruction.COPY, Instruction.SYNCHRONISE, Instruction.FINISH)
        judged = [said[at - 1] for at, each in enumerate(said) if each in steps][1:]
        assert set(judged) <= {Instruction.JUDGE}, order
        outcomes[commit.phase] += 1
    assert set(outcomes) == {Phase.COPYING, Phase.SYNCHRONISING, Phase.FINISHING}


def test_whatever_comes_late_a_live_checkpoint_without_failure_is_published() -> None:
    """Each event once more, at any later moment: no host does anything twice for it."""
    usual = run(LIVE, live=True)
    for first, event in enumerate(LIVE):
        for again in range(first + 1, len(LIVE) + 1):
            if _is_due(LIVE[:again], event):
                continue
            order = (*LIVE[:again], event, *LIVE[again:])
            assert run(order, live=True) == usual, order


def _is_due(before: tuple[Event, ...], event: Event) -> bool:
    """Whether `event` is what the machine waits for after `before`, so that it does count."""
    now, _ = run(before, live=True)
    return now.step(event) != (now, [])


def test_a_manifest_that_cannot_be_written_discards() -> None:
    commit, said = run((*STOPPED[:-1], PublishFailed("disk full")), live=False)
    assert commit.phase is Phase.ABANDONED
    assert said[-1] is Instruction.DISCARD
    assert commit.failures == {"m": "disk full"}


def test_what_may_be_published_is_not_discarded() -> None:
    commit, said = run((*STOPPED[:-1], PublishUnknown("h0 is gone")), live=False)
    assert commit.phase is Phase.ABANDONED
    assert Instruction.DISCARD not in said
    assert commit.failures == {"m": "h0 is gone"}


@pytest.mark.parametrize("at", range(len(STOPPED) - 3))
def test_saving_is_halted_before_the_vm_goes_on(at: int) -> None:
    _, said = run((*STOPPED[:at], Cancelled("^C")), live=False)
    last = said[said.index(Instruction.HALT) :]
    assert last in (
        [Instruction.HALT, Instruction.DISCARD],
        [Instruction.HALT, Instruction.RESUME, Instruction.DISCARD],
    )


def test_a_barrier_passed_twice_or_early_counts_once() -> None:
    twice = (Passed("m", Barrier.PREPARED), Passed("m", Barrier.PREPARED))
    assert run(twice, live=True)[0].phase is Phase.PREPARING
    early = (Passed("s", Barrier.SAVED), Passed("m", Barrier.FINISH), Converged(), AnotherRound())
    commit, said = run(early, live=True)
    assert (commit.phase, said) == (Phase.PREPARING, [Instruction.PREPARE])
