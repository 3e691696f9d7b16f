"""QCOW2 files as others see them: held by another process, compared, checked."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def in_use(path: Path) -> Iterator[None]:
    """Another process has the disk open, as QEMU would."""
    with subprocess.Popen(
        ["qemu-io", path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        said = b""
        while b"qemu-io>" not in said:  # it asks for a command once it has the disk
            piece = os.read(holder.stdout.fileno(), 4096)
            assert piece, "qemu-io could not open the disk"
            said += piece
        try:
            yield
        finally:
            holder.stdin.write(b"quit\n")
            holder.stdin.close()


def same(path: Path, other: Path) -> bool:
    """Whether a guest would read the same."""
    done = subprocess.run(["qemu-img", "compare", "-s", path, other], capture_output=True)
    assert done.returncode in (0, 1), done
    return done.returncode == 0


def sound(path: Path) -> bool:
    return subprocess.run(["qemu-img", "check", "-q", path]).returncode == 0
