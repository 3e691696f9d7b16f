"""The page-fault path in C and its plain twin in Python: the same answers, and nothing lost."""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dcres.errors import PagingError
from dcres.linux import files
from dcres.linux.pipe import address_of, resize_pipe
from dcres.linux.userfaultfd import Userfaultfd
from dcres.model import wire
from dcres.model.handshake import Identity
from dcres.model.pages import PAGE_SIZE, Extents, Mask, pages_of_extents
from dcres.model.placement import FIRST_SUB, MAIN
from dcres.model.wire import Kind
from dcres.paging.pager.book import PageBook
from dcres.paging.pager.evictor import Evictor
from dcres.paging.pager.faults import FaultHandler
from dcres.paging.pager.outbox import Outbox
from dcres.paging.pager.table import PageTable
from dcres.paging.server.fetcher import FetchingTable
from dcres.paging.server.service import PageService
from dcres.paging.server.subtable import SubTable
from dcres.paging.settings import SubAddress
from dcres.paging.transport import loop
from dcres.paging.transport.link import Link
from dcres.paging.transport.loop import Loop
from dcres.paging.transport.requests import Request, Runs
from tests.support.paging import Rig, rig
from tests.support.servers import Client, data_of, extents, memory_server, packed_pages
from tests.support.speed import patience
from tests.support.wait import until

pytestmark = pytest.mark.linux

PAGES = 2048
HELD = range(0, 1500)
HOLD_S = 0.02  # how long an answer is awaited before Python hears of the fault


def test_this_installation_has_the_hot_path() -> None:
    assert loop.HOT is not None, "dcres/paging/hot.c was not compiled: gcc and Python's headers"


def answers(folder: Path, name: str, requests: bytes, count: int) -> list[tuple[Kind, int, bytes]]:
    """The first `count` answers of a memory server with the pages of `HELD`; 0: all there are."""
    with memory_server(folder, name, PAGES) as server, Client(server) as client:
        for first in range(HELD.start, HELD.stop, 250):
            client.page_out(extents(*range(first, first + 250)))
        client.sock.sendall(requests)
        if not count:
            client.sock.shutdown(socket.SHUT_WR)
        found: list[tuple[Kind, int, bytes]] = []
        while not count or len(found) < count:
            try:
                frame = client.next()
            except (EOFError, ConnectionResetError):
                break
            found.append((frame.kind, frame.request, bytes(frame.payload)))
    return found


def random_request(rng: random.Random, number: int) -> bytes:
    first = rng.randrange(HELD.stop - 256)
    stop = first + rng.choice((1, 1, 2, 16, 64, 256))
    match rng.randrange(12):
        case 0:
            two = np.array([[first, first + 1], [first + 3, first + 5]])
            return wire.frame(Kind.PAGE_IN, number, wire.pack_extents(two))
        case 2:
            return wire.frame(Kind.EXISTENCE, number, wire.pack_range(first, stop - first))
        case 3:
            packed = packed_pages(np.array([[first, stop]]), number)
            return wire.frame(Kind.PAGE_OUT, number, packed)
        case 4:
            return wire.frame(Kind.RELEASE, number, wire.pack_run(1500, 1600))
        case _:
            return wire.frame(Kind.PAGE_IN, number, wire.pack_run(first, stop))


WRONG = {
    "a page that is not here": wire.frame(Kind.PAGE_IN, 7, wire.pack_run(1499, 1501)),
    "too many pages": wire.frame(Kind.PAGE_IN, 7, wire.pack_run(0, 257)),
    "outside of memory": wire.frame(Kind.PAGE_IN, 7, wire.pack_run(PAGES, PAGES + 1)),
    "an empty run": wire.frame(Kind.PAGE_IN, 7, wire.pack_run(5, 5)),
    "bytes behind the run": wire.frame(Kind.PAGE_IN, 7, wire.pack_run(5, 6) + b"x"),
    "fewer runs than announced": wire.frame(Kind.PAGE_IN, 7, b"\2" + wire.pack_run(5, 6)[1:]),
    "another version": b"DCRP\x01" + wire.frame(Kind.PAGE_IN, 7, wire.pack_run(5, 6))[5:],
    "half a frame": wire.frame(Kind.PAGE_IN, 7, wire.pack_run(5, 6))[:20],
}


