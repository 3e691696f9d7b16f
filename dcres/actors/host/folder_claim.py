"""Whose a VM's folder on a host is: one cluster's at a time, which the folder's mark names.

Whatever uses the folder holds its mark: the actor, and every process of the VM, which inherits
the descriptor. So the kernel tells whether anybody is left, in every container that shares the
folder. A mark that another cluster left is written anew only by the actor that holds it alone.
"""

from __future__ import annotations

import json
import os
import threading
import time
from dataclasses import asdict, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dcres.errors import Conflict
from dcres.linux.holding import hold, is_held
from dcres.linux.marks import MARK
from dcres.model.ownership import Claimant, Life, Standing, files_refusal, judge_files

_LONGEST_MARK_BYTES = 4096
_POLL_S = 0.01
_BUSY_S = 10.0  # to look whose a folder is takes milliseconds
_CLAIMANT = tuple(each.name for each in fields(Claimant))


class FolderClaim:
    """The claim of `me` to the marked folder of `vm`, which `variable` chooses."""

    def __init__(self, vm: str, folder: Path, variable: str, me: Claimant) -> None:
        self._vm = vm
        self._folder = folder
        self._variable = variable
        self._me = me
        self._taking = threading.Lock()
        self._fd: int | None = None

    @property
    def owner(self) -> str:
        """The cluster whose folder this is; empty if it is nobody's, or an earlier dcres's."""
        life = self._life(seen=False)
        return "" if life is None else life.owner.cluster

    @property
    def is_ours(self) -> bool:
        """Whether what is there may be touched: it is our cluster's, or tells of none.

        What is held was ours when it was taken, and nobody takes it from a holder.
        """
        if self.holds:
            return True
        life = self._life(seen=False)
        return life is None or judge_files(life, self._me) is Standing.OURS

    @property
    def holds(self) -> bool:
        """Whether it is held, and still there."""
        fd = self._fd
        return fd is not None and _is_at(fd, self._folder / MARK)

    @property
    def fd(self) -> int | None:
        """What a process inherits to hold the folder; None unless it was taken."""
        return self._fd

    def trouble(self, *, seen: bool, take_over: bool) -> str:
        """Why `take` would refuse now; empty if it would not. Changes nothing.

        `seen` says that processes of the VM are there.
        """
        life = self._life(seen)
        return "" if life is None else self._refusal(life, take_over)

    def _life(self, seen: bool) -> Life | None:
        """What the mark tells now; None without one."""
        fd = _opened(self._folder, os.O_RDONLY)
        if fd is None:
            return None
        try:
            return _life_of(fd, held=seen or is_held(self._folder / MARK))
        finally:
            os.close(fd)

    def _refusal(self, life: Life, take_over: bool) -> str:
        place = f"{self._folder} ({self._variable})"
        return files_refusal(self._vm, place, self._variable, life, self._me, take_over)

    def take(
        self, *, seen: bool = False, take_over: bool = False, ours_alone: bool = False
    ) -> bool:
        """Hold it, if it is there; whether it was another cluster's. Repeatable.

        Raises Conflict where `trouble` tells of one, and with `ours_alone` for any that is another
        cluster's.
        """
        deadline = time.monotonic() + _BUSY_S
        with self._taking:
            while time.monotonic() < deadline:
                fd = _opened(self._folder, os.O_RDWR)
                if fd is None:
                    return False
                if not _is_mark(fd) or (
                    self._fd is not None and os.path.sameopenfile(fd, self._fd)
                ):
                    os.close(fd)
                    return False
                try:
                    taken = self._take(fd, seen, take_over, ours_alone)
                except BaseException:
                    os.close(fd)
                    raise
                if taken is not None:
                    self._close()
                    self._fd = fd
                    return taken
                os.close(fd)
                time.sleep(_POLL_S)
        raise Conflict(f"{self._folder} is being taken by others all the time; try again")

    def _take(self, fd: int, seen: bool, take_over: bool, ours_alone: bool) -> bool | None:
        """None where another actor was just about to take it, or has removed it."""
        alone = hold(fd, alone=True)
        if not (alone or hold(fd)) or not _is_at(fd, self._folder / MARK):
            return None
        life = _life_of(fd, held=seen or not alone)
        ours = judge_files(life, self._me) is Standing.OURS
        why = self._refusal(life, take_over)
        if why or (ours_alone and not ours):
            raise Conflict(why or f"{self._folder} is another cluster's")
        if alone:
            _write_owner(fd, self._me)
            hold(fd)
        return not ours

    def release(self) -> None:
        """Hold it no longer. Repeatable."""
        with self._taking:
            self._close()

    def _close(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)


def _opened(folder: Path, flags: int) -> int | None:
    """The folder's mark; None if it has none."""
    try:
        if folder.is_symlink():
            return None
        return os.open(folder / MARK, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _is_at(fd: int, path: Path) -> bool:
    """Whether the open file still has that name: a mark goes with its folder."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat(follow_symlinks=False))
    except FileNotFoundError:
        return False


def _is_mark(fd: int) -> bool:
    """Not so while it is empty: whoever was to write it was killed."""
    return "what" in _values(fd)


def _values(fd: int) -> dict[str, Any]:
    try:
        values = json.loads(os.pread(fd, _LONGEST_MARK_BYTES, 0))
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def _life_of(fd: int, *, held: bool) -> Life:
    owner = _values(fd).get("owner")
    told = owner if isinstance(owner, dict) else {}
    claimant = Claimant(*(str(told.get(name, "")) for name in _CLAIMANT))
    return Life(0, claimant, str(told.get("since", "")), held)


def _write_owner(fd: int, me: Claimant) -> None:
    """In one write and without a moment in which the mark is no mark: blanks fill up the rest."""
    since = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    values = {**_values(fd), "owner": {**asdict(me), "since": since}}
    os.pwrite(fd, json.dumps(values).encode().ljust(os.fstat(fd).st_size), 0)
    os.fsync(fd)
