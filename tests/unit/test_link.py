"""A link whose server falls silent is noticed, named and tried again: real sockets, one thread."""

from __future__ import annotations

import gc
import socket
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from dcres.errors import PagingError, ProtocolError
from dcres.linux import network
from dcres.model.handshake import Identity, Role
from dcres.model.pages import PAGE_SIZE, Extents, Mask
from dcres.model.wire import Endpoint, Frame, Kind, pack_extents
from dcres.paging.server.fetcher import FetchingTable
from dcres.paging.server.service import PageService
from dcres.paging.server.subtable import SubTable
from dcres.paging.settings import SubAddress
from dcres.paging.transport import connection as connection_module
from dcres.paging.transport.link import Link, LinkState
from dcres.paging.transport.loop import READ, Loop
from dcres.paging.transport.requests import Request, Runs
from dcres.paging.transport.silence import Silence
from dcres.paging.transport.stream import FrameStream
from tests.support.speed import patience

ME = Identity(b"v" * 16, 1, b"s" * 32)
PAGES = 16
SILENT_S = patience(0.4)  # longer than a busy machine lets this process wait


class User:
    """A pager that places no page on the server, and notes what it is told."""

    def __init__(self) -> None:
        self.stored = 0
        self.unanswered: list[Kind] = []
        self.arrived: Runs = []
        self.placed: list[int] = []
        self.fetched: list[list[int]] = []

    def expected(self, link: Link, first: int, count: int) -> Mask:
        return np.isin(np.arange(first, first + count), self.placed)

    def link_ready(self, link: Link) -> None:
        return

    def link_down(self, link: Link, unanswered: list[Request]) -> None:
        self.unanswered += [request.kind for request in unanswered]

    def pages_arrived(self, link: Link, runs: Runs, address: int) -> None:
        self.arrived += runs

    def pages_put(self, link: Link, first: int, stop: int, at_ns: int) -> None:
        raise AssertionError("there is no guest's memory to put pages in")

    def pages_stored(self, link: Link, extents: Extents) -> None:
        self.stored += 1

    def pages_fetched(self, link: Link, asked: Extents, stored: Extents) -> None:
        self.fetched += stored.tolist()

    def memory_lost(self, why: PagingError) -> None:
        raise AssertionError(str(why))


class Wire:
    """A link and a memory server, each in a loop that turns when it is told to."""

    def __init__(self, folder: Path) -> None:
        self.server_loop, self.link_loop = Loop(), Loop()
        self.pages = SubTable(folder / "s.ram", PAGES, PAGES)
        table = FetchingTable(self.server_loop, ME, self.pages)
        at = Endpoint("127.0.0.1", 0)
        self.service = PageService(self.server_loop, ME, PAGES, at, table)
        self.user = User()
        address = SubAddress("h1", "127.0.0.1", self.service.port, PAGES, 16)
        self.link = Link(self.link_loop, address, ME, PAGES, self.user)

    def close(self) -> None:
        self.link.close()
        self.service.close()
        self.pages.__exit__()
        self.link_loop.close()
        self.server_loop.close()

    def turn_until(self, done: Callable[[], object], *, server: bool) -> None:
        """Let the link run, and the server if it is not to hang, until `done`."""
        deadline = time.monotonic() + patience(20)
        while not done():
            assert time.monotonic() < deadline
            if server:
                self.service.turn(0)
            self.link_loop.turn(0.005)
            self.link.connect_if_due()

    def ready(self) -> bool:
        return self.link.state is LinkState.READY and self.link.express


@pytest.fixture
def patient(tmp_path: Path) -> Iterator[Wire]:
    made = Wire(tmp_path)
    yield made
    made.close()


@pytest.fixture
def wire(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Wire]:
    monkeypatch.setattr(connection_module, "ANSWER_TIMEOUT_S", SILENT_S)
    made = Wire(tmp_path)
    yield made
    made.close()


def test_a_server_that_hangs_is_named_and_comes_back(wire: Wire) -> None:
    wire.turn_until(wire.ready, server=True)
    wire.link.page_out(np.array([[3, 4]]), [b"x" * PAGE_SIZE])
    asked_at = time.monotonic()
    wire.turn_until(lambda: not wire.ready(), server=False)
    assert time.monotonic() - asked_at >= SILENT_S
    assert f"it has not answered for {SILENT_S:g} s" in wire.link.trouble
    assert wire.user.unanswered == [Kind.PAGE_OUT]
    wire.turn_until(wire.ready, server=True)
    assert (wire.link.trouble, wire.user.stored) == ("", 0)
    wire.link.page_out(np.array([[3, 4]]), [b"x" * PAGE_SIZE])
    wire.turn_until(lambda: wire.user.stored, server=True)


