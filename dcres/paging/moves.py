"""The mover's orders on tmpfs: rows as `dcres.model.moves` makes them, ``int64``, little-endian."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from dcres.errors import PagingError
from dcres.linux.files import open_own
from dcres.model.moves import NO_MOVES, Moves


def save(path: Path, rows: Moves) -> None:
    """Replace the orders (mode 0600) in one step."""
    fresh = path.with_suffix(".new")
    fd = open_own(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    with os.fdopen(fd, "wb") as file:
        file.write(np.ascontiguousarray(rows, dtype="<i8").tobytes())
    fresh.rename(path)


def load(path: Path) -> Moves:
    """The orders; none when there is no file. Raises PagingError for half a row."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return NO_MOVES
    if len(data) % 32:
        raise PagingError(f"{path} does not hold whole rows of moves")
    return np.frombuffer(data, dtype="<i8").reshape(-1, 4).astype(np.int64)
