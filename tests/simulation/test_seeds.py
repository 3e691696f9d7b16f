"""Runs by their seeds: 1,000 of them, or those that DCRES_SEEDS names (``7``, ``0-5000``)."""

from __future__ import annotations

import os

import pytest

from dcres.errors import DcresError
from tests.simulation.clock import Stuck
from tests.simulation.run import Broken, Plan, Run

_BATCH = 50
_FEW = 4  # traces that are shown
# Faults that are not mended yet: the seed that shows each, and what it says. Take out what is
# mended, and look again after each change of the coordinator: other seeds then show them.
KNOWN: dict[int, str] = {}


def _seeds() -> list[range]:
    """In batches: a test for each seed would take longer than the seed."""
    first, _, last = os.environ.get("DCRES_SEEDS", "0-999").partition("-")
    begin, end = int(first), int(last or first) + 1
    return [range(at, min(at + _BATCH, end)) for at in range(begin, end, _BATCH)]


@pytest.mark.parametrize("seeds", _seeds(), ids=lambda seeds: f"{seeds.start}-{seeds.stop - 1}")
def test_what_must_hold_holds_after_every_seed(seeds: range) -> None:
    broken: list[str] = []
    named = "DCRES_SEEDS" in os.environ
    for seed in (seed for seed in seeds if named or seed not in KNOWN):
        run = Run(seed, Plan())
        try:
            run.go()
        except Exception as error:
            broken.append(f"seed {seed}: {error!r}\n{run.how_to_repeat}")
    assert not broken, f"{len(broken)} of {len(seeds)} seeds\n" + "\n\n".join(broken[:_FEW])


@pytest.mark.parametrize("seed", KNOWN)
def test_a_known_fault_is_there_still(seed: int) -> None:
    with pytest.raises((Broken, Stuck, DcresError), match=KNOWN[seed]):
        Run(seed, Plan()).go()


def test_a_seed_is_repeated_exactly() -> None:
    """What every host, client and fault did, and when."""
    for seed in range(5):
        first, second = Run(seed, Plan()).go(), Run(seed, Plan()).go()
        assert first.clock.trace == second.clock.trace
    assert Run(1, Plan()).go().clock.trace != Run(2, Plan()).go().clock.trace


def test_runs_do_what_they_are_for() -> None:
    """Checkpoints are taken and given up, hosts are lost, coordinators die: in a few seeds, too."""
    traces = "\n".join("\n".join(Run(seed, Plan()).go().clock.trace) for seed in range(60))
    for what in (
        "checkpoint live", "checkpoint stop", ": done", "was given up", "restore True", "is lost",
        "the coordinator of vm0 is killed", "is cut off", "is full", "QEMU of vm0 is killed",
        "its actor dies in", "move_into", "settle_moves", ".abandon", "was cancelled",
    ):  # fmt: skip
        assert what in traces, what
