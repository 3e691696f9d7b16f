"""How slow this machine is, measured once per run: what limits that guard against hanging are
multiplied by.

The measure is what tests spend most of their time on: Python at work, and processes that start. It
is taken under the load that is there, and handed on in the environment, so that all processes of a
run have the same. Load that comes later is provided for by `_MARGIN`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

VARIABLE = "DCRES_TESTS_SLOWNESS"
_MARGIN = 2.0
_REFERENCE_S = 0.45  # what `_work` takes on two quiet cores of a server of 2023
_TURNS = 8_000_000
_PROCESSES = 25


def patience(seconds: float) -> float:
    """`seconds` that are plenty on a quiet machine, for this one: a limit against hanging."""
    return seconds * SLOWNESS


def _work() -> None:
    total = 0
    for number in range(_TURNS):
        total ^= number
    for _ in range(_PROCESSES):
        subprocess.run([sys.executable, "-S", "-c", ""], check=True)


def _measured() -> float:
    given = os.environ.get(VARIABLE)
    if given is None:
        began = time.monotonic()
        _work()
        given = str(max(1.0, (time.monotonic() - began) / _REFERENCE_S) * _MARGIN)
        os.environ[VARIABLE] = given
    return float(given)


SLOWNESS = _measured()
