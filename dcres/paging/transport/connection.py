"""A link's second connection: PAGE_IN of what the guest waits for, and nothing else.

On the first one a missed page would wait for whatever is on its way there: windows of a walk,
pages that leave, releases. A PAGE_IN changes nothing on the server, and no page's other requests
are made while one for it is unanswered, so nothing depends on the order between the two
(docs/protocol.md, "The express connection").
"""

from __future__ import annotations

import secrets
import socket
from collections import deque
from collections.abc import Callable

from dcres.errors import PagingError, ProtocolError, Refused
from dcres.linux.pipe import address_of
from dcres.model import wire
from dcres.model.handshake import NONCE_BYTES, ClientHandshake, Identity, Role
from dcres.model.wire import Frame, Kind
from dcres.paging.settings import SubAddress
from dcres.paging.transport.loop import Loop
from dcres.paging.transport.requests import Request
from dcres.paging.transport.stream import FrameStream


def connect(
    loop: Loop,
    sub: SubAddress,
    on_frame: Callable[[Frame], None],
    on_close: Callable[[PagingError | OSError], None],
    on_put: Callable[[int, int, int, int], None],
) -> FrameStream:
    """A stream to a server; how connecting went shows when something is sent."""
    family = socket.AF_INET6 if ":" in sub.address else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    sock.setblocking(False)
    sock.connect_ex((sub.address, sub.port))
    return FrameStream(loop, sock, on_frame, on_close, on_put)


class Express:
    """Greets at once; `ready` when it may be used. `on_close` is called when it ends by itself."""

    def __init__(
        self,
        loop: Loop,
        sub: SubAddress,
        identity: Identity,
        page_count: int,
        on_answer: Callable[[Request, Frame, int], None],
        on_put: Callable[[Request, int, int, int], None],
        on_close: Callable[[PagingError | OSError], None],
    ) -> None:
        self.ready = False
        self.unanswered: deque[Request] = deque()
        self._loop, self._sub, self._page_count = loop, sub, page_count
        self._on_answer, self._on_put = on_answer, on_put
        self._handshake = ClientHandshake(identity, secrets.token_bytes(NONCE_BYTES), Role.EXPRESS)
        self._stream = connect(loop, sub, self._frame, on_close, self._put)
        self._buffer_address = address_of(self._stream.buffer)
        self._stream.send([self._handshake.hello()])

    @property
    def shared(self) -> wire.Shared:
        """Numbers that the hot path knows, too."""
        return self._stream.shared

    @property
    def owed(self) -> object:
        """What the server has to do next; None: nothing."""
        if self.unanswered:
            return self.unanswered[0].number
        return None if self.ready else "WELCOME"

    def send(self, request: Request, parts: list[wire.Part]) -> None:
        """A request with its frame."""
        self.unanswered.append(request)
        self._stream.send(parts)

    def asked(self, request: Request, rest: wire.Part) -> None:
        """A request of the hot path, with what of its frame was not sent."""
        self.unanswered.append(request)
        if rest:
            self._stream.finish(rest)

    def close(self, why: PagingError | OSError) -> None:
        """End it; `on_close` is told."""
        self._stream.close(why)

    def _frame(self, frame: Frame) -> None:
        if not self.ready:
            self._greet(frame)
            return
        if frame.kind is Kind.ERROR:
            raise PagingError(str(wire.unpack_error(frame.payload, self._sub.host)))
        if frame.kind is not Kind.PAGES:
            raise ProtocolError(f"{self._sub.host} answered PAGE_IN with {frame.kind.name}")
        request = self._answered(frame.request)
        try:
            self._on_answer(request, frame, self._buffer_address)
        except PagingError:
            if self._stream.open:  # it ends for it, and then the request is made again
                self.unanswered.appendleft(request)
            raise

    def _put(self, number: int, first: int, stop: int, at_ns: int) -> None:
        self._on_put(self._answered(number), first, stop, at_ns)

    def _answered(self, number: int) -> Request:
        if not self.unanswered or self.unanswered[0].number != number:
            raise ProtocolError(f"{self._sub.host} answered a request that was not made")
        return self.unanswered.popleft()

    def _greet(self, frame: Frame) -> None:
        answer = self._handshake.answer(frame)
        if answer is not None:
            self._stream.send([answer])
            return
        if self._handshake.page_count != self._page_count:
            raise Refused(f"{self._sub.host} serves a VM of another size")
        self.ready = True
        hot, stream = self._loop.hot, self._stream
        if hot is not None:  # it asks here for what is missed from now on
            hot.client(stream.fd, self._sub.code, stream.buffer, stream.shared, True)
