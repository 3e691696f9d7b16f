"""Placements to look at, written as a byte per page."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np

from dcres.api.placement import Placement
from dcres.model.picture import MOST_BUCKETS, summarise
from dcres.model.placement import LEAVING, MAIN, NOWHERE, sub_code

TICK_S = 0.1
CODES = {MAIN: "h0", LEAVING: "h0", sub_code(0): "h1", sub_code(1): "h2"}
_MEANING = {"m": MAIN, "a": sub_code(0), "b": sub_code(1), "~": sub_code(99), ".": NOWHERE}
AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def placement(pages: bytes, age_s: float = 0.1, buckets: int = MOST_BUCKETS) -> Placement:
    """`m`, `a` and `b` are on h0, h1 and h2, `~` is not yet brought, `.` is nowhere."""
    owners = np.array([_MEANING[chr(page)] for page in pages], dtype=np.uint8)
    now = 10**6
    ticks = np.full(owners.size, now + 1 - round(age_s / TICK_S), dtype=np.uint32)
    hosts = {code: host for code, host in CODES.items() if code in owners or code == MAIN}
    picture = summarise(owners, ticks, hosts, buckets=buckets, tick_now=now, tick_s=TICK_S)
    return Placement("box", AT, picture)
