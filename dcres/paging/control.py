"""How an actor steers a paging process: JSON lines over a Unix socket (mode 0600).

A request is ``{"do": name, …}``, the answer ``{"ok": true, …}`` or ``{"ok": false, "error":
class name, "message": …}``. An answer may come late (a drain, for one); requests of one
connection are answered in order. The other end is `dcres.paging.transport.control_server`.

`PagerControl`, `ServerControl` and `PartServerControl` are this with types. They send
through `call` or whatever else takes the same (`Daemon.call_patiently`), which alone knows where
the process listens.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from dcres import errors
from dcres.paging.orders import (
    AnswerT,
    Counters,
    Cut,
    Done,
    Freeze,
    Frozen,
    Json,
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
    name_of,
)
from dcres.paging.status import PagerStatus, PartServerStatus, ServerStatus


class Send(Protocol):
    """Sends one order to a process and gives its answer, or raises the error that it reports."""

    def __call__(self, do: str, **arguments: Any) -> Json:
        """The order `do`."""


class PagerControl:
    """The orders that a pager takes. All raise what it reports; see docs/protocol.md."""

    def __init__(self, send: Send) -> None:
        self._send = send

    def _ask(self, order: PagerOrder, kind: Callable[..., AnswerT]) -> AnswerT:
        return answer_of(kind, self._send(name_of(order), **order._asdict()))

    def status(self) -> PagerStatus:
        """How it is."""
        return self._ask(Status(), PagerStatus)

    def quiesce(self) -> Counters:
        """No page leaves any more, and none is on its way."""
        return self._ask(Quiesce(), Counters)

    def freeze(self) -> Frozen:
        """No fault is answered, either, and all hosts agree with the page table."""
        return self._ask(Freeze(), Frozen)

    def thaw(self) -> None:
        """It goes on as if nothing had been ordered."""
        self._ask(Thaw(), Done)

    def resize(self, limit_pages: int) -> None:
        """The main host keeps so many pages from now on."""
        self._ask(ResizePager(limit_pages), Done)

    def reload(self) -> None:
        """It uses the settings file as it is by now. Raises PagingError if it cannot."""
        self._ask(Reload(), Done)

    def track(self, changes: Path) -> None:
        """Changes are marked in this dirty bitmap from now on."""
        self._ask(Track(str(changes)), Done)

    def scan(self, changes: Path) -> int:
        """The map is up to date; how many pages are marked."""
        return self._ask(Scan(str(changes)), Written).written

    def untrack(self) -> None:
        """Nothing is marked any more."""
        self._ask(Untrack(), Done)

    def cut(self, checkpoint: str) -> None:
        """What changes after this is not in `checkpoint`. Raises PagingError unless frozen."""
        self._ask(Cut(checkpoint), Done)

    def rebase(self, checkpoint: str) -> None:
        """It keeps account of what changed since `checkpoint`, whose cut was the last one.

        Raises PagingError for another one; then there is no base.
        """
        self._ask(Rebase(checkpoint), Done)


class ServerControl:
    """The orders that a memory server takes. All raise what it reports."""

    def __init__(self, send: Send) -> None:
        self._send = send

    def _ask(self, order: ServerOrder, kind: Callable[..., AnswerT]) -> AnswerT:
        return answer_of(kind, self._send(name_of(order), **order._asdict()))

    def status(self) -> ServerStatus:
        """How it is."""
        return self._ask(Status(), ServerStatus)

    def resize(self, capacity_pages: int) -> None:
        """It takes so many pages from now on, and drops none that it has."""
        self._ask(ResizeServer(capacity_pages), Done)

    def track(self, changes: Path) -> None:
        """Changes are marked in this dirty bitmap from now on."""
        self._ask(Track(str(changes)), Done)

    def scan(self, changes: Path) -> int:
        """How many pages are marked."""
        return self._ask(Scan(str(changes)), Written).written

    def untrack(self) -> None:
        """Nothing is marked any more."""
        self._ask(Untrack(), Done)


class PartServerControl:
    """What a part server can be asked."""

    def __init__(self, send: Send) -> None:
        self._send = send

    def status(self) -> PartServerStatus:
        """How it is."""
        return answer_of(PartServerStatus, self._send("status"))


def call(path: Path, do: str, timeout_s: float = 10.0, **arguments: Any) -> Json:
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
    answer: Json = json.loads(line)
    if not answer.pop("ok"):
        raise _error(answer)
    return answer


def _error(answer: Json) -> errors.DcresError:
    kind = getattr(errors, answer["error"], errors.PagingError)
    if not (isinstance(kind, type) and issubclass(kind, errors.DcresError)):
        kind = errors.PagingError
    return kind(answer["message"])
