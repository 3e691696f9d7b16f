"""Checkpoint and restore of a stopped VM over one, two and three hosts, against the bare disk.

A real guest fills most of its memory with noise and rests. Every host of the local cluster is
on this machine and writes to the same disk, so several hosts cannot be faster than one here:
what shows is what it costs to take part.

In each round and for each number of hosts: a checkpoint; the VM is stopped; the bare disk writes
and reads as many bytes as the memory files hold; a restore. Two times each:

* ``save`` and ``load``: from the slowest host's preparation until its part was durable, and how
  long pages were read and put in place;
* ``checkpoint`` and ``restore``: the whole order, until the caller has the answer.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dcres.actors.control.coordinator import Coordinator
from dcres.actors.ports import Port
from dcres.actors.ray import gateway
from dcres.actors.ray.coordinator import RayCoordinator
from dcres.actors.ray.fleet import coordinator_name
from dcres.actors.ray.local_cluster import LocalCluster
from dcres.bench import disk
from dcres.bench.filler import fill_mib, filler_image
from dcres.bench.result import Aim, Bench, Direction, Figure, Ratio, Row, Setup
from dcres.bench.rig import wait_for
from dcres.errors import VmError
from dcres.model.pages import PAGE_SIZE
from dcres.storage.format.manifest import dumps
from dcres.storage.store.store import Store

MIB = 1 << 20
HOSTS = (1, 2, 3)
_FILL_TIMEOUT_S = 300.0
_RESTORE_TIMEOUT_S = 300.0
_WATCH_S = 0.005


def measure(setup: Setup) -> list[Row]:
    """Every round's rows."""
    memory_mib = 512 if setup.quick else 1024
    rounds = 1 if setup.quick else 5
    rows: list[Row] = []
    with _cluster(setup.folder, memory_mib) as cluster:
        subjects = []
        for hosts in HOSTS:
            setup.say(f"{hosts} host{'s' * (hosts > 1)}: a guest of {memory_mib} MiB fills memory")
            subjects.append(Subject(cluster, setup.folder, hosts, memory_mib))
        for at in range(rounds):
            for subject in subjects:
                setup.say(f"round {at + 1}: {subject.hosts} of {HOSTS[-1]} hosts")
                rows += subject.round(at)
        for subject in subjects:
            subject.end()
    return rows


@contextlib.contextmanager
def _cluster(folder: Path, memory_mib: int) -> Iterator[LocalCluster]:
    """Three hosts, each with room for one share of every VM, and this process connected."""
    room = sum(max(_shares(hosts, memory_mib)) for hosts in HOSTS) * MIB
    with LocalCluster.start(folder / "c", HOSTS[-1], memory_per_host=room) as cluster:
        gateway.connect(cluster.address, cluster.token_path)
        try:
            yield cluster
        finally:
            gateway.disconnect()


