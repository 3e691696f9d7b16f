"""Takes one guard out of a paging process, to show that the tests notice.

Put first on PYTHONPATH of a process that is started with DCRES_TEST_SABOTAGE.
"""

from __future__ import annotations

import os
from typing import Any


def arrivals_are_not_recorded() -> None:
    from dcres.paging.evictor import Evictor

    def arrived(self: Any, first: int, stop: int, *, wanted: bool = True) -> None:
        self.resident += stop - first

    Evictor.arrived = arrived  # type: ignore[method-assign]


def departures_are_not_recorded() -> None:
    from dcres.paging.evictor import NOBODY_LOOKS, Evictor

    honest = Evictor.step

    def step(self: Any) -> bool:
        changes, self.changes = self.changes, NOBODY_LOOKS
        try:
            return honest(self)
        finally:
            self.changes = changes

    Evictor.step = step  # type: ignore[method-assign]


def writes_are_looked_for_only_before_the_stop() -> None:
    from dcres.paging.evictor import Evictor

    honest = Evictor.note_writes

    def note_writes(self: Any) -> None:
        if self.enabled:  # it is not from the drain on
            honest(self)

    Evictor.note_writes = note_writes  # type: ignore[method-assign]


_KNOWN = {
    "last scan": writes_are_looked_for_only_before_the_stop,
    "arrivals": arrivals_are_not_recorded,
    "departures": departures_are_not_recorded,
}

if "DCRES_TEST_SABOTAGE" in os.environ:
    _KNOWN[os.environ["DCRES_TEST_SABOTAGE"]]()
