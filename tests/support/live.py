"""Live checkpoints of the native writer: the real saving and commit, with no QEMU around.

`WriterMain` and `WriterSub` are hosts as `Checkpointing` sees them. Stopping the VM is a
SIGSTOP of the writer; everything else is what the real hosts do.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dcres.actors.checkpointing import Checkpointing, Subject
from dcres.actors.host import Meter
from dcres.actors.messages import Finished, Placed, Saved
from dcres.actors.saving import SavingHost
from dcres.config import Layout, VmSpec
from dcres.model.formats import MemoryFormat
from dcres.model.live import Target
from dcres.model.pages import PAGE_SIZE
from dcres.model.placement import MAIN, digest, sub_code, to_saved
from dcres.paging import control
from dcres.paging.table import PageTable
from dcres.storage import tables
from dcres.storage.digest import file_sum
from dcres.storage.layout import HISTORY, MEMORY, PAGES, VMCORE
from dcres.storage.manifest import Manifest, Mode, loads
from dcres.storage.store import Store
from tests.support.paging import Rig

VM = "writer"


class _Orders:
    """The part of a `Daemon` that saving uses."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def call(self, do: str, timeout_s: float = 30.0, **arguments: Any) -> dict[str, Any]:
        return control.call(self._path, do, timeout_s, **arguments)


class WriterSub(SavingHost):
    def __init__(self, rig: Rig, index: int, store: Store) -> None:
        super().__init__(store, VM, f"sub{index}", Meter())
        self._source = rig.ram / f"sub{index}.ram"
        self._orders = _Orders(rig.folder / f"sub{index}.sock")

    def prepare(self, checkpoint: str, memory_format: MemoryFormat) -> None:
        self._store.begin(VM, checkpoint)
        # Each host's marks have a name of their own here: all lie in one folder.
        source = self._source.parent / self._host / "store.ram"
        source.parent.mkdir(exist_ok=True)
        if not source.exists():
            os.link(self._source, source)
        self._begin_saving(checkpoint, memory_format, source, self._orders)  # type: ignore[arg-type]

    def save(self, checkpoint: str) -> Saved:
        folder = self._store.host_folder(VM, checkpoint, self._host)
        return self._settle(
            checkpoint, lambda saved: [tables.write_existence(folder / PAGES, saved.mask)]
        )


class WriterMain(SavingHost):
    """Guards can be left out one by one, to show that the test notices."""

    def __init__(self, rig: Rig, store: Store, without: str = "") -> None:
        super().__init__(store, VM, "main", Meter())
        self._rig, self._without = rig, without
        self._orders = _Orders(rig.folder / "pager.sock")
        self._pid = rig.writer.process.pid

    def prepare(self, checkpoint: str, memory_format: MemoryFormat) -> dict[str, int]:
        self._store.begin(VM, checkpoint)
        self._begin_saving(
            checkpoint,
            memory_format,
            self._rig.ram / "guest.ram",
            self._orders,  # type: ignore[arg-type]
        )
        status = self._orders.call("status")
        return {"pages_in": status["pages_in"], "pages_out": status["pages_out"]}

    def finish(self, checkpoint: str) -> Finished:
        stopped_at = time.monotonic()
        os.kill(self._pid, signal.SIGSTOP)
        if self._without == "drain":
            frozen = {**self._orders.call("status"), "tick": 1}
        else:
            self._orders.call("quiesce")
            frozen = self._orders.call("freeze")
        table = PageTable(self._rig.ram / "table", self._rig.pages, writable=False)
        self._table = table.owners.copy(), table.ticks.copy()
        return Finished(frozen["tick"], 0, frozen["pages_in"], frozen["pages_out"], stopped_at)

    def resume(self, checkpoint: str) -> float:
        self._orders.call("thaw")
        os.kill(self._pid, signal.SIGCONT)
        return time.monotonic()

    def save(self, checkpoint: str, tick: int) -> Saved:
        folder = self._store.host_folder(VM, checkpoint, self._host)
        owners, ticks = self._table
        hosts = ("main", *(f"sub{i}" for i in range(len(self._rig.servers))))
        codes = [sub_code(i) for i in range(len(self._rig.servers))]
        (folder / VMCORE).write_bytes(b"no core")

        def write_tables(_: object) -> list[Any]:
            return [
                tables.write_placement(folder / PAGES, to_saved(owners, codes), hosts),
                tables.write_history(folder / HISTORY, ticks, tick),
                file_sum(folder / VMCORE),
            ]

        saved = self._settle(checkpoint, write_tables)
        if self._without:
            return replace(saved, placed=())
        assert ((owners == MAIN).sum(), digest(owners == MAIN)) == (saved.pages, saved.digest)
        masks = [owners == code for code in codes]
        return replace(saved, placed=tuple(Placed(int(m.sum()), digest(m)) for m in masks))

    def publish(self, manifest: str) -> None:
        self._store.publish(loads(manifest, Path("manifest.json")))