def test_memory_servers_with_and_without_it_answer_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(1)
    count = 400  # so many that a socket's buffers do not hold the answers
    requests = b"".join(random_request(rng, number) for number in range(count))
    hot = answers(tmp_path, "hot", requests, count)
    monkeypatch.setenv(loop.PLAIN, "1")
    assert hot == answers(tmp_path, "plain", requests, count)
    assert sum(len(payload) for _, _, payload in hot) > 30 << 20


@pytest.mark.parametrize("wrong", WRONG)
def test_they_refuse_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    requests = wire.frame(Kind.PAGE_IN, 6, wire.pack_run(3, 5)) + WRONG[wrong]
    hot = answers(tmp_path, "hot", requests, 0)
    monkeypatch.setenv(loop.PLAIN, "1")
    assert hot == answers(tmp_path, "plain", requests, 0)
    assert hot[0] == (Kind.PAGES, 6, packed_pages(extents(3, 4)))


def brought(made: Rig, goal: int) -> bool:
    return bool(made.status()["pages_in"] >= goal)


@pytest.mark.parametrize("plain", [False, True])
def test_storms_and_kills_lose_nothing(
    tmp_path: Path, writer_program: Path, monkeypatch: pytest.MonkeyPatch, plain: bool
) -> None:
    if plain:
        monkeypatch.setenv(loop.PLAIN, "1")
    rng = random.Random(9)
    with rig(tmp_path, writer_program, PAGES, 512, (1024, 1024)) as made:
        made.writer.ask("fill")
        made.writer.tell("run 6")
        for turn in range(8):
            assert made.status()["native"] is not plain
            made.order("resize", limit_pages=rng.choice([64, 256, 1024]))
            goal = made.status()["pages_in"] + rng.randrange(100, 800)
            with contextlib.suppress(AssertionError):  # it is a moment for a kill, no aim
                until(partial(brought, made, goal), 0.4)
            victim = ("pager", "sub0", "sub1")[turn % 3]
            made.kill(victim)
            if victim == "pager":
                made.start_pager()
            else:
                made.start_server(int(victim[3:]))
        words = made.writer.answer()
        assert made.status()["pages_in"] > 0
        assert words[0] == "ops"
        assert words[3] == "0", f"{words[3]} pages are damaged"


@pytest.mark.parametrize("plain", [False, True])
def test_pages_of_zeros_come_back_as_such(
    tmp_path: Path, writer_program: Path, monkeypatch: pytest.MonkeyPatch, plain: bool
) -> None:
    if plain:
        monkeypatch.setenv(loop.PLAIN, "1")
    with rig(tmp_path, writer_program, PAGES, 512, (PAGES,)) as made:
        made.writer.ask("fill")
        until(lambda: made.status()["leaving"] == 0, 30, "page-out has come to rest")
        made.order("quiesce")
        with files.opened(made.ram / "sub0.ram", os.O_RDWR) as store:
            first, stop = files.data_extents(store, PAGES)[0].tolist()
            assert stop - first > 8
            emptied = (first, first + 3, first + 4)
            for page in emptied:
                os.pwrite(store, bytes(PAGE_SIZE), page * PAGE_SIZE)
        made.writer.ask(f"read 1 {PAGES}")
        assert made.status()["pages"] == [PAGES, 0]
        with files.opened(made.ram / "guest.ram", os.O_RDONLY) as ram:
            for page in range(first, first + 8):
                data = os.pread(ram, PAGE_SIZE, page * PAGE_SIZE)
                assert any(data) is (page not in emptied), page
                assert page in emptied or int.from_bytes(data[:8], "little") == page