def test_a_host_may_go_that_has_not_confirmed_releases(patient: Wire) -> None:
    """They are told in batches, and pages may have gone from there a moment ago."""
    patient.turn_until(patient.ready, server=True)
    patient.turn_until(lambda: patient.link.settled, server=True)
    patient.link.release([(3, 4)])
    assert state_of(patient.link) == "not settled, not needed"
    patient.link.flush_releases()
    assert state_of(patient.link) == "not settled, not needed"
    patient.link.page_out(np.array([[3, 4]]), [b"x" * PAGE_SIZE])
    assert state_of(patient.link) == "not settled, needed"
    patient.turn_until(lambda: patient.link.settled, server=True)
    assert state_of(patient.link) == "settled, not needed"
    patient.link.fetch(SubAddress("h2", "127.0.0.1", 1, PAGES, 17), np.array([[5, 6]]))
    assert state_of(patient.link) == "settled, needed"


def state_of(link: Link) -> str:
    return (
        ("" if link.settled else "not ") + "settled, " + ("" if link.needed else "not ") + "needed"
    )


def test_a_server_that_accepts_and_does_not_greet_is_named(wire: Wire) -> None:
    """The kernel accepts for a process that hangs."""
    wire.turn_until(lambda: wire.link.trouble, server=False)
    assert "it has not answered" in wire.link.trouble
    wire.turn_until(wire.ready, server=True)


def test_a_link_on_which_nothing_is_asked_stays(wire: Wire) -> None:
    wire.turn_until(wire.ready, server=True)
    until = time.monotonic() + 2 * SILENT_S
    wire.turn_until(lambda: time.monotonic() > until, server=False)
    assert wire.ready()


def hold_pages(wire: Wire) -> None:
    """Pages 3 to 5 are on the server, and the table says so."""
    wire.turn_until(wire.ready, server=True)
    wire.link.page_out(np.array([[3, 6]]), [b"x" * 3 * PAGE_SIZE])
    wire.turn_until(lambda: wire.user.stored, server=True)
    wire.user.placed = [3, 4, 5]


def test_what_a_guest_waits_for_overtakes_what_it_does_not(wire: Wire) -> None:
    hold_pages(wire)
    wire.link.page_in([(3, 5)])
    wire.link.page_in([(5, 6)], hurry=True)
    assert not wire.link.settled
    pager, express = (wire.service._members[role][0].stream for role in (Role.PAGER, Role.EXPRESS))
    wire.server_loop.want(pager.fd, 0)  # it is held up on the way
    wire.turn_until(lambda: wire.user.arrived, server=True)
    assert wire.user.arrived == [(5, 6)]
    wire.server_loop.want(pager.fd, READ)
    wire.turn_until(lambda: wire.link.settled, server=True)
    assert wire.user.arrived == [(5, 6), (3, 5)]
    assert express.open


@pytest.mark.parametrize("role", [Role.PAGER, Role.EXPRESS])
def test_both_connections_end_together_and_are_made_again(wire: Wire, role: Role) -> None:
    hold_pages(wire)
    wire.link.page_in([(3, 5)])
    wire.link.page_in([(5, 6)], hurry=True)
    wire.service._members[role][0].stream.close(ConnectionAbortedError("the test cuts it"))
    wire.turn_until(lambda: not wire.ready(), server=False)
    assert wire.link.trouble
    assert "it has not answered" not in wire.link.trouble, "at once, not for its silence"
    assert not wire.link.express
    assert wire.user.unanswered == [Kind.PAGE_IN, Kind.PAGE_IN]
    assert wire.link.settled
    wire.turn_until(wire.ready, server=True)
    assert [wire.service.connected(each) for each in (Role.PAGER, Role.EXPRESS)] == [1, 1]
    wire.link.page_in([(5, 6)], hurry=True)
    wire.turn_until(lambda: wire.user.arrived, server=True)


def test_an_express_connection_to_a_vm_of_another_size_ends_the_link(wire: Wire) -> None:
    wire.turn_until(lambda: wire.link.state is LinkState.READY, server=True)
    wire.service.page_count += 1  # for connections that are accepted from now on
    wire.turn_until(lambda: wire.link.trouble, server=True)
    assert wire.link.trouble == "h1 serves a VM of another size"
    assert not wire.link.express


def test_an_express_connection_that_falls_silent_is_noticed(wire: Wire) -> None:
    hold_pages(wire)
    wire.link.page_in([(5, 6)], hurry=True)
    wire.turn_until(lambda: not wire.ready(), server=False)
    assert f"it has not answered for {SILENT_S:g} s" in wire.link.trouble
    assert wire.user.unanswered == [Kind.PAGE_IN]


