"""Pins: a checkpoint that is being taken, or whose pages somebody still reads, is not removed.

A pin is a shared lock on the checkpoint's folder, so a read-only store will do, nothing is
written, and it ends with its process.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from dcres.errors import Conflict, NotFound
from dcres.linux.files import shared_lock, sole_lock


@contextmanager
def pinned(folder: Path) -> Iterator[None]:
    """Keep what is in a checkpoint's folder from being removed inside the ``with`` block.

    Any number of processes may. Raises NotFound if nothing of the checkpoint is there, Conflict
    while it is being deleted.
    """
    checkpoint, root = folder.name, folder.parent.parent
    gone = f"nothing of checkpoint {checkpoint} is in {root}; see `dcres checkpoints`"
    with ExitStack() as held:
        try:
            fd = held.enter_context(shared_lock(folder))
        except FileNotFoundError:
            raise NotFound(gone) from None
        except BlockingIOError:
            raise Conflict(f"checkpoint {checkpoint} is being deleted") from None
        # A deletion may have ended after the folder was opened and before it was locked.
        if os.fstat(fd).st_nlink == 0:
            raise NotFound(gone)
        yield


class Hold:
    """The pin of one checkpoint, taken with the first need and let go of later; for threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held = ExitStack()
        self._checkpoint = ""
        self._over = False

    def take(self, checkpoint: str, pin: AbstractContextManager[None]) -> None:
        """Enter `pin`, unless `checkpoint` is held; another one no longer is.

        Raises what `pin` raises, Conflict after `release`.
        """
        with self._lock:
            if self._over:
                raise Conflict("this VM was ended before its parts were served")
            if checkpoint != self._checkpoint:
                self._drop()
                self._held.enter_context(pin)
                self._checkpoint = checkpoint

    def let_go(self, checkpoint: str) -> None:
        """Hold `checkpoint` no longer; another one stays held. Repeatable."""
        with self._lock:
            if checkpoint == self._checkpoint:
                self._drop()

    def drop(self) -> None:
        """What an earlier life of the VM needed. Repeatable."""
        with self._lock:
            self._drop()

    def release(self) -> None:
        """For good. Repeatable."""
        with self._lock:
            self._over = True
            self._drop()

    def _drop(self) -> None:
        self._held.close()
        self._checkpoint = ""


@contextmanager
def unpinned(folder: Path) -> Iterator[None]:
    """Hold a checkpoint's folder alone. Raises Conflict while somebody has it pinned.

    Raises FileNotFoundError if it is gone, also by somebody who held it until now.
    """
    with ExitStack() as held:
        try:
            fd = held.enter_context(sole_lock(folder))
        except BlockingIOError:
            raise Conflict(
                f"checkpoint {folder.name} is in use: it is being taken, its segments are being "
                "merged, or a VM is being restored from it or still reads its pages; delete it "
                "when that has ended, when the VM has all its memory, or end the VM"
            ) from None
        if os.fstat(fd).st_nlink == 0:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
        yield
