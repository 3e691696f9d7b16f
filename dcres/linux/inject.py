"""Make a running process call userfaultfd(2) and pipe2(2), and keep what it got.

A userfaultfd acts on the address space that created it, so QEMU itself must make the call.
ptrace(2) lets us stop one of its threads, point it at a ``syscall`` instruction of its own
vDSO, run that single instruction, and put every register back. Nothing of QEMU is patched.

Why this is safe: the thread is stopped between two instructions and resumes with exactly the
registers it had; a system call that it was waiting in is restarted by the kernel by the usual
rules (``orig_rax`` and the -ERESTART code come back with the registers); a signal that
arrives meanwhile is held and delivered when we let go; the 8 bytes of stack that pipe2 writes
to lie below the red zone and are restored.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from dcres.errors import UnsupportedHost
from dcres.linux import abi, libc

_SYSCALL_INSTRUCTION = b"\x0f\x05"
_BELOW_RED_ZONE = 1024
_NO_SYSCALL = 2**64 - 1


def _read_memory(pid: int, address: int, length_bytes: int) -> bytes:
    fd = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
    try:
        return os.pread(fd, length_bytes, address)
    finally:
        os.close(fd)


def _write_memory(pid: int, address: int, data: bytes) -> None:
    fd = os.open(f"/proc/{pid}/mem", os.O_RDWR)
    try:
        os.pwrite(fd, data, address)
    finally:
        os.close(fd)


def mappings(pid: int, path: str) -> list[tuple[int, int, int]]:
    """``(start, end, file offset)`` of every mapping of the file `path` in process `pid`."""
    inode = os.stat(path).st_ino
    found = []
    with open(f"/proc/{pid}/maps") as maps:
        for line in maps:
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and int(fields[4]) == inode and fields[5].strip() == path:
                start, end = (int(part, 16) for part in fields[0].split("-"))
                found.append((start, end, int(fields[2], 16)))
    return found


def _find_syscall(pid: int) -> int:
    with open(f"/proc/{pid}/maps") as maps:
        vdso = next((line for line in maps if line.rstrip().endswith("[vdso]")), None)
    if vdso is not None:
        start, end = (int(part, 16) for part in vdso.split()[0].split("-"))
        at = _read_memory(pid, start, end - start).find(_SYSCALL_INSTRUCTION)
        if at >= 0:
            return start + at
    raise UnsupportedHost(f"process {pid} has no vDSO with a syscall instruction")


def _regs(pid: int, request: int, regs: abi.UserRegs) -> abi.UserRegs:
    vector = abi.Iovec(ctypes.addressof(regs), ctypes.sizeof(regs))
    libc.ptrace(request, pid, abi.NT_PRSTATUS, ctypes.addressof(vector))
    return regs


class Stopped:
    """A thread that is stopped under our ptrace; made by `stopped`."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.held_signals: list[int] = []
        self._syscall_at = _find_syscall(pid)

    def call(self, number: int, *arguments: int) -> int:
        """Run one system call in the thread; its result. Raises OSError with its errno."""
        before = _regs(self.pid, abi.PTRACE_GETREGSET, abi.UserRegs())
        regs = abi.UserRegs.from_buffer_copy(before)
        regs.rip, regs.rax, regs.orig_rax = self._syscall_at, number, _NO_SYSCALL
        for name, value in zip(("rdi", "rsi", "rdx", "r10", "r8", "r9"), arguments, strict=False):
            setattr(regs, name, value)
        try:
            _regs(self.pid, abi.PTRACE_SETREGSET, regs)
            self._step()
            result = ctypes.c_int64(_regs(self.pid, abi.PTRACE_GETREGSET, regs).rax).value
        finally:
            _regs(self.pid, abi.PTRACE_SETREGSET, before)
        if result < 0:
            raise OSError(-result, os.strerror(-result))
        return result

    def _step(self) -> None:
        # A signal that is due stops the thread before the instruction runs; we hold it back,
        # step again, and deliver it when we detach.
        while True:
            libc.ptrace(abi.PTRACE_SINGLESTEP, self.pid)
            _, status = os.waitpid(self.pid, abi.WALL)
            if not os.WIFSTOPPED(status):
                raise ProcessLookupError(f"process {self.pid} ended while a call ran in it")
            if os.WSTOPSIG(status) == signal.SIGTRAP:
                return
            self.held_signals.append(os.WSTOPSIG(status))

    def make_pipe(self) -> tuple[int, int]:
        """pipe2(2) in the process: its numbers of the read end and the write end."""
        regs = _regs(self.pid, abi.PTRACE_GETREGSET, abi.UserRegs())
        scratch = (regs.rsp - _BELOW_RED_ZONE) & ~0xF
        saved = _read_memory(self.pid, scratch, 8)
        try:
            self.call(libc.SYS_PIPE2, scratch, os.O_CLOEXEC)
            read_end, write_end = struct.unpack("<ii", _read_memory(self.pid, scratch, 8))
        finally:
            _write_memory(self.pid, scratch, saved)
        return read_end, write_end


@contextmanager
def stopped(pid: int) -> Iterator[Stopped]:
    """Stop the main thread of `pid` for the length of a ``with`` block (about a millisecond).

    Raises UnsupportedHost on a machine that is not x86-64, PermissionError without the right
    to trace the process.
    """
    if os.uname().machine != "x86_64":
        raise UnsupportedHost(f"remote paging is built for x86-64, not {os.uname().machine}")
    libc.ptrace(abi.PTRACE_SEIZE, pid)
    held: list[int] = []
    try:
        libc.ptrace(abi.PTRACE_INTERRUPT, pid)
        os.waitpid(pid, abi.WALL)
        thread = Stopped(pid)
        held = thread.held_signals
        yield thread
    finally:
        libc.ptrace(abi.PTRACE_DETACH, pid, 0, held.pop() if held else 0)
        for number in held:
            os.kill(pid, number)


def make_userfaultfd(pid: int) -> int:
    """userfaultfd(2) in process `pid`; the number it has there.

    Raises UnsupportedHost where the kernel has none, or none for that process.
    """
    try:
        with stopped(pid) as thread:
            return thread.call(libc.SYS_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ENOSYS:
            raise UnsupportedHost(
                "this kernel has no userfaultfd; boot Linux 6.7 or newer with CONFIG_USERFAULTFD"
            ) from None
        if error.errno == errno.EPERM:
            raise UnsupportedHost(
                f"process {pid} may not use userfaultfd; run as root, or `dcres doctor` for more"
            ) from None
        raise


def make_pipe(pid: int) -> tuple[int, int]:
    """A pipe in process `pid`: its numbers there of the read and the write end."""
    with stopped(pid) as thread:
        return thread.make_pipe()


def descriptors(pid: int, target_prefix: str) -> list[int]:
    """Descriptors of `pid` whose link text starts with `target_prefix`, ascending."""
    found = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            target = os.readlink(f"/proc/{pid}/fd/{name}")
        except FileNotFoundError:  # closed since the listing
            continue
        if target.startswith(target_prefix):
            found.append(int(name))
    return sorted(found)


def take(pid: int, target_fd: int) -> int:
    """Our own copy of descriptor `target_fd` of process `pid`."""
    pidfd = os.pidfd_open(pid)
    try:
        return libc.pidfd_getfd(pidfd, target_fd)
    finally:
        os.close(pidfd)
