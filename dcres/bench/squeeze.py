"""Swapping, as a host does it by itself: a memory cgroup with a limit, and a swap file.

Both generations of cgroups: version 1 (`memory.limit_in_bytes`) and 2 (`memory.max`). Whatever
was made is taken away again, after a failure, too.
"""

from __future__ import annotations

import os
import secrets
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dcres.bench.rig import wait_for
from dcres.errors import UnsupportedHost

_V1, _V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
_TRIES_S = 30.0


class MemoryCgroup:
    """A cgroup of ours, for the processes that are put there."""

    def __init__(self, folder: Path, *, unified: bool) -> None:
        self._folder = folder
        self._limit = "memory.max" if unified else "memory.limit_in_bytes"
        self._usage = "memory.current" if unified else "memory.usage_in_bytes"
        self._own = "anon" if unified else "rss"
        self._unlimited = "max" if unified else "-1"

    def add(self, pid: int) -> None:
        """What the process touches first from now on is counted here."""
        (self._folder / "cgroup.procs").write_text(str(pid))

    @property
    def private_bytes(self) -> int:
        """Memory of the processes that is no file on tmpfs: not the guest's, but QEMU's own."""
        lines = (self._folder / "memory.stat").read_text().splitlines()
        return {name: int(value) for name, value in map(str.split, lines)}[self._own]

    @property
    def used_bytes(self) -> int:
        """All that is counted."""
        return int((self._folder / self._usage).read_text())

    def limit(self, length_bytes: int | None) -> None:
        """Swap out what is more; None lifts the limit. Raises PagingError if it cannot be met."""
        text = self._unlimited if length_bytes is None else str(length_bytes)

        def met() -> bool:
            try:
                (self._folder / self._limit).write_text(text)
            except OSError:  # EBUSY: the kernel gives up for now when pages are in use
                return False
            return length_bytes is None or self.used_bytes <= length_bytes

        wait_for(met, _TRIES_S, f"{self._folder} comes down to {text} bytes")


@contextmanager
def memory_cgroup() -> Iterator[MemoryCgroup]:
    """A cgroup without a limit; its processes must have ended at the end."""
    unified = (_V2 / "cgroup.controllers").exists()
    root = _V2 if unified else _V1
    folder = root / f"dcres-{os.getpid()}-{secrets.token_hex(3)}"
    try:
        if unified:
            (root / "cgroup.subtree_control").write_text("+memory")
        folder.mkdir()
    except OSError as error:
        raise UnsupportedHost(f"no memory cgroup can be made here: {error}") from None
    try:
        yield MemoryCgroup(folder, unified=unified)
    finally:
        wait_for(lambda: _removed(folder), _TRIES_S, f"{folder} can be removed")


def _removed(folder: Path) -> bool:
    try:
        folder.rmdir()
    except OSError:  # EBUSY: an ended process may be counted for a moment
        return False
    return True


class SwapFile:
    """A file to swap to, in use between `on` and `off`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._used = False

    def on(self) -> None:
        """Let the kernel swap to it."""
        _run("swapon", str(self._path))
        self._used = True

    def off(self) -> None:
        """Bring back all that is there; nothing if it is not used."""
        if self._used:
            _run("swapoff", str(self._path))
            self._used = False


@contextmanager
def swap_file(path: Path, length_bytes: int) -> Iterator[SwapFile]:
    """Such a file, not in use yet; gone afterwards. Raises UnsupportedHost."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    swap = SwapFile(path)
    try:
        os.posix_fallocate(fd, 0, length_bytes)
        _run("mkswap", str(path))
        yield swap
    finally:
        os.close(fd)
        swap.off()
        path.unlink()


def _run(*argv: str) -> None:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UnsupportedHost(f"this needs {argv[0]}; apt install util-linux mount") from None
    if done.returncode:
        raise UnsupportedHost(f"{' '.join(argv)} failed: {done.stderr.strip()}")
