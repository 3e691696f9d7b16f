"""A host that saves: orders that come late, for another checkpoint or one that was cancelled."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from dcres.actors.host import part_saver
from dcres.actors.host.agent import HostAgent
from dcres.actors.host.host_saver import HostSaver
from dcres.actors.host.meter import Meter
from dcres.actors.host.roles import SubRole
from dcres.actors.host.site import Site
from dcres.actors.host.state import StateFile, VmState
from dcres.actors.host.vm_folder import VmFolder
from dcres.actors.messages import Role, Saved
from dcres.config import HostSettings
from dcres.errors import Conflict, StoreFull
from dcres.linux.files import data_extents
from dcres.linux.marks import Mark
from dcres.linux.removal import OwnFolder
from dcres.model.formats import MemoryFormat
from dcres.model.live import HostRound
from dcres.model.pages import PAGE_SIZE, Extents
from dcres.storage import layout
from dcres.storage.engine.buffers import Buffers
from dcres.storage.engine.memory_file import SAVING_THREADS, MemoryFileWriter
from dcres.storage.engine.transfer import BATCH_PAGES
from dcres.storage.format import tables
from dcres.storage.store.pins import Hold
from dcres.storage.store.store import Store
from tests.support.speed import patience
from tests.support.stored import folder, memory, placement, take
from tests.support.vm import PlainMemory
from tests.support.wait import until

PAGES = 64
FIRST, SECOND = "vm-20260101-000000-0001", "vm-20260101-000000-0002"


class Tracker:
    """A paging process in which nothing moves."""

    def __init__(self) -> None:
        self.tracking: Path | None = None
        self.written = 0  # what the next scans find
        self.done: list[str] = []

    def track(self, changes: Path) -> None:
        self.done.append("track")
        self.tracking = changes

    def scan(self, changes: Path) -> int:
        self.done.append("scan")
        return self.written

    def untrack(self) -> None:
        self.done.append("untrack")
        self.tracking = None


class HeldMeter(Meter):
    """`hook` runs whenever pages have been saved."""

    hook: Callable[[], object] = staticmethod(lambda: None)

    def done(self, pages: int) -> None:
        self.hook()
        super().done(pages)


class Host(HostSaver):
    def __init__(self, folder: Path) -> None:
        OwnFolder.made(folder, Mark("files", "VM vm"))
        self.meter, self.daemon, self.store = HeldMeter(), Tracker(), Store(folder / "store")
        self.memory = folder / "store.ram"
        self.memory.write_bytes(os.urandom(PAGES * 4096))
        settings = HostSettings(name="h1", run=folder, ram=folder, store=self.store.root)
        own = VmFolder(folder, folder)
        site = Site("vm", settings, own, self.store, StateFile(own, Role.SUB), meter=self.meter)
        super().__init__(site, self.memory, self.daemon, self.daemon, lambda: True)

    def prepare(self, checkpoint: str) -> None:
        self.begin(checkpoint, MemoryFormat.PACKED)

    def save(self, checkpoint: str) -> Saved:
        return self.settle(checkpoint, lambda saved: [])

    def abandon(self, checkpoint: str) -> None:
        self.halt(checkpoint)
        self.discard(checkpoint)

    def files(self, checkpoint: str) -> set[str]:
        folder = self.store.root / "vm" / checkpoint
        return {path.name for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_orders_for_another_checkpoint_are_refused(host: Host) -> None:
    host.prepare(SECOND)
    for order in (
        lambda: host.copy(FIRST),
        lambda: host.synchronise(FIRST, True, PAGES),
        lambda: host.stage(FIRST, 0),
        lambda: host.save(FIRST),
    ):
        with pytest.raises(Conflict, match=FIRST):
            order()
    host.stage(SECOND, 0)
    assert host.save(SECOND).pages == PAGES


def test_buffers_are_there_before_the_stop(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Buffers(BATCH_PAGES * PAGE_SIZE)
    monkeypatch.setattr(part_saver, "BUFFERS", pool)
    host.prepare(FIRST)
    until(lambda: pool._made == SAVING_THREADS, what="there is one for each thread")


def test_memory_tables_that_fail_are_told(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are written by a thread of their own."""

    def full(*_: object) -> NoReturn:
        raise StoreFull("no room to write it")

    host.prepare(FIRST)
    host.stage(FIRST, 0)
    monkeypatch.setattr(part_saver, "write_memory_tables", full)
    with pytest.raises(StoreFull, match="no room to write it"):
        host.save(FIRST)
    host.abandon(FIRST)
    assert host.files(FIRST) == set()


