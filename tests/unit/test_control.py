"""The control socket: who listens at its path."""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from dcres.errors import PagesLost, PagingError, ProtocolError
from dcres.paging import control, orders
from dcres.paging.control import PagerControl, Send, ServerControl
from dcres.paging.orders import (
    PAGER_ORDERS,
    SERVER_ORDERS,
    Answer,
    Counters,
    Cut,
    Done,
    Freeze,
    Frozen,
    PagerOrder,
    Quiesce,
    Rebase,
    Reload,
    ResizePager,
    ResizeServer,
    Scan,
    ServerOrder,
    Status,
    Thaw,
    Track,
    Untrack,
    Written,
    answer_of,
    order_of,
)
from dcres.paging.status import Counts, LinkStatus, PagerStatus, ServerStatus
from dcres.paging.transport.control_server import ControlServer, Handler, Reply, typed
from dcres.paging.transport.loop import Loop


def answers(loop: Loop, path: Path) -> int:
    """Ask whoever listens at `path` and let `loop` answer."""
    answer: list[int] = []
    asking = threading.Thread(
        target=lambda: answer.append(control.call(path, "who", 5.0)["number"]), daemon=True
    )
    asking.start()
    while asking.is_alive():
        loop.turn(0.01)
    while loop.turn(0.01):  # the asker has hung up: its connection is closed here, too
        pass
    return answer[0]


def server(loop: Loop, path: Path, number: int) -> ControlServer:
    def handle(do: str, arguments: dict[str, object], reply: Reply) -> None:
        reply({"ok": True, "number": number})

    return ControlServer(loop, path, handle)


def test_who_closes_leaves_the_socket_of_its_successor(tmp_path: Path) -> None:
    loop, path = Loop(), tmp_path / "pager.sock"
    first = server(loop, path, 1)
    assert answers(loop, path) == 1
    second = server(loop, path, 2)
    first.close()
    assert answers(loop, path) == 2
    second.close()
    assert not path.exists()
    with pytest.raises(PagingError, match="does not answer to status"):
        control.call(path, "status")
    loop.close()


@pytest.mark.parametrize("line", [b"hello", b"[]", b"{}", b"\xff", b"[" * 60_000])
def test_a_request_that_is_none_is_answered(tmp_path: Path, line: bytes) -> None:
    loop, path = Loop(), tmp_path / "pager.sock"
    control_server = server(loop, path, 1)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.connect(str(path))
        sock.sendall(line + b"\n")
        while not select.select([sock], [], [], 0)[0]:
            loop.turn(0.01)
        assert b"a control request is not understood" in sock.recv(1000)
    while loop.turn(0.01):
        pass
    control_server.close()
    loop.close()


@pytest.mark.parametrize("value", [None, 5, ["x"]])
def test_what_is_no_text(value: object) -> None:
    with pytest.raises(ProtocolError, match="is no changes"):
        order_of("pager", PAGER_ORDERS, "track", {"changes": value})


@pytest.mark.parametrize("value", [None, -1, True, 1.5, "many", 10**30])
def test_what_is_no_number_of_pages(value: object) -> None:
    with pytest.raises(ProtocolError, match="is no number of pages"):
        order_of("pager", PAGER_ORDERS, "resize", {"limit_pages": value})


@pytest.mark.parametrize("do", ["dance", "", None, 5, ["status"], {}])
def test_what_is_no_order(do: object) -> None:
    with pytest.raises(ProtocolError, match="a memory server cannot"):
        order_of("memory server", SERVER_ORDERS, do, {})


# With types

COUNTS = Counts(pages_in=1, pages_out=2, zero_pages=3, taken_back=4, faults=5)
PAGER = PagerStatus(
    state="running",
    lost_why="",
    pid=1,
    adopted=False,
    tracking=True,
    native=True,
    limit_pages=8,
    pages=[8, 2],
    leaving=1,
    moving=False,
    pages_to_move=0,
    page_in_median_us=1.5,
    page_in_p99_us=2.5,
    links={"h1": LinkStatus(state="ready", trouble="", express=True)},
    **COUNTS,
)
SERVER = ServerStatus(
    port=1,
    pid=2,
    tracking=False,
    held_pages=3,
    capacity_pages=4,
    pages_in=5,
    pages_out=6,
    pages_peeked=7,
    pages_fetched=8,
    refused=9,
    connected=True,
    readers=10,
    digest="ab",
)
ANSWERS: dict[type[PagerOrder] | type[ServerOrder], Answer] = {
    Quiesce: Counters(**COUNTS),
    Freeze: Frozen(tick=7, **COUNTS),
    Scan: Written(11),
}
ASKED_PAGER: list[tuple[Callable[[PagerControl], object], PagerOrder, object]] = [
    (PagerControl.status, Status(), PAGER),
    (PagerControl.quiesce, Quiesce(), ANSWERS[Quiesce]),
    (PagerControl.freeze, Freeze(), ANSWERS[Freeze]),
    (PagerControl.thaw, Thaw(), None),
    (PagerControl.reload, Reload(), None),
    (lambda pager: pager.resize(5), ResizePager(5), None),
    (lambda pager: pager.track(Path("/m")), Track("/m"), None),
    (lambda pager: pager.scan(Path("/m")), Scan("/m"), 11),
    (PagerControl.untrack, Untrack(), None),
    (lambda pager: pager.cut("vm-1"), Cut("vm-1"), None),
    (lambda pager: pager.rebase("vm-1"), Rebase("vm-1"), None),
]
ASKED_SERVER: list[tuple[Callable[[ServerControl], object], ServerOrder, object]] = [
    (ServerControl.status, Status(), SERVER),
    (lambda server: server.resize(5), ResizeServer(5), None),
    (lambda server: server.track(Path("/m")), Track("/m"), None),
    (lambda server: server.scan(Path("/m")), Scan("/m"), 11),
    (ServerControl.untrack, Untrack(), None),
]


