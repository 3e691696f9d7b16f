"""Waiting for something to become true, with a deadline and words for when it does not."""

from __future__ import annotations

import time
from collections.abc import Callable


def until(predicate: Callable[[], object], timeout_s: float = 10.0, what: str = "it") -> None:
    """Poll `predicate` every 10 ms until it is true; AssertionError after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not predicate():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for: {what}"
        time.sleep(0.01)
