"""How an actor steers a paging process: JSON lines over a Unix socket (mode 0600).

A request is ``{"do": name, …}``, the answer ``{"ok": true, …}`` or ``{"ok": false, "error":
class name, "message": …}``. An answer may come late (a drain, for one); requests of one
connection are answered in order.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

from dcres import errors
from dcres.linux.removal import remove_socket
from dcres.paging.transport.loop import READ, Loop

_LONGEST_LINE = 1 << 16
_MOST_PAGES = 1 << 52  # of 4 KiB each, in 64 bits

Answer: TypeAlias = dict[str, Any]
Reply: TypeAlias = Callable[[Answer], None]
Handler: TypeAlias = Callable[[str, dict[str, Any], Reply], None]


def failure(error: errors.DcresError) -> Answer:
    """The answer that raises `error` again on the other side."""
    return {"ok": False, "error": type(error).__name__, "message": str(error)}


def text(arguments: dict[str, Any], name: str) -> str:
    """The argument `name` of an order. Raises ProtocolError unless it is a text."""
    value = arguments.get(name)
    if not isinstance(value, str):
        raise errors.ProtocolError(f"{value!r} is no {name}")
    return value


def pages(arguments: dict[str, Any], name: str) -> int:
    """The argument `name` of an order. Raises ProtocolError unless it is a number of pages."""
    value = arguments.get(name)
    if type(value) is not int or not 0 <= value < _MOST_PAGES:  # true and false are int, too
        raise errors.ProtocolError(f"{value!r} is no number of pages")
    return value


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
            self._reply(failure(errors.ProtocolError("a control request is not understood")))
            return
        try:
            self._handler(name, request, self._reply)
        except errors.DcresError as error:
            self._reply(failure(error))

    def _reply(self, answer: Answer) -> None:
        if not self._open:
            return
        try:
            # Answers are far smaller than a socket buffer, so this never has to wait.
            self._sock.sendall(json.dumps(answer).encode() + b"\n")
        except OSError:
            self._close()


def call(path: Path, do: str, timeout_s: float = 10.0, **arguments: Any) -> Answer:
    """Ask the paging process at `path`; its answer.

    Raises the error that the process reports, or PagingError when it does not answer.
    """
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(timeout_s)
            sock.connect(str(path))
            sock.sendall(json.dumps({"do": do, **arguments}).encode() + b"\n")
            line = sock.makefile("rb").readline()
    except OSError as error:
        raise errors.PagingError(f"{path.name} does not answer to {do}: {error}") from error
    if not line:
        raise errors.PagingError(f"{path.name} ended while it was asked to {do}")
    answer: Answer = json.loads(line)
    if not answer.pop("ok"):
        raise _error(answer)
    return answer


def _error(answer: Answer) -> errors.DcresError:
    kind = getattr(errors, answer["error"], errors.PagingError)
    if not (isinstance(kind, type) and issubclass(kind, errors.DcresError)):
        kind = errors.PagingError
    return kind(answer["message"])