@contextlib.contextmanager
def linked_with(asked: list[int]) -> Iterator[SimpleNamespace]:
    """A hot path with pages of this process's memory and a link to the test."""
    if loop.HOT is None:
        pytest.skip("not compiled")
    with ExitStack() as stack:
        fd = os.memfd_create("guest")
        stack.callback(os.close, fd)
        length = len(asked) * PAGE_SIZE
        os.ftruncate(fd, length)
        memory = mmap.mmap(fd, length)
        uffd = stack.enter_context(Userfaultfd.create())
        uffd.enable()
        uffd.register(address_of(memory), length, missing=True)
        epoll = stack.enter_context(select.epoll())
        ours, theirs = (stack.enter_context(each) for each in socket.socketpair())
        epoll.register(ours, select.EPOLLIN)
        epoll.register(uffd.fd, select.EPOLLIN)
        hot = loop.HOT(epoll.fileno())
        decoder = wire.Decoder(memoryview(mmap.mmap(-1, 2 << 20)))
        owners = np.full(len(asked), FIRST_SUB, dtype=np.uint8)
        numbers = np.array(asked, dtype=np.uint32)
        hot.watch(uffd.fd, address_of(memory), owners, numbers)
        buffer = decoder._buffer
        hot.client(ours.fileno(), FIRST_SUB, buffer, decoder.shared, False)
        yield SimpleNamespace(
            hot=hot,
            owners=owners,
            asked=numbers,
            far=theirs,
            fd=fd,
            near=ours,
            shared=decoder.shared,
            buffer=buffer,
            memory=memory,
        )
        hot.forget(ours.fileno())


@pytest.fixture
def linked() -> Iterator[SimpleNamespace]:
    """The same with four pages, some of them on their way."""
    with linked_with([0, 7, 7, 9]) as made:
        yield made


def miss(made: SimpleNamespace, page: int) -> threading.Thread:
    """A thread that waits for `page`, in the kernel: Python's would wait with the GIL."""
    sink = os.memfd_create("sink")
    wanted = memoryview(made.memory)[page * PAGE_SIZE :][:8]

    def read() -> None:
        os.write(sink, wanted)
        os.close(sink)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return thread


def pages(number: int, first: int, stop: int, data: bytes | None = None) -> bytes:
    which = np.array([[first, stop]])
    packed = packed_pages(which) if data is None else wire.pack_extents(which) + data
    return wire.frame(Kind.PAGES, number, packed)


def test_pages_that_were_asked_for_are_put_in_place(linked: SimpleNamespace) -> None:
    linked.far.sendall(pages(7, 1, 3))
    before = time.monotonic_ns()
    ((fd, (number, first, stop, at_ns)),) = linked.hot.turn(1.0)
    assert (fd, number, first, stop) == (linked.near.fileno(), 7, 1, 3)
    assert before <= at_ns <= time.monotonic_ns()
    assert linked.owners.tolist() == [FIRST_SUB, MAIN, MAIN, FIRST_SUB]
    assert os.pread(linked.fd, 2 * PAGE_SIZE, PAGE_SIZE) == data_of(np.array([[1, 3]]))
    assert linked.shared[wire.START] == linked.shared[wire.STOP], "the frame is used up"


def test_pages_behind_what_python_has_to_see_first_stay_in_the_buffer(
    linked: SimpleNamespace,
) -> None:
    frames = wire.frame(Kind.STORED, 5) + pages(7, 1, 3)
    linked.far.sendall(pages(9, 3, 4) + frames)
    (told, rest) = linked.hot.turn(1.0)
    assert told[1][:3] == (9, 3, 4)
    assert rest == (linked.near.fileno(), loop.RECEIVED)
    assert linked.owners.tolist() == [FIRST_SUB, MAIN, MAIN, MAIN], "the guest need not wait"
    start, stop = linked.shared[wire.START], linked.shared[wire.STOP]
    assert bytes(linked.buffer[start:stop]) == frames


