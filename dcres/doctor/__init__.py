"""What this host can do for dcres, found out by doing it.

`gather` tries things and writes down what happened; `evaluate` turns these facts into checks
and is pure. A check that fails names the remedy.
"""

from __future__ import annotations

from dcres.config import HostSettings
from dcres.doctor.checks import Check, Status, as_json, evaluate
from dcres.doctor.facts import Facts, gather

__all__ = ["Check", "Facts", "Status", "as_json", "evaluate", "examine", "gather"]


def examine(settings: HostSettings) -> list[Check]:
    """`gather` and `evaluate`: what ``dcres doctor`` shows."""
    return evaluate(gather(settings))
