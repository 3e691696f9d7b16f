"""Being interrupted: SIGTERM and SIGHUP like Ctrl-C, and parts that must not be.

A signal that is ignored when dcres begins stays ignored: whoever started it wanted that. `nohup`
does so with SIGHUP, and a script's shell with SIGINT for what it starts in the background; SIGTERM
interrupts such a job.
"""

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

    Those that are ignored stay so.
    """
    if _in_main_thread():
        for each in _SIGNALS:
            if signal.getsignal(each) is not signal.SIG_IGN:
                signal.signal(each, _interrupt)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ignore these signals: for cleaning up, which takes seconds and ends by itself."""
    if not _in_main_thread():
        yield
        return
    before = {each: signal.getsignal(each) for each in _SIGNALS}
    # None: a handler that is not Python's, so nobody could put it back.
    ours = [each for each in _SIGNALS if before[each] is not None]
    try:
        for each in ours:
            signal.signal(each, signal.SIG_IGN)
        yield
    finally:
        for each in ours:
            signal.signal(each, before[each])


class Terminated(BaseException):
    """SIGTERM in a block of `ended_by_sigterm`; the process ends when the block is left."""


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM raises Terminated in this block, and ends the process as ever once that is left.

    For a library, whose caller may have said nothing about SIGTERM: Python then ends at once, and
    what the block has begun would go on without anybody. A handler of the caller's own is kept, an
    ignored signal stays ignored, and a thread other than the main one cannot be interrupted.
    """
    before = signal.getsignal(signal.SIGTERM)
    if not _in_main_thread() or before in (None, signal.SIG_IGN):
        yield
    elif before is signal.SIG_DFL:
        with _terminated_on_sigterm():
            yield
    else:
        # Again: Ray's core puts its own in the place of the one that Python knows of.
        signal.signal(signal.SIGTERM, before)
        yield


@contextmanager
def _terminated_on_sigterm() -> Iterator[None]:
    heard = False

    def hear(number: int, frame: FrameType | None) -> None:
        nonlocal heard
        if not heard:  # more of them change nothing: the block is being left
            heard = True
            raise Terminated

    try:
        try:
            signal.signal(signal.SIGTERM, hear)
            yield
        finally:
            if signal.getsignal(signal.SIGTERM) is hear:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
    finally:
        if heard:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.raise_signal(signal.SIGTERM)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
