"""Live checkpoints of the native writer: the hosts' own actors, with no QEMU around.

What they save, freeze, stop and let go on, and in which order, is `MainRole`'s and `SubRole`'s
doing. Only the monitor is another: it stops the writer with a signal.
"""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dcres.actors.control import publishing
from dcres.actors.control.checkpointing import Checkpointing
from dcres.actors.control.publishing import Subject
from dcres.actors.host.part_service import PartService
from dcres.actors.host.roles import MainRole, SubRole
from dcres.actors.host.site import Site
from dcres.actors.host.state import StateFile, VmState
from dcres.actors.host.vm_folder import VmFolder
from dcres.actors.messages import Role
from dcres.actors.ports import Port
from dcres.actors.protocol import Machine, Saving
from dcres.config import HostSettings, Layout, VmSpec
from dcres.linux.marks import Mark
from dcres.linux.process import ProcessId
from dcres.model.formats import WHOLE_FORMATS, MemoryFormat
from dcres.model.live import Target
from dcres.model.pages import PAGE_SIZE
from dcres.model.placement import sub_code
from dcres.model.run_state import RunState
from dcres.paging.control import PagerControl
from dcres.paging.orders import Counters, Frozen
from dcres.paging.status import PagerStatus
from dcres.storage.engine import memory_file
from dcres.storage.format.manifest import Manifest, Mode, dumps, loads
from dcres.storage.layout import MEMORY
from dcres.storage.store.store import Store
from dcres.vm.command import VmFiles
from dcres.vm.process import QemuProcess
from tests.support.paging import Rig
from tests.support.ports import DirectPort

VM = "writer"


def _site(rig: Rig, store: Store, name: str, folder: VmFolder, role: Role) -> Site:
    settings = HostSettings(name=name, run=rig.folder, ram=rig.ram, store=store.root)
    return Site(VM, settings, folder, store, StateFile(folder, role))


def writer_sub(rig: Rig, index: int, store: Store) -> SubRole:
    """A sub host with a memory server of the rig."""
    name = f"sub{index}"
    folder = VmFolder(rig.folder / name, rig.ram / name)
    folder.make()
    site = _site(rig, store, name, folder, Role.SUB)
    sub = SubRole(site, PartService(site))
    sub.server.daemon.control = rig.folder / f"{name}.sock"
    # Each host's marks have a name of their own here: all stores lie in one folder.
    os.link(rig.ram / f"{name}.ram", site.store_file)
    site.state.begin(VmState(generation=1))
    return sub


class WriterMonitor:
    """The part of QEMU's monitor that a checkpoint uses, for a process without devices."""

    has_saved_core = False

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._stopped = False

    def status(self) -> RunState:
        return RunState.PAUSED if self._stopped else RunState.RUNNING

    settled_status = status

    def send_fd(self, name: str, fd: int) -> None:
        """The claim to the VM's name would end with QEMU; here with the actor that made it."""

    def stop(self) -> None:
        os.kill(self._pid, signal.SIGSTOP)
        self._stopped = True

    def cont(self) -> None:
        os.kill(self._pid, signal.SIGCONT)
        self._stopped = False

    def snapshot_disks(self, nodes: Sequence[str], name: str) -> None:
        assert nodes == []

    def save_core(self, path: Path) -> None:
        path.write_bytes(b"no core")


class Undrained(PagerControl):
    """The pager as one that does not wait until it is at rest has it."""

    def quiesce(self) -> Counters:
        now = super().status()
        return Counters(
            now["pages_in"], now["pages_out"], now["zero_pages"], now["taken_back"], now["faults"]
        )

    def freeze(self) -> Frozen:
        return Frozen(1, *self.quiesce())

    def status(self) -> PagerStatus:
        return {**super().status(), "state": "frozen"}


def writer_main(rig: Rig, store: Store, spec: VmSpec, without: str = "") -> MainRole:
    """The main host with the rig's pager.

    Guards can be left out one by one, to show that the test notices. The hosts then must not
    compare what they have saved with the page table, or there would be no such checkpoint.
    """
    folder = VmFolder(rig.folder, rig.ram)
    Mark("files", "the rig").put(rig.ram)
    site = _site(rig, store, "main", folder, Role.MAIN)
    main = MainRole(site, PartService(site))
    if without == "drain":
        main.pager.control = Undrained(main.pager.daemon.call)
        main.pager.draining = Undrained(main.pager.daemon.call)
        main.pager.patient = Undrained(main.pager.daemon.call_patiently)
    writer, orders = WriterMonitor(rig.writer.process.pid), threading.Lock()
    process = ProcessId.of(rig.writer.process.pid)
    assert process is not None

    @contextmanager
    def monitor() -> Iterator[Any]:
        with orders:
            yield writer

    main.qemu.monitor = monitor  # type: ignore[method-assign]
    names = tuple(f"sub{index}" for index in range(len(rig.servers)))
    site.state.begin(
        VmState(
            qemu=QemuProcess(process, VmFiles.of(VM, rig.folder, rig.ram)),
            spec=spec,
            hosts=("main", *names),
            codes=() if without else tuple(sub_code(index) for index in range(len(names))),
            accel="tcg",
            cluster="test",
            generation=1,
        )
    )
    return main