@pytest.mark.parametrize(
    ("what", "frame"),
    [
        ("nobody asked for", pages(7, 0, 2)),
        ("asked for under two numbers", pages(7, 2, 4)),
        ("asked for under another number", pages(8, 1, 3)),
        ("outside of memory", pages(9, 3, 5)),
        ("with too little data", pages(7, 1, 3, b"x" * PAGE_SIZE)),
        ("of zeros", pages(7, 1, 3, b"\3")),
        ("with half of them zeros", pages(7, 1, 3, b"\1" + b"x" * PAGE_SIZE)),
        ("with flags of more pages", pages(7, 1, 3, b"\4" + b"x" * 2 * PAGE_SIZE)),
        ("of another kind", wire.frame(Kind.STORED, 7, pages(7, 1, 3)[wire.HEADER.size :])),
        ("of another version", b"DCRP\1" + pages(7, 1, 3)[5:]),
    ],
)
def test_other_pages_are_left_to_python(linked: SimpleNamespace, what: str, frame: bytes) -> None:
    linked.far.sendall(frame)
    assert linked.hot.turn(1.0) == [(linked.near.fileno(), loop.RECEIVED)], what
    assert (linked.owners == FIRST_SUB).all(), what
    assert os.fstat(linked.fd).st_blocks == 0, what


def test_pages_of_another_host_are_left_to_python(linked: SimpleNamespace) -> None:
    linked.owners[2] = FIRST_SUB + 1
    linked.far.sendall(pages(7, 1, 3))
    assert linked.hot.turn(1.0) == [(linked.near.fileno(), loop.RECEIVED)]
    assert linked.owners.tolist() == [FIRST_SUB, FIRST_SUB, FIRST_SUB + 1, FIRST_SUB]


def test_both_speak_of_the_same_things() -> None:
    module = pytest.importorskip("dcres.paging._hot")
    assert (module.RECEIVED, module.VERSION) == (loop.RECEIVED, wire.VERSION)
    assert (module.FILL, module.PUNCH, module.EMPTY) == (loop.FILL, loop.PUNCH, loop.EMPTY)
    values = (module.NOT_NOW, module.NOW, module.HALF_SENT)
    assert values == (wire.NOT_NOW, wire.NOW, wire.HALF_SENT)


# The page book and its twin

GUEST_PAGES = 256
REMOTE = range(160)  # with the sub host at first; nobody has touched the others


