"""Noticing that a peer owes something and does not do it."""

from __future__ import annotations


class Silence:
    """Watches what a peer owes next; pure, so the time is given to it."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._owed: object = None
        self._since_s = 0.0

    def too_long(self, owed: object, now_s: float) -> bool:
        """Whether the peer has owed just this for more than the timeout; None: it owes nothing.

        Answers come in order, so one that owes something else by now has answered meanwhile.
        """
        if owed is None or owed != self._owed:
            self._owed, self._since_s = owed, now_s
            return False
        return now_s - self._since_s > self._timeout_s
