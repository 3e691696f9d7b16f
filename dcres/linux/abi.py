"""Numbers and structs of the kernel's interface, x86-64 and generic.

ioctl numbers are computed from the size of the struct that they carry, so that a wrong field
shows up as a wrong number (`tests/unit/test_abi.py` holds them against the kernel's headers).
Sources: include/uapi/linux/userfaultfd.h, include/uapi/linux/fs.h, asm/ptrace.h.
"""

from __future__ import annotations

import ctypes
from enum import IntFlag

_u64 = ctypes.c_uint64
_s64 = ctypes.c_int64


class UffdioApi(ctypes.Structure):
    """struct uffdio_api."""

    _fields_ = [("api", _u64), ("features", _u64), ("ioctls", _u64)]


class UffdioRange(ctypes.Structure):
    """struct uffdio_range."""

    _fields_ = [("start", _u64), ("len", _u64)]


class UffdioRegister(ctypes.Structure):
    """struct uffdio_register."""

    _fields_ = [("start", _u64), ("len", _u64), ("mode", _u64), ("ioctls", _u64)]


class UffdioCopy(ctypes.Structure):
    """struct uffdio_copy."""

    _fields_ = [("dst", _u64), ("src", _u64), ("len", _u64), ("mode", _u64), ("copy", _s64)]


class UffdioZeropage(ctypes.Structure):
    """struct uffdio_zeropage."""

    _fields_ = [("start", _u64), ("len", _u64), ("mode", _u64), ("zeropage", _s64)]


class UffdioWriteprotect(ctypes.Structure):
    """struct uffdio_writeprotect."""

    _fields_ = [("start", _u64), ("len", _u64), ("mode", _u64)]


class PmScanArg(ctypes.Structure):
    """struct pm_scan_arg."""

    _fields_ = [
        ("size", _u64),
        ("flags", _u64),
        ("start", _u64),
        ("end", _u64),
        ("walk_end", _u64),
        ("vec", _u64),
        ("vec_len", _u64),
        ("max_pages", _u64),
        ("category_inverted", _u64),
        ("category_mask", _u64),
        ("category_anyof_mask", _u64),
        ("return_mask", _u64),
    ]


_REGISTERS = (
    *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx"),
    *("rsi", "rdi", "orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base"),
    *("ds", "es", "fs", "gs"),
)


class UserRegs(ctypes.Structure):
    """struct user_regs_struct of x86-64."""

    _fields_ = [(name, _u64) for name in _REGISTERS]


class Iovec(ctypes.Structure):
    """struct iovec."""

    _fields_ = [("base", ctypes.c_void_p), ("len", ctypes.c_size_t)]


def _ioc(direction: int, kind: int, number: int, struct: type[ctypes.Structure]) -> int:
    return direction << 30 | ctypes.sizeof(struct) << 16 | kind << 8 | number


_READ, _WRITE = 2, 1
_UFFD = 0xAA

UFFDIO_API = _ioc(_READ | _WRITE, _UFFD, 0x3F, UffdioApi)
UFFDIO_REGISTER = _ioc(_READ | _WRITE, _UFFD, 0x00, UffdioRegister)
UFFDIO_WAKE = _ioc(_READ, _UFFD, 0x02, UffdioRange)
UFFDIO_COPY = _ioc(_READ | _WRITE, _UFFD, 0x03, UffdioCopy)
UFFDIO_ZEROPAGE = _ioc(_READ | _WRITE, _UFFD, 0x04, UffdioZeropage)
UFFDIO_WRITEPROTECT = _ioc(_READ | _WRITE, _UFFD, 0x06, UffdioWriteprotect)
PAGEMAP_SCAN = _ioc(_READ | _WRITE, ord("f"), 16, PmScanArg)

UFFD_API_VERSION = 0xAA
UFFD_EVENT_PAGEFAULT = 0x12
UFFD_PAGEFAULT_FLAG_WRITE = 1 << 0
UFFDIO_REGISTER_MODE_MISSING = 1 << 0
UFFDIO_REGISTER_MODE_WP = 1 << 1
UFFDIO_COPY_MODE_WP = 1 << 1
UFFDIO_WRITEPROTECT_MODE_WP = 1 << 0
UFFD_MESSAGE_SIZE = 32

PAGE_IS_WRITTEN = 1 << 1
PM_SCAN_WP_MATCHING = 1 << 0
PM_SCAN_CHECK_WPASYNC = 1 << 1


class UffdFeature(IntFlag):
    """Features asked for in UFFDIO_API."""

    MISSING_SHMEM = 1 << 5
    WP_HUGETLBFS_SHMEM = 1 << 12
    WP_UNPOPULATED = 1 << 13
    WP_ASYNC = 1 << 15


PTRACE_SINGLESTEP = 9
PTRACE_DETACH = 17
PTRACE_GETREGSET = 0x4204
PTRACE_SETREGSET = 0x4205
PTRACE_SEIZE = 0x4206
PTRACE_INTERRUPT = 0x4207
NT_PRSTATUS = 1
WALL = 0x40000000
