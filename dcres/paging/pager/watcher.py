"""Standby: finds out whom the guest reads, which no kernel record tells.

A watched page stays in the RAM file and is taken out of the guest's page table (`Outbox.unmap`,
4 to 11 µs). The guest's next touch maps it again, inside the kernel and without us (1.3 µs
instead of 0.02), and the page map shows it. So nothing has to be undone for a checkpoint, and
who is on standby is no fact that must survive: after a crash everybody is active again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np

from dcres.linux.pagemap import WriteTracker
from dcres.model.pages import Mask, Pages
from dcres.model.policy import Policy
from dcres.paging.pager.outbox import Outbox

STEP_PAGES = 16  # a fault that comes meanwhile waits for a fifth of a millisecond at most
PAGES_PER_TICK = 512  # about 5 % of this process's time at most
LOOK_PAGES = 16384
_CHOSEN_PAGES = 4096
_PAUSE_TICKS = 10


class Watcher:
    """Puts pages on standby, little by little, and tells the policy who was touched there."""

    def __init__(
        self,
        policy: Policy,
        outbox: Outbox,
        tracker: WriteTracker,
        may_leave: Callable[[Pages | slice], Mask],
        now: Callable[[], int],
    ) -> None:
        self._policy = policy
        self._outbox = outbox
        self._tracker = tracker
        self._may_leave = may_leave
        self._now = now
        self._chosen: deque[Pages] = deque()
        self._tick = 0
        self._allowance = 0
        self._choose_at = 0
        self._look_at = 0

    def touched_of(self, pages: Pages) -> Mask:
        """Which of the ascending `pages` were on standby and touched there; they no longer are."""
        touched = self._policy.on_standby[pages]
        touched[touched] = self._tracker.mapped(pages[touched])
        self._policy.touched(pages[touched], self._now())
        return touched

    def step(self) -> Pages:
        """What is due now: look at some, put some on standby. Returns the latter."""
        tick = self._now()
        if tick != self._tick:
            self._tick, self._allowance = tick, PAGES_PER_TICK
            self._look()
        if not self._chosen and tick >= self._choose_at:
            self._choose(tick)
        if not self._chosen or not self._allowance:
            return np.empty(0, dtype=np.int64)
        pages = self._chosen.popleft()
        pages = pages[self._may_leave(pages) & ~self._policy.on_standby[pages]]
        self._allowance = max(0, self._allowance - pages.size)
        if pages.size:
            self._outbox.unmap(pages)
            self._policy.standby(pages, tick)
        return pages

    def _look(self) -> None:
        """Look at one stretch of memory: at a GiB in less than two seconds."""
        watched = self._policy.on_standby
        first = self._look_at if self._look_at < watched.size else 0
        self._look_at = first + LOOK_PAGES
        self.touched_of(first + np.flatnonzero(watched[first : self._look_at]))

    def _choose(self, tick: int) -> None:
        pages = self._policy.suspects(self._may_leave(slice(None)), tick, _CHOSEN_PAGES)
        self._chosen.extend(pages[at : at + STEP_PAGES] for at in range(0, pages.size, STEP_PAGES))
        # Choosing looks at every page, so few at a time would cost more than they are worth.
        self._choose_at = tick + (1 if pages.size else _PAUSE_TICKS)