def _shares(hosts: int, memory_mib: int) -> list[int]:
    """MiB per host, alike."""
    return [-(-memory_mib // hosts)] * hosts


class Subject:
    """One VM over some number of hosts; it is brought back from its own checkpoint each round."""

    def __init__(self, cluster: LocalCluster, folder: Path, hosts: int, memory_mib: int) -> None:
        self.hosts = hosts
        self._vm = f"bench{hosts}"
        self._cluster = cluster
        self._store = Store(cluster.settings(cluster.hosts[0]).store)
        self._raw = folder / "raw"
        self._port: Port = gateway.spawn(RayCoordinator, coordinator_name(self._vm), (self._vm,))
        self._port.wait_ready(60.0)
        main, *subs = (f"{share}MiB" for share in _shares(hosts, memory_mib))
        image = filler_image(folder)
        self._port.within(_RESTORE_TIMEOUT_S).call(
            Coordinator.start,
            {
                "name": self._vm,
                "memory": f"{memory_mib}MiB",
                "kernel": str(image.kernel),
                "initrd": str(image.initrd),
                "append": f"console=ttyS0 quiet panic=-1 fill={fill_mib(memory_mib)}",
                "layout": {"main": main, "subs": subs},
            },
        )
        self._await_filled()

    def _await_filled(self) -> None:
        console = Path(self._port.call(Coordinator.status)["hosts"][0]["console"])

        def filled() -> bool:
            text = console.read_text(errors="replace")
            if "FILL FAILED" in text or "panic" in text:
                raise VmError(f"the guest could not fill its memory: {text.strip()[-200:]}")
            return "FILLED" in text

        wait_for(filled, _FILL_TIMEOUT_S, "the guest has filled its memory")

    def round(self, at: int) -> list[Row]:
        """Checkpoint, bare write and read, restore; the checkpoint is deleted in the end."""
        facts = self._port.within(_RESTORE_TIMEOUT_S).call(
            Coordinator.checkpoint, "stop", full=True
        )
        self._port.call(Coordinator.stop)
        length = facts["pages"] * PAGE_SIZE
        raw_write = disk.write(self._raw, length)
        raw_read = disk.read(self._raw)
        restored = self._restore(facts)
        self._raw.unlink()
        self._store.delete(facts["checkpoint"])
        return self._rows(at, facts, restored, length / raw_write, length / raw_read)

    def _rows(
        self,
        at: int,
        facts: dict[str, Any],
        restored: tuple[float, float],
        raw_write: float,
        raw_read: float,
    ) -> list[Row]:
        """Rates in MB/s; `raw_write` and `raw_read` in bytes per second, `restored` in seconds."""
        length = facts["pages"] * PAGE_SIZE
        load, restore = restored
        seconds = {
            "save": max(host["seconds"] for host in facts["hosts"]),
            "checkpoint": facts["seconds"],
            "load": load,
            "restore": restore,
        }
        n = self.hosts
        rows = [
            Row(f"{what}_{n}", at, length / 1e6 / each, "MB/s", {"seconds": each, "bytes": length})
            for what, each in seconds.items()
        ]
        rows.append(Row(f"downtime_{n}", at, facts["downtime_seconds"], "s"))
        rows.append(Row(f"raw_write_{n}", at, raw_write / 1e6, "MB/s"))
        rows.append(Row(f"raw_read_{n}", at, raw_read / 1e6, "MB/s"))
        return rows

    def _restore(self, facts: dict[str, Any]) -> tuple[float, float]:
        """Restore; how long pages were put in place, and how long it took in all."""
        manifest = dumps(self._store.get(facts["checkpoint"]))
        watch = LoadWatch(self._memory_files(), facts["pages"])
        with watch:
            answer = self._port.within(_RESTORE_TIMEOUT_S).call(Coordinator.restore, manifest)
        return watch.seconds, answer["seconds"]

    def _memory_files(self) -> list[Path]:
        """Where the VM's pages may come to lie; any host may become the main host."""
        settings = [self._cluster.settings(host) for host in self._cluster.hosts]
        names = ("guest.ram", "store.ram")
        return [each.ram / self._vm / name for each in settings for name in names]

    def end(self) -> None:
        """Stop the VM and its coordinator."""
        self._port.call(Coordinator.stop)
        gateway.kill(coordinator_name(self._vm))


class LoadWatch:
    """Watches tmpfs files grow: `seconds` from the first page loaded to the last.

    Loading is a small part of a restore and nobody reports it by itself. What QEMU puts into
    memory before (firmware) is little, and thrown away again.
    """

    def __init__(self, files: list[Path], pages: int) -> None:
        self._files = files
        self._wanted = pages * PAGE_SIZE
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._moments: list[tuple[float, int]] = []

    def __enter__(self) -> LoadWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(_WATCH_S):
            self._moments.append((time.monotonic(), sum(map(_allocated, self._files))))

    @property
    def seconds(self) -> float:
        """The time in which the files grew from 2 % to 98 % of the pages, drawn out to 100 %."""
        low, high = (self._when(share) for share in (0.02, 0.98))
        return (high - low) / 0.96

    def _when(self, share: float) -> float:
        for moment, length in self._moments:
            if length >= share * self._wanted:
                return moment
        raise VmError("the restored VM holds fewer pages than its checkpoint")


def _allocated(path: Path) -> int:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return 0
    return found.st_blocks * 512


def _ratios() -> dict[str, Ratio]:
    found = {}
    for n in HOSTS:
        found[f"checkpoint_{n}_over_raw"] = Ratio(f"save_{n}", f"raw_write_{n}")
        found[f"restore_{n}_over_raw"] = Ratio(f"load_{n}", f"raw_read_{n}")
        found[f"checkpoint_{n}_whole_over_raw"] = Ratio(f"checkpoint_{n}", f"raw_write_{n}")
        found[f"restore_{n}_whole_over_raw"] = Ratio(f"restore_{n}", f"raw_read_{n}")
    return found


def _whats(*names: str) -> tuple[str, ...]:
    return tuple(f"{name}_{n}" for n in HOSTS for name in names)


BENCH = Bench(
    name="checkpoint",
    about="checkpoint and restore of a stopped VM over 1, 2 and 3 hosts against the bare disk",
    measure=measure,
    ratios=_ratios(),
    aims=tuple(
        Aim(f"{what}_{n}_over_raw", Direction.AT_LEAST, 0.5)
        for what in ("checkpoint", "restore")
        for n in HOSTS
    ),
    figures=(
        Figure("Checkpoint, stopped VM", "MB/s", _whats("raw_write", "save", "checkpoint")),
        Figure("Restore", "MB/s", _whats("raw_read", "load", "restore"), color="tab:orange"),
    ),
)
