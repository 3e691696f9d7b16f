"""What dcres takes for granted about userfaultfd, PAGEMAP_SCAN, injection and splice."""

from __future__ import annotations

import fcntl
import os
import select
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from mmap import mmap
from pathlib import Path

import numpy as np
import pytest

from dcres.errors import PagesLost, UnsupportedHost
from dcres.linux import abi, files, inject, libc
from dcres.linux.pagemap import WriteTracker
from dcres.linux.pipe import address_of, waiting_bytes
from dcres.linux.userfaultfd import REQUIRED_FEATURES, Userfaultfd
from dcres.model.pages import PAGE_SIZE, extents_of_pages, pages_of_extents
from dcres.model.placement import LEAVING, MAIN, recover
from dcres.paging.pager.attach import present
from dcres.paging.pager.book import PageBook
from dcres.paging.pager.outbox import BATCH_PAGES, Outbox
from dcres.paging.pager.table import JournalState, PageTable
from tests.support.paging import Writer
from tests.support.sabotage import sitecustomize
from tests.support.speed import patience
from tests.support.wait import until

pytestmark = pytest.mark.linux

PAGES = 64


@dataclass(frozen=True, slots=True)
class Target:
    """The native writer, with a userfaultfd that it was made to open."""

    writer: Writer
    uffd: Userfaultfd
    number: int
    base: int
    ram: int

    @property
    def pid(self) -> int:
        return self.writer.process.pid

    def page(self, page: int) -> int:
        return self.base + page * PAGE_SIZE


@pytest.fixture
def target(ram_path: Path, writer_program: Path) -> Iterator[Target]:
    """Every page of it is missing."""
    writer = Writer(writer_program, ram_path, PAGES)
    try:
        number = inject.make_userfaultfd(writer.process.pid)
        with (
            Userfaultfd(inject.take(writer.process.pid, number)) as uffd,
            files.opened(ram_path, os.O_RDWR) as ram,
        ):
            ((base, _, _),) = inject.mappings(writer.process.pid, str(ram_path))
            uffd.enable()
            uffd.register(base, PAGES * PAGE_SIZE, missing=True)
            yield Target(writer, uffd, number, base, ram)
    finally:
        writer.kill()


def test_a_kernel_that_lacks_features_is_refused_by_their_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fcntl, "ioctl", fcntl.ioctl)  # to have it back afterwards
    sitecustomize.linux_6_1()
    lacks = "lacks WP_UNPOPULATED, WP_ASYNC; dcres needs Linux 6.7 or newer"
    with Userfaultfd.create() as uffd, pytest.raises(UnsupportedHost, match=lacks):
        uffd.enable()


def test_what_no_kernel_has_is_refused_by_this_one() -> None:
    """The kernel's own refusal, which grants nothing; asked again it tells what it has."""
    features = REQUIRED_FEATURES | abi.UffdFeature(1 << 62)
    with (
        Userfaultfd.create() as uffd,
        pytest.raises(UnsupportedHost, match="lacks 0x4000000000000000;"),
    ):
        uffd.enable(features)


