"""Pages that move between servers: readers, fetches, pulls; and who may do what."""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from dcres.errors import Conflict, PagesLost, PagingError, Refused
from dcres.model import wire
from dcres.model.handshake import Role
from dcres.model.pages import PAGE_SIZE, Extents
from dcres.model.wire import Endpoint, Kind
from dcres.paging.changes import DirtyBitmap
from dcres.paging.server import fetcher, service
from dcres.paging.server.fetcher import FetchingTable
from dcres.paging.server.service import PageService
from dcres.paging.server.subtable import SubTable
from dcres.paging.settings import SubAddress
from dcres.paging.transport import loop
from dcres.paging.transport.loop import Loop
from dcres.paging.transport.puller import pull
from dcres.paging.transport.stream import FrameStream
from tests.support.servers import (
    ME,
    Client,
    HeldSource,
    Server,
    Target,
    content,
    data_of,
    ended,
    extents,
    memory_server,
    packed_pages,
)
from tests.support.speed import patience
from tests.support.wait import until

pytestmark = pytest.mark.linux

PAGES = 2000


@pytest.fixture
def one(tmp_path: Path) -> Iterator[Server]:
    with memory_server(tmp_path, "one", PAGES) as server:
        yield server


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Server]:
    with memory_server(tmp_path, "two", PAGES, capacity=1000) as server:
        yield server


# Roles


def test_readers_look_while_the_pager_works(one: Server) -> None:
    with Client(one) as pager, Client(one, Role.READER) as first, Client(one, Role.READER) as other:
        pager.page_out(extents(3, 4, 9))
        for reader in (first, other):
            found, data = reader.peek(extents(2, 3, 4, 5, 9, 10))
            assert found.tolist() == [[3, 5], [9, 10]]
            assert data == data_of(extents(3, 4, 9))
            assert reader.here() == [3, 4, 9]
        assert first.peek(extents(100, 101))[0].tolist() == []
        pager.release(extents(4))
        assert first.peek(extents(3, 4))[0].tolist() == [[3, 4]]
        assert pager.page_in(extents(3)) == content(3)
        status = one.status()
        assert (status["readers"], status["connected"]) == (2, True)
        assert status["pages_peeked"] == 7
    until(lambda: one.status()["readers"] == 0, what="the readers are gone")


def test_a_second_pager_ends_the_first_and_no_reader(one: Server) -> None:
    with Client(one) as old, Client(one, Role.READER) as reader, Client(one) as new:
        new.page_out(extents(1))
        with pytest.raises(EOFError):
            old.next()
        assert reader.here() == [1]


# The express connection


