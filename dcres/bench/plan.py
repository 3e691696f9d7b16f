"""How long the planner takes for 1 TiB of memory, and how much memory it needs for it.

A child process makes up the placement of a VM over eight hosts, with most accesses to few pages
and a tenth of memory nowhere, and plans it onto six hosts of other sizes, of which each reads
one old part from its own disk. The peak is that of the whole process, inputs and result
included. A short run plans 64 GiB and multiplies: too much for the peak, because the planner's
working space does not grow with memory.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from dcres.bench.result import Aim, Bench, Direction, Figure, Ratio, Row, Setup
from dcres.model.history import Ticks
from dcres.model.pages import PAGE_SIZE
from dcres.model.placement import SAVED_NOWHERE, Owners
from dcres.model.plan import plan

TIB = 1 << 40
_TIMEOUT_S = 600.0
_PARTS, _TARGETS = 8, 6
_SHARES = (0.25, 0.25, 0.2, 0.15, 0.1, 0.1)  # of memory, the main host first
_CHUNK_PAGES = 1 << 20
_REGION_PAGES = 512  # neighbours that are about as hot, and on the same host: 2 MiB
_NOW = 100_000  # the tick of the checkpoint; more than 16 bits


def measure(setup: Setup) -> list[Row]:
    """Every round's rows."""
    memory = TIB >> 4 if setup.quick else TIB
    rows = []
    for at in range(2 if setup.quick else 5):
        setup.say(f"round {at + 1}: {memory >> 30} GiB")
        found = _in_child(memory // PAGE_SIZE)
        seconds = found["seconds"] * (TIB // memory)
        peak = found["start_bytes"] + found["growth_bytes"] * (TIB // memory)
        rows.append(Row("plan_1TiB", at, seconds, "s", found))
        rows.append(Row("peak_1TiB", at, peak, "bytes"))
        rows.append(Row("second", at, 1.0, "s"))
        rows.append(Row("byte", at, 1.0, "bytes"))
    return rows


def _in_child(pages: int) -> dict[str, Any]:
    order = f"from dcres.bench import plan; plan.child({pages})"
    done = subprocess.run(
        [sys.executable, "-c", order],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=_TIMEOUT_S,
    )
    return dict(json.loads(done.stdout))


def child(pages: int) -> None:
    """Plan made-up memory of so many pages, and print what it took as JSON."""
    start = _own_bytes("VmRSS")
    placement, ticks = _memory(pages)
    capacities = [int(share * pages) for share in _SHARES]
    holds = np.eye(_PARTS, _TARGETS, dtype=np.bool_)
    began, cpu_began = time.monotonic(), time.process_time()
    found = plan(placement, ticks, capacities, holds)
    answer = {
        "seconds": time.monotonic() - began,
        "cpu_seconds": time.process_time() - cpu_began,
        "start_bytes": start,
        "growth_bytes": _own_bytes("VmHWM") - start,
        "pages": pages,
        "moved_pages": found.moved_pages,
    }
    print(json.dumps(answer))


def _own_bytes(field: str) -> int:
    """A size from /proc; ru_maxrss would not do: it counts what the parent had at the fork."""
    match = re.search(rf"^{field}:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    return int(match[1]) << 10 if match else 0


def _memory(pages: int) -> tuple[Owners, Ticks]:
    """Placement and ticks: what was hot is on the main host, the rest elsewhere in 2 MiB runs."""
    rng = np.random.default_rng(1)
    placement = np.empty(pages, dtype=np.uint8)
    ticks = np.empty(pages, dtype=np.uint32)
    for first in range(0, pages, _CHUNK_PAGES):
        at = slice(first, min(first + _CHUNK_PAGES, pages))
        count = at.stop - at.start
        regions = -(-count // _REGION_PAGES)
        age = np.repeat(rng.pareto(1.2, regions) + 0.1, _REGION_PAGES)[:count]
        ticks[at] = _NOW / (1 + age * rng.exponential(1, count))
        where = rng.integers(1, _PARTS, regions, dtype=np.uint8)
        where[rng.random(regions) < 0.1] = SAVED_NOWHERE
        placed = np.repeat(where, _REGION_PAGES)[:count]
        placed[(placed != SAVED_NOWHERE) & (ticks[at] > _NOW * 0.9)] = 0
        placement[at] = placed
    return placement, ticks


BENCH = Bench(
    name="plan",
    about="planning a restore of 1 TiB from eight hosts onto six",
    measure=measure,
    ratios={
        "seconds_1TiB": Ratio("plan_1TiB", "second"),
        "peak_bytes_1TiB": Ratio("peak_1TiB", "byte"),
    },
    aims=(
        Aim("seconds_1TiB", Direction.AT_MOST, 10),
        Aim("peak_bytes_1TiB", Direction.AT_MOST, 4 << 30),
    ),
    figures=(
        Figure("planning 1 TiB", "s", ("plan_1TiB",)),
        Figure("memory for it", "bytes", ("peak_1TiB",), "tab:orange"),
    ),
)
