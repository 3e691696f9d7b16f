"""The event loop of the paging processes: epoll and a callback per descriptor.

asyncio costs more than the page-fault path can spend (30 µs a turn against 5), and one thread
that never blocks is all that a pager or a memory server is.

What a guest waits for is done by `dcres/paging/hot.c` before any Python runs, where that module
was built and `DCRES_PLAIN_PAGING` is not set; see docs/decisions/page-fault-path.md.
"""

from __future__ import annotations

import logging
import os
import select
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dcres.paging._hot import Hot

try:
    from dcres.paging import _hot
except ImportError:  # no compiler when dcres was installed
    HOT: type[Hot] | None = None
else:
    HOT = _hot.Hot

log = logging.getLogger("dcres.paging")

READ = select.EPOLLIN
WRITE = select.EPOLLOUT

RECEIVED = 1 << 24  # what the hot path tells when data is in the buffer already
PLAIN = "DCRES_PLAIN_PAGING"
MOST_LOOKS = 64  # in one turn
FILL, PUNCH, EMPTY = range(3)  # ways to carry pages: file to pipe, a hole, pipe to file

# With the events that are ready, or with what the hot path has already done.
Callback = Callable[[Any], None]


def _hot_path(epoll_fd: int) -> Hot | None:
    if HOT is None:
        log.warning("page faults are served by Python alone: dcres was installed without gcc")
    return None if HOT is None or os.environ.get(PLAIN) else HOT(epoll_fd)


class Loop:
    """Descriptors, and whom to call when one is ready."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callback] = {}
        self._done: deque[tuple[int, Any]] = deque()  # by the hot path; before all else
        self._told: deque[tuple[int, Any]] = deque()
        self.hot = _hot_path(self._epoll.fileno())
        """What does simple work without us, if anything."""
        self._poll = self._epoll.poll if self.hot is None else self.hot.turn

    def add(self, fd: int, callback: Callback, events: int = READ) -> None:
        """Call ``callback(events)`` whenever `fd` is ready."""
        self._epoll.register(fd, events)
        self._callbacks[fd] = callback

    def want(self, fd: int, events: int) -> None:
        """Change what is waited for on `fd`; 0 waits for nothing but errors."""
        self._epoll.modify(fd, events)

    def remove(self, fd: int) -> None:
        """Forget `fd`; before it is closed."""
        del self._callbacks[fd]
        # A new connection may have its number in a moment, and must not get what is the old one's.
        self._done = deque(each for each in self._done if each[0] != fd)
        self._told = deque(each for each in self._told if each[0] != fd)
        if self.hot is not None:
            self.hot.forget(fd)
        self._epoll.unregister(fd)

    def turn(self, timeout_s: float) -> bool:
        """Wait, call whoever is ready, and say whether anyone was."""
        self._take(self._poll(timeout_s), only_now=False)
        busy, looks = bool(self._done or self._told), 0
        while waiting := self._done or self._told:
            fd, events = waiting.popleft()
            self._callbacks[fd](events)
            looks += 1
            # Have done what a guest waits for by now, between two calls of ours. Not for ever: much
            # is done only between two turns.
            if (self._done or self._told) and self.hot is not None and looks <= MOST_LOOKS:
                self._take(self.hot.turn(-1.0), only_now=True)
        return busy

    def _take(self, told: Sequence[tuple[int, Any]], *, only_now: bool) -> None:
        """Put what was told in order.

        Faults before all else: their requests are sent, and count before any that we send now.
        Then what the hot path has taken out of a buffer, before anybody reads what comes behind
        it there. Descriptors that are merely ready are told again in the next turn, so those of
        a look in between (`only_now`) are passed over.
        """
        for fd, what in told:
            if isinstance(what, list):
                self._done.appendleft((fd, what))
            elif not isinstance(what, int):
                self._done.append((fd, what))
            elif what == RECEIVED or not only_now:
                self._told.append((fd, what))

    def close(self) -> None:
        """Close the epoll descriptor; the others are their owners'."""
        self._epoll.close()
