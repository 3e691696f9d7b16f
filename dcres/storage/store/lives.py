"""The lives of a VM, as a store knows them: which generations there were, and whose the name is.

Each life has a file beside the VM's checkpoints, and its QEMU locks it: the kernel lets go
of that when QEMU has ended, not before, whatever becomes of those who started it. So anybody who
reaches the store can see whether the life goes on, from another container, too.
`dcres.model.ownership` decides what that means. Who ends a life removes its file.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from dcres.errors import CheckpointCorrupt, Conflict, NameTaken, NotOurs
from dcres.linux.files import is_locked, lock_for_good, locked
from dcres.linux.removal import StoreFile, create
from dcres.model.ownership import Claimant, Life, Standing, judge, refusal
from dcres.storage import layout
from dcres.storage.atomic import (
    make_private_dirs,
    store_written,
    sync_folder,
    write_durably,
    write_whole,
)
from dcres.storage.store import marker
from dcres.storage.store.records import Records

_UNKNOWN = Claimant("", "", "", "")


@dataclass(frozen=True, slots=True)
class Claimed:
    """A life that may begin. `lock` is a descriptor for its QEMU to hold; the caller closes it."""

    generation: int
    lock: int


class Lives:
    """The lives of one VM in the store `root`."""

    def __init__(self, root: Path, vm: str) -> None:
        self._root = root
        self._vm = layout.checked_vm(vm)
        self._folder = root / vm

    @property
    def records(self) -> Records:
        """The record of whether the VM is to run."""
        return Records(self._root, self._vm)

    def claim(self, me: Claimant, above: int, since: str, *, take_over: bool = False) -> Claimed:
        """Begin a life, with a generation greater than `above` and all given out before; durable.

        Callers in other processes wait for each other (flock). Raises Conflict where the name is
        another cluster's, unless that has ended, or may have and `take_over` (NameTaken: it has
        not); CheckpointCorrupt if the counter cannot be read, StoreFull, StoreReadOnly.
        """
        with self._alone():
            lives = self.require_free(me, take_over=take_over)
            known = [life.generation for life in lives]
            generation = max(above, self.counter(), *known) + 1
            claimed = self._begin(me, generation, since)
            for life in lives:
                if not life.held:  # those that run show it by their lock
                    # What stays says nothing any more: a newer life decides.
                    with suppress(NotOurs, OSError):
                        StoreFile(self._path(life.generation)).remove()
        return claimed

    def renew(self, me: Claimant, generation: int, since: str) -> Claimed | None:
        """Require that no life came after this one, which goes on and may save.

        Claimed anew where the store knows nothing of it: it could not be written to before, or
        was replaced. Raises Conflict for a former life, and as `claim`.
        """
        with self._alone():
            self.require_latest(generation)
            if self._owner_of(generation) == me:
                return None
            self.require_free(me)
            return self._begin(me, generation, since)

    def require_latest(self, generation: int) -> None:
        """Raises Conflict for a life after which another one has begun."""
        latest = self.counter()
        if latest > generation:
            raise Conflict(
                f"this life of VM {self._vm} (generation {generation}) is over: generation "
                f"{latest} has begun from the store {self._root}, so this one takes no "
                "checkpoint; end it, or make sure that the other has ended, and restore"
            )

    def release(self, me: Claimant, generation: int) -> None:
        """The life was ended, and the name is free unless somebody holds its lock. Repeatable."""
        path = self._path(generation)
        if self._owner_of(generation) != me:
            return
        with locked(self._folder / layout.GENERATION_LOCK):
            if self._owner_of(generation) == me and not is_locked(path):
                StoreFile(path).remove()
                sync_folder(self._folder)

    def trouble(self, me: Claimant, *, take_over: bool = False) -> str:
        """Why `claim` would refuse, as things are now; empty if it would not. Changes nothing."""
        return refusal(self._vm, self._lives(), me, take_over)

    def require_free(self, me: Claimant, *, take_over: bool = False) -> list[Life]:
        """The lives so far. Raises Conflict (NameTaken) as `claim` does; changes nothing."""
        lives = self._lives()
        if why := refusal(self._vm, lives, me, take_over):
            error = NameTaken if judge(lives, me)[0] is Standing.ALIVE else Conflict
            raise error(f"{self._folder}: {why}")
        return lives

    def counter(self) -> int:
        """The last generation given out here; 0 if none was. Raises CheckpointCorrupt."""
        return read_counter(self._folder / layout.GENERATION)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        marker.mark(self._root)
        make_private_dirs(self._folder)
        lock = self._folder / layout.GENERATION_LOCK
        with store_written(lock), locked(lock):
            yield

    def _begin(self, me: Claimant, generation: int, since: str) -> Claimed:
        write_durably(self._folder / layout.GENERATION, b"%d\n" % generation)
        path = self._path(generation)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        text = json.dumps({**asdict(me), "since": since}, sort_keys=True) + "\n"
        with store_written(path):
            fd, ours = create(temporary, os.O_RDWR)
            try:
                lock_for_good(fd)  # before anybody can find it free
                write_whole(fd, text.encode("ascii"))
                os.fsync(fd)
                os.rename(temporary, path)
                sync_folder(self._folder)
            except BaseException:
                ours.remove()
                os.close(fd)
                raise
        return Claimed(generation, fd)

    def _lives(self) -> list[Life]:
        names = os.listdir(self._folder) if self._folder.is_dir() else []
        generations = [each for each in map(layout.generation_of, names) if each is not None]
        lives = []
        for generation in sorted(generations):
            with suppress(FileNotFoundError):  # it was released meanwhile
                held = is_locked(self._path(generation))
                owner, since = self._read(generation)
                lives.append(Life(generation, owner, since, held))
        return lives

    def _path(self, generation: int) -> Path:
        return self._folder / layout.life_file(generation)

    def _owner_of(self, generation: int) -> Claimant | None:
        with suppress(FileNotFoundError):
            return self._read(generation)[0]
        return None

    def _read(self, generation: int) -> tuple[Claimant, str]:
        """What a file says; of one that is damaged nobody knows whose it is."""
        try:
            values = json.loads(self._path(generation).read_bytes())
            since = str(values.pop("since"))
            owner = Claimant(**{key: str(value) for key, value in values.items()})
        except (ValueError, TypeError, AttributeError, KeyError):
            return _UNKNOWN, "an unknown time"
        return owner, since


def next_without_store(path: Path, above: int) -> int:
    """A generation for a VM whose store cannot be written to, kept in `path` on its host.

    Greater than `above` and all that were given out so before; durable. Raises CheckpointCorrupt.
    """
    make_private_dirs(path.parent)
    with locked(path.with_name(f".{path.name}.lock")):
        generation = max(above, read_counter(path)) + 1
        write_durably(path, b"%d\n" % generation)
    return generation


def read_counter(path: Path) -> int:
    """The number in a file; 0 if there is none. Raises CheckpointCorrupt."""
    with suppress(FileNotFoundError):
        text = path.read_text("ascii", errors="replace").strip()
        if not (text.isascii() and text.isdigit()):
            raise CheckpointCorrupt(
                f"{path} is not a number; write one above all generations there"
            )
        return int(text)
    return 0
