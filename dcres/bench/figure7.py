"""Figure 7 of Murata and Kourai (2019): a 1 GiB VM that is split 512/512 over two hosts.

Three ways, in each round one after the other, on hosts with disks and links of their own
(`dcres.bench.hosts`):

* ``dcres``: every host saves and loads what it holds, the VM is stopped (``--mode stop``);
* ``traditional``: QEMU's own migration of the same split VM into one file on the main host
  (`dcres.bench.traditional`). Everything the sub host holds comes in through remote paging, and
  for each page that comes another has to leave. Its restore starts QEMU under a pager with the
  same share and loads the file: what exceeds the share is paged out to the sub host meanwhile.
  The paging is dcres's own, so how fast that is counts for these times;
* ``ordinary``: QEMU's own migration of a VM that has all its memory on one host and no pager.

The guest's memory is full of noise. Times are those of the whole order, as its caller sees it: a
checkpoint's from the order to the answer, with everything durable; a restore's until the guest
may run. That of dcres and the traditional one begin with Ray setting memory aside on both hosts
and starting actors there; the ordinary one only starts QEMU.

Each host's disk reads and writes `DISK_MB_PER_S`, as a hard disk of today does, and links have
1 Gbit, as theirs. So disks and link decide, as on their machines, and not the two
processors that all hosts have in common here. How the three ways compare depends on it: what goes
through paging cannot be faster than the link, whatever the disk. A full run therefore also takes
checkpoints with other disks (``_at_100``, ``_at_400`` MB/s). ``disk_of_a_host`` and ``link`` are
what one and the other really did, all hosts at once.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from dcres.actors.control.coordinator import Coordinator
from dcres.actors.ray.local_cluster import LocalCluster
from dcres.bench.apart import await_word
from dcres.bench.hosts import Hosts, slow_cluster
from dcres.bench.result import Aim, Bench, Direction, Figure, Ratio, Row, Setup
from dcres.bench.split import (
    MIB,
    SplitVm,
    checkpoint_details,
    guest_spec,
    layout_of,
    restore_details,
)
from dcres.bench.traditional import Image
from dcres.config import Accel, VmSpec
from dcres.storage.format.manifest import Manifest
from dcres.vm import process
from dcres.vm.command import QEMU, VmFiles
from dcres.vm.monitor import Monitor

MEMORY_MIB = 1024
DISK_MB_PER_S, OTHER_DISKS_MB_PER_S = 200, (100, 400)
ROUNDS, QUICK_ROUNDS = 4, 1
_LEAST_BYTES = MEMORY_MIB * MIB * 85 // 100  # of a stream that has memory in it


def measure(setup: Setup) -> list[Row]:
    """Every round's rows."""
    rounds = QUICK_ROUNDS if setup.quick else ROUNDS
    rows: list[Row] = []
    with ExitStack() as held:
        hosts, cluster = held.enter_context(slow_cluster(setup.folder, 2, MEMORY_MIB * MIB))
        setup.say(f"guests of {MEMORY_MIB} MiB fill their memory, split over two hosts and on one")
        split = Split(held, setup.folder, hosts, cluster)
        ordinary = held.enter_context(Ordinary(setup.folder, hosts))  # both fill at once
        split.await_filled()
        for at in range(rounds):
            for row in _round(setup, hosts, ordinary, split, at):
                setup.say(f"round {at + 1} of {rounds}: {row.what} {row.value:.3g} {row.unit}")
                rows.append(row)
    return rows


def _round(setup: Setup, hosts: Hosts, ordinary: Ordinary, split: Split, at: int) -> Iterator[Row]:
    for disk in () if setup.quick else OTHER_DISKS_MB_PER_S:
        hosts.limit(disk)
        yield ordinary.save(at, f"_at_{disk}")
        yield from split.save(at, f"_at_{disk}")
    hosts.limit(DISK_MB_PER_S)
    yield from hosts.rates(at)
    yield ordinary.save(at)
    yield from split.save(at)
    yield ordinary.restore(at)
    yield from split.restore(at)