@pytest.mark.parametrize("kind", [Kind.PAGE_OUT, Kind.FETCH])
def test_what_a_link_breaks_in_sending_is_unanswered_with_the_releases_ahead(
    wire: Wire, kind: Kind
) -> None:
    hold_pages(wire)
    wire.link.release([(5, 6)])
    assert wire.link._main is not None
    wire.link._main._stream._sock.shutdown(socket.SHUT_WR)  # to send is an error from now on
    if kind is Kind.PAGE_OUT:
        wire.link.page_out(np.array([[3, 4]]), [b"x" * PAGE_SIZE])
    else:
        wire.link.fetch(wire.link.sub, np.array([[3, 4]]))
    assert wire.link.state is LinkState.DOWN
    assert wire.user.unanswered == [Kind.RELEASE, kind]


@pytest.mark.parametrize("stored", [[[3, 5]], [[2, 4]], [[4, 6]], [[9, 9]], [[0, PAGES + 1]]])
def test_a_host_that_fetched_what_it_was_not_to_is_not_believed(
    patient: Wire, stored: list[list[int]]
) -> None:
    """The fetch is told as unanswered, so that it does not count as under way for ever."""
    patient.turn_until(patient.ready, server=True)
    patient.turn_until(lambda: patient.link.settled, server=True)
    patient.link.fetch(SubAddress("h2", "127.0.0.1", 1, PAGES, 17), np.array([[3, 4], [5, 6]]))
    main = patient.link._main
    assert main is not None
    (number,) = main.fetches
    packed = memoryview(pack_extents(np.array(stored)))
    with pytest.raises(ProtocolError) as raised:
        main._frame(Frame(Kind.FETCHED, number, packed, 0))
    main.close(raised.value)
    assert (patient.user.fetched, patient.user.unanswered) == ([], [Kind.FETCH])


@pytest.mark.parametrize(
    ("asked", "answer"), [(Kind.PAGE_OUT, Kind.STORED), (Kind.RELEASE, Kind.RELEASED)]
)
def test_an_answer_with_something_in_it_that_should_be_empty_ends_the_link(
    patient: Wire, asked: Kind, answer: Kind
) -> None:
    patient.turn_until(patient.ready, server=True)
    patient.turn_until(lambda: patient.link.settled, server=True)
    if asked is Kind.PAGE_OUT:
        patient.link.page_out(np.array([[3, 4]]), [b"x" * PAGE_SIZE])
    else:
        patient.link.release([(3, 4)])
        patient.link.flush_releases()
    main = patient.link._main
    assert main is not None
    (request,) = main.unanswered
    with pytest.raises(ProtocolError) as raised:
        main._frame(Frame(answer, request.number, memoryview(b"x"), 0))
    main.close(raised.value)
    assert (patient.user.stored, patient.user.unanswered) == (0, [asked])


def test_who_answers_slowly_one_by_one_is_not_silent() -> None:
    silence = Silence(10.0)
    assert not any(silence.too_long(number, 9.0 * number) for number in range(1, 20))
    assert not silence.too_long(19, 9.0 * 19 + 10.0)
    assert silence.too_long(19, 9.0 * 19 + 10.1)
    assert not silence.too_long(None, 1000.0)
    assert not silence.too_long(19, 2000.0)


def test_the_kernel_watches_the_peer_of_every_connection() -> None:
    loop = Loop()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sock = socket.create_connection(listener.getsockname())
        stream = FrameStream(loop, sock, lambda frame: None, lambda why: None)
        option = {
            name: sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name))
            for name in ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT")
        }
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        asked_s = option["TCP_KEEPIDLE"] + option["TCP_KEEPCNT"] * option["TCP_KEEPINTVL"]
        assert asked_s == network.PEER_TIMEOUT_S == option["TCP_USER_TIMEOUT"] / 1000
        stream.close(ConnectionAbortedError("done"))
    loop.close()


class Closing:
    """Who is told of one connection."""

    why = ""  # not the error, whose traceback has the frames that met it

    def connected(self, connection: connection_module.Connection) -> None:
        raise AssertionError("nobody listens there")

    answered = fetched = put = connected

    def closed(self, connection: connection_module.Connection, why: PagingError | OSError) -> None:
        self.why = str(why)


def test_a_connection_that_has_ended_leaves_nothing_to_the_collector() -> None:
    """Its buffers are megabytes, and a host that is away is tried ten times a second."""
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    loop, user = Loop(), Closing()
    address = SubAddress("h1", "127.0.0.1", port, PAGES, 16)
    made = connection_module.Connection(loop, ME, PAGES, address, Role.PAGER)
    left = weakref.ref(made)
    gc.disable()
    try:
        made.greet(user)  # type: ignore[arg-type]
        deadline = time.monotonic() + patience(20)
        while not user.why:
            assert time.monotonic() < deadline
            loop.turn(0.005)
        del made
        assert left() is None
    finally:
        gc.enable()
        loop.close()
