"""Homes as clusters leave them, without a cluster."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from dcres.actors.ray.local_cluster import _new_state
from dcres.actors.ray.local_home import Home, State, own_folders
from dcres.linux.marks import STORE_MARK
from dcres.linux.removal import OwnFolder

CHECKPOINT = "box-20260102-030405-abcd"


def state_of(home: Path, **changes: Any) -> State:
    """The record of a cluster in `home`, with its folders for memory and others beside the home."""
    beside = home.parent
    state = _new_state(beside, home / "store", 1 << 20, False)
    found = replace(state, **changes)
    ram = beside / f"dcres-{found.id}"
    return replace(found, temp=f"{ram}-temp", ram=str(ram))


def left_by_a_cluster(home: Path, **changes: Any) -> Path:
    """All that a cluster leaves that was killed, and a checkpoint; with a folder of a user's."""
    place, state = Home(home), state_of(home, **changes)
    home.mkdir(exist_ok=True)
    with place.claimed():
        place.write(state)
        place.token.write_text("secret")
        for path, mark in own_folders(place, state).items():
            (OwnFolder.new(path, mark).path / "h0").mkdir()
    (place.store / "box" / CHECKPOINT).mkdir(parents=True)
    (place.store / STORE_MARK).write_text("{}")
    (home / "photos").mkdir()
    return home