class LiveCheckpoints:
    """Takes checkpoints of a rig's writer, one after the other, into a store."""

    def __init__(self, rig: Rig, store: Store, without: str = "") -> None:
        self._rig, self._store, self._without = rig, store, without
        self.why_full = ""  # of the last increment that was none
        subs = len(rig.servers)
        shares = [PAGE_SIZE * rig.pages] * (subs + 1)
        spec = VmSpec(
            name=VM,
            memory=PAGE_SIZE * rig.pages,
            kernel=Path("none"),
            layout=Layout(main=shares[0], subs=tuple(shares[1:])),
        )
        ports: dict[str, Port] = {"main": DirectPort(writer_main(rig, store, spec, without).duties)}
        ports |= {f"sub{i}": DirectPort(writer_sub(rig, i, store).duties) for i in range(subs)}
        self._subject = Subject(VM, 1, spec, "tcg", "none", "q35", tuple(ports), ports)

    def take(self, number: int, mode: Mode = Mode.LIVE) -> Manifest:
        """Checkpoint `number`: even ones are sparse, odd ones packed."""
        return self._take(number, mode, WHOLE_FORMATS[number % 2], None)

    def increment(self, number: int, mode: Mode = Mode.LIVE) -> Manifest:
        """Checkpoint `number` upon the one before, if that can be."""
        found = self._subject.ports["main"].call(Machine.base)
        self.why_full = found.why_none
        base = loads(found.manifest, Path("base")) if found.manifest else None
        return self._take(number, mode, MemoryFormat.SEGMENTED, base)

    def compact(self, manifest: Manifest) -> None:
        """What a coordinator orders after each checkpoint."""
        for port in self._subject.ports.values():
            port.call(Saving.compact, dumps(manifest))

    def _take(
        self, number: int, mode: Mode, memory_format: MemoryFormat, base: Manifest | None
    ) -> Manifest:
        name = f"{VM}-20260101-000000-{number:04x}"
        checkpointing = Checkpointing(self._subject, name, mode, Target(), memory_format, base=base)
        if not self._without:
            return checkpointing.run()
        with patch.object(publishing, "_require_agreement"):
            return checkpointing.run()

    def memory(self, manifest: Manifest) -> list[npt.NDArray[np.uint64]]:
        """Each host's memory file as it is, a row of words a page; what is not there is zeros."""
        if manifest.memory_format is MemoryFormat.SEGMENTED:
            return [self._loaded(manifest, part.host) for part in manifest.hosts]
        folder = self._store.root / VM / manifest.checkpoint
        return [
            _words(folder / part.host, part.memory_file, manifest.page_count)
            for part in manifest.hosts
        ]

    def _loaded(self, manifest: Manifest, host: str) -> npt.NDArray[np.uint64]:
        with tempfile.TemporaryFile() as file:
            file.truncate(manifest.memory_bytes)
            memory_file.load(self._store.read_part(manifest, host).memory, file.fileno())
            return np.fromfile(file, dtype=np.uint64).reshape(-1, PAGE_SIZE // 8)

    def require_size(self, manifest: Manifest, memory: list[npt.NDArray[np.uint64]]) -> None:
        """However many rounds there were, a memory file takes its pages' blocks and no more.

        Within 1 %, and a block: ext4 has one of its own for a file of more than four runs. Pages
        of zeros need no place (docs/format.md).
        """
        folder = self._store.root / VM / manifest.checkpoint
        for part, words in zip(manifest.hosts, memory, strict=True):
            held_bytes = int((words != 0).any(axis=1).sum()) * PAGE_SIZE
            taken_bytes = (folder / part.host / part.memory_file).stat().st_blocks * 512
            assert taken_bytes == part.file_bytes_allocated
            assert held_bytes <= taken_bytes <= held_bytes * 1.01 + PAGE_SIZE, part


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


class Writes:
    """What every page holds after some number of writes; only what is new is worked out."""

    def __init__(self, pages: int) -> None:
        self._latest = 0
        self._last = np.zeros(pages, dtype=np.uint64)  # per page, its last write up to `_latest`

    def expected_at(self, latest: int) -> npt.NDArray[np.uint64]:
        """Each page's last write when `latest` was the last of all; not to be changed."""
        if latest < self._latest:
            self._latest, self._last = 0, np.zeros_like(self._last)
        numbers = np.arange(self._latest + 1, latest + 1, dtype=np.uint64)
        np.maximum.at(self._last, pages_of_writes(numbers, self._last.size), numbers)
        self._latest = latest
        return self._last


def faults_in(parts: list[npt.NDArray[np.uint64]], writes: Writes) -> list[str]:
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
    stale = (memory[:, 1] != writes.expected_at(latest)).nonzero()[0]
    if stale.size:
        found.append(f"{stale.size} pages are not as they were at write {latest}")
    half = memory.shape[1] // 2
    torn = (memory[:, 1] != memory[:, half]) | (memory[:, 1] != memory[:, -1])
    torn[pages_of_writes(np.array([latest], dtype=np.uint64), pages)] = False
    if torn.any():
        found.append(f"{int(torn.sum())} pages are torn")
    return found