@contextmanager
def listening(path: Path, handler: Handler) -> Iterator[Send]:
    """A process with this handler, in a thread; how to call it."""
    loop, over = Loop(), threading.Event()
    control_server = ControlServer(loop, path, handler)

    def turn() -> None:
        while not over.is_set():
            loop.turn(0.01)

    thread = threading.Thread(target=turn)
    thread.start()
    yield partial(control.call, path)
    over.set()
    thread.join()
    while loop.turn(0.01):  # those who asked have hung up
        pass
    control_server.close()
    loop.close()


def typed_of(tuples: Iterable[PagerOrder | ServerOrder]) -> list[tuple[type, object]]:
    """Named tuples of two types may be equal."""
    return [(type(each), each) for each in tuples]


def test_orders_of_a_pager_arrive_as_they_were_given_and_so_do_its_answers(tmp_path: Path) -> None:
    given: list[PagerOrder] = []

    def take(order: PagerOrder, reply: orders.Reply) -> None:
        given.append(order)
        reply(PAGER if isinstance(order, Status) else ANSWERS.get(type(order), Done()))

    with listening(tmp_path / "sock", typed("pager", PAGER_ORDERS, take)) as send:
        assert [ask(PagerControl(send)) for ask, _, _ in ASKED_PAGER] == [
            answer for _, _, answer in ASKED_PAGER
        ]
    assert typed_of(given) == typed_of(order for _, order, _ in ASKED_PAGER)
    assert {type(order) for order in given} == set(PAGER_ORDERS.values())


def test_orders_of_a_memory_server_arrive_as_they_were_given(tmp_path: Path) -> None:
    given: list[ServerOrder] = []

    def take(order: ServerOrder, reply: orders.Reply) -> None:
        given.append(order)
        reply(SERVER if isinstance(order, Status) else ANSWERS.get(type(order), Done()))

    with listening(tmp_path / "sock", typed("memory server", SERVER_ORDERS, take)) as send:
        assert [ask(ServerControl(send)) for ask, _, _ in ASKED_SERVER] == [
            answer for _, _, answer in ASKED_SERVER
        ]
    assert typed_of(given) == typed_of(order for _, order, _ in ASKED_SERVER)
    assert {type(order) for order in given} == set(SERVER_ORDERS.values())


def test_an_error_is_raised_again_whether_it_comes_at_once_or_later(tmp_path: Path) -> None:
    def take(order: PagerOrder, reply: orders.Reply) -> None:
        if isinstance(order, Freeze):
            raise PagesLost("page 5 is gone")
        reply(PagingError("the link to h1 is down"))

    with listening(tmp_path / "sock", typed("pager", PAGER_ORDERS, take)) as send:
        with pytest.raises(PagesLost, match="page 5 is gone"):
            PagerControl(send).freeze()
        with pytest.raises(PagingError, match="the link to h1 is down"):
            PagerControl(send).quiesce()


def test_an_answer_that_lacks_something_is_none() -> None:
    with pytest.raises(ProtocolError, match="another version of dcres: it lacks faults, pages_out"):
        answer_of(Frozen, {"pages_in": 1})
    with pytest.raises(ProtocolError, match="another version of dcres: it lacks port"):
        answer_of(ServerStatus, dict(list(SERVER.items())[1:]))


def test_what_a_later_dcres_says_more_is_left_to_it() -> None:
    """A pager that it has started, or that has started an agent's predecessor, goes on."""
    assert answer_of(Frozen, {**COUNTS, "tick": 1, "colour": 1}) == Frozen(1, 1, 2, 3, 4, 5)
    assert answer_of(ServerStatus, {**SERVER, "colour": 1}) == SERVER


def test_an_order_with_more_to_it_is_refused() -> None:
    """To do half of what a later dcres wants would be something else."""
    with pytest.raises(ProtocolError, match="a pager cannot scan with epoch"):
        order_of("pager", PAGER_ORDERS, "scan", {"changes": "x", "epoch": 3})


def test_the_json_of_a_status_is_flat_and_complete() -> None:
    line = orders.json_of(PAGER)
    assert line["ok"] is True
    assert line["links"] == {"h1": {"state": "ready", "trouble": "", "express": True}}
    assert COUNTS.items() <= line.items()
    text = (Path(__file__).parents[2] / "docs/protocol.md").read_text()
    told = text[text.index("`status` of a pager:") : text.index("Of a part server: `port`")]
    for name in (line.keys() | orders.json_of(SERVER).keys()) - {"ok"}:
        assert f"`{name}`" in told, f"docs/protocol.md does not tell of {name}"