def pages_done(host: Host) -> int:
    """Of what it did last."""
    return host.meter.progress.done_bytes // PAGE_SIZE


def write(host: Host, page: int) -> bytes:
    """The guest writes a page, and its paging process marks it; what is in it then."""
    content = os.urandom(4096)
    with host.memory.open("r+b") as memory:
        memory.seek(page * 4096)
        memory.write(content)
    assert host.daemon.tracking is not None
    with host.daemon.tracking.open("r+b") as marks:
        marks.seek(page)
        marks.write(b"\1")
    return content


def test_rounds_go_on_after_a_host_was_ready_for_the_stop(host: Host) -> None:
    """Each saves what was written since the one before, in whichever order they come."""
    host.prepare(FIRST)
    host.copy(FIRST)
    assert pages_done(host) == PAGES
    expected: dict[int, bytes] = {}
    rounds: tuple[Callable[[], HostRound | None], ...] = (
        lambda: host.synchronise(FIRST, True, PAGES),
        lambda: host.copy(FIRST),
        lambda: host.synchronise(FIRST, True, PAGES),
    )
    for page, round_ in enumerate(rounds):
        expected |= {each: write(host, each) for each in (page, PAGES - 1)}
        assert round_() is not None
        assert pages_done(host) == 2
    expected[9] = write(host, 9)
    assert host.synchronise(FIRST, False, PAGES) is None
    host.stage(FIRST, PAGES)
    assert host.save(FIRST).pages == PAGES
    saved = PlainMemory(PAGES * 4096)
    saved.add_saved(host.store.root / "vm" / FIRST / "h1", "h1")
    assert {page: bytes(saved.at(page)) for page in expected} == expected


def test_a_stopped_checkpoint_needs_no_scan_and_a_live_one_does(host: Host) -> None:
    host.prepare(FIRST)
    host.stage(FIRST, 0)
    assert "scan" not in host.daemon.done
    assert host.save(FIRST).pages == PAGES
    host.prepare(SECOND)
    host.copy(SECOND)
    host.daemon.done.clear()
    host.stage(SECOND, PAGES)
    assert host.daemon.done[0] == "scan"


@pytest.mark.parametrize(("left", "most", "room"), [(0, 9, 0), (16, 99, 20), (40, 45, 45)])
def test_memory_for_the_stop_is_there_before_it(
    host: Host, monkeypatch: pytest.MonkeyPatch, left: int, most: int, room: int
) -> None:
    made: list[int] = []
    monkeypatch.setattr(MemoryFileWriter, "make_room", lambda _, pages: made.append(pages))
    host.prepare(FIRST)
    host.daemon.written = left
    host.copy(FIRST)
    assert made == []  # another round may come first
    host.synchronise(FIRST, False, most)
    assert made == [room]


def test_a_prepare_that_comes_late_does_not_take_the_place_of_the_next(host: Host) -> None:
    host.halt(FIRST)  # cancelled before its prepare had come
    host.prepare(SECOND)
    with pytest.raises(Conflict, match="was cancelled"):
        host.prepare(FIRST)
    host.stage(SECOND, 0)
    host.save(SECOND)
    assert host.files(SECOND) == {"memory.pack", "index.arrow", "sums.arrow"}
    assert host.files(FIRST) == set()


