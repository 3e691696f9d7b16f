"""What the witness in the guest says on its console, read from text that may hold anything."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

# A line counts once its end is there: a number cut off in the middle would be a wrong number.
_START = re.compile(r"WITNESS start\s*\r?\n")
_READY = re.compile(r"WITNESS ready bytes=(\d+) files=(\d+)\s*\r?\n")
_TICK = re.compile(r"WITNESS tick=(\d+) checks=(\d+) failures=(\d+)\s*\r?\n")
_FAILURE = re.compile(r"WITNESS FAILURE (\S[^\r\n]*)\r?\n")


@dataclass(frozen=True, slots=True)
class WitnessReport:
    """The witness's last word, and what its console shows on the way there.

    `ready_bytes` is how much it filled, None until it has. `boots` counts starts, so more than
    one means that the guest crashed. `ticks_lost` counts numbers that were passed over between
    two ticks; going back, as after a restore, loses none.
    """

    ready_bytes: int | None = None
    tick: int = 0
    checks: int = 0
    failures: int = 0
    boots: int = 0
    ticks_lost: int = 0
    failed: tuple[str, ...] = ()

    @property
    def ready(self) -> bool:
        """Whether memory is filled and checks go on."""
        return self.ready_bytes is not None


def parse(console: str) -> WitnessReport:
    """The report in a console's whole text so far."""
    ready = _READY.findall(console)
    ticks = [tuple(map(int, found)) for found in _TICK.findall(console)]
    tick, checks, failures = ticks[-1] if ticks else (0, 0, 0)
    numbers = [number for number, _, _ in ticks]
    return WitnessReport(
        ready_bytes=int(ready[-1][0]) if ready else None,
        tick=tick,
        checks=checks,
        failures=failures,
        boots=len(_START.findall(console)),
        ticks_lost=sum(max(after - before - 1, 0) for before, after in pairwise(numbers)),
        failed=tuple(_FAILURE.findall(console)),
    )


def read(console: Path) -> WitnessReport:
    """The report in a console log; an empty one when the file is not there yet."""
    try:
        return parse(console.read_bytes().decode(errors="replace"))
    except FileNotFoundError:
        return WitnessReport()
