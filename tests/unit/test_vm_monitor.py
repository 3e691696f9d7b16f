"""What needs no QEMU to be decided."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from dcres.model.run_state import RunState
from dcres.vm.monitor import Monitor, _CoreTransfer, _LoopThread


def monitor_of(version: str) -> Monitor:
    numbers = dict(zip(("major", "minor", "micro"), map(int, version.split(".")), strict=True))
    greeting = SimpleNamespace(QMP=SimpleNamespace(version={"qemu": numbers}))
    client: Any = SimpleNamespace(greeting=greeting)
    return Monitor(Path("qmp.sock"), Mock(), client)


@pytest.mark.parametrize(
    ("version", "uri"),
    [
        ("7.2.22", "fd:dcres-core"),
        ("8.1.5", "fd:dcres-core"),
        ("8.1.92", "fd:dcres-core"),  # a candidate for 8.2; a descriptor will do there, too
        ("8.2.0", "file:/core"),
        ("9.1.0", "file:/core"),
        ("10.0.2", "file:/core"),
    ],
)
def test_how_a_core_is_named(version: str, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []
    monkeypatch.setattr(Monitor, "send_fd", lambda _, name, fd: sent.append(name))
    assert monitor_of(version).version == version
    assert _CoreTransfer(monitor_of(version)).uri(Path("/core"), 3) == uri
    assert sent == (["dcres-core"] if uri.startswith("fd:") else [])


def test_every_run_state_is_spelled_as_qemu_does() -> None:
    assert all(state.value == state.name.lower().replace("_", "-") for state in RunState)


def test_closing_ends_what_is_still_under_way(tmp_path: Path) -> None:
    """A connection that is being made or ended when its QEMU goes."""
    path, ended = tmp_path / "socket", []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        loop = _LoopThread()

        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await reader.read()
            finally:
                writer.close()
                await writer.wait_closed()
                ended.append("closed")

        tasks = []

        async def begin() -> None:
            both = await asyncio.open_unix_connection(str(path))
            tasks.append(asyncio.create_task(talk(*both)))
            await asyncio.sleep(0)  # it has begun

        loop.run(begin(), 5.0)
        loop.close()
        assert ended == ["closed"]
        peer, _ = listener.accept()
        with peer:
            assert peer.recv(1) == b"", "the connection is open"
