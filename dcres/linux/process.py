"""Processes that outlive us, and a way to name them that cannot hit a stranger.

A pid may be given to another process once its owner has ended. The pid together with the
process's start time (field 22 of ``/proc/PID/stat``, in clock ticks since boot) names one
process for good, and a pidfd taken and then checked against it sends signals without a race.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dcres.errors import HostError, UnsupportedHost
from dcres.linux.files import open_own

_PROC = Path("/proc")
_KILLED_S = 30.0  # until memory is given back and files are closed
# The shell tells us its own pid and start time, which exec keeps; then it becomes the program.
#
# Ray runs its workers at nice 15, and what they start would inherit that: the guest would then
# have no precedence over the threads that save it (a client of the guest waited 244 ms in a
# checkpoint whose VM was paused for 23). Who may not raise a priority keeps the one it has.
_LAUNCHER = (
    'renice -n 0 -p "$$" >/dev/null 2>&1; '
    'read -r stat <"/proc/$$/stat"; echo "$stat"; exec "$@" >&2'
)


def _start_time_of_stat(stat: str) -> tuple[int, str]:
    """Start time and state letter; the name in parentheses may hold anything, even ``)``."""
    fields = stat[stat.rindex(")") + 2 :].split()
    return int(fields[19]), fields[0]


def _read_stat(pid: int) -> tuple[int, str] | None:
    try:
        return _start_time_of_stat((_PROC / str(pid) / "stat").read_text(errors="replace"))
    except (FileNotFoundError, ProcessLookupError):
        return None


@dataclass(frozen=True, slots=True)
class ProcessId:
    """One process, for good: `start_time` is in clock ticks since boot."""

    pid: int
    start_time: int

    @classmethod
    def of(cls, pid: int) -> ProcessId | None:
        """The process that has `pid` now, or None when there is none."""
        stat = _read_stat(pid)
        return None if stat is None else cls(pid, stat[0])

    @property
    def alive(self) -> bool:
        """Whether it still runs; a zombie does not."""
        stat = _read_stat(self.pid)
        return stat is not None and stat[0] == self.start_time and stat[1] not in "ZX"

    @property
    def argv(self) -> list[str]:
        """Its command line; empty when it has ended."""
        try:
            words = (_PROC / str(self.pid) / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            return []
        if not self.alive:
            return []
        return [os.fsdecode(word) for word in words.split(b"\0")[:-1]]

    def _open(self) -> int | None:
        try:
            fd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return None
        # The pidfd pins whichever process it names, so checking after opening leaves no gap. Its
        # state says nothing: that is its first thread's, which may be a zombie while the last one
        # still gives back memory, and holds files and their locks.
        stat = _read_stat(self.pid)
        if stat is not None and stat[0] == self.start_time:
            return fd
        os.close(fd)
        return None

    def kill(self, sig: int = signal.SIGKILL) -> bool:
        """Send `sig`; False when the process has ended already."""
        fd = self._open()
        if fd is None:
            return False
        try:
            if _has_ended(fd, 0.0):
                return False
            signal.pidfd_send_signal(fd, sig)
        except ProcessLookupError:
            return False
        finally:
            os.close(fd)
        return True

    def wait_gone(self, timeout_s: float) -> bool:
        """Wait until it has ended (reaped or not), with all its threads and open files.

        False when `timeout_s` passed before.
        """
        fd = self._open()
        if fd is None:
            return True
        try:
            return _has_ended(fd, timeout_s)
        finally:
            os.close(fd)

    def end(self, grace_s: float = 5.0) -> bool:
        """SIGTERM, and SIGKILL when it has not ended after `grace_s`; whether it is gone.

        That may take a while after SIGKILL: much memory, or a disk that hangs.
        """
        if self.kill(signal.SIGTERM) and not self.wait_gone(grace_s):
            self.kill(signal.SIGKILL)
        return self.wait_gone(_KILLED_S)


def _has_ended(pidfd: int, timeout_s: float) -> bool:
    """Whether it has within that time: pidfd_open(2), ready once all threads have."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(int(timeout_s * 1000)))


