"""Restores: how soon the guest runs, eagerly and lazily, and where it finds its memory.

A real guest fills most of its memory with noise on one host, is spread over two hosts (half
each, stores of their own) and saved there. In each round and for each size of memory that
checkpoint is restored, every time read from the disk:

* ``lazy`` and ``eager``: over two hosts that have changed places; the plan has what is hotter
  cross, and leaves where it is what nobody has touched since it was filled. ``…_one_host``: on
  the one that was the sub host, so that half of memory has to cross.
* ``whole``: until the lazily restored guest had all its memory, every page of which its pager
  had from a part server; the guest works a little meanwhile.
* ``qemu_incoming``: the same guest, saved by a plain QEMU into one file, in a plain QEMU on one
  host; ``qemu_start``: that QEMU's start alone, until its monitor answers.

The time of a restore ends when QEMU has been told to let the guest run. ``reserve`` is the part
of it in which Ray sets memory aside and starts the hosts' actors, in processes that are there
already (`dcres.actors.ray.gateway.spares`); ``own`` is a lazy restore over two hosts, with all
of that, but without QEMU's start. On one host Ray has to start an actor on the other one, too,
which no longer is the VM's. All hosts are on this machine, and so share its processors. What else
a restore is about is in `dcres.bench.move` (bytes per second between two hosts) and
`dcres.bench.history` (what the access history is good for).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from dcres.actors.control.coordinator import Coordinator
from dcres.actors.host.vm_folder import VmFolder
from dcres.actors.ports import Port
from dcres.actors.ray.local_cluster import LocalCluster
from dcres.bench import history, move
from dcres.bench.apart import (
    FILL_TIMEOUT_S,
    apart,
    await_word,
    coordinator,
    delete,
    folder_of,
    store_of,
)
from dcres.bench.filler import fill_mib, filler_image
from dcres.bench.move import forget
from dcres.bench.result import Aim, Bench, Direction, Figure, Ratio, Row, Setup
from dcres.bench.rig import wait_for
from dcres.config import Accel, Layout, VmSpec
from dcres.model.pages import PAGE_SIZE
from dcres.storage.format.manifest import Manifest, dumps
from dcres.vm import process
from dcres.vm.command import VmFiles
from dcres.vm.monitor import Monitor

MIB = 1 << 20
SIZES = {"256MiB": 256, "1GiB": 1024, "4GiB": 4096}
QUICK_SIZES = {"256MiB": 256, "512MiB": 512}
ROUNDS, QUICK_ROUNDS = 3, 1
_TIMEOUT_S = 600.0
_POLL_S = 0.02
# The eager restore before took the processes in reserve; others are there by then, and idle.
# Without it, lazy restores would be measured while they start.
_SPARES_S = 4.0
_HOT_MIB = 32


def measure(setup: Setup) -> list[Row]:
    """Every round's rows."""
    sizes = QUICK_SIZES if setup.quick else SIZES
    rounds = QUICK_ROUNDS if setup.quick else ROUNDS
    rows: list[Row] = []
    most = max(sizes.values()) * MIB
    with ExitStack() as held:
        cluster = held.enter_context(apart(setup.folder / "c", 2, memory_per_host=most))
        subjects = []
        for size, memory_mib in sizes.items():
            setup.say(f"a guest of {size} fills its memory, twice")
            plain = _Plain(setup.folder, size, memory_mib)
            subjects.append(_Subject(held, cluster, setup.folder, size, memory_mib, plain))
        for at in range(rounds):
            for subject in subjects:
                setup.say(f"round {at + 1}: {subject.size}")
                rows += subject.round(at)
        rows += history.measure(setup, cluster, rounds)
    return rows + move.measure(setup, rounds)


def _spec(folder: Path, size: str, memory_mib: int) -> dict[str, Any]:
    """A VM file's values."""
    image = filler_image(folder)
    words = f"fill={fill_mib(memory_mib)} dirty=1 span={_HOT_MIB}"
    return {
        "name": f"restore-{size.lower()}",
        "memory": f"{memory_mib}MiB",
        "kernel": str(image.kernel),
        "initrd": str(image.initrd),
        "append": f"console=ttyS0 quiet panic=-1 {words}",
        "accel": "tcg",
        "layout": {"main": f"{memory_mib}MiB"},
    }


