"""The guest of most benchmarks: it fills its memory with data that no disk can shorten."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dcres.bench.rig import build
from dcres.config import default_home
from dcres.vm import guest

_SOURCE = Path(__file__).with_name("filler.c")
_KERNEL_MIB = 112  # what the guest's kernel keeps for itself, and a little more


@dataclass(frozen=True, slots=True)
class FillerImage:
    """What QEMU boots to run `filler.c`."""

    kernel: Path
    initrd: Path


def filler_image(folder: Path) -> FillerImage:
    """The usual guest kernel with `filler.c` as its only program."""
    kernel = guest.prepare(default_home() / "guest").kernel
    program = build(_SOURCE, folder / "filler", "-static")
    initrd = folder / "filler.gz"
    initrd.write_bytes(guest.initramfs(program.read_bytes()))
    return FillerImage(kernel, initrd)


def fill_mib(memory_mib: int) -> int:
    """How much of a guest's memory it can fill: with huge pages its kernel keeps 5 % free."""
    return memory_mib - _KERNEL_MIB - memory_mib // 16
