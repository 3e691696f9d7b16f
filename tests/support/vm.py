"""Whole VMs over real hosts of this process, without Ray: for tests of what is in a checkpoint.

A `Rig` has three (or more) hosts with folders of their own and one store. What it starts is
gone afterwards, and its end is a test: no process, RAM file or socket is left.
"""

from __future__ import annotations

import gc
import math
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from dcres.actors.control.coordinator import Coordinator
from dcres.actors.host.agent import HostAgent
from dcres.actors.host.roles import MainRole, SubRole
from dcres.config import HostSettings, parse_size
from dcres.errors import DcresError
from dcres.linux.marks import MARK
from dcres.linux.process import find_marked
from dcres.model.formats import DEFAULT_FORMAT, MemoryFormat
from dcres.storage.format.manifest import Manifest, dumps
from dcres.storage.store.store import Store
from dcres.vm import witness
from dcres.vm.witness import WitnessReport
from tests.support.fleet import LocalFleet, real_hosts
from tests.support.guest import guest_image
from tests.support.wait import until

PAGE_BYTES = 4096  # these tests read memory without the code that they judge
BOOT_TIMEOUT_S = 120.0


def spec_of(
    name: str = "vm",
    memory: str = "192MiB",
    main: str = "96MiB",
    subs: Sequence[str] = ("64MiB", "64MiB"),
    fill: int | str = 64,
    pause_s: float = 0.05,
    **more: Any,
) -> dict[str, Any]:
    """A VM file's values: the witness fills `fill` MiB (or ``off``).

    With a pause after each check, which takes about as long, the guest leaves cores to what is
    done to it and to other tests.
    """
    image = guest_image()
    return {
        "name": name,
        "memory": memory,
        "kernel": str(image.kernel),
        "initrd": str(image.initrd),
        "append": f"console=ttyS0 quiet panic=-1 witness={fill} witness_chunk=1"
        f" witness_pause={pause_s:g}",
        "accel": "tcg",
        "layout": {"main": main, "subs": list(subs)},
        **more,
    }


def await_checks(console: Path, more: int = 1, timeout_s: float = BOOT_TIMEOUT_S) -> WitnessReport:
    """Wait until the witness has made `more` checks than now; its report, without a failure."""
    until(lambda: _goes(witness.read(console)), timeout_s, "the witness is ready")
    target = witness.read(console).checks + more
    until(
        lambda: witness.read(console).checks >= target,
        timeout_s,
        f"the witness made {target} checks",
    )
    report = witness.read(console)
    assert report.failures == 0, report.failed
    assert report.boots <= 1
    return report


def stays(path: Path) -> bool:
    """Whether a file is one of those that stay in a run folder when its VM has ended."""
    return path.suffix == ".log" or path.name == MARK


def _goes(report: WitnessReport) -> bool:
    return report.ready or report.tick > 0  # a restored guest does not say that it is ready


@dataclass
class Rig:
    """Hosts, a store and one VM's coordinator."""

    folder: Path
    ram: Path
    store: Store
    settings: dict[str, HostSettings]
    fleet: LocalFleet
    coordinator: Coordinator
    kept: list[Path] = field(default_factory=list)

    @property
    def console(self) -> Path:
        return Path(self.coordinator.status()["hosts"][0]["console"])

    def agent(self, index: int) -> HostAgent:
        """The actor of a host itself."""
        found = self.fleet.actor("vm", index).object
        assert isinstance(found, HostAgent)
        return found

    def main(self) -> MainRole:
        """What the main host consists of."""
        found = self.agent(0).composed
        assert isinstance(found, MainRole)
        return found

    def sub(self, index: int = 1) -> SubRole:
        """What a sub host consists of."""
        found = self.agent(index).composed
        assert isinstance(found, SubRole)
        return found

    def boot(self, spec: dict[str, Any], checks: int = 1) -> WitnessReport:
        """Start a VM and wait for its witness."""
        self.coordinator.start(spec)
        return await_checks(self.console, checks)

    def checkpoint(
        self, memory_format: MemoryFormat = DEFAULT_FORMAT, *, full: bool = True
    ) -> Manifest:
        facts = self.coordinator.checkpoint("stop", memory_format=memory_format, full=full)
        return self.store.get(facts["checkpoint"])

    def restore(self, manifest: Manifest, **more: Any) -> dict[str, Any]:
        return self.coordinator.restore(dumps(manifest), **more)

    def listed(self) -> list[str]:
        return [each.checkpoint for each in self.store.list()]

    def running(self) -> dict[int, str]:
        """Whatever still runs for the VM on any host: command lines by process."""
        return {
            process.pid: " ".join(words)
            for each in self.settings.values()
            for folder in ("vm", "vm.parts")
            for process in find_marked("DCRES_VM_RUN", str(each.run / folder))
            if (words := process.argv)
        }

    def require_nothing_left(self) -> None:
        """No process, no memory, no socket; logs, marks and generations may stay."""
        assert self.running() == {}
        left = [path for path in self.ram.rglob("*") if path.is_file()]
        left += [
            path
            for each in self.settings.values()
            for path in each.run.rglob("*")
            if not (path.is_dir() or stays(path) or ".generation" in path.name)
        ]
        assert not left, left


