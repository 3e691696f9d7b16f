"""The cost of a file format: sparse and packed memory files against a plain one.

A host that has half of a VM's memory saves it and loads it back. The half is *contiguous* (the
first one), *random* (every page by chance) or *alternating* (every other page, so that no two
pages of the host are neighbours: the worst case of a sparse file). The data is noise; the rest
of the RAM file is holes, as on a host that has no more.

``checkpoint_F_P`` is the time from the first page read until the memory file and the tables that
go with it (checksums, index) are durable; ``restore_F_P`` the time to read the tables and the
file from the disk and to have every page, verified, in its place on tmpfs. ``again_F`` is the work
of a later round of a live checkpoint: an eighth of the contiguous half, pages chosen by chance,
saved once more into a file that has them and is not durable yet. `dcres.bench.plain`
is the yardstick: the same pages one after the other, without checksums, index or verification.
Both run in this process, without Ray and QEMU. Every round takes them in another order.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import numpy as np

from dcres.bench import plain
from dcres.bench.result import Aim, Bench, Direction, Figure, Ratio, Row, Setup
from dcres.linux.files import opened
from dcres.model.formats import WHOLE_FORMATS, MemoryFormat
from dcres.model.pages import PAGE_SIZE, Extents, Mask, extents_of_mask, split
from dcres.storage import layout
from dcres.storage.engine.expected import MemoryFile
from dcres.storage.engine.memory_file import MemoryFileWriter, load
from dcres.storage.format import tables
from dcres.storage.format.host_part import write_memory_tables

PLACEMENTS = ("contiguous", "random", "alternating")
FORMATS = tuple(map(str, WHOLE_FORMATS))
_PLAIN = "plain"
_MEMORY_BYTES, _QUICK_MEMORY_BYTES = 1 << 30, 1 << 29
_NOISE_PAGES = 1 << 14
_ROUNDS, _QUICK_ROUNDS = 12, 2
_AGAIN_SHARE = 1 / 8


@dataclass(frozen=True, slots=True, eq=False)
class Half:
    """The pages of one host, in a RAM file on tmpfs; `target` is where they are loaded to."""

    name: str
    mask: Mask
    ram: Path
    target: Path
    folder: Path  # on the disk that is measured

    @property
    def extents(self) -> Extents:
        """Its pages."""
        return extents_of_mask(self.mask)


def measure(setup: Setup) -> list[Row]:
    """Every round's rows."""
    memory_bytes = _QUICK_MEMORY_BYTES if setup.quick else _MEMORY_BYTES
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="dcres-bench-", dir="/dev/shm") as shm:
        halves = []
        for name in PLACEMENTS:
            setup.say(f"noise in a half of memory: {name}")
            halves.append(_half(Path(shm), setup.folder, name, memory_bytes))
        rounds = _QUICK_ROUNDS if setup.quick else _ROUNDS
        for at in range(rounds):
            for half in halves:
                setup.say(f"round {at + 1} of {rounds}: {half.name}")
                rows += _round(at, half)
    return rows


