"""Being interrupted: SIGTERM and SIGHUP like Ctrl-C, and parts that must not be."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class OperationInterrupted(KeyboardInterrupt):
    """An interrupt while an operation was attended; its text says what became of that."""


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt(signal.Signals(number).name)


def interrupt_on_signals() -> None:
    """From now on SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt in the main thread.

    A shell that starts a job in the background has it ignore SIGINT; that is undone here.
    """
    if threading.current_thread() is threading.main_thread():
        for each in _SIGNALS:
            signal.signal(each, _interrupt)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ignore these signals: for cleaning up, which takes seconds and ends by itself."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {each: signal.signal(each, signal.SIG_IGN) for each in _SIGNALS}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
