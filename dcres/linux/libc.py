"""libc's own functions, where Python has no name for them; errno becomes OSError in one place."""

from __future__ import annotations

import ctypes
import mmap
import os

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.syscall.restype = ctypes.c_long
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

SYS_USERFAULTFD = 323
SYS_PIPE2 = 293
SYS_PIDFD_GETFD = 438


def check(result: int, what: str) -> int:
    """`result` of a C call, or OSError with errno when it is negative."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def ptrace(request: int, pid: int, address: int = 0, data: int = 0) -> int:
    """ptrace(2). The tracer is the calling thread: every call for a tracee comes from one."""
    return check(_libc.ptrace(request, pid, address, data), f"ptrace {request:#x} on {pid}")


def userfaultfd(flags: int) -> int:
    """userfaultfd(2) for the calling process."""
    return check(_libc.syscall(SYS_USERFAULTFD, flags), "userfaultfd")


def pidfd_getfd(pidfd: int, target_fd: int) -> int:
    """pidfd_getfd(2): our own copy of another process's descriptor."""
    return check(_libc.syscall(SYS_PIDFD_GETFD, pidfd, target_fd, 0), "pidfd_getfd")


def fallocate(fd: int, mode: int, offset_bytes: int, length_bytes: int) -> int:
    """fallocate(2)."""
    return check(_libc.fallocate(fd, mode, offset_bytes, length_bytes), "fallocate")


def madvise(buffer: mmap.mmap, length_bytes: int, advice: int) -> int:
    """madvise(2) about the first bytes of `buffer`, without the interpreter's lock."""
    # Holds the buffer's memory, so that it cannot be closed meanwhile.
    held = (ctypes.c_char * len(buffer)).from_buffer(buffer)
    return check(_libc.madvise(held, length_bytes, advice), "madvise")


def setns(fd: int, kind: int) -> int:
    """setns(2): the calling thread joins the namespace that `fd` refers to."""
    return check(_libc.setns(fd, kind), "setns")