def restart_main(vm: Rig) -> None:
    """The main host's actor is killed, and Ray starts it again: what its process had ends."""
    dead = vm.main()
    vm.fleet.actor("vm", 0).die()
    dead.pager.daemon._wanted = False  # nothing keeps it running any more
    dead.pager.daemon._unwanted.set()
    dead.qemu.disconnect()
    dead.saver.kept.drop()
    vm.fleet.actor("vm", 0).restart()


@contextmanager
def rig(
    hosts: int = 3,
    store: Path | None = None,
    main: type[HostAgent] = HostAgent,
    private: bool = False,
) -> Iterator[Rig]:
    """A `Rig`; its VM is called ``vm``. With `private` every host has a store of its own."""
    folder = Path(tempfile.mkdtemp(prefix="dcres-t-"))
    ram = Path(tempfile.mkdtemp(prefix="dcres-t-", dir="/dev/shm"))
    settings = {
        f"h{number}": HostSettings(
            name=f"h{number}",
            run=folder / f"h{number}",
            ram=ram / f"h{number}",
            store=folder / f"store{number}" if private else store or folder / "store",
        )
        for number in range(hosts)
    }
    fleet = real_hosts(settings, main)
    made = Rig(
        folder,
        ram,
        Store(settings["h0"].store),
        settings,
        fleet,
        Coordinator("vm", fleet),
    )
    before = descriptors()
    try:
        yield made
        made.coordinator.stop()
        made.require_nothing_left()
        require_closed(before)
    finally:
        with suppress(DcresError):
            made.coordinator.stop()
        shutil.rmtree(folder)
        shutil.rmtree(ram)


def require_closed(before: set[tuple[str, str]]) -> None:
    """What this process has opened since `before` is closed soon; else AssertionError names it."""
    try:
        until(lambda: descriptors() <= before, 30, "no descriptor that was not there before")
    except AssertionError as error:
        error.add_note(f"open: {sorted(descriptors() - before)}")
        raise


def descriptors() -> set[tuple[str, str]]:
    """What Python code has open in this process, by number, but for what waits for the collector.

    An exception holds the frames it went through, and they what was open there. A socket counts
    when it is one of Python's: where Ray is connected, its gRPC opens and closes others at will.
    A pidfd counts when its process has ended: of one that lives, a `Daemon` opens another twice a
    second, so two looks differ where the VM of other tests goes on.
    """
    gc.collect()
    # Asked for its type, no object runs code of its own, as a dead weak reference would.
    objects = (each for each in gc.get_objects() if issubclass(type(each), socket.socket))
    sockets = {str(each.fileno()) for each in objects}
    found = set()
    for fd in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the one that this list was read from
            target = os.readlink(fd)
            if target == "anon_inode:[pidfd]":
                counts = _has_ended(fd.name)
            else:
                counts = fd.name in sockets or not target.startswith("socket:")
            if counts:
                found.add((fd.name, target))
    return found


def _has_ended(pidfd: str) -> bool:
    """Whether the process that a descriptor names has ended and was reaped (pidfd_open(2))."""
    return "Pid:\t-1\n" in Path(f"/proc/self/fdinfo/{pidfd}").read_text()


def renamed(manifest: Manifest, checkpoint: str) -> Manifest:
    """The manifest as that of another checkpoint of its VM."""
    text = manifest.model_dump_json()
    for prefix in ("", f"{manifest.vm}-"):  # files are called by the rest
        before, after = (name.removeprefix(prefix) for name in (manifest.checkpoint, checkpoint))
        text = text.replace(before, after)
    return Manifest.model_validate_json(text)


_GONE = 0xFFFFFFFE  # in a segment's table; one more is a page of zeros


