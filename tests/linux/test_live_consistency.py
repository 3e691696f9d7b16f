"""Live checkpoints are points in time: shown over many, and shown to be able to fail."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from dcres.storage.store.store import Store
from tests.support import sabotage
from tests.support.live import LiveCheckpoints, Writes, faults_in, pages_of_writes
from tests.support.paging import rig
from tests.support.speed import patience

pytestmark = pytest.mark.linux

PAGES = 2048
SUBS = (1200, 1200)
MOST = 250  # a handful is enough, unless others keep the writer from writing at the right moment


@pytest.mark.timeout(patience(600))
def test_200_live_checkpoints_under_paging_are_points_in_time(
    tmp_path: Path, writer_program: Path
) -> None:
    store = Store(tmp_path / "store")
    with rig(tmp_path, writer_program, PAGES, 600, SUBS) as paged:
        paged.writer.tell("causal 600")
        checkpoints = LiveCheckpoints(paged, store)
        writes = Writes(PAGES)
        before = paged.status()
        for number in range(200):
            manifest = checkpoints.take(number)
            memory = checkpoints.memory(manifest)
            assert faults_in(memory, writes) == []
            assert store.verify(manifest.checkpoint).ok
            checkpoints.require_size(manifest, memory)
            store.delete(manifest.checkpoint)
        after = paged.status()
    assert after["pages_in"] - before["pages_in"] > 2000
    assert after["pages_out"] - before["pages_out"] > 2000


@pytest.mark.timeout(patience(600))
@pytest.mark.parametrize("guard", ["arrivals", "departures", "last scan", "drain"])
def test_without_one_guard_the_fault_is_seen(
    guard: str, tmp_path: Path, writer_program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "store")
    if guard != "drain":  # a guard of the pager; the drain is ordered from outside
        monkeypatch.setenv("PYTHONPATH", str(Path(next(iter(sabotage.__path__)))))
        monkeypatch.setenv("DCRES_TEST_SABOTAGE", guard)
    with rig(tmp_path, writer_program, PAGES, 600, SUBS) as paged:
        paged.writer.tell("causal 600")
        checkpoints = LiveCheckpoints(paged, store, without=guard)
        writes = Writes(PAGES)
        for number in range(MOST):
            manifest = checkpoints.take(number)
            found = faults_in(checkpoints.memory(manifest), writes)
            shutil.rmtree(tmp_path / "store")
            if found:
                return
    pytest.fail(f"{MOST} checkpoints without {guard} showed no fault")


def test_what_is_expected_of_pages_does_not_depend_on_what_was_asked_before() -> None:
    writes = Writes(PAGES)
    for latest in (1, 5000, 5001, 20_000, 300):
        expected = np.zeros(PAGES, dtype=np.uint64)
        numbers = np.arange(1, latest + 1, dtype=np.uint64)
        expected[pages_of_writes(numbers, PAGES)] = numbers  # of equal places the last counts
        assert (writes.expected_at(latest) == expected).all()