class Guest:
    """Memory of this process, paged as a pager does it, and a memory server in the same thread."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        me, length = Identity(b"v" * 16, 1, b"s" * 32), GUEST_PAGES * PAGE_SIZE
        self.server_loop, self.loop = Loop(), Loop()
        store = stack.enter_context(SubTable(folder / "store", GUEST_PAGES, GUEST_PAGES))
        remote = np.array([[REMOTE.start, REMOTE.stop]])
        store.write(remote, memoryview(data_of(remote)))
        served = FetchingTable(self.server_loop, me, store)
        at = wire.Endpoint("127.0.0.1", 0)
        self.service = PageService(self.server_loop, me, GUEST_PAGES, at, served, store=store.store)
        self.fd, spool, *pipe = os.memfd_create("guest"), os.memfd_create("spool"), *os.pipe()
        for fd in (self.fd, spool, *pipe):
            stack.callback(os.close, fd)
            if fd not in pipe:
                os.ftruncate(fd, length)
        self.memory = mmap.mmap(self.fd, length)
        uffd = stack.enter_context(Userfaultfd.create())
        uffd.enable()
        uffd.register(address_of(self.memory), length, missing=True)
        owners = np.zeros(GUEST_PAGES, dtype=np.uint8)
        owners[REMOTE.start : REMOTE.stop] = FIRST_SUB
        self.book = PageBook(PageTable.create(folder / "table", owners, GUEST_PAGES))
        outbox = Outbox(self.book, self.fd, spool, (pipe[0], pipe[1]))
        outbox.hot = self.loop.hot
        sub = SubAddress("h1", "127.0.0.1", self.service.port, GUEST_PAGES, FIRST_SUB)
        self.link = Link(self.loop, sub, me, GUEST_PAGES, self)
        self.ticks = 0
        kernel: Any = SimpleNamespace(  # that has seen no write, nor a touch on standby
            scan=lambda *, protect: np.empty((0, 2), dtype=np.int64),
            mapped=lambda pages: np.zeros(pages.size, dtype=np.bool_),
        )
        self.evictor = Evictor(self.book, outbox, [self.link], kernel, self._now)
        base = address_of(self.memory)
        self.faults = FaultHandler(
            uffd, base, self.book, self.evictor, outbox, [self.link], self._now
        )
        self.loop.add(uffd.fd, self._ready)
        if self.loop.hot is not None:
            owners, asked = self.book.for_hot_path, self.faults.asked
            self.loop.hot.watch(uffd.fd, base, owners, asked)
        stack.callback(self._close)

    def _close(self) -> None:
        self.link.close()
        self.service.close()
        self.loop.close()
        self.server_loop.close()

    def _now(self) -> int:
        return self.ticks

    def _ready(self, told: Any) -> None:
        if isinstance(told, list):
            self.faults.told(told)
        else:
            self.faults.read()

    def settle(self, done: Callable[[], object]) -> None:
        """Let all of them work until `done`, and nothing is on its way."""

        def settled() -> bool:
            self.service.turn(0)
            self.loop.turn(0.001)
            self.link.connect_if_due()
            moved = self.evictor.step()
            self.link.flush_releases()
            on_the_way = moved or self.faults.fetching or self.book.in_flight_pages
            return bool(done() and not on_the_way and self.link.settled)

        until(settled, 20, "everything has come to rest")

    def touch(self, page: int) -> None:
        self.ticks += 1
        reader = miss(SimpleNamespace(memory=self.memory), page)
        self.settle(lambda: not reader.is_alive())

    def state(self) -> list[object]:
        """What Python keeps of it, in the book and beside it."""
        book, faults = self.book, self.faults
        return [
            book.owners.tolist(),
            book.recalled.tolist(),
            (book.resident, book.leaving, book.in_flight_pages),
            (faults.faults, faults.pages_in, faults.zero_pages, faults.asked.any()),
            (self.evictor.pages_out, self.link.held_pages),
            book.table.ticks.tolist(),
        ]

    # LinkUser, as the pager does it

    def expected(self, link: Link, first: int, count: int) -> Mask:
        expected: Mask = self.book.owners[first : first + count] == link.code
        return expected

    def link_ready(self, link: Link) -> None:
        self.faults.link_ready(link)

    def link_down(self, link: Link, unanswered: list[Request]) -> None:
        return

    def pages_arrived(self, link: Link, runs: Runs, address: int) -> None:
        self.faults.arrived(link, runs, address)

    def pages_put(self, link: Link, first: int, stop: int, at_ns: int) -> None:
        self.put_by_hot_path = True
        self.faults.put(link, first, stop, at_ns)

    put_by_hot_path = False

    def pages_stored(self, link: Link, extents: Extents) -> None:
        self.evictor.stored(link, extents)

    def pages_fetched(self, link: Link, asked: Extents, stored: Extents) -> None:
        raise AssertionError("nothing is fetched")

    def memory_lost(self, why: PagingError) -> None:
        raise AssertionError(str(why))


def lived(folder: Path, seed: int) -> tuple[list[list[object]], bool]:
    """The states of a guest after each of a sequence of touches and limits; all data is right."""
    folder.mkdir()
    rng, states = random.Random(seed), []
    with ExitStack() as stack:
        guest = Guest(folder, stack)
        guest.evictor.share.limit(GUEST_PAGES)
        guest.settle(lambda: guest.link.express)
        page = 0
        for _ in range(60):
            # Walks, which bring neighbours at once, and jumps, which bring them later or none.
            page = (page + 1 if rng.random() < 0.5 else rng.randrange(GUEST_PAGES)) % GUEST_PAGES
            guest.touch(page)
            states.append(guest.state())
            if rng.random() < 0.2:
                guest.evictor.share.limit(rng.choice([16, 64, GUEST_PAGES]))
                guest.settle(lambda: True)
                states.append(guest.state())
        guest.evictor.share.limit(2 * GUEST_PAGES)
        for page in REMOTE:
            guest.touch(page)
        data = data_of(np.array([[REMOTE.start, REMOTE.stop]]))
        assert os.pread(guest.fd, len(data), 0) == data
        assert guest.faults.pages_in > len(REMOTE) / 2
        assert guest.evictor.pages_out
        return states, guest.put_by_hot_path


@pytest.mark.parametrize("seed", range(3))
def test_the_book_and_its_twin_in_c_say_the_same_after_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    hot, by_hot_path = lived(tmp_path / "hot", seed)
    monkeypatch.setenv(loop.PLAIN, "1")
    plain, by_python = lived(tmp_path / "plain", seed)
    assert (by_hot_path, by_python) == (True, False)
    for step, (one, other) in enumerate(zip(hot, plain, strict=True)):
        assert one == other, f"after step {step}"


# What is done between the system calls of a page-out


@pytest.fixture
def carrier(tmp_path: Path) -> Iterator[SimpleNamespace]:
    """A file of 64 pages, one to move them to, and a pipe."""
    if loop.HOT is None:
        pytest.skip("not compiled")
    with ExitStack() as stack:
        epoll = stack.enter_context(select.epoll())
        fds = [os.memfd_create("from"), os.memfd_create("to"), *os.pipe()]
        for fd in fds:
            stack.callback(os.close, fd)
        resize_pipe(fds[3], 64 * PAGE_SIZE)
        os.pwrite(fds[0], data_of(np.array([[0, 64]])), 0)
        hot = loop.HOT(epoll.fileno())
        yield SimpleNamespace(hot=hot, ram=fds[0], spool=fds[1], pipe=(fds[2], fds[3]))


@pytest.mark.parametrize("runs", [[[3, 4]], [[0, 64]], [[1, 2], [5, 40], [63, 64]]])
def test_runs_are_carried_to_the_same_places(
    carrier: SimpleNamespace, runs: list[list[int]]
) -> None:
    which = np.array(runs)
    length = int((which[:, 1] - which[:, 0]).sum()) * PAGE_SIZE
    hot, (read_end, write_end) = carrier.hot, carrier.pipe
    assert hot.carry(loop.FILL, carrier.ram, write_end, which) == length
    assert hot.carry(loop.PUNCH, -1, carrier.ram, which) == length
    assert hot.carry(loop.EMPTY, read_end, carrier.spool, which) == length
    for first, stop in runs:
        data = data_of(np.array([[first, stop]]))
        assert os.pread(carrier.spool, len(data), first * PAGE_SIZE) == data
    there = {page for first, stop in runs for page in range(first, stop)}
    for fd, pages_there in ((carrier.spool, there), (carrier.ram, set(range(64)) - there)):
        os.ftruncate(fd, 64 * PAGE_SIZE)
        found = pages_of_extents(files.data_extents(fd, 64)).tolist()
        assert set(found) == pages_there


def test_a_run_that_cannot_be_carried_is_an_error(carrier: SimpleNamespace) -> None:
    which = np.array([[60, 70]])
    moved = carrier.hot.carry(loop.FILL, carrier.ram, carrier.pipe[1], which)
    assert moved == 4 * PAGE_SIZE, "the file ends there"
    with pytest.raises(OSError, match="Bad file descriptor"):
        carrier.hot.carry(loop.PUNCH, -1, -1, which)


def test_a_fault_is_answered_between_two_system_calls_and_told_of_in_the_next_turn(
    linked: SimpleNamespace, tmp_path: Path
) -> None:
    linked.shared[wire.MAY_SEND] = wire.NOW
    reader = miss(linked, 0)
    which = np.array([[0, 1]] * 4)

    def asked() -> bool:
        with files.opened(other, os.O_RDWR) as fd:
            linked.hot.carry(loop.PUNCH, -1, fd, which)
        return bool(linked.asked[0])

    other = tmp_path / "other"
    other.write_bytes(bytes(PAGE_SIZE))
    until(asked, 5, "the page is asked for")
    assert linked.asked.tolist() == [1, 7, 7, 9]
    asked_for = linked.far.recv(100)
    assert asked_for == wire.frame(Kind.PAGE_IN, 1, wire.pack_run(0, 1))
    linked.far.sendall(pages(1, 0, 1, b"\0" + b"x" * PAGE_SIZE))
    told = linked.hot.turn(1.0)
    (page, number, sent_bytes, code, _), *more = told[0][1]
    assert (page, number, sent_bytes, code) == (0, 1, len(asked_for), FIRST_SUB)
    assert not more
    until(lambda: linked.hot.turn(0.1) is not None and not reader.is_alive(), 5, "it goes on")
    assert linked.memory[:8] == b"x" * 8


def told_pages(told: list[tuple[int, object]]) -> list[int]:
    return [fault[0] for _, what in told if isinstance(what, list) for fault in what]


def test_an_answer_is_awaited_before_python_hears_of_a_fault_unless_answers_are_late() -> None:
    count = 20
    with linked_with([0] * count) as made:
        made.shared[wire.MAY_SEND] = wire.NOW
        waited_s = []
        for page in range(count):
            began = time.monotonic()
            reader = miss(made, page)
            assert told_pages(made.hot.turn(1.0)) == [page]
            waited_s.append(time.monotonic() - began)
        assert min(waited_s[:3]) > HOLD_S, "the answer was not awaited"
        assert min(waited_s[3:19]) < HOLD_S, "no answer came in time three times, and it is awaited"
        assert waited_s[19] > HOLD_S, "it is not tried again"
        made.far.sendall(b"".join(pages(n + 1, n, n + 1) for n in range(1, count)))
        until(lambda: made.hot.turn(0.1) is not None and not reader.is_alive(), 5, "it goes on")


def test_python_hears_of_a_fault_and_of_its_answer_at_once() -> None:
    with linked_with([0] * 4) as made:
        made.shared[wire.MAY_SEND] = wire.NOW

        def answer() -> None:
            assert made.far.recv(100) == wire.frame(Kind.PAGE_IN, 1, wire.pack_run(1, 2))
            made.far.sendall(pages(1, 1, 2))

        server = threading.Thread(target=answer, daemon=True)
        server.start()
        reader = miss(made, 1)
        faults, put = made.hot.turn(1.0)
        assert told_pages([faults]) == [1]
        assert put[1][:3] == (1, 1, 2)
        assert made.owners.tolist() == [FIRST_SUB, MAIN, FIRST_SUB, FIRST_SUB]
        for thread in (server, reader):
            thread.join(patience(5))
            assert not thread.is_alive()


def test_of_more_faults_than_can_be_told_at_once_none_is_lost(tmp_path: Path) -> None:
    count, most = 300, 256
    other = tmp_path / "other"
    other.write_bytes(bytes(PAGE_SIZE))
    told: list[int] = []
    with linked_with([0] * count) as made, files.opened(other, os.O_RDWR) as fd:
        made.far.setblocking(False)
        made.shared[wire.MAY_SEND] = wire.NOW
        for page in range(count):
            miss(made, page)

        def answered_between(enough: int) -> bool:
            made.hot.carry(loop.PUNCH, -1, fd, np.array([[0, 1]] * 40))
            received(made.far)
            return int(np.count_nonzero(made.asked)) >= enough

        until(partial(answered_between, most - 16), 5, "so many are asked for")
        time.sleep(0.1)  # for the others
        answered_between(0)
        assert np.count_nonzero(made.asked) <= most
        told += told_pages(made.hot.turn(0.0))
        assert most - 16 < len(told) <= most

        def all_told() -> bool:
            told.extend(told_pages(made.hot.turn(0.1)))
            return len(told) == count

        until(all_told, 5, "the rest is told of")
        assert sorted(told) == list(range(count))


def test_what_was_not_told_of_a_connection_that_ended_is_forgotten(tmp_path: Path) -> None:
    """A memory server may end its express connections in the middle of what it attends them in."""
    if loop.HOT is None:
        pytest.skip("not compiled")
    with ExitStack() as stack:
        epoll = stack.enter_context(select.epoll())
        hot = loop.HOT(epoll.fileno())
        store = stack.enter_context(files.opened(tmp_path / "store", os.O_RDWR | os.O_CREAT))
        here = np.zeros(4, dtype=np.bool_)
        pairs = [socket.socketpair() for _ in range(2)]
        for ours, theirs in pairs:
            stack.enter_context(ours)
            stack.enter_context(theirs)
            decoder = wire.Decoder(memoryview(mmap.mmap(-1, 2 << 20)))
            hot.server(ours.fileno(), store, decoder._buffer, decoder.shared, here, True)
            theirs.sendall(wire.frame(Kind.RELEASE, 1, wire.pack_run(0, 1)))  # is for Python
        hot.attend()
        gone, left = (ours.fileno() for ours, _ in pairs)
        hot.forget(gone)
        assert hot.turn(0.0) == [(left, loop.RECEIVED)]
        hot.forget(left)


def test_an_answer_that_does_not_fit_the_socket_is_half_sent(tmp_path: Path) -> None:
    """Then nothing is sent before its rest, which is Python's to send; see `FrameStream.finish`."""
    if loop.HOT is None:
        pytest.skip("not compiled")
    count = wire.MAX_PAGES
    data = data_of(np.array([[1, count + 1]]))  # page 0 would be one of zeros
    with ExitStack() as stack:
        epoll = stack.enter_context(select.epoll())
        hot = loop.HOT(epoll.fileno())
        store = stack.enter_context(files.opened(tmp_path / "store", os.O_RDWR | os.O_CREAT))
        os.pwrite(store, data, PAGE_SIZE)
        ours, theirs = (stack.enter_context(each) for each in socket.socketpair())
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 << 10)
        theirs.setblocking(False)
        epoll.register(ours, select.EPOLLIN)
        decoder = wire.Decoder(memoryview(mmap.mmap(-1, 2 << 20)))
        decoder.shared[wire.MAY_SEND] = wire.NOW
        here = np.ones(count + 1, dtype=np.bool_)
        hot.server(ours.fileno(), store, decoder._buffer, decoder.shared, here, False)
        for number in (1, 2):
            theirs.sendall(wire.frame(Kind.PAGE_IN, number, wire.pack_run(1, count + 1)))
        told = hot.turn(1.0)
        assert [fd for fd, _ in told] == [ours.fileno()] * len(told)
        ((rest,),) = [[what] for _, what in told if isinstance(what, bytes)]
        assert decoder.shared[wire.MAY_SEND] == wire.HALF_SENT
        begun = received(theirs)
        assert begun
        assert begun + rest == pages(1, 1, count + 1, bytes(count // 8) + data)
        hot.forget(ours.fileno())


def received(sock: socket.socket) -> bytes:
    parts = []
    with contextlib.suppress(BlockingIOError):
        while True:
            parts.append(sock.recv(1 << 20))
    return b"".join(parts)
