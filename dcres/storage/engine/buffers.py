"""Buffers that memory files go through, kept for the next transfer of this process.

In a virtual machine huge pages that were free for two seconds are got from the hypervisor again:
32 MiB took 80 to 150 ms that way, and 3 ms where they were still there. A file of 2 GB was saved
at 1,810 MB/s through buffers that were there, and at 1,630 through fresh ones.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from dcres.linux.files import aligned_buffer, populate


class Buffers:
    """Buffers of `length_bytes`, each lent to one user at a time and kept from then on."""

    def __init__(self, length_bytes: int) -> None:
        self._length_bytes = length_bytes
        self._lock = threading.Lock()
        self._free: list[mmap.mmap] = []
        self._made = 0

    @contextmanager
    def lent(self) -> Iterator[memoryview]:
        """A buffer with any content. Raises OSError if there is no memory for another."""
        with self._lock:
            buffer = self._free.pop() if self._free else self._another()
        try:
            yield memoryview(buffer)
        finally:
            with self._lock:
                self._free.append(buffer)

    def warm(self, count: int, used_bytes: int) -> None:
        """Have the first `used_bytes` of `count` buffers present, before they are needed.

        They may be lent meanwhile: to populate memory changes nothing that is in it.
        """
        with suppress(OSError):  # whoever needs it meets the error, and can tell what fails
            with self._lock:
                while self._made < count:
                    self._free.append(self._another())
                buffers = list(self._free[-count:])
            for buffer in reversed(buffers):
                populate(buffer, used_bytes)

    def _another(self) -> mmap.mmap:
        buffer = aligned_buffer(self._length_bytes)
        self._made += 1
        return buffer
