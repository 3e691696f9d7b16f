"""Pipes as a place where pages wait, and where a buffer lies in memory."""

from __future__ import annotations

import fcntl
import mmap
import os
import termios
from array import array
from ctypes import addressof, c_char


def resize_pipe(fd: int, length_bytes: int) -> None:
    """Let a pipe hold `length_bytes` (F_SETPIPE_SZ). Raises OSError, EPERM above the limit."""
    fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, length_bytes)


def access_mode(fd: int) -> int:
    """os.O_RDONLY for a pipe's read end, os.O_WRONLY for its write end (F_GETFL)."""
    return fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE


def waiting_bytes(fd: int) -> int:
    """How many bytes wait in a pipe (FIONREAD)."""
    waiting = array("i", [0])
    fcntl.ioctl(fd, termios.FIONREAD, waiting)
    return waiting[0]


def address_of(buffer: mmap.mmap) -> int:
    """The address of an anonymous mapping, for calls that take one. It must outlive the use."""
    return addressof(c_char.from_buffer(buffer))
