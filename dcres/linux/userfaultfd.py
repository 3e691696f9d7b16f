"""userfaultfd(2), typed: what dcres uses of it and nothing more.

A userfaultfd belongs to the address space that created it. QEMU's is made by
`dcres.linux.inject`; this class wraps any copy of the descriptor. While one copy stays open
anywhere, a fault waits; when the last one closes, missing pages read as zeros. QEMU keeps its
own copy for that reason.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from typing import Self

from dcres.errors import UnsupportedHost
from dcres.linux import abi, libc
from dcres.model.pages import PAGE_SIZE

REQUIRED_FEATURES = (
    abi.UffdFeature.MISSING_SHMEM
    | abi.UffdFeature.WP_HUGETLBFS_SHMEM
    | abi.UffdFeature.WP_UNPOPULATED
    | abi.UffdFeature.WP_ASYNC
)
_ACCESS = struct.Struct("<B7xQQ8x")  # the same with the flags
_ADDRESS = struct.Struct("<B15xQ8x")  # event, flags and padding, address, thread id


class Userfaultfd:
    """One open userfaultfd descriptor; closes it at the end of a ``with`` block."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._copy = abi.UffdioCopy()
        self._zero = abi.UffdioZeropage()
        self._range = abi.UffdioRange()

    @classmethod
    def create(cls) -> Self:
        """A userfaultfd for this process. Raises OSError (EPERM, ENOSYS)."""
        return cls(libc.userfaultfd(os.O_CLOEXEC | os.O_NONBLOCK))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    def enable(self, features: abi.UffdFeature = REQUIRED_FEATURES) -> None:
        """UFFDIO_API with `features`; UnsupportedHost when the kernel does not grant them all."""
        api = abi.UffdioApi(api=abi.UFFD_API_VERSION, features=int(features))
        try:
            fcntl.ioctl(self.fd, abi.UFFDIO_API, api)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            # It refuses all when it lacks one. Asked for nothing it tells what it has.
            api = abi.UffdioApi(api=abi.UFFD_API_VERSION, features=0)
            fcntl.ioctl(self.fd, abi.UFFDIO_API, api)
        missing = int(features) & ~int(api.features)
        if missing:
            named = ", ".join(str(flag.name) for flag in abi.UffdFeature if flag & missing)
            raise UnsupportedHost(
                f"this kernel's userfaultfd lacks {named or hex(missing)}; "
                "dcres needs Linux 6.7 or newer"
            )

    def register(self, start: int, length_bytes: int, *, missing: bool) -> None:
        """Watch ``[start, start + length_bytes)`` for writes, and for missing pages if asked."""
        mode = abi.UFFDIO_REGISTER_MODE_WP
        if missing:
            mode |= abi.UFFDIO_REGISTER_MODE_MISSING
        fcntl.ioctl(
            self.fd,
            abi.UFFDIO_REGISTER,
            abi.UffdioRegister(start=start, len=length_bytes, mode=mode),
        )

    def read_faults(self, most: int = 32) -> list[int]:
        """Addresses of up to `most` faults that wait; empty when there are none.

        The descriptor is non-blocking. Raises OSError when the process behind it is gone.
        """
        try:
            data = os.read(self.fd, abi.UFFD_MESSAGE_SIZE * most)
        except BlockingIOError:
            return []
        return [a for event, a in _ADDRESS.iter_unpack(data) if event == abi.UFFD_EVENT_PAGEFAULT]

    def read_accesses(self, most: int) -> list[tuple[int, bool]]:
        """As `read_faults`, and whether each was a write."""
        try:
            data = os.read(self.fd, abi.UFFD_MESSAGE_SIZE * most)
        except BlockingIOError:
            return []
        return [
            (address, bool(flags & abi.UFFD_PAGEFAULT_FLAG_WRITE))
            for event, flags, address in _ACCESS.iter_unpack(data)
            if event == abi.UFFD_EVENT_PAGEFAULT
        ]

    def copy(self, destination: int, source: int, length_bytes: int) -> int:
        """Put pages in place, write-protected, and wake who waits for them.

        A page that is there already is left as it is (its waiters are woken all the same);
        returns how many such pages there were. Afterwards every page of the range is present.
        """
        call = self._copy
        done = existed = 0
        while done < length_bytes:
            call.dst, call.src, call.len = destination + done, source + done, length_bytes - done
            call.mode, call.copy = abi.UFFDIO_COPY_MODE_WP, 0
            try:
                fcntl.ioctl(self.fd, abi.UFFDIO_COPY, call)
                break
            except OSError as error:
                # `copy` holds the bytes put so far, or the error itself when there are none.
                done += max(int(call.copy), 0)
                if error.errno == errno.EEXIST:
                    self.wake(destination + done, PAGE_SIZE)
                    done += PAGE_SIZE
                    existed += 1
                elif error.errno != errno.EAGAIN:
                    raise
        return existed

    def zero(self, start: int, length_bytes: int) -> bool:
        """Put zero pages in place and wake; False when a page was there already (woken too)."""
        call = self._zero
        call.start, call.len, call.mode, call.zeropage = start, length_bytes, 0, 0
        try:
            fcntl.ioctl(self.fd, abi.UFFDIO_ZEROPAGE, call)
        except FileExistsError:
            self.wake(start, length_bytes)
            return False
        return True

    def wake(self, start: int, length_bytes: int) -> None:
        """Let threads that wait in this range fault again."""
        self._range.start, self._range.len = start, length_bytes
        fcntl.ioctl(self.fd, abi.UFFDIO_WAKE, self._range)

    def write_protect(self, start: int, length_bytes: int) -> None:
        """Write-protect a range, so that PAGEMAP_SCAN can tell what is written from now on."""
        call = abi.UffdioWriteprotect(
            start=start, len=length_bytes, mode=abi.UFFDIO_WRITEPROTECT_MODE_WP
        )
        fcntl.ioctl(self.fd, abi.UFFDIO_WRITEPROTECT, call)