class PlainMemory:
    """A VM's memory put together from sparse files, by plain reads, page by page.

    Nothing of dcres is used: ``SEEK_DATA`` tells which pages a file holds.
    """

    def __init__(self, length_bytes: int) -> None:
        self.length_bytes = length_bytes
        self.pages: dict[int, bytes] = {}
        self.owner: dict[int, str] = {}

    def add(self, path: Path, owner: str) -> int:
        """Take the pages of one file; AssertionError for a page that another file has."""
        taken = 0
        with path.open("rb", buffering=0) as file:
            assert os.fstat(file.fileno()).st_size == self.length_bytes
            for number in _pages_of(file.fileno(), self.length_bytes):
                self.put(number, os.pread(file.fileno(), PAGE_BYTES, number * PAGE_BYTES), owner)
                taken += 1
        return taken

    def put(self, number: int, page: bytes, owner: str) -> None:
        """Take one page; AssertionError if it was taken already."""
        assert number not in self.owner, f"page {number}: {self.owner[number]} and {owner}"
        self.pages[number], self.owner[number] = page, owner

    def add_saved(self, folder: Path, owner: str) -> int:
        """Take what a host saved, read as docs/format.md says and no other way."""
        if segments := sorted(folder.glob("*.segment.arrow")):
            return self._add_segments(segments, owner)
        listed = _column(folder / "sums.arrow", "page")
        assert listed == sorted(set(listed))
        places = {number: number for number in listed}
        if (pack := folder / "memory.pack").exists():
            order = _column(folder / "index.arrow", "page")
            assert len(set(order)) == len(order)
            assert pack.stat().st_size == len(order) * PAGE_BYTES
            assert set(order) <= set(listed)
            places = {number: place for place, number in enumerate(order)}
        with (pack if pack.exists() else folder / "memory.img").open("rb", buffering=0) as file:
            if not pack.exists():
                assert os.fstat(file.fileno()).st_size == self.length_bytes
                assert set(_pages_of(file.fileno(), self.length_bytes)) <= set(listed)
            for number in listed:
                page = bytes(PAGE_BYTES)  # without a place it is zeros
                if number in places:
                    page = os.pread(file.fileno(), PAGE_BYTES, places[number] * PAGE_BYTES)
                self.put(number, page, owner)
        return len(listed)

    def _add_segments(self, tables: list[Path], owner: str) -> int:
        """The newest segment that lists a page has it, or tells that it is gone."""
        found: dict[int, bytes] = {}
        for table in tables:  # their names begin with the time
            pack = table.with_name(table.name.replace(".segment.arrow", ".pack"))
            numbers, places = _column(table, "page"), _column(table, "place")
            assert numbers == sorted(set(numbers))
            held = [place for place in places if place < _GONE]
            assert sorted(held) == list(range(pack.stat().st_size // PAGE_BYTES))
            with pack.open("rb", buffering=0) as file:
                for number, place in zip(numbers, places, strict=True):
                    found[number] = bytes(PAGE_BYTES)
                    if place < _GONE:
                        found[number] = os.pread(file.fileno(), PAGE_BYTES, place * PAGE_BYTES)
                    elif place == _GONE:
                        del found[number]
        for number, page in found.items():
            self.put(number, page, owner)
        return len(found)

    def at(self, number: int) -> bytes:
        """A page; one that is nowhere reads as zeros."""
        return self.pages.get(number, bytes(PAGE_BYTES))

    def owned_by(self, owner: str) -> set[int]:
        return {number for number, name in self.owner.items() if name == owner}


def _column(path: Path, name: str) -> list[int]:
    with pa.memory_map(str(path)) as source:
        found: list[int] = pa.ipc.open_file(source).read_all()[name].to_pylist()
    return found


def _pages_of(fd: int, length_bytes: int) -> Iterator[int]:
    at = 0
    while at < length_bytes:
        try:
            data = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:  # ENXIO: no data any more
            return
        at = os.lseek(fd, data, os.SEEK_HOLE)
        assert data % PAGE_BYTES == 0
        yield from range(data // PAGE_BYTES, -(-at // PAGE_BYTES))


def total_bytes(text: str) -> int:
    return parse_size(text)


def keeps_checking(console: Path, seconds: float) -> WitnessReport:
    """Let the witness go on for `seconds`, and until it has checked often: nothing ever fails."""
    before = await_checks(console)
    over = time.monotonic() + seconds
    until(lambda: time.monotonic() >= over, seconds + 10, "the time is over")
    made = witness.read(console).checks - before.checks
    report = await_checks(console, max(1, math.ceil(seconds / 4 - made)))
    assert report.ticks_lost == 0
    return report