def test_a_missed_page_comes_while_a_page_out_is_on_its_way(one: Server) -> None:
    with Client(one) as pager, Client(one, Role.EXPRESS) as express:
        pager.page_out(extents(3, 4))
        packed = packed_pages(extents(*range(10, 200)))
        frame = wire.frame(Kind.PAGE_OUT, 2, packed)
        pager.sock.sendall(frame[: len(frame) // 2])
        assert express.page_in(extents(4)) == content(4)
        pager.sock.sendall(frame[len(frame) // 2 :])
        assert pager.next().kind is Kind.STORED
        assert express.page_in(extents(*range(10, 200))) == data_of(extents(*range(10, 200)))
        assert one.status()["pages_in"] == 191


@pytest.mark.parametrize("plain", [False, True])
def test_missed_pages_are_served_in_the_middle_of_page_outs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain: bool
) -> None:
    if plain:
        monkeypatch.setenv(loop.PLAIN, "1")
    scattered = extents(*range(0, 512, 2))
    with (
        memory_server(tmp_path, "busy", PAGES) as server,
        Client(server) as pager,
        Client(server, Role.EXPRESS) as express,
    ):
        pager.page_out(extents(1001, 1003))
        numbers = []
        for version in range(40):
            numbers.append(pager.tell(Kind.PAGE_OUT, packed_pages(scattered, version)))
            numbers.append(pager.tell(Kind.RELEASE, wire.pack_extents(scattered)))
            assert express.page_in(extents(1001)) == content(1001)
            assert express.page_in(extents(1003)) == content(1003)
        assert [pager.next().request for _ in numbers] == numbers
        assert pager.here() == [1001, 1003]


@pytest.mark.parametrize("kind", [each for each in Kind if 16 <= each < 31 and each != 18])
def test_an_express_connection_asks_for_pages_and_nothing_else(one: Server, kind: Kind) -> None:
    with Client(one) as pager, Client(one, Role.EXPRESS) as express:
        pager.page_out(extents(1))
        express.tell(kind, wire.pack_extents(extents(1)))
        message = f"ProtocolError: an express connection does not send {kind.name}"
        assert ended(express) == message.encode()
        assert pager.page_in(extents(1)) == content(1)


def test_without_its_pager_an_express_connection_is_refused(one: Server) -> None:
    with pytest.raises(Refused):
        Client(one, Role.EXPRESS)
    until(lambda: "its pager is not connected" in one.log(), what="the server has told its log")


def test_an_express_connection_ends_with_its_pager(one: Server) -> None:
    with Client(one) as pager, Client(one, Role.EXPRESS) as express:
        pager.sock.close()
        with pytest.raises(EOFError):
            express.next()
    with Client(one), Client(one, Role.EXPRESS) as express, Client(one) as newer:
        with pytest.raises(EOFError):
            express.next()
        with Client(one, Role.EXPRESS) as another:
            newer.page_out(extents(1))
            assert another.page_in(extents(1)) == content(1)


@pytest.mark.parametrize("kind", [Kind.PAGE_IN, Kind.PAGE_OUT, Kind.RELEASE, Kind.FETCH])
def test_a_reader_changes_nothing(one: Server, kind: Kind) -> None:
    packed = {
        Kind.PAGE_OUT: packed_pages(extents(1), 2),
        Kind.FETCH: wire.pack_fetch(one.endpoint, extents(1)),
    }.get(kind, wire.pack_extents(extents(1)))
    with Client(one) as pager, Client(one, Role.READER) as reader:
        pager.page_out(extents(1))
        reader.tell(kind, packed)
        assert ended(reader) == f"ProtocolError: a reader does not send {kind.name}".encode()
        assert pager.page_in(extents(1)) == content(1)


def test_too_much_asked_for_at_once(one: Server) -> None:
    with Client(one, Role.READER) as reader:
        reader.tell(Kind.PEEK, wire.pack_run(0, wire.MAX_PAGES + 1))
        assert b"257 pages asked for at once" in ended(reader)


def test_more_readers_than_there_is_place_for(one: Server) -> None:
    with contextlib.ExitStack() as connected:
        last = Client(one, Role.READER)
        for _ in range(63):
            connected.enter_context(Client(one, Role.READER))
        with last:
            with pytest.raises(Refused):
                connected.enter_context(Client(one, Role.READER))
            until(lambda: "64 of its role are connected already" in one.log(), what="it is logged")
            with Client(one) as pager:
                pager.page_out(extents(1))
        until(lambda: one.status()["readers"] == 63, what="one reader is gone")
        assert connected.enter_context(Client(one, Role.READER)).here() == [1]


def test_a_reader_that_takes_nothing_is_served_no_faster(one: Server) -> None:
    """Its answers wait in no memory of the server's, and keep nobody from being served."""
    many = np.array([[0, wire.MAX_PAGES]])
    with Client(one) as pager, Client(one, Role.READER) as idle:
        pager.page_out(many)
        for _ in range(200):
            idle.tell(Kind.PEEK, wire.pack_extents(many))
        until(lambda: one.status()["pages_peeked"] > 0, what="the server begins")
        assert pager.page_in(extents(5)) == content(5)
        assert one.status()["pages_peeked"] < 100 * wire.MAX_PAGES
        for _ in range(200):
            assert idle.next().kind is Kind.PAGES
        assert one.status()["pages_peeked"] == 200 * wire.MAX_PAGES


@pytest.mark.parametrize("version", [1, 2])
def test_earlier_versions_are_hung_up_on(one: Server, version: int) -> None:
    with socket.create_connection(("127.0.0.1", one.port), timeout=patience(10)) as sock:
        sock.sendall(wire.HEADER.pack(b"DCRP", version, Kind.HELLO, 0, 0, 56) + bytes(56))
        assert sock.recv(100) == b""
    until(
        lambda: (
            f"speaks version {version} of the paging protocol and this is version 4" in one.log()
        ),
        what="it is logged",
    )


@pytest.mark.parametrize("role", [Role.PAGER, Role.READER])
def test_an_error_comes_behind_every_answer(one: Server, role: Role) -> None:
    """Also to somebody who has not taken them yet, and goes on asking."""
    many = wire.pack_run(0, wire.MAX_PAGES)
    with Client(one) as pager:
        pager.page_out(np.array([[0, wire.MAX_PAGES]]))
    with Client(one, role) as client:
        for _ in range(30):  # more than sockets hold
            client.tell(Kind.PEEK, many)
        client.tell(Kind.PEEK, b"")
        for _ in range(30):
            client.tell(Kind.PEEK, many)
            assert client.next().kind is Kind.PAGES
        client.tell(Kind.PEEK, many)
        assert ended(client) == b"ProtocolError: a frame ends inside its extents"
    until(lambda: one.status()["connected"] is False, what="the server has let go of it")


def test_who_is_told_an_error_hears_that_it_was_the_last(one: Server) -> None:
    """Before the server stops to wait for it: its end of the connection is shut at once."""
    took_s = []
    for _ in range(3):  # a busy machine may be late, but not every time
        with Client(one, Role.READER) as client:
            began = time.monotonic()
            client.tell(Kind.PEEK, b"")
            ended(client)
            took_s.append(time.monotonic() - began)
    assert min(took_s) < service.ENDING_TIMEOUT_S / 2


def test_a_peer_that_does_not_hang_up_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "ENDING_TIMEOUT_S", 0.1)
    loop = Loop()
    with SubTable(tmp_path / "store.ram", PAGES, PAGES) as pages:
        at = Endpoint("127.0.0.1", 0)
        served = PageService(loop, ME, PAGES, at, FetchingTable(loop, ME, pages))
        with socket.create_connection(("127.0.0.1", served.port)) as peer:
            until(lambda: served._strangers or loop.turn(0.01), what="it is accepted")
            (connection,) = served._strangers
            connection.handshake.accepted = True
            served.admit(connection)
            time.sleep(0.2)  # it counts from its end
            connection.stream.end(PagingError("the test wants it"))
            assert served._ending == [connection]
            ended_at = time.monotonic()
            while served._ending:
                served.turn(0.01)
            assert 0.1 <= time.monotonic() - ended_at < patience(2)
            assert peer.recv(1) == b""
        served.close()
    loop.close()


@pytest.mark.parametrize("order", ["track", "scan"])
def test_an_order_without_sense_ends_nobody(one: Server, tmp_path: Path, order: str) -> None:
    nowhere, unnameable = str(tmp_path / "no" / "such"), "a\0b"
    for wrong in ({}, {"changes": 5}, {"changes": nowhere}, {"changes": unnameable}):
        with pytest.raises(PagingError):
            one.order(order, **wrong)
    assert one.status()["tracking"] is False


# Capacity


def test_resized_below_what_it_holds(one: Server) -> None:
    with Client(one) as pager:
        pager.page_out(extents(*range(100)))
        one.order("resize", capacity_pages=50)
        assert one.status()["capacity_pages"] == 50
        pager.page_out(extents(7), version=1)  # takes no more room
        assert pager.page_in(extents(7)) == content(7, 1)
        pager.tell(Kind.PAGE_OUT, packed_pages(extents(200)))
        assert b"NoRoom: this sub host holds 100 of 50" in ended(pager)
    one.order("resize", capacity_pages=101)
    with Client(one) as pager:
        pager.page_out(extents(200))
    for wrong in (-1, "many", None, 1.5):
        with pytest.raises(PagingError, match="no number of pages"):
            one.order("resize", capacity_pages=wrong)


# Fetches


def spread(seed: int, count: int) -> Extents:
    return extents(*np.random.default_rng(seed).choice(PAGES, count, replace=False).tolist())


def fill(server: Server, which: Extents, version: int = 0) -> None:
    """Let `which` be there, over as many PAGE_OUTs as it takes."""
    pages = [page for first, stop in which.tolist() for page in range(first, stop)]
    with Client(server) as pager:
        for at in range(0, len(pages), wire.MAX_PAGES):
            pager.page_out(extents(*pages[at : at + wire.MAX_PAGES]), version)


def test_pages_are_fetched_from_one_memory_server_by_another(one: Server, two: Server) -> None:
    which = spread(1, 900)
    fill(one, which)
    with Client(two) as pager:
        number = pager.fetch(one.endpoint, which)
        stored = pager.fetched(number)
        assert extents(*stored).tolist() == which.tolist() == extents(*pager.here()).tolist()
        for page in stored[::50]:
            assert pager.page_in(extents(page)) == content(page)
        # The same connection serves again; what is there is replaced.
        fill(one, extents(stored[0]), version=1)
        assert pager.fetched(pager.fetch(one.endpoint, extents(stored[0]))) == stored[:1]
        assert pager.page_in(extents(stored[0])) == content(stored[0], 1)
    assert one.status()["readers"] == 1
    assert one.status()["pages_peeked"] == two.status()["pages_fetched"] == 901
    with Client(one) as pager:
        assert extents(*pager.here()).tolist() == which.tolist()


def test_requests_pass_a_fetch_by(two: Server) -> None:
    with HeldSource(PAGES) as source, Client(two) as pager:
        number = pager.fetch(source.endpoint, extents(1, 2, 3))
        pager.page_out(extents(10))
        assert source.greet() is Role.READER
        peek, which = source.asked()
        assert pager.page_in(extents(10)) == content(10)
        source.answer(peek, which)
        assert pager.fetched(number) == [1, 2, 3]


def test_what_the_source_lacks_is_not_named(one: Server, two: Server) -> None:
    fill(one, extents(1, 3, 4, 1500))
    with Client(two) as pager:
        assert pager.fetched(pager.fetch(one.endpoint, extents(*range(1000)))) == [1, 3, 4]
        assert pager.fetched(pager.fetch(one.endpoint, extents(7))) == []
        assert pager.here() == [1, 3, 4]


def test_a_source_that_is_not_there(two: Server) -> None:
    with HeldSource(PAGES) as source:
        nowhere = source.endpoint
    with Client(two) as pager:
        for at in (nowhere, Endpoint("::1", nowhere.port), Endpoint("255.255.255.255", 9)):
            assert pager.fetched(pager.fetch(at, extents(*range(600)))) == []
        pager.page_out(extents(1))


def test_a_source_that_ends_halfway(two: Server) -> None:
    with HeldSource(PAGES) as source, Client(two) as pager:
        number = pager.fetch(source.endpoint, extents(*range(1800)))
        source.greet()
        peek, which = source.asked()
        source.answer(peek, which)
        until(lambda: two.status()["pages_fetched"] == 256, what="the first part is stored")
        source.hang_up()
        assert pager.fetched(number) == list(range(256))
        # Another try makes another connection.
        number = pager.fetch(source.endpoint, extents(500))
        source.greet()
        source.answer(*source.asked())
        assert pager.fetched(number) == [500]


@pytest.mark.parametrize(
    "answer",
    [
        wire.frame(Kind.PAGES, 1, packed_pages(extents(5))),
        wire.frame(Kind.PAGES, 1, wire.pack_extents(extents(0, 1)) + bytes(2 * PAGE_SIZE)),
        wire.frame(Kind.PAGES, 1, wire.pack_extents(extents(1)) + bytes(100)),
        wire.frame(Kind.PAGES, 2, packed_pages(extents(1))),
        wire.frame(Kind.STORED, 1),
        wire.frame(Kind.ERROR, 1, b"CheckpointCorrupt: page 1 was altered"),
        b"x" * 100,
    ],
)
def test_a_source_that_answers_wrongly(two: Server, answer: bytes) -> None:
    with HeldSource(PAGES) as source, Client(two) as pager:
        number = pager.fetch(source.endpoint, extents(1, 2))
        source.greet()
        source.asked()
        assert source._client is not None
        source._client.sock.sendall(answer)
        assert pager.fetched(number) == []
        assert pager.here() == []


def test_a_source_of_another_generation_is_no_source(tmp_path: Path, two: Server) -> None:
    with memory_server(tmp_path, "old", PAGES, generation=2) as old, Client(two) as pager:
        assert pager.fetched(pager.fetch(old.endpoint, extents(1))) == []
        until(lambda: "it is of generation 3, not 2" in old.log(), what="it is logged")


def test_no_room_for_all_of_it(one: Server, two: Server) -> None:
    which = extents(*range(1100))
    fill(one, which)
    with Client(two) as pager:
        stored = pager.fetched(pager.fetch(one.endpoint, which))
        assert stored == list(range(768))  # of 1000 pages room: whole parts
        assert pager.here() == stored
        pager.page_out(extents(*range(1200, 1400)))


@pytest.mark.parametrize("what", ["page-out", "release", "another fetch"])
def test_what_the_pager_says_meanwhile_is_younger(two: Server, what: str) -> None:
    with HeldSource(PAGES) as source, HeldSource(PAGES) as other, Client(two) as pager:
        number = pager.fetch(source.endpoint, extents(*range(10, 20)))
        source.greet()
        peek, which = source.asked()
        match what:
            case "page-out":
                pager.page_out(extents(12, 13, 25), version=1)
            case "release":
                pager.release(extents(12, 13, 25))
            case _:
                later = pager.fetch(other.endpoint, extents(12, 13, 25))
                other.greet()
                other.answer(*other.asked(), version=1)
                assert pager.fetched(later) == [12, 13, 25]
        source.answer(peek, which)
        assert pager.fetched(number) == [10, 11, 14, 15, 16, 17, 18, 19]
        assert pager.page_in(extents(11, 14)) == data_of(extents(11, 14))
        if what == "release":
            assert pager.here() == [10, 11, *range(14, 20)]
        else:
            assert pager.page_in(extents(12, 13)) == data_of(extents(12, 13), 1)


def test_a_page_released_after_it_was_stored_and_before_fetched_is_said(two: Server) -> None:
    with HeldSource(PAGES) as source, Client(two) as pager:
        number = pager.fetch(source.endpoint, extents(*range(300)))
        source.greet()
        source.answer(*source.asked())
        until(lambda: two.status()["pages_fetched"] == 256, what="the first part is stored")
        pager.release(extents(7, 299))
        peek, which = source.asked()
        assert which.tolist() == [[256, 300]]
        source.answer(peek, which)
        assert pager.fetched(number) == [page for page in range(299) if page != 7]


def test_a_part_of_which_nothing_is_wanted_is_not_asked_for(two: Server) -> None:
    with HeldSource(PAGES) as source, Client(two) as pager:
        number = pager.fetch(source.endpoint, extents(*range(1536)))
        pager.release(extents(*range(1024, 1280)))
        source.greet()
        asked = []
        for _ in range(5):
            peek, which = source.asked()
            asked.append(which.tolist())
            source.answer(peek, extents())
        assert asked[4] == [[1280, 1536]]
        assert pager.fetched(number) == []


def test_nothing_is_written_for_a_pager_that_is_gone(two: Server) -> None:
    with HeldSource(PAGES) as source:
        with Client(two) as old:
            old.fetch(source.endpoint, extents(*range(300)))
            source.greet()
            first, second = source.asked(), source.asked()
            source.answer(*first)
            until(lambda: two.status()["pages_fetched"] == 256, what="the first part is stored")
        with Client(two) as new:
            source.answer(*second)
            # The source is in use again, so its late answer has been read by now.
            number = new.fetch(source.endpoint, extents(1000))
            source.answer(*source.asked())
            assert new.fetched(number) == [1000]
            assert new.here() == [*range(256), 1000]


def test_a_source_that_is_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetcher, "STALL_TIMEOUT_S", 0.1)
    loop = Loop()
    with (
        SubTable(tmp_path / "store.ram", PAGES, PAGES) as pages,
        HeldSource(PAGES) as source,
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as pager,
    ):
        table = FetchingTable(loop, ME, pages)
        asker = FrameStream(loop, listener.accept()[0], lambda _: None, lambda _: None)
        table.fetch(asker, 5, source.endpoint, extents(1, 2))

        def answered() -> bool:
            table.end_stalled()
            loop.turn(0)
            return bool(select.select([pager], [], [], 0)[0])

        until(answered, what="FETCHED")
        assert pager.recv(100) == wire.frame(Kind.FETCHED, 5, wire.pack_extents(extents()))
        asker.close(PagingError("the test is over"))
    loop.close()


def test_a_source_to_which_there_is_no_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = Loop()
    with (
        SubTable(tmp_path / "store.ram", PAGES, PAGES) as pages,
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as pager,
    ):
        table = FetchingTable(loop, ME, pages)
        asker = FrameStream(loop, listener.accept()[0], lambda _: None, lambda _: None)
        with monkeypatch.context() as patch:  # as on a host without IPv6
            patch.setattr(
                "dcres.paging.server.fetcher.socket.socket",
                Mock(side_effect=OSError(97, "no such family")),
            )
            table.fetch(asker, 5, Endpoint("::1", 9), extents(1, 2))
        assert pager.recv(100) == wire.frame(Kind.FETCHED, 5, wire.pack_extents(extents()))
        asker.close(PagingError("the test is over"))
    loop.close()


def test_fetched_pages_are_marked_for_a_live_checkpoint(
    one: Server, two: Server, tmp_path: Path
) -> None:
    fill(one, extents(1, 2, 30))
    two.order("track", changes=str(tmp_path / "changes"))
    with Client(two) as pager:
        assert pager.fetched(pager.fetch(one.endpoint, extents(1, 2, 30))) == [1, 2, 30]
    assert DirtyBitmap(tmp_path / "changes", PAGES).take().tolist() == [[1, 3], [30, 31]]


# Pulls


def test_pages_are_pulled(one: Server) -> None:
    which = spread(2, 1500)
    fill(one, which)
    target, done = Target(PAGES), list[int]()
    assert pull(one.address, ME, PAGES, which, target.write, done.append) == 1500
    assert sum(done) == 1500
    assert extents(*target.pages).tolist() == which.tolist()
    for page in target.pages:
        assert target.data[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] == content(page)
    assert pull(one.address, ME, PAGES, extents(), target.write) == 0


def test_a_pull_of_what_is_not_there(one: Server) -> None:
    fill(one, extents(*range(600)))
    target = Target(PAGES)
    with pytest.raises(PagesLost, match="one lacks page 600"):
        pull(one.address, ME, PAGES, extents(*range(605)), target.write)
    assert 600 not in target.pages


def test_a_pull_by_who_does_not_belong(one: Server) -> None:
    with pytest.raises(Refused):
        pull(one.address, replace(ME, generation=9), PAGES, extents(1), Target(PAGES).write)
    with pytest.raises(Refused, match="another size"):
        pull(one.address, ME, PAGES + 1, extents(1), Target(PAGES).write)


def test_a_pull_from_nobody() -> None:
    with HeldSource(PAGES) as source:
        nowhere = SubAddress("h9", "127.0.0.1", source.endpoint.port, 0)
    with pytest.raises(PagingError, match=r"h9 does not serve its pages at 127\.0\.0\.1 port"):
        pull(nowhere, ME, PAGES, extents(1), Target(PAGES).write)


def test_a_pull_from_a_host_that_falls_silent(two: Server) -> None:
    with HeldSource(PAGES) as source:
        silent = SubAddress("h9", "127.0.0.1", source.endpoint.port, 0)
        asked: list[int] = []
        began = time.monotonic()
        with pytest.raises(PagingError, match="h9 has sent nothing for 1 s"):
            pull(silent, ME, PAGES, extents(1), Target(PAGES).write, asked.append, timeout_s=1)
        assert time.monotonic() - began < patience(5)
        assert asked
        assert not any(asked)


def test_a_pull_ends_when_its_caller_has_had_enough(one: Server) -> None:
    fill(one, extents(*range(1000)))

    def cancelled(_: int) -> None:
        raise Conflict("load was cancelled")

    with pytest.raises(Conflict):
        pull(one.address, ME, PAGES, extents(*range(1000)), Target(PAGES).write, cancelled)

    def full(first: int, stop: int, data: memoryview) -> None:
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        pull(one.address, ME, PAGES, extents(1), full)
    until(lambda: one.status()["readers"] == 0, what="the connections are closed")
