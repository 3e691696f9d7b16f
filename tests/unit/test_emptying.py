"""A store is emptied whole, or not at all while somebody uses it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from dcres.errors import Conflict
from dcres.model.ownership import Claimant
from dcres.storage.store import emptying
from dcres.storage.store.store import Store
from tests.support.stored import PAGE_COUNT, memory, take

OTHER = Claimant("other", "h0", "machine", "boot")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """With a checkpoint."""
    made = Store(tmp_path / "store")
    made.publish(take(made, memory(tmp_path / "ram", np.ones(PAGE_COUNT, dtype=np.bool_))))
    return made


def paths(store: Store) -> list[Path]:
    return sorted(store.root.rglob("*"))


def test_not_while_a_vm_of_another_cluster_runs(store: Store) -> None:
    """Without its file nobody would see that it runs, and its name would be free."""
    claimed = store.lives("vm").claim(OTHER, 0, "now")
    before = paths(store)
    with pytest.raises(Conflict, match="VM vm runs and has its checkpoints in"):
        emptying.empty(store.root)
    assert paths(store) == before
    os.close(claimed.lock)
    assert emptying.empty(store.root)
    assert not store.root.exists()


def test_not_while_a_checkpoint_is_in_use(store: Store, tmp_path: Path) -> None:
    (taken,) = store.list()
    more = memory(tmp_path / "more", np.ones(PAGE_COUNT, dtype=np.bool_))
    store.publish(take(store, more, vm="a"))
    before = paths(store)
    with store.pin(taken.checkpoint), pytest.raises(Conflict, match="is in use"):
        emptying.empty(store.root)
    assert paths(store) == before
    assert emptying.empty(store.root)
