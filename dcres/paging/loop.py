"""The event loop of the paging processes: epoll and a callback per descriptor.

asyncio costs more than the page-fault path can spend (30 µs a turn against 5), and one thread
that never blocks is all that a pager or a memory server is.
"""

from __future__ import annotations

import select
from collections.abc import Callable

READ = select.EPOLLIN
WRITE = select.EPOLLOUT

Callback = Callable[[int], None]


class Loop:
    """Descriptors, and whom to call when one is ready."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callback] = {}

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
        self._epoll.unregister(fd)

    def turn(self, timeout_s: float) -> bool:
        """Wait, call whoever is ready, and say whether anyone was."""
        ready = self._epoll.poll(timeout_s)
        for fd, events in ready:
            callback = self._callbacks.get(fd)  # an earlier callback may have removed it
            if callback is not None:
                callback(events)
        return bool(ready)

    def close(self) -> None:
        """Close the epoll descriptor; the others are their owners'."""
        self._epoll.close()
