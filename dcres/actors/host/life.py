"""The beginning and the end of a VM on a host, in their order."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dcres.errors import Conflict, DcresError

_POLL_S = 0.02
_ENDED = "this VM was ended before its start was done"


class Life:
    """Orders what begins a VM on a host and what ends it: the end waits, and is final.

    Both run in threads of one actor. Without this a coordinator that was started again would
    end what is there, while the start that its predecessor ordered goes on and leaves a QEMU.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._over = False

    @contextmanager
    def beginning(self) -> Iterator[None]:
        """Around a start. Raises Conflict when the end has come, however the start fails by it.

        The end kills what the start has begun, a launcher that was about to be a program too.
        """
        with self._lock:
            self._require_not_over()
            try:
                yield
            except (DcresError, OSError) as error:
                if self._over:
                    raise Conflict(_ENDED) from error
                raise
            self._require_not_over()

    def _require_not_over(self) -> None:
        if self._over:
            raise Conflict(_ENDED)

    @contextmanager
    def ending(self, hurry: Callable[[], None]) -> Iterator[None]:
        """Around the end; `hurry` makes a start under way fail and is called until it has."""
        self._over = True
        hurry()
        while not self._lock.acquire(timeout=_POLL_S):
            hurry()
        try:
            yield
        finally:
            self._lock.release()
