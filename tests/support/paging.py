"""Remote paging for a process that is not QEMU: real pager, real memory servers, real faults."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dcres.bench import rig as bench_rig
from dcres.bench.rig import Writer, build_writer
from dcres.linux.files import data_extents
from dcres.model.pages import PAGE_SIZE

__all__ = ["Rig", "Writer", "build_writer", "rig"]


class Rig(bench_rig.Rig):
    """The benchmarks' rig, whose memory can be looked at as a whole."""

    def memory(self) -> bytes:
        """All of the memory, put together from every host, while the pager is frozen."""
        names = ["guest.ram", "outbox.ram", *(f"sub{i}.ram" for i in range(len(self.servers)))]
        whole = bytearray(self.pages * PAGE_SIZE)
        for name in names:
            fd = os.open(self.ram / name, os.O_RDONLY)
            try:
                for first, stop in data_extents(fd, self.pages).tolist():
                    at, length = first * PAGE_SIZE, (stop - first) * PAGE_SIZE
                    assert not any(whole[at : at + length]), f"{name}: a page is in two places"
                    whole[at : at + length] = os.pread(fd, length, at)
            finally:
                os.close(fd)
        return bytes(whole)


@contextmanager
def rig(
    folder: Path, program: Path, pages: int, limit: int, subs: tuple[int, ...]
) -> Iterator[Rig]:
    """A running `Rig`; everything it started is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="dcres-test-", dir="/dev/shm") as ram:
        made = Rig(folder, Path(ram), program, pages)
        try:
            made.start(limit, subs)
            yield made
        finally:
            made.close()
