"""The control socket: who listens at its path."""

from __future__ import annotations

import select
import socket
import threading
from pathlib import Path

import pytest

from dcres.errors import PagingError, ProtocolError
from dcres.paging import control
from dcres.paging.control import ControlServer, Reply
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
        control.text({"changes": value}, "changes")


@pytest.mark.parametrize("value", [None, -1, True, 1.5, "many", 10**30])
def test_what_is_no_number_of_pages(value: object) -> None:
    with pytest.raises(ProtocolError, match="is no number of pages"):
        control.pages({"limit_pages": value}, "limit_pages")