def test_a_kernel_without_userfaultfd_is_refused(
    writer_program: Path, ram_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = Writer(writer_program, ram_path, PAGES)
    try:
        monkeypatch.setattr(libc, "SYS_USERFAULTFD", libc.SYS_USERFAULTFD)
        sitecustomize.no_userfaultfd()
        with pytest.raises(UnsupportedHost, match=r"has no userfaultfd; boot Linux 6\.7"):
            inject.make_userfaultfd(writer.process.pid)
    finally:
        writer.kill()


def faults(target: Target) -> list[int]:
    """The pages whose faults arrive, at least one."""
    found: list[int] = []

    def some() -> bool:
        found.extend((a - target.base) // PAGE_SIZE for a in target.uffd.read_faults())
        return bool(found)

    until(some, 30, "a page fault")
    return found


def data(*values: int) -> bytes:
    """One page per value: what the writer sees at byte 8."""
    return b"".join(bytes(8) + value.to_bytes(8, "little") + bytes(4080) for value in values)


def put(target: Target, first: int, *values: int) -> int:
    """UFFDIO_COPY pages into place from `first` on."""
    source = mmap(-1, len(values) * PAGE_SIZE)
    source[:] = data(*values)
    return target.uffd.copy(target.page(first), address_of(source), len(source))


def allocated_pages(target: Target) -> list[int]:
    return pages_of_extents(files.data_extents(target.ram, PAGES)).tolist()


# Injection


def test_a_running_process_is_made_to_open_a_userfaultfd(target: Target) -> None:
    link = os.readlink(f"/proc/{target.pid}/fd/{target.number}")
    assert link == "anon_inode:[userfaultfd]"
    assert inject.descriptors(target.pid, "anon_inode:[userfaultfd]") == [target.number]


def test_a_read_that_the_process_waits_in_goes_on_after_injection(target: Target) -> None:
    for _ in range(50):
        inject.make_pipe(target.pid)
    target.writer.tell("read 1 1")
    assert faults(target) == [0]
    target.uffd.zero(target.page(0), PAGE_SIZE)
    assert target.writer.answer()[2:] == ["sum", "0"]


def test_a_signal_that_comes_during_injection_is_delivered_afterwards(target: Target) -> None:
    with inject.stopped(target.pid) as thread:
        os.kill(target.pid, signal.SIGTERM)
        assert thread.call(39) == target.pid  # getpid(2)
        assert target.writer.process.poll() is None
    assert target.writer.process.wait(patience(5)) == -signal.SIGTERM


def test_a_call_that_fails_in_the_process_raises_here(target: Target) -> None:
    with inject.stopped(target.pid) as thread, pytest.raises(OSError, match="Bad file"):
        thread.call(3, 999)  # close(2)


def test_an_injected_pipe_lives_in_the_process_and_carries_bytes(target: Target) -> None:
    numbers = inject.make_pipe(target.pid)
    read_end, write_end = (inject.take(target.pid, number) for number in numbers)
    try:
        os.write(write_end, b"words")
        assert waiting_bytes(read_end) == 5
        inode = os.fstat(read_end).st_ino
        assert inject.descriptors(target.pid, f"pipe:[{inode}]") == sorted(numbers)
        assert os.read(read_end, 10) == b"words"
    finally:
        os.close(read_end)
        os.close(write_end)


# Missing pages


def test_a_fault_is_answered_with_data(target: Target) -> None:
    target.writer.tell("read 1 3")
    assert faults(target) == [0]
    put(target, 0, 5, 6, 7)
    assert target.writer.answer()[2:] == ["sum", "18"]
    assert allocated_pages(target) == [0, 1, 2]


def test_a_copy_passes_over_what_is_there_and_wakes_who_waits(target: Target) -> None:
    os.pwrite(target.ram, data(50), 1 * PAGE_SIZE)
    os.pwrite(target.ram, data(60), 3 * PAGE_SIZE)
    target.writer.tell("read 1 4")
    assert faults(target) == [0]
    assert put(target, 0, 1, 2, 3, 4) == 2
    assert target.writer.answer()[2:] == ["sum", str(1 + 50 + 3 + 60)]


def test_a_copy_onto_a_page_that_came_meanwhile_wakes_its_waiter(target: Target) -> None:
    target.writer.tell("read 1 1")
    assert faults(target) == [0]
    os.pwrite(target.ram, data(9), 0)
    assert put(target, 0, 1) == 1
    assert target.writer.answer()[2:] == ["sum", "9"]


def test_zeros_do_not_replace_a_page_that_is_there(target: Target) -> None:
    assert target.uffd.zero(target.page(0), PAGE_SIZE)
    os.pwrite(target.ram, data(3), PAGE_SIZE)
    assert not target.uffd.zero(target.page(1), PAGE_SIZE)
    assert target.writer.ask("read 1 2")[3] == "3"


def test_after_our_copy_is_closed_faults_wait_for_the_next(target: Target) -> None:
    target.writer.tell("read 1 1")
    assert faults(target) == [0]
    fresh = inject.take(target.pid, target.number)
    os.dup2(fresh, target.uffd.fd)  # closes our copy; the next has its number
    os.close(fresh)
    assert target.uffd.read_faults() == [], "the message was read by the one that died"
    target.uffd.wake(target.base, PAGES * PAGE_SIZE)
    assert faults(target) == [0], "the woken thread faults again"
    put(target, 0, 4)
    assert target.writer.answer()[3] == "4"


def test_reading_a_hole_by_descriptor_allocates_nothing(target: Target) -> None:
    assert os.pread(target.ram, PAGE_SIZE, 5 * PAGE_SIZE) == bytes(PAGE_SIZE)
    assert allocated_pages(target) == []
    target.writer.tell("read 1 1")
    assert faults(target) == [0], "the page is missing still"


def test_faults_stop_when_the_process_is_gone(target: Target) -> None:
    target.writer.tell("read 1 1")
    assert faults(target) == [0]
    target.writer.kill()
    with pytest.raises(OSError, match="No such process"):
        put(target, 0, 1)


# Writes


@pytest.fixture
def tracker(target: Target) -> Iterator[WriteTracker]:
    """Pages 0 to 31 are present and protected, the others missing."""
    put(target, 0, *range(32))
    with WriteTracker(target.pid, target.base, PAGES) as made:
        made.scan()
        yield made


def written(tracker: WriteTracker, *, protect: bool = True) -> list[int]:
    """Written pages among those that are present."""
    return [page for page in pages_of_extents(tracker.scan(protect=protect)).tolist() if page < 32]


def test_only_what_was_written_is_reported_and_only_once(
    target: Target, tracker: WriteTracker
) -> None:
    assert written(tracker) == []
    target.writer.ask("write 4 8")
    target.writer.ask("read 1 32")
    assert written(tracker, protect=False) == list(range(0, 32, 4))
    assert written(tracker) == list(range(0, 32, 4))
    assert written(tracker) == []
    target.writer.ask("write 31 2")
    assert written(tracker) == [0, 31]


def test_no_write_ever_waits_for_us(target: Target, tracker: WriteTracker) -> None:
    target.writer.ask("write 1 32")
    assert target.uffd.read_faults() == []


def test_a_page_put_in_place_counts_as_unwritten_until_it_is(
    target: Target, tracker: WriteTracker
) -> None:
    files.punch_hole(target.ram, 0, 2 * PAGE_SIZE)
    put(target, 0, 1, 2)
    assert written(tracker) == []
    target.writer.ask("write 1 1")
    assert written(tracker) == [0]


def test_our_own_writes_to_the_file_are_not_seen(target: Target, tracker: WriteTracker) -> None:
    os.pwrite(target.ram, data(77), 3 * PAGE_SIZE)
    assert written(tracker) == []


def test_pages_that_are_missing_keep_their_protection(
    target: Target, tracker: WriteTracker
) -> None:
    """WP_UNPOPULATED: protection set on a hole holds for the page that comes there."""
    target.uffd.write_protect(target.base, PAGES * PAGE_SIZE)
    found = pages_of_extents(tracker.scan()).tolist()
    assert found == []


def test_tracking_needs_the_mapping_to_be_registered(ram_path: Path, writer_program: Path) -> None:
    writer = Writer(writer_program, ram_path, PAGES)
    try:
        ((base, _, _),) = inject.mappings(writer.process.pid, str(ram_path))
        with (
            WriteTracker(writer.process.pid, base, PAGES) as tracker,
            pytest.raises(PermissionError),
        ):
            tracker.scan()
    finally:
        writer.kill()


# Standby


@pytest.fixture
def outbox(target: Target, tracker: WriteTracker) -> Iterator[Outbox]:
    """Of the target with its 32 pages."""
    folder = Path(f"/dev/shm/dcres-test-{os.getpid()}.standby")
    folder.mkdir()
    pipe = os.pipe()
    with files.opened(folder / "outbox", os.O_RDWR | os.O_CREAT) as spool:
        table = PageTable.create(folder / "table", np.full(PAGES, MAIN, dtype=np.uint8), PAGES)
        yield Outbox(PageBook(table), target.ram, spool, pipe)
    for fd in pipe:
        os.close(fd)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def test_a_page_on_standby_comes_back_by_itself_and_shows_that_it_did(
    target: Target, tracker: WriteTracker, outbox: Outbox
) -> None:
    pages = np.array([2, 3, 4, 9])
    outbox.unmap(pages)
    assert not tracker.mapped(pages).any()
    assert tracker.mapped(np.array([1, 5, 8, 10])).all()
    assert allocated_pages(target) == list(range(32))
    assert target.writer.ask("read 3 2")[3] == "3", "the content is what it was"
    assert target.uffd.read_faults() == [], "nobody had to wait for us"
    assert tracker.mapped(pages).tolist() == [False, True, False, False]


def test_no_write_goes_unseen_because_of_standby(
    target: Target, tracker: WriteTracker, outbox: Outbox
) -> None:
    target.writer.ask("write 3 2")
    outbox.unmap(np.arange(2, 8))
    assert 3 in written(tracker), "written before and not looked for until now"
    target.writer.ask("read 1 8")
    assert written(tracker) == [], "reading is no writing"
    outbox.unmap(np.arange(2, 8))
    target.writer.ask("write 3 2")
    assert written(tracker) == [0, 3]


def test_no_update_is_lost_while_pages_are_put_on_standby_under_load(
    target: Target, outbox: Outbox
) -> None:
    """The guest runs into holes, too: it then waits, and is woken like anybody else."""
    put(target, 32, *range(32, PAGES))
    for first in range(PAGES):  # the writer counts from 0
        os.pwrite(target.ram, data(0), first * PAGE_SIZE)
    rng, unmapped = np.random.default_rng(5), 0

    def answered() -> bool:
        nonlocal unmapped
        outbox.unmap(np.sort(rng.choice(PAGES, 16, replace=False)))
        unmapped += 16
        for address in target.uffd.read_faults():
            target.uffd.wake(address, PAGE_SIZE)
        stdout = target.writer.process.stdout
        assert stdout is not None
        return bool(select.select([stdout.fileno()], [], [], 0)[0])

    while unmapped <= 1000:
        target.writer.tell("run 1.5")
        until(answered, 30, "the writer ends")
        assert target.writer.answer()[3] == "0"


def test_nobody_is_asked_about_no_pages(tracker: WriteTracker) -> None:
    assert tracker.mapped(np.array([], dtype=np.int64)).size == 0


# Page-out and standby that are killed at any step


class Killed(BaseException):
    """The process ends here; nothing after this line is run."""


@dataclass(slots=True)
class Killer:
    """Counts system calls and writes to the table, and ends the process before one of them."""

    countdown: int

    def wrap(self, function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **named: object) -> object:
            if self.countdown == 0:
                raise Killed
            self.countdown -= 1
            return function(*arguments, **named)

        return call


@dataclass(slots=True)
class Bench:
    """An outbox with files of its own, which survive; the outbox and its table do not."""

    folder: Path
    ram: int
    spool: int
    pipe: tuple[int, int]

    def open(self) -> tuple[PageTable, Outbox]:
        table = PageTable(self.folder / "table", PAGES)
        return table, Outbox(PageBook(table), self.ram, self.spool, self.pipe)

    def content(self, fd: int, page: int) -> bytes:
        return os.pread(fd, PAGE_SIZE, page * PAGE_SIZE)


@pytest.fixture
def bench(ram_path: Path) -> Iterator[Bench]:
    folder = ram_path.with_suffix(".folder")
    folder.mkdir()
    pipe = os.pipe()
    with (
        files.opened(ram_path, os.O_RDWR | os.O_CREAT) as ram,
        files.opened(folder / "outbox", os.O_RDWR | os.O_CREAT) as spool,
    ):
        yield Bench(folder, ram, spool, pipe)
    for fd in pipe:
        os.close(fd)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def refill(bench: Bench) -> None:
    """All pages on the main host, each with its number in it; pipe and outbox empty."""
    while waiting := waiting_bytes(bench.pipe[0]):
        os.read(bench.pipe[0], waiting)
    for fd in (bench.ram, bench.spool):
        os.ftruncate(fd, 0)
        os.ftruncate(fd, PAGES * PAGE_SIZE)
    os.pwrite(bench.ram, b"".join(number(page) for page in range(PAGES)), 0)
    PageTable.create(bench.folder / "table", np.full(PAGES, MAIN, dtype=np.uint8), PAGES)


def number(page: int) -> bytes:
    return page.to_bytes(8, "little") * (PAGE_SIZE // 8)


def run_until_killed(
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    work: Callable[[], object],
    splice: Callable[..., int] | None = None,
) -> bool:
    """Run `work`, killed before its system call or table write number `step`."""
    killer = Killer(step)
    with monkeypatch.context() as patched:
        patched.setattr(os, "splice", killer.wrap(splice or short_splice))
        patched.setattr(os, "read", killer.wrap(os.read))
        patched.setattr(files, "punch_hole", killer.wrap(files.punch_hole))
        patched.setattr(PageTable, "_set", killer.wrap(PageTable._set))
        for transition in (PageBook.page_out, PageBook.resume_page_out):
            patched.setattr(PageBook, transition.__name__, killer.wrap(transition))
        try:
            work()
        except Killed:
            return True
    return False


_splice = os.splice


def short_splice(source: int, target: int, count: int, **offsets: int) -> int:
    """splice(2) may move less than it was asked to; from a pipe even parts of pages."""
    most = 2 * PAGE_SIZE if "offset_src" in offsets else PAGE_SIZE + 1000
    return _splice(source, target, min(count, most), **offsets)


def page_splice(source: int, target: int, count: int, **offsets: int) -> int:
    """Into the RAM file only whole pages go: the kernel copies each under its lock."""
    return _splice(source, target, min(count, PAGE_SIZE), **offsets)


BATCH = np.array([3, 4, 5, 9, 20, 21, 40], dtype=np.int64)


def check_recovered(bench: Bench, table: PageTable) -> None:
    """Every page is in one place, whole, and the table can tell where."""
    assert table.journal_state is JournalState.EMPTY
    assert waiting_bytes(bench.pipe[0]) == 0
    in_ram, in_outbox = present(bench.ram, PAGES), present(bench.spool, PAGES)
    found = recover(table.owners, in_ram, in_outbox)
    assert not found.lost.any()
    for page in range(PAGES):
        fd = {MAIN: bench.ram, LEAVING: bench.spool}[int(found.owners[page])]
        assert bench.content(fd, page) == number(page), page
    assert not (in_ram & in_outbox & ~found.stale_outbox).any()


def test_taking_pages_moves_them_whole(bench: Bench) -> None:
    refill(bench)
    table, outbox = bench.open()
    outbox.take(BATCH)
    assert np.flatnonzero(present(bench.spool, PAGES)).tolist() == BATCH.tolist()
    assert np.flatnonzero(~present(bench.ram, PAGES)).tolist() == BATCH.tolist()
    assert np.flatnonzero(table.owners == LEAVING).tolist() == BATCH.tolist()
    check_recovered(bench, table)


def test_a_pager_killed_at_any_step_of_a_page_out_loses_no_page(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = 0
    while True:
        refill(bench)
        _, outbox = bench.open()
        if not run_until_killed(monkeypatch, step, partial(outbox.take, BATCH)):
            break
        table, successor = bench.open()
        successor.recover()
        check_recovered(bench, table)
        step += 1
    assert step > 15, "these were all the steps"


def test_a_successor_killed_at_any_step_of_its_recovery_loses_no_page(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 0
    for first in range(30):
        for second in range(30):
            refill(bench)
            _, outbox = bench.open()
            if not run_until_killed(monkeypatch, first, partial(outbox.take, BATCH)):
                break
            _, successor = bench.open()
            killed = run_until_killed(monkeypatch, second, successor.recover)
            table, third = bench.open()
            third.recover()
            check_recovered(bench, table)
            steps += 1
            if not killed:
                break
    assert steps > 100


def test_a_pager_and_its_successor_killed_at_any_step_of_standby_lose_no_page(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways: set[JournalState] = set()
    steps = 0
    for first in range(40):
        for second in range(40):
            refill(bench)
            _, outbox = bench.open()
            splices = page_splice
            if not run_until_killed(monkeypatch, first, partial(outbox.unmap, BATCH), splices):
                break
            table, successor = bench.open()
            ways.add(table.journal_state)
            in_ram = table.journal_state is JournalState.REFILLING
            splices = page_splice if in_ram else short_splice
            killed = run_until_killed(monkeypatch, second, successor.recover, splices)
            table, third = bench.open()
            third.recover()
            check_recovered(bench, table)
            steps += 1
            if not killed:
                break
    assert ways == set(JournalState)
    assert steps > 100


def test_putting_pages_on_standby_leaves_them_where_they_are(bench: Bench) -> None:
    refill(bench)
    table, outbox = bench.open()
    outbox.unmap(BATCH)
    assert present(bench.ram, PAGES).all()
    assert not present(bench.spool, PAGES).any()
    assert (table.owners == MAIN).all()
    check_recovered(bench, table)


def test_a_page_that_is_not_there_is_not_taken(bench: Bench) -> None:
    refill(bench)
    files.punch_hole(bench.ram, 4 * PAGE_SIZE, PAGE_SIZE)
    os.ftruncate(bench.ram, 4 * PAGE_SIZE)
    _, outbox = bench.open()
    with pytest.raises(PagesLost):
        outbox.take(np.array([5], dtype=np.int64))


def test_a_batch_fits_the_pipe(bench: Bench) -> None:
    """take() would wait for ever if the kernel had given the pipe less than it asked for."""
    refill(bench)
    bench.open()
    os.set_blocking(bench.pipe[1], False)
    assert os.write(bench.pipe[1], bytes(BATCH_PAGES * PAGE_SIZE)) == BATCH_PAGES * PAGE_SIZE


def test_what_leaves_the_outbox_is_gone_and_the_rest_is_there(bench: Bench) -> None:
    refill(bench)
    _, outbox = bench.open()
    outbox.take(BATCH)
    assert b"".join(outbox.read(extents_of_pages(BATCH))) == b"".join(map(number, BATCH.tolist()))
    outbox.drop(np.array([[3, 5], [20, 21]]))
    assert np.flatnonzero(present(bench.spool, PAGES)).tolist() == [5, 9, 21, 40]
    assert outbox.ram_has(2)
    assert not outbox.ram_has(3)
    assert not outbox.ram_has(PAGES - 24)
