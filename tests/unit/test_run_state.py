"""Every run state of QEMU: told, kept over a checkpoint, and what is to be done about it."""

from __future__ import annotations

import pytest

from dcres.model.phase import HostState, VmPhase, in_the_way, is_at_rest, judged
from dcres.model.run_state import (
    HELD,
    RunState,
    advice,
    is_held,
    is_trouble,
    kept,
    no_run,
    no_save,
    runs_restored,
    told,
)

SAVABLE = {
    RunState.RUNNING,
    RunState.PAUSED,
    RunState.PRELAUNCH,
    RunState.IO_ERROR,
    RunState.GUEST_PANICKED,
    RunState.WATCHDOG,
}


@pytest.mark.parametrize("now", RunState)
def test_without_a_checkpoint_qemu_is_believed(now: RunState) -> None:
    assert told(now, None) is now
    assert not is_held(now, None)
    assert kept(now, None) is None


@pytest.mark.parametrize("found", sorted(SAVABLE - {RunState.RUNNING}))
def test_what_stood_still_is_told_and_let_stand_after_its_core_was_saved(found: RunState) -> None:
    """Also before that, and after a second checkpoint and a restart."""
    for now in (found, RunState.FINISH_MIGRATE, RunState.POSTMIGRATE):
        assert told(now, found) is found
        assert not is_held(now, found)
        once = kept(now, found)
        assert once is (None if now is found else found)
        assert told(now, once) is found
        assert kept(now, once) is once


@pytest.mark.parametrize("now", RunState)
def test_a_vm_that_ran_goes_on_only_from_where_a_checkpoint_leaves_it(now: RunState) -> None:
    """Where its disk failed meanwhile, or its guest ended, that is not undone."""
    assert is_held(now, RunState.RUNNING) is (now in HELD)
    assert kept(now, RunState.RUNNING) is None


@pytest.mark.parametrize("state", RunState)
def test_what_is_said_of_each(state: RunState) -> None:
    assert (no_save("box", state) == "") is (state in SAVABLE)
    for sentence in (no_save("box", state), no_run("box", state), advice("box", state)):
        assert sentence == sentence.strip().rstrip(".")
    if state in SAVABLE:
        assert no_run("box", state) == "", "what can be saved can run again"
    if not no_run("box", state) and state not in (RunState.RUNNING, RunState.COLO):
        assert "`dcres resume box`" in advice("box", state) or is_trouble(state)
    assert not (is_trouble(state) and not advice("box", state))


def test_what_runs_once_it_is_restored() -> None:
    assert {each for each in SAVABLE if runs_restored(each)} == {
        RunState.RUNNING,
        RunState.IO_ERROR,
    }


A, OFF, T, S, L = (
    HostState.ANSWERS,
    HostState.OFF,
    HostState.TROUBLED,
    HostState.SILENT,
    HostState.LOST,
)


@pytest.mark.parametrize(
    ("states", "phase"),
    [
        ((A, A, A), VmPhase.RUNNING),
        ((T, A, A), VmPhase.RUNNING),
        ((A, S, A), VmPhase.UNKNOWN),
        ((S, S, S), VmPhase.UNKNOWN),
        ((S, L, A), VmPhase.LOST),
        ((L, S, S), VmPhase.LOST),
        ((OFF, A, A), VmPhase.OFF),
        ((OFF, L, S), VmPhase.OFF),
    ],
)
def test_a_proof_outweighs_silence_and_the_end_of_the_guest_both(
    states: tuple[HostState, ...], phase: VmPhase
) -> None:
    assert judged(states) is phase
    assert is_at_rest(phase)


@pytest.mark.parametrize("phase", VmPhase)
def test_only_what_nobody_can_use_makes_way(phase: VmPhase) -> None:
    free = phase in (VmPhase.ABSENT, VmPhase.OFF, VmPhase.LOST)
    assert (in_the_way("box", phase) == "") is free
    assert free or "`dcres stop box`" in in_the_way("box", phase)
