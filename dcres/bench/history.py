"""What the access history is good for: page-ins after a restore placed by it, and by chance.

A real guest over two hosts fills two thirds of its memory and then reads and writes a part that
fits the main host. Once the policy has seen that for a while a checkpoint is taken, and restored
eagerly: as it is, and with the pages' ticks dealt out at random, so that any page is as likely
to be put on the main host as any other. After each the pages that the pager brings are counted.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from dcres.actors.control.coordinator import Coordinator
from dcres.actors.host.vm_folder import VmFolder
from dcres.actors.ports import Port
from dcres.actors.ray.local_cluster import LocalCluster
from dcres.bench.apart import await_word, coordinator, folder_of, store_of
from dcres.bench.filler import filler_image
from dcres.bench.result import Aim, Direction, Ratio, Row, Setup
from dcres.storage.format import tables
from dcres.storage.format.manifest import Manifest, dumps
from dcres.storage.layout import HISTORY

WHATS = ("page_ins_by_history", "page_ins_by_chance")
RATIOS = {"page_ins_history_over_random": Ratio(*WHATS)}
AIMS = (Aim("page_ins_history_over_random", Direction.AT_MOST, 0.2),)

_VM = "history"
_MEMORY_MIB, _MAIN_MIB, _FILL_MIB, _HOT_MIB = 512, 256, 340, 128
_WORK = f"dirty=20 reads=3 span={_HOT_MIB}"
_SECONDS, _QUICK_SECONDS = 30.0, 7.0  # to learn, and to count
_TIMEOUT_S = 300.0


def measure(setup: Setup, cluster: LocalCluster, rounds: int) -> list[Row]:
    """Page-ins per second in every round."""
    seconds = _QUICK_SECONDS if setup.quick else _SECONDS
    setup.say(f"a guest that works on {_HOT_MIB} of {_MEMORY_MIB} MiB")
    with coordinator(_VM) as port:
        subject = _Subject(cluster, port, setup.folder, seconds)
        rows = []
        for at in range(rounds):
            for what in WHATS:
                setup.say(f"round {at + 1}: {what.replace('_', ' ')}")
                rows.append(subject.count(what, at, seconds))
    return rows


class _Subject:
    """The guest's checkpoint."""

    def __init__(self, cluster: LocalCluster, port: Port, folder: Path, learning_s: float) -> None:
        self._cluster = cluster
        self._port = port
        image = filler_image(folder)
        main, sub = f"{_MAIN_MIB}MiB", f"{_MEMORY_MIB - _MAIN_MIB}MiB"
        spec = {
            "name": _VM,
            "memory": f"{_MEMORY_MIB}MiB",
            "kernel": str(image.kernel),
            "initrd": str(image.initrd),
            "append": f"console=ttyS0 quiet panic=-1 fill={_FILL_MIB} {_WORK}",
            "accel": "tcg",
            "layout": {"main": main, "subs": [sub]},
        }
        port.within(_TIMEOUT_S).call(Coordinator.start, spec, list(cluster.hosts))
        self._await_work()
        time.sleep(learning_s)
        facts = port.within(_TIMEOUT_S).call(Coordinator.checkpoint, "live", full=True)
        port.call(Coordinator.stop)
        self._manifest = store_of(cluster, cluster.hosts[0]).get(facts["checkpoint"])
        self._history = self._read_history()

    def _await_work(self) -> None:
        run = VmFolder.of(self._cluster.settings(self._cluster.hosts[0]), _VM).run
        await_word(run / "console.log", "WROTE")

    @property
    def _history_path(self) -> Path:
        main = self._manifest.main.host
        return folder_of(self._cluster, self._manifest, main) / HISTORY

    def _read_history(self) -> tables.Ticks:
        return tables.read_history(self._history_path, self._manifest.page_count)[0].copy()

    def count(self, what: str, at: int, seconds: float) -> Row:
        """Restore, and count what the pager brings meanwhile."""
        by_history = what == WHATS[0]
        ticks = self._history
        if not by_history:
            ticks = np.random.default_rng(at).permutation(ticks)
        manifest = self._with_history(ticks)
        self._port.within(_TIMEOUT_S).call(Coordinator.restore, dumps(manifest))
        began = time.monotonic()
        self._await_work()
        time.sleep(max(0.0, began + seconds - time.monotonic()))
        counters: dict[str, Any] = self._port.call(Coordinator.status)["hosts"][0]
        taken = time.monotonic() - began
        self._port.call(Coordinator.stop)
        seen = {key: counters[key] for key in ("pages_in", "pages_out", "faults")}
        return Row(what, at, counters["pages_in"] / taken, "pages/s", {"seconds": taken, **seen})

    def _with_history(self, ticks: tables.Ticks) -> Manifest:
        """The checkpoint with another history in its place, and a manifest that says so."""
        manifest = self._manifest
        written = tables.write_history(self._history_path, ticks, manifest.tick)
        files = tuple(written if each.name == HISTORY else each for each in manifest.main.files)
        main = manifest.main.model_copy(update={"files": files})
        return manifest.model_copy(update={"hosts": (main, *manifest.hosts[1:])})