class _Subject:
    """One size of memory: a checkpoint of two hosts, restored again and again."""

    def __init__(
        self,
        held: ExitStack,
        cluster: LocalCluster,
        folder: Path,
        size: str,
        memory_mib: int,
        plain: _Plain,
    ) -> None:
        self.size = size
        self._cluster = cluster
        self._plain = plain
        self._hosts = list(cluster.hosts)
        self._one = Layout(main=memory_mib * MIB)
        self._two = Layout(main=memory_mib // 2 * MIB, subs=(memory_mib // 2 * MIB,))
        spec = _spec(folder, size, memory_mib)
        self._vm = str(spec["name"])
        self._port: Port = held.enter_context(coordinator(self._vm))
        self._manifest = self._save(spec)

    def _save(self, spec: dict[str, Any]) -> Manifest:
        """The checkpoint over two hosts; memory is filled where no page has to leave."""
        self._port.within(_TIMEOUT_S).call(Coordinator.start, spec, self._hosts[:1])
        await_word(self._console(self._hosts[0]), "WROTE")
        alone = self._checkpoint()
        self._restore(alone, self._two, self._hosts, lazy=False)
        both = self._checkpoint()
        delete(self._cluster, alone)
        return both

    def _checkpoint(self) -> Manifest:
        facts = self._port.within(_TIMEOUT_S).call(Coordinator.checkpoint, "stop", full=True)
        self._port.call(Coordinator.stop)
        return store_of(self._cluster, self._hosts[0]).get(facts["checkpoint"])

    def _console(self, host: str) -> Path:
        return VmFolder.of(self._cluster.settings(host), self._vm).run / "console.log"

    def _restore(
        self, manifest: Manifest, layout: Layout, hosts: list[str], lazy: bool
    ) -> dict[str, Any]:
        """The facts, with the time until the guest said something."""
        for part in manifest.hosts:
            forget(folder_of(self._cluster, manifest, part.host) / part.memory_file)
        began = time.monotonic()
        facts: dict[str, Any] = self._port.within(_TIMEOUT_S).call(
            Coordinator.restore, dumps(manifest), layout, hosts, lazy
        )
        await_word(self._console(hosts[0]), "WROTE")
        return {**facts, "first_word_seconds": time.monotonic() - began, "began": began}

    def round(self, at: int) -> list[Row]:
        """All ways of restoring, one after the other."""
        start, incoming = self._plain.restore()
        rows = [
            Row(f"qemu_start_{self.size}", at, start, "s"),
            Row(f"qemu_incoming_{self.size}", at, incoming, "s"),
        ]
        for name, layout, hosts in (
            (self.size, self._two, self._hosts[::-1]),
            (f"one_host_{self.size}", self._one, self._hosts[1:]),
        ):
            eager = self._restore(self._manifest, layout, hosts, lazy=False)
            rows.append(_row(f"eager_{name}", at, eager))
            self._port.call(Coordinator.stop)
            rows += self._lazy_rows(name, at, layout, hosts, start)
        return rows

    def _lazy_rows(
        self, name: str, at: int, layout: Layout, hosts: list[str], start: float
    ) -> Iterator[Row]:
        time.sleep(_SPARES_S)
        facts = self._restore(self._manifest, layout, hosts, lazy=True)
        reserve = facts["parts_seconds"]["reserve"]
        yield _row(f"lazy_{name}", at, facts)
        yield Row(f"reserve_{name}", at, reserve, "s")
        if layout is self._two:
            yield Row(f"own_{name}", at, facts["seconds"] - start, "s")
        while self._port.call(Coordinator.status)["hosts"][0]["moving"]:
            time.sleep(_POLL_S)
        whole = time.monotonic() - facts["began"]
        rate = self._manifest.pages * PAGE_SIZE / 1e6 / (whole - facts["seconds"])
        yield Row(f"whole_{name}", at, whole, "s", {"MB_per_s": rate})
        self._port.call(Coordinator.stop)


def _row(what: str, at: int, facts: dict[str, Any]) -> Row:
    seen = ("parts_seconds", "first_word_seconds", "pages_moved")
    return Row(what, at, facts["seconds"], "s", {key: facts[key] for key in seen})


class _Plain:
    """The same guest in a QEMU of its own, saved by QEMU into a file."""

    def __init__(self, folder: Path, size: str, memory_mib: int) -> None:
        self._folder = folder
        self._stream = folder / f"stream-{size}"
        self._spec = VmSpec.model_validate(_spec(folder, size, memory_mib))
        with tempfile.TemporaryDirectory(prefix="dcres-bench-", dir="/dev/shm") as ram:
            files = self._files(ram)
            qemu, monitor = process.start(self._spec, files, Accel.TCG)
            try:
                monitor.cont()
                await_word(files.console, "WROTE")
                monitor.stop()
                monitor.execute("migrate-set-parameters", {"max-bandwidth": 1 << 40})
                monitor.execute("migrate", {"uri": f"exec:cat > {self._stream}"})
                _await_migrated(monitor)
            finally:
                monitor.close()
                qemu.end()

    def _files(self, ram: str) -> VmFiles:
        folder = self._folder
        (folder / "console").unlink(missing_ok=True)
        return VmFiles(Path(ram) / "ram", folder / "q.sock", folder / "console", folder / "q.log")

    def restore(self) -> tuple[float, float]:
        """Seconds until QEMU's monitor answered, and until the guest ran."""
        forget(self._stream)
        with tempfile.TemporaryDirectory(prefix="dcres-bench-", dir="/dev/shm") as ram:
            began = time.monotonic()
            qemu, monitor = process.start(self._spec, self._files(ram), Accel.TCG, incoming=True)
            try:
                monitor.status()
                start = time.monotonic() - began
                monitor.execute("migrate-incoming", {"uri": f"exec:cat {self._stream}"})
                _await_migrated(monitor)
                monitor.cont()
                return start, time.monotonic() - began
            finally:
                monitor.close()
                qemu.end()


def _await_migrated(monitor: Monitor) -> None:
    wait_for(
        lambda: monitor.execute("query-migrate").get("status") == "completed",
        FILL_TIMEOUT_S,
        "QEMU has migrated",
    )


def _whats(*names: str) -> tuple[str, ...]:
    return tuple(f"{name}_{size}" for size in SIZES for name in names)


BENCH = Bench(
    name="restore",
    about="restores, eager and lazy, over sizes of memory; moving memory; placement by history",
    measure=measure,
    ratios={
        "lazy_seconds_4GiB_over_256MiB": Ratio("lazy_4GiB", "lazy_256MiB"),
        "eager_over_qemu_incoming": Ratio("eager_one_host_4GiB", "qemu_incoming_4GiB"),
        **history.RATIOS,
        **move.RATIOS,
    },
    aims=(
        Aim("own_256MiB", Direction.AT_MOST, 1, "s"),
        Aim("own_4GiB", Direction.AT_MOST, 1, "s"),
        Aim("lazy_seconds_4GiB_over_256MiB", Direction.AT_MOST, 1.25),
        Aim("eager_over_qemu_incoming", Direction.AT_MOST, 1),
        *history.AIMS,
        *move.AIMS,
    ),
    figures=(
        Figure("until the guest runs", "s", _whats("lazy", "reserve", "qemu_start")),
        Figure(
            "with all its memory",
            "s",
            _whats("eager", "eager_one_host", "qemu_incoming", "whole"),
            "tab:orange",
        ),
        Figure(
            "memory moves",
            "MB/s",
            ("move_loopback", "copy_loopback", "move_1gbit", "copy_1gbit"),
            "tab:green",
        ),
        Figure("pages brought after a restore", "pages/s", history.WHATS, "tab:red"),
    ),
)
