"""A connected TCP socket that carries frames, in a `Loop`: never blocks, keeps what is unsent."""

from __future__ import annotations

import mmap
import socket
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

from dcres.errors import PagingError
from dcres.linux.network import watch_peer
from dcres.model import wire
from dcres.model.wire import Part
from dcres.paging.transport.loop import READ, RECEIVED, WRITE, Loop

_BUFFER_BYTES = 2 << 20
_MAX_PARTS = 256  # below IOV_MAX


def _nobody(*_: object) -> None:
    """Who is told of a stream that has ended."""


class FrameStream:
    """Frames in and out. `on_frame` is called per frame, `on_close` once, with the reason.

    `on_put` is called instead for PAGES that the hot path has put in place: request's number,
    first page, stop, when (monotonic ns).
    """

    def __init__(
        self,
        loop: Loop,
        sock: socket.socket,
        on_frame: Callable[[wire.Frame], None],
        on_close: Callable[[PagingError | OSError], None],
        on_put: Callable[[int, int, int, int], None] | None = None,
    ) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        watch_peer(sock)
        self._loop = loop
        self._sock = sock
        self._on_frame: Callable[[wire.Frame], object] = on_frame
        self._on_close: Callable[[PagingError | OSError], object] = on_close
        self._on_put: Callable[[int, int, int, int], object] | None = on_put
        self.buffer = mmap.mmap(-1, _BUFFER_BYTES)
        self._decoder = wire.Decoder(memoryview(self.buffer))
        self.shared = self._decoder.shared
        self.shared[wire.MAY_SEND] = wire.NOW
        self._unsent: deque[Part] = deque()
        self._blocked = False  # epoll waits for room to write
        self.open = True
        self.ending = False  # since `end`, until the peer has taken all that was sent before it
        loop.add(sock.fileno(), self._ready)

    def send(self, parts: Sequence[Part]) -> None:
        """Send `parts` in order, now as far as the socket takes them, the rest when it can."""
        if not self.open:
            return
        waiting = bool(self._unsent)
        self._unsent.extend(parts)
        if self.shared[wire.MAY_SEND] == wire.HALF_SENT:
            return  # until `finish` has the rest of what is half sent
        self.shared[wire.MAY_SEND] = wire.NOT_NOW
        if not waiting:
            self._flush()

    def finish(self, rest: Part) -> None:
        """Send the rest of a frame that the hot path has begun, before anything else."""
        if self.open:
            self._unsent.appendleft(rest)
            self.shared[wire.MAY_SEND] = wire.NOT_NOW
            self._flush()

    @property
    def fd(self) -> int:
        """The socket's descriptor."""
        return self._sock.fileno()

    @property
    def idle(self) -> bool:
        """Whether everything was handed to the kernel."""
        return not self._unsent and self.shared[wire.MAY_SEND] != wire.HALF_SENT

    def close(self, why: PagingError | OSError) -> None:
        """Close the connection and tell `on_close`; the second time does nothing."""
        if not self.open:
            return
        self.open = False
        self._loop.remove(self._sock.fileno())
        self._sock.close()
        self._unsent.clear()
        self._tell(why)

    def _tell(self, why: PagingError | OSError) -> None:
        """For the last time: whoever is told may go with its buffers, and no cycle keeps them."""
        told, self._on_close = self._on_close, _nobody
        self._on_frame = self._on_put = _nobody
        told(why)

    def end(self, why: PagingError | OSError) -> None:
        """Close the connection when the peer has taken what was sent; `on_close` is told now.

        To close a socket at which requests still arrive resets it, and the peer may never see
        what was sent last: the ERROR that says why. So what comes is dropped until it closes.
        """
        if not self.open or self.shared[wire.MAY_SEND] == wire.HALF_SENT:
            self.close(why)
            return
        self.open, self.ending = False, True
        self._loop.remove(self._sock.fileno())
        self._loop.add(self._sock.fileno(), self._drain, READ | WRITE)
        self._tell(why)

    def drop(self) -> None:
        """Wait no longer for the peer of a connection that is `ending`."""
        if self.ending:
            self.ending = False
            self._loop.remove(self._sock.fileno())
            self._sock.close()
            self._unsent.clear()

    def _drain(self, _: int) -> None:
        try:
            with suppress(BlockingIOError, InterruptedError):
                self._push()
                self._sock.shutdown(socket.SHUT_WR)
                self._loop.want(self._sock.fileno(), READ)
            with suppress(BlockingIOError, InterruptedError):
                if not self._sock.recv_into(self.buffer):
                    self.drop()
        except OSError:
            self.drop()

    def _ready(self, events: int | bytes | tuple[int, int, int, int]) -> None:
        if isinstance(events, tuple):
            self._put(events)
        elif isinstance(events, bytes):  # the rest of an answer that the hot path has begun
            self.finish(events)
        elif events == RECEIVED:
            self._take_frames()
        else:
            if events & WRITE:
                self._flush()
            if events & ~WRITE and self.open:
                self._receive()

    def _receive(self) -> None:
        room = self._decoder.receive_into()
        if not room:  # the hot path has filled it with frames that nobody has taken yet
            self._take_frames()
            return
        try:
            length = self._sock.recv_into(room)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self.close(error)
            return
        if length == 0:
            self.close(ConnectionResetError("the peer closed the connection"))
            return
        self._decoder.received(length)
        self._take_frames()

    def _take_frames(self) -> None:
        try:
            for frame in self._decoder.frames():
                self._on_frame(frame)
                if not self.open:
                    return
        except PagingError as error:
            self.close(error)

    def _put(self, told: tuple[int, int, int, int]) -> None:
        if self._on_put is None:
            raise ValueError("pages were put in place for a stream that asks for none")
        try:
            self._on_put(*told)
        except PagingError as error:
            self.close(error)

    def _flush(self) -> None:
        if self.shared[wire.MAY_SEND] == wire.HALF_SENT:
            return
        try:
            self._push()
        except (BlockingIOError, InterruptedError):
            self._loop.want(self._sock.fileno(), READ | WRITE)
            self._blocked = True
            return
        except OSError as error:
            self.close(error)
            return
        self.shared[wire.MAY_SEND] = wire.NOW
        if self._blocked:
            self._loop.want(self._sock.fileno(), READ)
            self._blocked = False

    def _push(self) -> None:
        while self._unsent:
            parts = [self._unsent[i] for i in range(min(len(self._unsent), _MAX_PARTS))]
            self._sent(self._sock.sendmsg(parts))

    def _sent(self, length: int) -> None:
        while length:
            first = self._unsent.popleft()
            if length < len(first):
                self._unsent.appendleft(memoryview(first)[length:])
                return
            length -= len(first)
