"""Increments under paging are points in time, whole by themselves, and small.

The hosts' own actors save a writer whose pages travel; what is restored from a chain is compared
with what the writer had written at that moment, exactly.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from dcres.errors import Conflict
from dcres.storage.format.manifest import Manifest, Mode
from dcres.storage.format.merged import is_to_be_merged
from dcres.storage.layout import MOST_SEGMENTS
from dcres.storage.store.store import Store
from tests.support.live import LiveCheckpoints, Writes, faults_in
from tests.support.paging import Rig, rig
from tests.support.speed import patience
from tests.support.wait import until

pytestmark = pytest.mark.linux

PAGES, LIMIT, SUBS = 2048, 600, (1200, 1200)
ROUNDS = int(os.environ.get("DCRES_ROUNDS", "2"))  # more of them make a campaign
TAKEN = 12 * ROUNDS

Words = npt.NDArray[np.uint64]


@pytest.fixture
def paged(tmp_path: Path, writer_program: Path) -> Iterator[Rig]:
    with rig(tmp_path, writer_program, PAGES, LIMIT, SUBS) as made:
        yield made


@pytest.mark.timeout(patience(60 * ROUNDS + 600))
def test_increments_are_points_in_time(paged: Rig, tmp_path: Path) -> None:
    """Of a writer that goes on; pagers are killed, segments merged, and bases deleted."""
    store, rng = Store(tmp_path / "store"), random.Random(5)
    checkpoints, writes = LiveCheckpoints(paged, store), Writes(PAGES)
    paged.writer.tell("causal 600")
    upon = 0
    kept: list[str] = []
    for number in range(TAKEN):
        mode = Mode.STOP if number % 7 == 3 else Mode.LIVE
        manifest = checkpoints.increment(number, mode)
        kept.append(manifest.checkpoint)
        checkpoints.compact(manifest)
        assert faults_in(checkpoints.memory(manifest), writes) == []
        assert store.verify(manifest.checkpoint, strict=True).ok
        upon += manifest.base is not None
        if number % 9 == 5:
            paged.kill("pager")
            paged.start_pager()
        while len(kept) > rng.randrange(1, 6):
            delete(store, kept.pop(0))
    assert upon > TAKEN // 2
    for name in kept:
        assert store.verify(name, strict=True).ok


def delete(store: Store, checkpoint: str) -> None:
    """Once it is not in use any more: its segments may be merged just now."""

    def deleted() -> bool:
        try:
            store.delete(checkpoint)
        except Conflict:
            return False
        return True

    until(deleted, 30)


def test_only_what_changed_is_saved(paged: Rig, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    checkpoints = LiveCheckpoints(paged, store)
    paged.writer.ask("fill")
    first = checkpoints.increment(0)
    assert (first.base, first.pages_saved, first.pages_changed) == (None, PAGES, PAGES)
    assert checkpoints.why_full
    paged.writer.ask("write 1 20")
    paged.writer.ask("read 1 2048")  # everything comes and goes
    second = checkpoints.increment(1)
    assert second.base == first.checkpoint
    assert (second.pages, second.pages_saved, second.pages_changed) == (PAGES, 20, 20)
    assert sum(part.bytes_written for part in second.hosts) <= 30 * 4096
    before, after = (_whole(checkpoints, each) for each in (first, second))
    assert int((before != after).any(axis=1).sum()) == 20
    third = checkpoints.increment(2)
    assert (third.pages_saved, third.pages_changed) == (0, 0)
    store.delete(first.checkpoint)
    store.delete(second.checkpoint)
    assert store.verify(third.checkpoint, strict=True).ok
    assert np.array_equal(_whole(checkpoints, third), after)


def _whole(checkpoints: LiveCheckpoints, manifest: Manifest) -> Words:
    whole: Words = np.maximum.reduce(checkpoints.memory(manifest))
    return whole


def test_with_segments_that_are_merged_a_chain_goes_on(paged: Rig, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    checkpoints = LiveCheckpoints(paged, store)
    paged.writer.ask("fill")
    kept: list[Manifest] = []
    for number in range(TAKEN):
        paged.writer.ask(f"write {1 + 40 * number} 60")
        kept.append(manifest := checkpoints.increment(number))
        assert (manifest.base is None) == (number == 0), checkpoints.why_full
        checkpoints.compact(manifest)
        if manifest.most_segments > MOST_SEGMENTS - 4:  # on a machine that is busy elsewhere
            until(partial(are_merged, store, manifest), 30, "segments to be merged")
    assert max(each.most_segments for each in kept) < MOST_SEGMENTS
    last = kept.pop()
    for each in kept:
        delete(store, each.checkpoint)
    assert store.verify(last.checkpoint, strict=True).ok
    places = sum(segment.places for part in last.hosts for segment in part.segments or ())
    assert places <= PAGES + MOST_SEGMENTS * 60, "what was superseded is gone"


def are_merged(store: Store, manifest: Manifest) -> bool:
    """Nothing is left for a compaction to do."""
    merged_part = store.continuing.merged_part
    return not any(
        is_to_be_merged(part.pages, part.segments or (), merged_part(manifest, part.host))
        for part in manifest.hosts
    )


def test_after_so_many_there_is_a_full_one(paged: Rig, tmp_path: Path) -> None:
    checkpoints = LiveCheckpoints(paged, Store(tmp_path / "store"))
    paged.writer.ask("write 1 64")
    full = {}
    for number in range(MOST_SEGMENTS + 2):
        if checkpoints.increment(number).base is None:
            full[number] = checkpoints.why_full
    assert list(full) == [0, MOST_SEGMENTS]
    assert f"has {MOST_SEGMENTS} segments that were not merged" in full[MOST_SEGMENTS]
