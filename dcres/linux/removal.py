"""The one place where dcres removes files, and the proof that it wants to see first.

Nothing is removed that is not provably ours, and each proof is a value that cannot be had
without it:

* `OwnFolder`: a folder that carries our mark, a small file with what the folder is and whose. It
  is marked when we make it, or when it is there and empty, so that all below it came later.
* `OwnNames`: names in a folder that others use as well, and that were free when it was marked.
* `StoreFile`: what a store writes beside its checkpoints, by its name, in a folder that is a store.
* `CheckpointFolder`: one that is called as checkpoints alone are, ``VM/VM-date-time-token``.
* `Created`: a file that this very process made (O_EXCL), as long as its name leads to it still.

Besides these a dead socket and an empty folder may go: both hold nothing. No removal follows a
symbolic link, and none goes into a file system that is mounted below.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import stat
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from dcres.errors import Conflict, HostError, NotOurs
from dcres.linux.marks import HOME_MARK, MARK, STORE_MARK, Mark, may_be_marked

_MOUNTS = Path("/proc/self/mountinfo")
# As in dcres.storage.layout, which is above us.
_STORE_FILE = re.compile(
    r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?/"
    r"(?:generation|\.generation\.lock|record\.json|scrubbed\.json|\.life-\d+|\.[\w.-]+\.tmp)"
)
_CHECKPOINT = re.compile(r"(?P<vm>[a-z0-9](?:[a-z0-9-]*[a-z0-9])?)/(?P=vm)-\d{8}-\d{6}-[0-9a-f]{4}")


@dataclass(frozen=True, slots=True)
class OwnFolder:
    """A folder that carries our mark: all below it may go. `made` and `found` return one."""

    path: Path
    mark: Mark

    def __post_init__(self) -> None:
        found = Mark.of(self.path)
        if found != self.mark:
            raise NotOurs(
                f"{self.path} is not {self.mark}"
                + (f" but {found}" if found else ": it does not carry the mark of dcres")
            )

    @classmethod
    def made(
        cls, path: Path, mark: Mark, *, earlier: Callable[[Collection[str]], bool] | None = None
    ) -> Self:
        """A private folder with `mark`: a new one, one of that mark already, or an empty one.

        `earlier` tells from the names in it whether an earlier dcres, which had no marks, made
        it. Raises NotOurs for any other that is there, OSError.
        """
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        if Mark.of(path) is None and may_be_marked(path, earlier):
            mark.put(path)
        try:
            return cls(path, mark)
        except NotOurs as error:
            raise NotOurs(
                f"{error}; it may hold files of yours, so dcres does not use it: move it away, or "
                "choose another place"
            ) from None

    @classmethod
    def new(cls, path: Path, mark: Mark) -> Self:
        """The same, in a folder where others may put things, too: it must not be there yet.

        Raises Conflict if it is, OSError.
        """
        try:
            path.mkdir(mode=0o700)
        except FileExistsError:
            raise Conflict(
                f"{path} exists already, where dcres makes its own; move it away"
            ) from None
        mark.put(path)
        return cls(path, mark)

    @classmethod
    def taken(
        cls, path: Path, mark: Mark, earlier: Callable[[Collection[str]], bool]
    ) -> Self | None:
        """`found`, and one that an earlier dcres made is marked now; see `made`."""
        if Mark.of(path) is None and path.is_dir() and not path.is_symlink():
            names = os.listdir(path)
            if names and earlier(names):
                mark.put(path)
        return cls.found(path, mark)

    @classmethod
    def found(cls, path: Path, mark: Mark) -> Self | None:
        """The folder, if it is there and carries `mark`; else None: it is not ours to remove."""
        try:
            return cls(path, mark)
        except NotOurs:
            return None

    @classmethod
    def around(cls, path: Path) -> Self:
        """The nearest folder above `path` that carries a mark. Raises NotOurs."""
        for folder in path.absolute().parents:
            mark = Mark.of(folder)
            if mark is not None:
                return cls(folder, mark)
        raise NotOurs(f"{path} lies in no folder of dcres's, so it is not removed")

    def remove_file(self, path: Path) -> None:
        """Remove the file `path` below this folder, if it is there; a link, not what it leads to.

        Raises NotOurs for one that is not below, OSError.
        """
        _require_below(self.path, path)
        path.unlink(missing_ok=True)

    def remove_below(self, path: Path) -> None:
        """Remove the file or folder `path` below this one, if it is there.

        Raises NotOurs for one that is not below, HostError.
        """
        _require_below(self.path, path)
        _clear(path.parent, lambda each: each.name != path.name)

    def clear(self, keep: Callable[[Path], bool] = lambda _: False) -> None:
        """Remove all that is in it but its mark, and but what `keep` names. Raises HostError."""
        _clear(self.path, lambda path: path.name == MARK or keep(path))

    def remove(self) -> None:
        """Remove it and all below it, the mark last. Raises HostError."""
        self.clear()
        with _telling(self.path):
            (self.path / MARK).unlink(missing_ok=True)
            remove_if_empty(self.path)


@dataclass(frozen=True, slots=True)
class OwnNames:
    """Names in a folder that others use as well. Raises NotOurs unless its mark has them."""

    path: Path
    names: frozenset[str]

    def __post_init__(self) -> None:
        if not self.names <= self._names_in_mark():
            raise NotOurs(f"{self.path} does not carry the mark of dcres, so nothing in it is ours")

    @classmethod
    def claim(cls, path: Path, names: frozenset[str], fd: int) -> Self:
        """Write the mark of the folder `path`, which is open as `fd`.

        The caller has seen that none of these names is taken by what is not ours.
        """
        values = {"note": "in this folder these names are dcres's", "names": sorted(names)}
        os.ftruncate(fd, 0)
        os.pwrite(fd, json.dumps(values).encode(), 0)
        os.fsync(fd)
        return cls(path, names)

    def _names_in_mark(self) -> set[str]:
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            return set(json.loads((self.path / HOME_MARK).read_bytes())["names"])
        return set()

    def remove_file(self, name: str) -> None:
        """Remove the file of that name, if there is one. Raises NotOurs, OSError."""
        if name not in self.names:
            raise NotOurs(f"{self.path / name} is not dcres's, so it is not removed")
        (self.path / name).unlink(missing_ok=True)

    def remove(self) -> bool:
        """Remove the mark, and the folder if that was all; whether it is gone."""
        (self.path / HOME_MARK).unlink(missing_ok=True)
        return remove_if_empty(self.path)


@dataclass(frozen=True, slots=True)
class StoreFile:
    """A file beside the checkpoints of a store. Raises NotOurs for what cannot be one."""

    path: Path

    def __post_init__(self) -> None:
        named = _STORE_FILE.fullmatch("/".join(self.path.parts[-2:]))
        in_store = (self.path.parent.parent / STORE_MARK).is_file() or self._is_counter()
        if not (named and in_store) or self.path.parent.is_symlink():
            raise NotOurs(f"{self.path} is not a file of a store, so it is not removed")

    def _is_counter(self) -> bool:
        """An earlier dcres marked no store; its counter is a number, and its lock is empty."""
        with contextlib.suppress(OSError):
            text = self.path.read_bytes()[:32]
            return text.strip().isdigit() if self.path.name == "generation" else not text
        return False

    def remove(self) -> None:
        """Remove it, if it is there. Raises OSError."""
        self.path.unlink(missing_ok=True)


def remove_store_mark(store: Path) -> bool:
    """Remove the mark of what is a store no more, and the folder if that was all; is it gone?"""
    if not store.is_symlink():
        (store / STORE_MARK).unlink(missing_ok=True)
    return remove_if_empty(store)


@dataclass(frozen=True, slots=True)
class CheckpointFolder:
    """The folder of a checkpoint in a store. Raises NotOurs for one that cannot be."""

    path: Path

    def __post_init__(self) -> None:
        named = _CHECKPOINT.fullmatch("/".join(self.path.parts[-2:]))
        if named is None or self.path.is_symlink() or self.path.parent.is_symlink():
            raise NotOurs(f"{self.path} is not a folder of a checkpoint, so it is not removed")

    def remove_file(self, path: Path) -> None:
        """Remove the file `path` below this folder, if it is there. Raises NotOurs, OSError."""
        _require_below(self.path, path)
        path.unlink(missing_ok=True)

    def require_removable(self) -> None:
        """Raises HostError where `remove` would refuse; changes nothing."""
        _require_no_mounts(self.path)

    def remove(self) -> None:
        """Remove it and all below it; does nothing if it is gone. Raises HostError."""
        _clear(self.path, lambda _: False)
        with _telling(self.path), contextlib.suppress(FileNotFoundError):
            self.path.rmdir()


@dataclass(frozen=True, slots=True)
class Created:
    """A file that this process has made; `create` returns one."""

    path: Path
    device: int
    inode: int

    def remove(self) -> None:
        """Remove it, unless its name leads to another by now. Raises OSError."""
        with contextlib.suppress(FileNotFoundError):
            status = self.path.lstat()
            if (status.st_dev, status.st_ino) == (self.device, self.inode):
                self.path.unlink()


def create(path: Path, flags: int, mode: int = 0o600) -> tuple[int, Created]:
    """A new file, and its descriptor, which the caller closes. Raises FileExistsError, OSError."""
    flags |= os.O_CREAT | os.O_EXCL
    fd = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    return fd, created(path, fd, flags)


def created(path: Path, fd: int, flags: int) -> Created:
    """The same for one that was opened with these `flags`. Raises ValueError without O_EXCL."""
    if not flags & os.O_EXCL:
        raise ValueError(f"{path} was opened without O_EXCL, so it may have been there before")
    status = os.fstat(fd)
    return Created(path, status.st_dev, status.st_ino)


def remove_own_file(path: Path) -> None:
    """Remove the file `path`, if there is one: it lies below a folder with our mark.

    Raises NotOurs, OSError.
    """
    if os.path.lexists(path):
        OwnFolder.around(path).remove_file(path)


def remove_socket(path: Path) -> None:
    """Remove the Unix socket `path`, if there is one: it holds nothing, whoever made it.

    Raises NotOurs for anything else, OSError.
    """
    try:
        is_socket = stat.S_ISSOCK(path.lstat().st_mode)
    except FileNotFoundError:
        return
    if not is_socket:
        raise NotOurs(f"{path} is not a socket, and dcres makes one there; move it away")
    path.unlink(missing_ok=True)


def remove_if_empty(folder: Path) -> bool:
    """Remove a folder that holds nothing; whether it is gone. A mount point and a link stay."""
    try:
        folder.rmdir()
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY, errno.ENOTDIR):
            raise
        return False
    return True


def _require_below(folder: Path, path: Path) -> None:
    """NotOurs unless `path` is below `folder`, and no link on the way leads elsewhere."""
    above = Path(os.path.realpath(path.parent))
    if not above.is_relative_to(os.path.realpath(folder)):
        raise NotOurs(f"{path} is not in {folder}, so it is not removed")


def _clear(folder: Path, keep: Callable[[Path], bool]) -> None:
    _require_no_mounts(folder)
    with _telling(folder):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if keep(path):
                continue
            with contextlib.suppress(FileNotFoundError):  # others may remove it as well
                if stat.S_ISDIR(path.lstat().st_mode):
                    _empty(path)
                    path.rmdir()
                else:
                    path.unlink()


def _empty(folder: Path) -> None:
    """As shutil.rmtree, which gives up in the middle when others remove the same."""

    def unless_gone(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    for _, folders, files, fd in os.fwalk(folder, topdown=False, onerror=unless_gone):
        for name in files:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=fd)
        for name in folders:
            with contextlib.suppress(FileNotFoundError):
                try:
                    os.rmdir(name, dir_fd=fd)
                except NotADirectoryError:  # a link to a folder
                    os.unlink(name, dir_fd=fd)


def _require_no_mounts(folder: Path) -> None:
    """HostError if a file system is mounted below `folder`: what is on it is not ours."""
    real = os.path.realpath(folder)
    for line in _MOUNTS.read_text().splitlines():
        point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), line.split()[4])
        if point.startswith(real + "/"):
            raise HostError(f"{point} is mounted below {folder}; unmount it, then try again")


@contextlib.contextmanager
def _telling(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        why = f"{error.strerror}: {error.filename}"
        raise HostError(f"cannot remove all of {folder} ({why}); remove the rest by hand") from None
