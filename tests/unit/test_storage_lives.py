"""The lives of a VM in a store: generations only grow, and the name is one cluster's at a time."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dcres.errors import CheckpointCorrupt, Conflict
from dcres.model.ownership import Claimant
from dcres.storage import layout
from dcres.storage.store.lives import Lives, next_without_store
from dcres.storage.store.store import Store
from tests.support.stored import PAGE_COUNT, memory, take

ME = Claimant("mine", "h0", "machine", "boot")
OTHER = replace(ME, cluster="other")  # on the same machine
FAR = replace(OTHER, machine="far", boot="away")
NOW = "2026-01-01T00:00:00Z"


@pytest.fixture
def lives(tmp_path: Path) -> Lives:
    return Lives(tmp_path / "store", "demo")


class Held:
    """Locks as QEMUs hold them."""

    def __init__(self) -> None:
        self.fds: dict[int, int] = {}

    def begin(
        self, lives: Lives, me: Claimant = ME, above: int = 0, take_over: bool = False
    ) -> int:
        claimed = lives.claim(me, above, NOW, take_over=take_over)
        self.fds[claimed.generation] = claimed.lock
        return claimed.generation

    def end(self, generation: int) -> None:
        os.close(self.fds.pop(generation))


@pytest.fixture
def held() -> Iterator[Held]:
    made = Held()
    yield made
    for generation in list(made.fds):
        made.end(generation)


def files(lives: Lives) -> set[str]:
    return {path.name for path in lives._folder.iterdir() if path.name.startswith(".life")}


def test_generations_only_grow(lives: Lives, held: Held) -> None:
    assert [held.begin(lives) for _ in range(3)] == [1, 2, 3]
    assert held.begin(lives, above=40) == 41
    (lives._folder / layout.GENERATION).unlink()
    assert held.begin(lives) == 42, "the lives' own files tell, too"
    (lives._folder / layout.GENERATION).write_text("7 or 8")
    with pytest.raises(CheckpointCorrupt, match="generation is not a number"):
        held.begin(lives)


def test_a_manifest_s_generation_counts(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    assert store.latest_generation("demo") == 0
    ram = memory(tmp_path / "ram", np.ones(PAGE_COUNT, dtype=np.bool_))
    store.publish(take(store, ram, generation=40))
    assert store.latest_generation("demo") == 40


def test_generations_are_given_out_once(lives: Lives, held: Held) -> None:
    threads = [threading.Thread(target=held.begin, args=(lives,)) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(held.fds) == list(range(1, 17))


def test_the_name_is_another_cluster_s_while_its_qemu_runs(lives: Lives, held: Held) -> None:
    first = held.begin(lives)
    for take_over in (False, True):
        assert "which runs on host h0" in lives.trouble(OTHER, take_over=take_over)
        with pytest.raises(Conflict, match="of another cluster, which runs"):
            held.begin(lives, OTHER, take_over=take_over)
    assert lives.counter() == first, "nothing was changed"
    held.end(first)
    assert lives.trouble(OTHER) == ""
    assert held.begin(lives, OTHER) == first + 1
    assert files(lives) == {".life-2"}


def test_the_lock_lives_as_long_as_a_process_that_was_given_it(lives: Lives, held: Held) -> None:
    """Whoever began the life may end."""
    first = held.begin(lives)
    qemu = subprocess.Popen(["sleep", "60"], pass_fds=[held.fds[first]])
    held.end(first)
    try:
        assert lives.trouble(OTHER)
    finally:
        qemu.kill()
        qemu.wait()
    assert not lives.trouble(OTHER)


def test_who_stops_frees_the_name(lives: Lives, held: Held) -> None:
    first = held.begin(lives, FAR)
    lives.release(FAR, first)
    assert lives.trouble(ME), "its QEMU holds it still"
    held.end(first)
    assert lives.trouble(ME), "from here its end cannot be seen"
    lives.release(ME, first)
    assert files(lives) == {".life-1"}, "it is not ours to release"
    for _ in range(2):
        lives.release(FAR, first)
    assert not lives.trouble(ME)
    assert files(lives) == set()


def test_a_dead_cluster_elsewhere_is_taken_over_when_told(lives: Lives, held: Held) -> None:
    held.end(held.begin(lives, FAR))
    with pytest.raises(Conflict, match="--take-over"):
        held.begin(lives)
    assert held.begin(lives, take_over=True) == 2
    with pytest.raises(Conflict, match=r"generation 1\) is over"):
        lives.renew(FAR, 1, NOW)
    with pytest.raises(Conflict, match="is over"):
        lives.require_latest(1)


def test_a_cluster_goes_on_with_its_own_name(lives: Lives, held: Held) -> None:
    """Also when a QEMU that was cut off still holds the lock of its life."""
    elsewhere = replace(ME, host="h1", machine="another", boot="another")
    cut_off, new = held.begin(lives), held.begin(lives, elsewhere)
    assert files(lives) == {".life-1", ".life-2"}
    assert lives.renew(elsewhere, new, NOW) is None
    with pytest.raises(Conflict, match="is over"):
        lives.renew(ME, cut_off, NOW)
    held.end(new)
    lives.release(elsewhere, new)
    assert lives.trouble(OTHER), "the one that was cut off runs on"
    with pytest.raises(Conflict, match="is over"):
        lives.renew(ME, cut_off, NOW)
    held.end(cut_off)
    held.begin(lives, elsewhere)
    assert files(lives) == {".life-3"}


def test_a_life_that_the_store_does_not_know_is_claimed_when_it_saves(
    lives: Lives, held: Held
) -> None:
    claimed = lives.renew(ME, 7, NOW)
    assert claimed is not None
    held.fds[7] = claimed.lock
    assert (lives.counter(), claimed.generation) == (7, 7)
    assert lives.renew(ME, 7, NOW) is None
    with pytest.raises(Conflict, match="another cluster"):
        lives.renew(OTHER, 8, NOW)


def test_a_damaged_file_is_nobody_s(lives: Lives, held: Held) -> None:
    held.end(held.begin(lives))
    for content in (b"", b"[]", b"{}", b'{"since": 1}', b"\xff"):
        (lives._folder / ".life-1").write_bytes(content)
        assert "--take-over" in lives.trouble(ME)
    (lives._folder / ".life-one").write_bytes(b"not a life")
    assert held.begin(lives, take_over=True) == 2
    assert (lives._folder / ".life-one").exists()


def test_what_the_file_says(lives: Lives, held: Held) -> None:
    held.begin(lives)
    assert json.loads((lives._folder / ".life-1").read_text()) == {
        "boot": "boot",
        "cluster": "mine",
        "host": "h0",
        "machine": "machine",
        "since": NOW,
    }


def test_a_look_changes_nothing(tmp_path: Path) -> None:
    store = tmp_path / "store"
    assert Lives(store, "demo").trouble(ME) == ""
    Lives(store, "demo").release(ME, 1)
    with suppress(Conflict):
        Lives(store, "demo").require_latest(1)
    assert not store.exists()


def test_generations_without_a_store(tmp_path: Path) -> None:
    record = tmp_path / "run" / "demo.generation"
    assert [next_without_store(record, above) for above in (0, 0, 9, 3)] == [1, 2, 10, 11]