def half_of(name: str, page_count: int) -> Mask:
    """Which pages the host has."""
    if name == "contiguous":
        mask: Mask = np.arange(page_count) < page_count // 2
    elif name == "alternating":
        mask = np.arange(page_count) % 2 == 0
    else:
        mask = np.zeros(page_count, dtype=np.bool_)
        mask[np.random.default_rng(8).permutation(page_count)[: page_count // 2]] = True
    return mask


def _half(shm: Path, disk: Path, name: str, memory_bytes: int) -> Half:
    mask = half_of(name, memory_bytes // PAGE_SIZE)
    folder = disk / name
    folder.mkdir()
    half = Half(name, mask, shm / f"{name}.ram", shm / "target", folder)
    noise = memoryview(np.random.default_rng(1).bytes(_NOISE_PAGES * PAGE_SIZE))
    with opened(half.ram, os.O_RDWR | os.O_CREAT) as fd:
        os.ftruncate(fd, memory_bytes)
        for first, stop in split(half.extents, _NOISE_PAGES // 2):
            begin = first % (_NOISE_PAGES // 2) * PAGE_SIZE
            os.pwrite(fd, noise[begin : begin + (stop - first) * PAGE_SIZE], first * PAGE_SIZE)
    return half


def _round(at: int, half: Half) -> list[Row]:
    orders = list(permutations((*FORMATS, _PLAIN)))
    rows = []
    for name in orders[at % len(orders)]:
        save, restore = _times(half, name)
        rows.append(Row(f"checkpoint_{name}_{half.name}", at, save, "s"))
        rows.append(Row(f"restore_{name}_{half.name}", at, restore, "s"))
        if half.name == PLACEMENTS[0] and name != _PLAIN:
            rows.append(Row(f"again_{name}", at, _time_again(half, name), "s"))
    return rows


def _times(half: Half, name: str) -> tuple[float, float]:
    """Seconds to save and to load."""
    with opened(half.ram, os.O_RDONLY) as ram_fd, _emptied(half.folder) as folder:
        if name == _PLAIN:
            pages = np.flatnonzero(half.mask)
            save = _timed(lambda: plain.save(folder / "plain", ram_fd, pages))
            with _target(half) as fd:
                return save, _timed(lambda: plain.load(folder / "plain", fd, pages))
        path = folder / layout.MEMORY_FILES[MemoryFormat(name)]
        save = _timed(lambda: _save(path, half, ram_fd, MemoryFormat(name)))
        with _target(half) as fd:
            return save, _timed(lambda: _load(path, half, fd, MemoryFormat(name)))


def _timed(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _save(path: Path, half: Half, ram_fd: int, memory_format: MemoryFormat) -> None:
    with MemoryFileWriter(path, len(half.mask), memory_format=memory_format) as writer:
        writer.save(ram_fd, half.extents)
        saved = writer.seal()
    write_memory_tables(path.parent, saved)


def _time_again(half: Half, name: str) -> float:
    """Seconds to save a few of the pages once more."""
    some = half.mask & (np.random.default_rng(8).random(half.mask.size) < _AGAIN_SHARE)
    with (
        opened(half.ram, os.O_RDONLY) as ram_fd,
        _emptied(half.folder) as folder,
        MemoryFileWriter(
            folder / "again", half.mask.size, memory_format=MemoryFormat(name)
        ) as writer,
    ):
        writer.save(ram_fd, half.extents)
        return _timed(lambda: writer.save(ram_fd, extents_of_mask(some)))


def _load(path: Path, half: Half, target_fd: int, memory_format: MemoryFormat) -> None:
    mask, sums = tables.read_sums(path.parent / layout.SUMS, len(half.mask))
    order = None
    if memory_format is MemoryFormat.PACKED:
        order = tables.read_index(path.parent / layout.INDEX, len(half.mask))
    load(MemoryFile(path, mask, sums, order), target_fd)


@contextmanager
def _emptied(folder: Path) -> Iterator[Path]:
    """A folder that is removed in the end, and whose blocks are free again before the next."""
    inner = folder / "part"
    inner.mkdir()
    try:
        yield inner
    finally:
        shutil.rmtree(inner)
        with opened(folder, os.O_RDONLY | os.O_DIRECTORY) as fd:
            os.fsync(fd)


@contextmanager
def _target(half: Half) -> Iterator[int]:
    """An empty RAM file on tmpfs, gone in the end."""
    with opened(half.target, os.O_RDWR | os.O_CREAT) as fd:
        try:
            os.ftruncate(fd, len(half.mask) * PAGE_SIZE)
            yield fd
        finally:
            half.target.unlink()


def _ratios() -> dict[str, Ratio]:
    again = {
        f"again_{name}_over_checkpoint": Ratio(
            f"again_{name}", f"checkpoint_{name}_{PLACEMENTS[0]}"
        )
        for name in FORMATS
    }
    return again | {
        f"{what}_{name}_over_plain_{placement}": Ratio(
            f"{what}_{name}_{placement}", f"{what}_plain_{placement}"
        )
        for what in ("checkpoint", "restore")
        for name in FORMATS
        for placement in PLACEMENTS
    }


def _whats(what: str) -> tuple[str, ...]:
    return tuple(f"{what}_{name}_{p}" for p in PLACEMENTS for name in (_PLAIN, *FORMATS))


BENCH = Bench(
    name="figure8",
    about="memory files, sparse and packed, against a plain file of the same pages",
    measure=measure,
    ratios=_ratios(),
    aims=tuple(
        Aim(f"{what}_packed_over_plain_alternating", Direction.AT_MOST, 1.03)
        for what in ("checkpoint", "restore")
    ),
    figures=(
        Figure("Checkpoint of half of 1 GiB", "s", _whats("checkpoint")),
        Figure("Restore", "s", _whats("restore"), color="tab:orange"),
        Figure(
            "An eighth, saved again", "s", tuple(f"again_{f}" for f in FORMATS), color="tab:green"
        ),
    ),
)
