"""Reading many pages from a server as fast as the link takes them: how a restore moves memory.

Blocking, one thread, one connection. Some PEEKs are always on their way, so that the source
reads and sends while this side writes.
"""

from __future__ import annotations

import contextlib
import mmap
import secrets
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TypeAlias

import numpy as np

from dcres.errors import PagesLost, PagingError, ProtocolError, Refused
from dcres.model import wire
from dcres.model.handshake import NONCE_BYTES, ClientHandshake, Identity, Role
from dcres.model.pages import PAGE_SIZE, Extents, count_pages, pages_of_extents
from dcres.model.wire import Decoder, Frame, Kind
from dcres.paging.settings import SubAddress

Write: TypeAlias = Callable[[int, int, memoryview], None]
Progress: TypeAlias = Callable[[int], None]

WINDOW = 8
TIMEOUT_S = 30.0
_POLL_S = 0.5
_BUFFER_BYTES = 8 << 20  # several frames, so that few are cut at its end and moved to its front


def pull(
    source: SubAddress,
    identity: Identity,
    page_count: int,
    extents: Extents,
    write: Write,
    progress: Progress | None = None,
    timeout_s: float = TIMEOUT_S,
) -> int:
    """Read `extents` from `source` and hand each run of pages to ``write(first, stop, data)``.

    `data` is valid during the call. `progress` gets pages done since its last call, 0 while
    waiting; what it or `write` raises ends the pull. Returns the number of pages. Raises
    PagesLost if the source lacks a page, CheckpointCorrupt if it finds one altered, Refused,
    and PagingError when it cannot be reached, ends, or is silent for `timeout_s`.
    """
    with _network(source):
        sock = socket.create_connection((source.address, source.port), timeout_s)
    with sock:
        return _Pull(sock, source, page_count, progress, timeout_s).run(identity, extents, write)


@contextlib.contextmanager
def _network(source: SubAddress) -> Iterator[None]:
    """Turn what a socket raises into PagingError; errors of the writing stay what they are."""
    try:
        yield
    except OSError as error:
        raise PagingError(
            f"{source.host} does not serve its pages at {source.address} port {source.port} "
            f"({error}); see whether that host is well and try again"
        ) from error


class _Pull:
    """One connection and what was asked for on it."""

    def __init__(
        self,
        sock: socket.socket,
        source: SubAddress,
        page_count: int,
        progress: Progress | None,
        timeout_s: float,
    ) -> None:
        sock.settimeout(_POLL_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock = sock
        self._source = source
        self._host = source.host
        self._page_count = page_count
        self._progress = progress
        self._timeout_s = timeout_s
        self._decoder = Decoder(memoryview(mmap.mmap(-1, _BUFFER_BYTES)))
        self._asked: deque[tuple[int, Extents]] = deque()
        self._number = 0

    def run(self, identity: Identity, extents: Extents, write: Write) -> int:
        """All of `pull` once the connection is there."""
        frames = self._frames()
        self._greet(identity, frames)
        parts = _parts(extents)
        for _ in range(WINDOW):
            self._ask(next(parts, None))
        done = 0
        while self._asked:
            frame = next(frames)
            self._ask(next(parts, None))
            done += self._take(frame, write)
        return done

    def _frames(self) -> Iterator[Frame]:
        """What the source sends; a frame is valid until the next is asked for."""
        while True:
            yield from self._decoder.frames()
            self._decoder.received(self._receive())

    def _receive(self) -> int:
        deadline = time.monotonic() + self._timeout_s
        while True:
            with _network(self._source), contextlib.suppress(TimeoutError):
                length = self._sock.recv_into(self._decoder.receive_into())
                if length == 0:
                    raise ConnectionResetError("it closed the connection")
                return length
            if time.monotonic() > deadline:
                raise PagingError(
                    f"{self._host} has sent nothing for {self._timeout_s:.0f} s; see whether that "
                    "host and the network to it are well, and try again"
                )
            self._report(0)

    def _send(self, frame: bytes) -> None:
        with _network(self._source):
            self._sock.sendall(frame)

    def _greet(self, identity: Identity, frames: Iterator[Frame]) -> None:
        handshake = ClientHandshake(identity, secrets.token_bytes(NONCE_BYTES), Role.READER)
        answer: bytes | None = handshake.hello()
        while answer is not None:
            self._send(answer)
            answer = handshake.answer(next(frames))
        if handshake.page_count != self._page_count:
            raise Refused(f"{self._host} serves a VM of another size")

    def _ask(self, extents: Extents | None) -> None:
        if extents is None:
            return
        self._number = self._number % 0xFFFFFFFF + 1
        self._asked.append((self._number, extents))
        self._send(wire.frame(Kind.PEEK, self._number, wire.pack_extents(extents)))

    def _take(self, frame: Frame, write: Write) -> int:
        if frame.kind is Kind.ERROR:
            raise wire.unpack_error(frame.payload, self._host)
        number, asked = self._asked.popleft()
        if frame.kind is not Kind.PAGES or frame.request != number:
            raise ProtocolError(f"{self._host} sent {frame.kind.name}, which was not asked for")
        extents, data = wire.unpack_pages(frame.payload, self._page_count, may_be_none=True)
        if extents.tobytes() != asked.tobytes():
            self._complain(asked, extents)
        at = 0
        for first, stop in extents.tolist():
            end = at + (stop - first) * PAGE_SIZE
            write(first, stop, data[at:end])
            at = end
        pages = count_pages(extents)
        self._report(pages)
        return pages

    def _complain(self, asked: Extents, got: Extents) -> None:
        here = set(pages_of_extents(got).tolist())
        lacking = [page for page in pages_of_extents(asked).tolist() if page not in here]
        if not lacking:
            raise ProtocolError(f"{self._host} sent pages that were not asked for")
        raise PagesLost(f"{self._host} lacks page {lacking[0]}, which it should hold")

    def _report(self, pages: int) -> None:
        if self._progress is not None:
            self._progress(pages)


def _parts(extents: Extents) -> Iterator[Extents]:
    """`extents` in parts of one PEEK each."""
    rows: list[tuple[int, int]] = []
    room = wire.MAX_PAGES
    for first, stop in extents.tolist():
        while first < stop:
            end = min(stop, first + room)
            rows.append((first, end))
            room -= end - first
            first = end
            if not room:
                yield np.array(rows, dtype=np.int64)
                rows, room = [], wire.MAX_PAGES
    if rows:
        yield np.array(rows, dtype=np.int64)