@pytest.mark.skipif(os.geteuid() != 0, reason="who has left the background may not come back")
def test_copying_is_in_the_background_and_looking_for_pages_is_not(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Page-out waits for the inode's lock while somebody looks (lseek(2), fallocate(2))."""
    priorities: dict[str, set[int]] = {"looking": set(), "copying": set()}

    def note(what: str) -> None:
        priorities[what].add(os.getpriority(os.PRIO_PROCESS, 0))

    def look(fd: int, page_count: int) -> Extents:
        note("looking")
        return data_extents(fd, page_count)

    monkeypatch.setattr(part_saver, "data_extents", look)
    host.meter.hook = lambda: note("copying")
    before = os.getpriority(os.PRIO_PROCESS, 0)
    host.prepare(FIRST)
    host.copy(FIRST)
    assert pages_done(host) == PAGES
    host.halt(FIRST)
    assert priorities == {"looking": {before}, "copying": {15}}


def test_a_halt_that_comes_late_ends_nothing_else(host: Host) -> None:
    host.prepare(FIRST)
    host.abandon(FIRST)
    host.prepare(SECOND)
    host.halt(FIRST)
    assert host.daemon.tracking is not None
    host.copy(SECOND)
    assert pages_done(host) == PAGES


def test_a_halt_ends_what_is_being_saved_and_its_tracking(host: Host) -> None:
    host.prepare(FIRST)
    saving, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        saving.set()
        go_on.wait(patience(20))

    host.meter.hook = hold
    errors: list[Conflict] = []

    def copy() -> None:
        try:
            host.copy(FIRST)
        except Conflict as error:
            errors.append(error)

    threads = [threading.Thread(target=copy), threading.Thread(target=host.halt, args=(FIRST,))]
    threads[0].start()
    assert saving.wait(patience(10))
    threads[1].start()
    until(lambda: FIRST in host._halted, 30, "the halt has come")
    go_on.set()
    for thread in threads:
        thread.join(patience(10))
    assert "cancelled" in str(errors[0])
    assert host.daemon.tracking is None
    host.meter.hook = lambda: None
    host.prepare(SECOND)  # and the next one is not hurried any more
    host.copy(SECOND)
    assert pages_done(host) == PAGES


class Server(Tracker):
    """A memory server that is full."""

    def status(self) -> dict[str, int]:
        return {"held_pages": PAGES}


def serving_sub_host(tmp_path: Path) -> SubRole:
    """A sub host of VM demo named h1, with a store of its own, and memory in which nothing moves.

    Nothing is started: what its memory server is asked is answered in its place.
    """
    environ = {
        "DCRES_HOST": "h1",
        "DCRES_RUN": str(tmp_path / "run"),
        "DCRES_RAM": str(tmp_path / "memory"),
        "DCRES_STORE": str(tmp_path / "store"),
    }
    for name in ("run", "memory"):
        (tmp_path / name).mkdir()
    agent = HostAgent("demo", Role.SUB, environ=environ)
    host, site = agent.composed, agent.site
    assert isinstance(host, SubRole)
    site.folder.make()
    site.state.begin(VmState(generation=1, reserved=PAGES * 4096))
    site.store_file.write_bytes(os.urandom(PAGES * 4096))
    server: Any = Server()
    host.server.patient = host.saver._tracker = host.saver._patient = server
    return host


@pytest.mark.parametrize("lacking", [layout.PAGES, layout.SUMS])
def test_a_sub_host_sweeps_what_it_did_not_finish_and_nothing_else(
    tmp_path: Path, lacking: str
) -> None:
    """A part that is whole may be one of a checkpoint whose manifest is with the main host."""
    host = serving_sub_host(tmp_path).saving
    store = Store(tmp_path / "store")
    ram = memory(tmp_path / "ram", placement() != tables.NOWHERE)
    unfinished, whole, other, published = (
        take(store, ram, token=f"000{number}", vm="other" if number == 3 else "demo")
        for number in range(1, 5)
    )
    for apart in (unfinished, whole):
        for main_or_third in ("h0", "h2"):
            shutil.rmtree(folder(store, apart) / main_or_third)
    (folder(store, unfinished) / "h1" / lacking).unlink()
    store.publish(published)

    wanted = "demo-20260301-120000-0009"
    host.prepare(wanted, MemoryFormat.PACKED)
    kept = {whole.checkpoint, published.checkpoint, wanted}
    assert {path.name for path in (store.root / "demo").iterdir()} == kept
    assert store.verify(published.checkpoint).ok
    assert store.verify_part(whole, "h1").report.ok
    assert folder(store, other).is_dir()
    host.abandon(wanted)


def test_a_sub_host_that_is_told_twice_keeps_what_it_has_begun(tmp_path: Path) -> None:
    """Nor does it sweep what the main host has begun in a store that both share."""
    host = serving_sub_host(tmp_path).saving
    store = Store(tmp_path / "store")
    wanted = "demo-20260301-120000-0009"
    other = Hold()
    store.begin("demo", wanted, other)
    core = store.host_folder("demo", wanted, "h0") / layout.VMCORE
    core.write_bytes(b"core")
    for _ in range(2):
        host.prepare(wanted, MemoryFormat.PACKED)
    host.stage(wanted, 0)
    assert host.save(wanted, tick=1).pages == PAGES
    assert core.read_bytes() == b"core"
    other.drop()