def _stdin_of(data: bytes | int | None) -> int:
    """A descriptor of our own for what `spawn_detached` names; bytes never touch a disk."""
    if data is None:
        return os.open(os.devnull, os.O_RDONLY)
    if isinstance(data, int):
        return os.dup(data)
    fd = os.memfd_create("stdin")
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.lseek(fd, 0, os.SEEK_SET)
    except BaseException:
        os.close(fd)
        raise
    return fd


def spawn_detached(
    argv: Sequence[str],
    log: Path,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: bytes | int | None = None,
    inherited: Sequence[int] = (),
) -> ProcessId:
    """Start `argv` in a session of its own, as a child of init rather than of us.

    It outlives us, gets none of our descriptors but those `inherited`, leaves no zombie of ours,
    and runs at normal priority where we may give it that, whatever ours is. Its output is
    appended to `log` (mode 0600); it reads `stdin`, bytes or a descriptor, or ``/dev/null``. When
    this returns the program has been started; whether it stays is for the caller to see. Raises
    UnsupportedHost when the program is not installed, HostError when something ended it before it
    began, OSError when `log` cannot be written.
    """
    path = None if env is None else env.get("PATH")
    if shutil.which(argv[0], path=path) is None:
        raise UnsupportedHost(f"{argv[0]} is not installed or not executable; run scripts/setup")
    log_fd = open_own(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    stdin_fd = None
    try:
        stdin_fd = _stdin_of(stdin)
        # Reading to the end of the pipe waits until exec has replaced the shell's output.
        launched = subprocess.run(
            ["setsid", "--fork", "sh", "-c", _LAUNCHER, "dcres-launch", *argv],
            stdin=stdin_fd,
            stdout=subprocess.PIPE,
            stderr=log_fd,
            env=None if env is None else dict(env),
            cwd=cwd,
            pass_fds=inherited,
            check=False,
        )
    finally:
        os.close(log_fd)
        if stdin_fd is not None:
            os.close(stdin_fd)
    stat = launched.stdout.decode(errors="replace")
    if not stat.strip():  # killed before it was the program
        raise HostError(f"{argv[0]} was not started: its launcher was killed; try again")
    return ProcessId(int(stat.split(" ", 1)[0]), _start_time_of_stat(stat)[0])


def find_marked(key: str, value: str) -> list[ProcessId]:
    """Live processes that were started with ``key=value`` in their environment."""
    wanted = f"{key}={value}".encode()
    return [process for process, environ in _environs() if wanted in environ]


def sees(process: ProcessId, folder: Path) -> bool:
    """Whether `folder` is to that process what it is to us: in a container it may be another.

    Of a folder that is not there nobody can tell but by the mounts that it sees.
    """
    path, theirs = Path(os.path.realpath(folder)), _PROC / str(process.pid)
    try:
        if not path.exists():
            return os.readlink(theirs / "ns/mnt") == os.readlink(_PROC / "self/ns/mnt")
        return path.samefile(f"{theirs}/root{path}")
    except OSError:  # it has ended, or has no such folder
        return False


def environments(keys: Sequence[str]) -> Iterator[tuple[ProcessId, dict[str, str]]]:
    """Live processes that were started with any of `keys` in their environment, and that."""
    for process, environ in _environs():
        pairs = [os.fsdecode(each).partition("=") for each in environ]
        values = {key: value for key, _, value in pairs}
        if values.keys() & set(keys):
            yield process, values


def _environs() -> Iterator[tuple[ProcessId, list[bytes]]]:
    """Of all live processes that let us see what they were started with."""
    for entry in _PROC.iterdir():
        if not entry.name.isdigit():
            continue
        with suppress(OSError):
            before = ProcessId.of(int(entry.name))
            environ = (entry / "environ").read_bytes().split(b"\0")
            if before is not None and before.alive:
                yield before, environ
