"""A stream whose frames are begun by the hot path: nothing comes between the parts of one."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from dcres.model import wire
from dcres.model.wire import Frame, Kind
from dcres.paging.transport.loop import READ, RECEIVED, WRITE, Loop
from dcres.paging.transport.stream import FrameStream


class Pair:
    """A stream and the socket at its other end."""

    def __init__(self) -> None:
        near, self.far = socket.socketpair()
        self.loop = Loop()
        self.frames: list[Frame] = []
        self.closed: list[Exception] = []
        self.stream = FrameStream(self.loop, near, self.frames.append, self.closed.append)
        self.far.setblocking(False)

    def half_sent(self, part: bytes) -> None:
        """What `hot.c` does when the socket is full in the middle of a frame."""
        self.stream.shared[wire.MAY_SEND] = wire.HALF_SENT
        self.stream._sock.send(part)

    def end(self) -> None:
        self.stream.close(ConnectionResetError("the test is over"))
        self.far.close()
        self.loop.close()


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    monkeypatch.setattr("dcres.paging.transport.stream.watch_peer", lambda sock: None)  # TCP only
    monkeypatch.setattr(socket.socket, "setsockopt", lambda *_: None)
    made = Pair()
    yield made
    made.end()


def test_nothing_overtakes_the_rest_of_a_frame(pair: Pair) -> None:
    pair.half_sent(b"AAAA")
    pair.stream.send([b"FETCHED"])
    pair.stream._ready(WRITE)  # a stale event: there was room once
    assert pair.far.recv(100) == b"AAAA"
    assert not pair.stream.idle
    pair.stream._ready(b"BBBB")
    assert pair.far.recv(100) == b"BBBBFETCHED"
    assert pair.stream.shared[wire.MAY_SEND] == wire.NOW
    assert pair.stream.idle


def test_the_rest_alone(pair: Pair) -> None:
    pair.half_sent(b"AAAA")
    pair.stream._ready(WRITE)
    assert pair.stream.shared[wire.MAY_SEND] == wire.HALF_SENT
    pair.stream.finish(b"BBBB")
    pair.stream.send([b"C"])
    assert pair.far.recv(100) == b"AAAABBBBC"


def test_a_buffer_full_of_frames_is_not_the_end(pair: Pair) -> None:
    """The hot path has received all of it, and what it tells of that is still to come."""
    frame = wire.frame(Kind.EXISTENCE, 1, bytes(wire.MAX_PAYLOAD))
    shared, buffer = pair.stream.shared, pair.stream.buffer
    whole = len(buffer) // len(frame)
    shared[wire.STOP] = len(buffer)
    shared[wire.START] = len(buffer) - whole * len(frame)
    buffer[shared[wire.START] :] = frame * whole
    pair.far.send(b"DCRP")
    pair.stream._ready(READ)
    pair.stream._ready(RECEIVED)
    assert pair.closed == []
    assert len(pair.frames) == whole
