"""How a pager comes to a standstill, for a checkpoint: it stops in two steps and goes on.

::

    RUNNING ──quiesce──▶ QUIET ──freeze──▶ FROZEN ──thaw──▶ RUNNING
       │                                                  (thaw works from QUIET, too)
       └── a page is gone ──▶ LOST: serves nothing; the guest waits and never reads zeros

QUIET sends no page out and has none on the way, but answers faults: saving the VM core can
touch guest memory. FROZEN answers none, so that placement does not change.

Both steps take a while, so their answers are *promises*: each is kept in the pager's loop once
what it waits for has come about.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from dcres.errors import PagesLost, PagingError
from dcres.paging.orders import Counters, Frozen, Reply
from dcres.paging.pager.evictor import Evictor
from dcres.paging.pager.faults import FaultHandler
from dcres.paging.pager.mover import Mover
from dcres.paging.status import Counts
from dcres.paging.transport.link import Link, LinkState

LINK_PATIENCE_S = 2.0  # for a link that broke; the VM is paused meanwhile


class PagerState(StrEnum):
    """See the module's picture."""

    RUNNING = "running"
    QUIET = "quiet"
    FROZEN = "frozen"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class _Promise:
    """An order whose answer has to wait: `keep` answers it once it is `due`."""

    due: Callable[[], bool]
    keep: Callable[[], None]
    reply: Reply


class Standstill:
    """The state of a pager, and the orders that change it.

    What moves pages is told here to stop and to go on; the pager itself asks `answers_faults`.
    """

    def __init__(
        self, faults: FaultHandler, evictor: Evictor, mover: Mover, now: Callable[[], int]
    ) -> None:
        self._faults = faults
        self._evictor = evictor
        self._mover = mover
        self._now = now
        self._links: Sequence[Link] = ()
        self._promises: list[_Promise] = []
        self.state = PagerState.RUNNING
        self.lost_why = ""

    def set_links(self, links: Sequence[Link]) -> None:
        """The sub hosts from now on."""
        self._links = links

    @property
    def answers_faults(self) -> bool:
        """Whether the guest gets its pages; the pager asks between two turns of its loop."""
        return self.state in (PagerState.RUNNING, PagerState.QUIET)

    def require_alive(self) -> None:
        """Raises PagesLost when the VM is lost."""
        if self.state is PagerState.LOST:
            raise PagesLost(self.lost_why)

    def require_frozen(self) -> None:
        """Raises PagingError unless nothing moves and no fault is answered."""
        if self.state is not PagerState.FROZEN:
            raise PagingError(f"the pager is {self.state}, not frozen")

    def lose(self, why: str) -> None:
        """A page is gone: for good."""
        self.state = PagerState.LOST
        self.lost_why = why

    def quiesce(self, reply: Reply) -> None:
        """Send nothing out any more; answer once nothing is on its way, in either direction.

        Neighbours that the guest's last misses have asked for still come then, and were not
        moved for the checkpoint. Nobody waits for a link that broke.
        """
        self.require_alive()
        self._stop_moving()
        self.state = PagerState.QUIET
        self._promises.append(
            _Promise(
                lambda: self._drained() and (not self._faults.fetching or bool(self._away())),
                lambda: reply(self.counters()),
                reply,
            )
        )

    def freeze(self, reply: Reply) -> None:
        """Answer no faults any more, once those under way are answered and all hosts agree.

        A link that broke has a moment to come back; without it the answer is a failure.
        """
        self.require_alive()
        self._stop_moving()
        patience_until = time.monotonic() + LINK_PATIENCE_S

        def due() -> bool:
            back = not self._away() or time.monotonic() > patience_until
            return self._drained() and self._settled() and back

        self._promises.append(_Promise(due, lambda: self._freeze_now(reply), reply))

    def thaw(self) -> None:
        """Go on as if nothing had been ordered."""
        self.require_alive()
        self._promises.clear()
        self._evictor.enabled = self._mover.enabled = True
        self.state = PagerState.RUNNING

    def keep_promises(self) -> None:
        """Answer the orders whose time has come; in every turn of the loop."""
        lost = self.state is PagerState.LOST
        for promise in [each for each in self._promises if lost or each.due()]:
            self._promises.remove(promise)
            if lost:
                promise.reply(PagesLost(self.lost_why))
            else:
                promise.keep()

    def counters(self) -> Counters:
        """What was done so far."""
        return Counters(**self.counts())

    def counts(self) -> Counts:
        """The same by name, for answers that hold more."""
        return Counts(
            pages_in=self._faults.pages_in,
            pages_out=self._evictor.pages_out,
            zero_pages=self._faults.zero_pages,
            taken_back=self._faults.taken_back,
            faults=self._faults.faults,
        )

    def _stop_moving(self) -> None:
        self._evictor.enabled = self._mover.enabled = False

    def _drained(self) -> bool:
        return self._evictor.drained and self._mover.drained

    def _settled(self) -> bool:
        for link in self._links:
            link.flush_releases()
        return not self._faults.fetching and all(link.settled for link in self._links)

    def _away(self) -> list[str]:
        return [each.sub.host for each in self._links if each.state is not LinkState.READY]

    def _freeze_now(self, reply: Reply) -> None:
        if missing := self._away():  # what they hold is not known to agree with the table
            reply(PagingError(f"the link to {', '.join(missing)} is down"))
            return
        self.state = PagerState.FROZEN
        self._evictor.note_writes()
        reply(Frozen(tick=self._now(), **self.counts()))
