"""The end of the control socket where a paging process listens; see `dcres.paging.control`."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

from dcres import errors
from dcres.linux.removal import remove_socket
from dcres.paging import orders as orders_
from dcres.paging.orders import Json, OrderT, json_of, order_of
from dcres.paging.transport.loop import READ, Loop

_LONGEST_LINE = 1 << 16

Reply: TypeAlias = Callable[[Json], None]
Handler: TypeAlias = Callable[[str, Json, Reply], None]


def typed(
    who: str, orders: Mapping[str, type[OrderT]], take: Callable[[OrderT, orders_.Reply], None]
) -> Handler:
    """A handler that gives orders to `take` as one of their types, and takes typed answers."""

    def handle(do: str, arguments: Json, reply: Reply) -> None:
        take(order_of(who, orders, do, arguments), lambda answer: reply(json_of(answer)))

    return handle


class ControlServer:
    """Accepts control connections in a `Loop` and hands each request to `handler`."""

    def __init__(self, loop: Loop, path: Path, handler: Handler) -> None:
        self._loop = loop
        self._path = path
        self._handler = handler
        remove_socket(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        mask = os.umask(0o177)
        try:
            self._socket.bind(str(path))
        finally:
            os.umask(mask)
        self._inode = path.stat().st_ino
        self._socket.listen(8)
        self._socket.setblocking(False)
        loop.add(self._socket.fileno(), self._accept)

    def close(self) -> None:
        """Stop listening and remove the socket, unless somebody else listens there by now."""
        self._loop.remove(self._socket.fileno())
        with suppress(FileNotFoundError):
            # While the socket is open nobody else's gets its inode.
            if self._path.stat().st_ino == self._inode:
                remove_socket(self._path)
        self._socket.close()

    def _accept(self, _: int) -> None:
        try:
            connection, _address = self._socket.accept()
        except BlockingIOError:
            return
        _ControlConnection(self._loop, connection, self._handler)


class _ControlConnection:
    def __init__(self, loop: Loop, sock: socket.socket, handler: Handler) -> None:
        sock.setblocking(False)
        self._loop, self._sock, self._handler = loop, sock, handler
        self._received = b""
        self._open = True
        loop.add(sock.fileno(), self._ready, READ)

    def _close(self) -> None:
        if self._open:
            self._open = False
            self._loop.remove(self._sock.fileno())
            self._sock.close()

    def _ready(self, _: int) -> None:
        try:
            data = self._sock.recv(_LONGEST_LINE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self._received += data
        if not data or len(self._received) > _LONGEST_LINE:
            self._close()
            return
        *lines, self._received = self._received.split(b"\n")
        for line in lines:
            self._handle(line)

    def _handle(self, line: bytes) -> None:
        try:
            request = json.loads(line)
            name = request.pop("do")
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            self._reply(json_of(errors.ProtocolError("a control request is not understood")))
            return
        try:
            self._handler(name, request, self._reply)
        except errors.DcresError as error:
            self._reply(json_of(error))

    def _reply(self, answer: Json) -> None:
        if not self._open:
            return
        try:
            # Answers are far smaller than a socket buffer, so this never has to wait.
            self._sock.sendall(json.dumps(answer).encode() + b"\n")
        except OSError:
            self._close()
