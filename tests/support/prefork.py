"""Python processes that start with everything imported: forks of one that has done it.

Importing Ray, Arrow and all else takes a command 1.5 s of one core, which is most of what a short
one needs. A fork is a process like any other: it has an environment, a working folder and
signals of its own, and ends as the interpreter does.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO, NoReturn

_MESSAGE_BYTES = 1 << 20
_POLL_S = 0.005


@dataclass
class Forked:
    """A process of the server's; what tests use of `subprocess.Popen`."""

    server: Server
    pid: int
    out: IO[str]
    err: IO[str]
    returncode: int = 0
    _read: dict[str, str] = field(default_factory=dict)

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def communicate(self, timeout: float) -> tuple[str, str]:
        """All that it says, until it ends. Raises TimeoutError, after which it is gone."""
        readers = [
            threading.Thread(target=self._drain, args=(name, stream), daemon=True)
            for name, stream in (("out", self.out), ("err", self.err))
        ]
        for reader in readers:
            reader.start()
        try:
            self.returncode = self.server.status_of(self.pid, timeout)
        except TimeoutError:
            os.kill(self.pid, signal.SIGKILL)
            raise
        for reader in readers:
            reader.join(10)
        return self._read["out"], self._read["err"]

    def _drain(self, name: str, stream: IO[str]) -> None:
        with stream:
            self._read[name] = stream.read()


class Server:
    """The process that forks; it ends with the socket."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._lock = threading.Lock()
        self._ended: dict[int, int] = {}
        with theirs:
            program = "import sys; from tests.support.prefork import serve; serve(int(sys.argv[1]))"
            self._process = subprocess.Popen(
                [sys.executable, "-c", program, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )

    def run(self, program: str, arguments: Sequence[str], environ: Mapping[str, str]) -> Forked:
        """Run Python text in a new process with that environment."""
        order = {"program": program, "arguments": list(arguments), "environ": dict(environ)}
        (out, their_out), (err, their_err) = os.pipe(), os.pipe()
        try:
            with self._lock:
                text = json.dumps(order).encode()
                socket.send_fds(self._socket, [text], [their_out, their_err])
                while "pid" not in (said := self._hear()):
                    pass
        finally:
            os.close(their_out)
            os.close(their_err)
        return Forked(self, said["pid"], os.fdopen(out), os.fdopen(err))

    def status_of(self, pid: int, timeout_s: float) -> int:
        """Wait for the end of one of its processes. Raises TimeoutError."""
        deadline = time.monotonic() + timeout_s
        while True:
            with self._lock:
                if pid in self._ended:
                    return self._ended.pop(pid)
                self._socket.settimeout(_POLL_S)
                with suppress(TimeoutError):
                    self._hear()
                self._socket.settimeout(None)
            if time.monotonic() > deadline:
                raise TimeoutError(f"process {pid} did not end in {timeout_s} s")
            time.sleep(_POLL_S)

    def _hear(self) -> dict[str, int]:
        said: dict[str, int] = json.loads(self._socket.recv(_MESSAGE_BYTES) or b"null")
        assert said is not None, "the server of forks has ended"
        if "ended" in said:
            self._ended[said["ended"]] = said["status"]
        return said

    def close(self) -> None:
        self._socket.close()
        self._process.wait(10)


_servers: list[Server] = []


def server() -> Server:
    """The one of this process, started at its first use."""
    if not _servers:
        _servers.append(Server())
    return _servers[0]


def close() -> None:
    """End it, if there is one."""
    while _servers:
        _servers.pop().close()


def serve(descriptor: int) -> None:
    """Fork what is ordered, tell of each end; until nobody orders any more."""
    import ray  # noqa: F401

    import dcres.actors.ray.gateway
    import dcres.api.cluster
    import dcres.api.plan
    import dcres.api.resizing
    import dcres.cli.tables  # noqa: F401

    orders = socket.socket(fileno=descriptor)
    ends, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    with selectors.DefaultSelector() as selector:
        for each in (orders.fileno(), ends):
            selector.register(each, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fd == ends:
                    os.read(ends, 512)
                    _tell_ends(orders)
                elif not _fork(orders, (ends, wake)):
                    return


def _tell_ends(orders: socket.socket) -> None:
    with suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            status = os.waitstatus_to_exitcode(found[1])
            orders.send(json.dumps({"ended": found[0], "status": status}).encode())


def _fork(orders: socket.socket, ours: tuple[int, int]) -> bool:
    """Whether there was an order. In the new process this does not return."""
    text, descriptors, _, _ = socket.recv_fds(orders, _MESSAGE_BYTES, 2)
    if not text:
        return False
    pid = os.fork()
    if not pid:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        # As from a terminal, also if the tests were started in the background or by nohup.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        for number, each in enumerate(descriptors, start=1):
            os.dup2(each, number)
        for each in (*descriptors, *ours, orders.detach()):
            os.close(each)
        _become(json.loads(text))
    for each in descriptors:
        os.close(each)
    orders.send(json.dumps({"pid": pid}).encode())
    return True


def _become(order: dict[str, object]) -> NoReturn:
    environ, arguments = order["environ"], order["arguments"]
    assert isinstance(environ, dict)
    assert isinstance(arguments, list)
    os.environ.clear()
    os.environ.update(environ)
    sys.argv[:] = ["-c", *arguments]
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    exec(str(order["program"]), {"__name__": "__main__"})
    sys.exit(0)