@dataclass(frozen=True)
class DirectPort:
    """A port to an object of this process."""

    target: Any

    def call(self, method: str, *args: Any, timeout_s: float = 60.0) -> Any:
        return getattr(self.target, method)(*args)

    def submit(self, method: str, *args: Any) -> Any:
        raise NotImplementedError

    def wait_ready(self, timeout_s: float) -> None:
        return


class LiveCheckpoints:
    """Takes checkpoints of a rig's writer, one after the other, into a store."""

    def __init__(self, rig: Rig, store: Store, without: str = "") -> None:
        self._rig, self._store, self._without = rig, store, without
        subs = len(rig.servers)
        ports = {"main": DirectPort(WriterMain(rig, store, without))}
        ports |= {f"sub{i}": DirectPort(WriterSub(rig, i, store)) for i in range(subs)}
        shares = [PAGE_SIZE * rig.pages] * (subs + 1)
        spec = VmSpec(
            name=VM,
            memory=PAGE_SIZE * rig.pages,
            kernel=Path("none"),
            layout=Layout(main=shares[0], subs=tuple(shares[1:])),
        )
        self._subject = Subject(VM, 1, spec, "tcg", "none", "q35", tuple(ports), ports)

    def take(self, number: int, mode: Mode = Mode.LIVE) -> Manifest:
        """Checkpoint `number`: even ones are sparse, odd ones packed."""
        name = f"{VM}-20260101-000000-{number:04x}"
        memory_format = list(MemoryFormat)[number % 2]
        checkpointing = Checkpointing(self._subject, name, mode, Target(), memory_format)
        if self._without:
            checkpointing._require_agreement = lambda: None  # type: ignore[method-assign]
        return checkpointing.run()

    def memory(self, manifest: Manifest) -> list[npt.NDArray[np.uint64]]:
        """Each host's memory file as it is, a row of words a page; what is not there is zeros."""
        folder = self._store.root / VM / manifest.checkpoint
        return [
            _words(folder / part.host, part.memory_file, manifest.page_count)
            for part in manifest.hosts
        ]


def _words(folder: Path, name: str, page_count: int) -> npt.NDArray[np.uint64]:
    found = np.fromfile(folder / name, dtype=np.uint64).reshape(-1, PAGE_SIZE // 8)
    if name == MEMORY:
        return found
    whole = np.zeros((page_count, PAGE_SIZE // 8), dtype=np.uint64)
    whole[pa.ipc.open_file(folder / "index.arrow").read_all()["page"].to_numpy()] = found
    return whole


def pages_of_writes(numbers: npt.NDArray[np.uint64], pages: int) -> npt.NDArray[np.int64]:
    """Which page each numbered write of ``causal`` goes to; as in writer.c."""
    hashes = numbers * np.uint64(0x9E3779B97F4A7C15)
    span = np.where(hashes >> np.uint64(60), (pages + 3) // 4, pages).astype(np.uint64)
    return ((hashes >> np.uint64(20)) % span).astype(np.int64)


def faults_in(parts: list[npt.NDArray[np.uint64]]) -> list[str]:
    """What is wrong with the memory of a checkpoint, given its hosts' pages; empty if nothing.

    The latest write that shows anywhere fixes the moment of the checkpoint. From the known
    order of writes follows what every page has to hold at that moment, exactly.
    """
    pages = len(parts[0])
    found = []
    present = [part[:, 1] != 0 for part in parts]
    twice = int((np.sum(present, axis=0) > 1).sum())
    if twice:
        found.append(f"{twice} pages are in two files")
    memory = np.maximum.reduce(parts)
    latest = int(memory[:, 1].max())
    expected = np.zeros(pages, dtype=np.uint64)
    numbers = np.arange(1, latest + 1, dtype=np.uint64)
    np.maximum.at(expected, pages_of_writes(numbers, pages), numbers)
    stale = (memory[:, 1] != expected).nonzero()[0]
    if stale.size:
        found.append(f"{stale.size} pages are not as they were at write {latest}")
    half = memory.shape[1] // 2
    torn = (memory[:, 1] != memory[:, half]) | (memory[:, 1] != memory[:, -1])
    torn[pages_of_writes(np.array([latest], dtype=np.uint64), pages)] = False
    if torn.any():
        found.append(f"{int(torn.sum())} pages are torn")
    return found
