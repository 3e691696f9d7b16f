"""The control socket: who listens at its path."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from dcres.errors import PagingError
from dcres.paging import control
from dcres.paging.control import ControlServer, Reply
from dcres.paging.loop import Loop


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