class Split:
    """The VM over both hosts, which runs except while it is saved."""

    def __init__(self, held: ExitStack, folder: Path, hosts: Hosts, cluster: LocalCluster) -> None:
        self._monitor = folder / "second.sock"
        self._image = Image(folder / "split.image", hosts.argv("h0"))
        self._layout = layout_of(MEMORY_MIB // 2, MEMORY_MIB // 2)
        # dcres keeps its own connection to QEMU's monitor, which serves one client.
        self._extra = ("-qmp", f"unix:{self._monitor},server=on,wait=off")
        self._vm = SplitVm(held, cluster, guest_spec(folder, "figure7", MEMORY_MIB))
        self._vm.start(self._layout, self._extra)
        self._manifest: Manifest | None = None

    def await_filled(self) -> None:
        """Before it is saved."""
        self._vm.await_filled()

    def save(self, at: int, suffix: str = "") -> Iterator[Row]:
        """By dcres, then by QEMU."""
        if self._manifest is not None:
            self._vm.forget(self._manifest)
        saved, self._manifest = self._vm.checkpoint()
        yield Row(f"checkpoint_dcres{suffix}", at, saved.seconds, "s", checkpoint_details(saved))
        before = self._paged()
        with Monitor.connect(self._monitor) as monitor:
            seconds = self._image.save(monitor, _LEAST_BYTES)
            monitor.cont()
        details = {"image_bytes": self._image.length_bytes, **self._since(before)}
        yield Row(f"checkpoint_traditional{suffix}", at, seconds, "s", details)

    def restore(self, at: int) -> Iterator[Row]:
        """From QEMU's file, then from dcres's checkpoint, by which the VM goes on."""
        self._vm.stop()
        yield self._load(at)
        self._vm.stop()
        if self._manifest is not None:
            restored = self._vm.restore(self._manifest, self._layout)
            yield Row("restore_dcres", at, restored.seconds, "s", restore_details(restored))

    def _load(self, at: int) -> Row:
        began = time.monotonic()
        self._vm.start(self._layout, (*self._extra, "-incoming", "defer"))
        ready = time.monotonic() - began
        with Monitor.connect(self._monitor) as monitor:
            self._image.load(monitor)
        seconds = time.monotonic() - began
        details = {"ready_seconds": ready, **self._since({"pages_in": 0, "pages_out": 0})}
        self._vm.await_life()
        return Row("restore_traditional", at, seconds, "s", details)

    def _paged(self) -> dict[str, int]:
        main = self._vm.port.call(Coordinator.status)["hosts"][0]
        return {key: main[key] for key in ("pages_in", "pages_out")}

    def _since(self, before: dict[str, int]) -> dict[str, Any]:
        return {key: value - before[key] for key, value in self._paged().items()}


class Ordinary:
    """The same guest in a plain QEMU on the first host; it is paused while others are timed."""

    def __init__(self, folder: Path, hosts: Hosts) -> None:
        self._image = Image(folder / "ordinary.image", hosts.argv("h0"))
        self._folder = folder
        layout = {"main": f"{MEMORY_MIB}MiB"}
        spec = {**guest_spec(folder, "ordinary", MEMORY_MIB), "layout": layout}
        self._spec = VmSpec.model_validate(spec)
        self._qemu = str(hosts.program("h0", QEMU))
        self._ended = ExitStack()

    def __enter__(self) -> Self:
        self._monitor = self._start(incoming=False)
        self._monitor.cont()
        self._await_life()
        self._monitor.stop()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.close()

    def _start(self, *, incoming: bool) -> Monitor:
        """A QEMU in place of the one before."""
        self._ended.close()
        ram = tempfile.TemporaryDirectory(prefix="dcres-bench-", dir="/dev/shm")
        self._ended.callback(ram.cleanup)
        self._console.unlink(missing_ok=True)
        folder = self._folder
        files = VmFiles(Path(ram.name) / "ram", folder / "o.sock", self._console, folder / "o.log")
        qemu, monitor = process.start(
            self._spec, files, Accel.TCG, incoming=incoming, qemu=self._qemu
        )
        self._ended.callback(qemu.end)
        self._ended.callback(monitor.close)
        return monitor

    @property
    def _console(self) -> Path:
        return self._folder / "ordinary.log"

    def _await_life(self) -> None:
        await_word(self._console, "WROTE")

    def save(self, at: int, suffix: str = "") -> Row:
        """It is paused in the end."""
        self._monitor.cont()
        seconds = self._image.save(self._monitor, _LEAST_BYTES)
        details = {"image_bytes": self._image.length_bytes}
        return Row(f"checkpoint_ordinary{suffix}", at, seconds, "s", details)

    def restore(self, at: int) -> Row:
        """In a QEMU in place of the one before; it is paused in the end."""
        began = time.monotonic()
        self._monitor = self._start(incoming=True)
        ready = time.monotonic() - began
        self._image.load(self._monitor)
        seconds = time.monotonic() - began
        self._await_life()
        self._monitor.stop()
        return Row("restore_ordinary", at, seconds, "s", {"ready_seconds": ready})


_WAYS = ("dcres", "ordinary", "traditional")
_DISKS = {"": DISK_MB_PER_S, **{f"_at_{disk}": disk for disk in OTHER_DISKS_MB_PER_S}}


def _ratios() -> dict[str, Ratio]:
    found = {}
    for other in _WAYS[1:]:
        for suffix in _DISKS:
            name = f"checkpoint_dcres_over_{other}{suffix}"
            found[name] = Ratio(f"checkpoint_dcres{suffix}", f"checkpoint_{other}{suffix}")
        found[f"restore_dcres_over_{other}"] = Ratio("restore_dcres", f"restore_{other}")
    return found


BENCH = Bench(
    name="figure7",
    about="checkpoint and restore of a VM split over two hosts: dcres, QEMU's own way, one host",
    measure=measure,
    ratios=_ratios(),
    aims=(
        Aim("checkpoint_dcres_over_ordinary", Direction.AT_MOST, 0.55),
        Aim("checkpoint_dcres_over_traditional", Direction.AT_MOST, 0.2),
    ),
    figures=(
        Figure("Checkpoint", "s", tuple(f"checkpoint_{way}" for way in _WAYS)),
        Figure("Restore", "s", tuple(f"restore_{way}" for way in _WAYS), "tab:orange"),
        Figure(
            "Checkpoint with other disks",
            "s",
            tuple(f"checkpoint_{way}{suffix}" for suffix in list(_DISKS)[1:] for way in _WAYS),
            "tab:green",
        ),
    ),
)
