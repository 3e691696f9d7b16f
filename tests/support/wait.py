"""Waiting for something to become true, with a deadline and words for when it does not."""

from __future__ import annotations

import time
from collections.abc import Callable

from tests.support.speed import patience

_OFTEN_S = 0.01
_SELDOM_S = 0.05
_PATIENCE_S = 1.0


def until(predicate: Callable[[], object], timeout_s: float = 30.0, what: str = "it") -> None:
    """Poll `predicate` until it is true; AssertionError after `patience` for `timeout_s`.

    Every 10 ms at first. What takes long is what others are busy with, and to ask them keeps them
    from it: after a second every 50 ms.
    """
    limit_s = patience(timeout_s)
    began = time.monotonic()
    while not predicate():
        waited = time.monotonic() - began
        assert waited < limit_s, f"waited {limit_s:.0f} s for: {what}"
        time.sleep(_OFTEN_S if waited < _PATIENCE_S else _SELDOM_S)
