"""Remote paging without a guest: a small native program under a real pager and memory servers.

`writer.c` maps a file as QEMU maps its RAM, and reads and writes it by order; it knows how
often it wrote every page, so damage shows. The tests use the same rig.
"""

from __future__ import annotations

import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dcres.errors import PagingError, UnsupportedHost
from dcres.model.placement import sub_code
from dcres.paging import control, settings
from dcres.paging.settings import PagerSettings, ServerSettings, SubAddress

_SOURCE = Path(__file__).with_name("writer.c")
_START_TIMEOUT_S = 120.0
_POLL_S = 0.005


def build(source: Path, program: Path, *options: str) -> Path:
    """`source` compiled into `program`, unless it is there. Raises UnsupportedHost."""
    if program.exists():
        return program
    if shutil.which("gcc") is None:
        raise UnsupportedHost("benchmarks need gcc; apt install gcc libc6-dev")
    argv = ["gcc", "-O2", "-Wall", "-o", str(program), str(source), *options]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UnsupportedHost(f"gcc cannot compile {source.name}: {done.stderr.strip()[-300:]}")
    return program


def build_writer(folder: Path) -> Path:
    """The native writer, compiled into `folder`."""
    return build(_SOURCE, folder / "writer")


def wait_for(done: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Poll until `done`; PagingError after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not done():
        if time.monotonic() > deadline:
            raise PagingError(f"waited {timeout_s:.3g} s for this: {what}")
        time.sleep(_POLL_S)


class Writer:
    """The native writer as a process that takes orders; see `writer.c`."""

    def __init__(self, program: Path, ram: Path, page_count: int) -> None:
        self.process = subprocess.Popen(
            [program, ram, str(page_count)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.answer()

    def tell(self, line: str) -> None:
        """Give an order and do not wait."""
        if self.process.stdin is None:
            raise PagingError("the writer was started without a pipe")
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def answer(self) -> list[str]:
        """Wait for the answer to an order: its words, none when the writer has ended."""
        if self.process.stdout is None:
            raise PagingError("the writer was started without a pipe")
        return self.process.stdout.readline().split()

    def ask(self, line: str) -> list[str]:
        """Give an order and wait for the answer."""
        self.tell(line)
        return self.answer()

    def numbers(self, line: str) -> dict[str, int]:
        """The same, for answers of the form ``name number …``. Raises PagingError."""
        words = self.ask(line)
        try:
            return {words[at]: int(words[at + 1]) for at in range(0, len(words), 2)}
        except (ValueError, IndexError):
            raise PagingError(f"the writer answered {words} to {line!r}") from None

    def kill(self) -> None:
        """End it."""
        self.process.kill()
        self.process.communicate()


@dataclass(frozen=True, slots=True)
class Net:
    """Where the pager and the memory servers run: prefixes of their commands, servers' address."""

    main: tuple[str, ...] = ()
    subs: tuple[str, ...] = ()
    address: str = "127.0.0.1"


LOOPBACK = Net()


class Paged:
    """The memory of process `pid`, ``RAM/guest.ram``, on this host and on memory servers."""

    def __init__(self, folder: Path, ram: Path, pid: int, pages: int, net: Net = LOOPBACK) -> None:
        self.folder, self.ram, self.pages, self.net = folder, ram, pages, net
        self._pid = pid
        self.vm, self.secret = uuid.uuid4().hex, secrets.token_hex(32)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.servers: list[ServerSettings] = []

    def start(self, limit: int, subs: tuple[int, ...]) -> None:
        """Memory servers with room for `subs` pages, then the pager, which keeps `limit`."""
        self.servers = [self._server_settings(i, capacity) for i, capacity in enumerate(subs)]
        for index in range(len(subs)):
            self.start_server(index)
        self.pager_settings = self._pager_settings(limit)
        settings.save(self.pager_settings, self.folder / "pager.json")
        self.start_pager()

    def _server_settings(self, index: int, capacity: int) -> ServerSettings:
        return ServerSettings(
            vm=self.vm,
            generation=1,
            secret=self.secret,
            page_count=self.pages,
            capacity_pages=capacity,
            address=self.net.address,
            port=0,
            store=str(self.ram / f"sub{index}.ram"),
            control=str(self.folder / f"sub{index}.sock"),
        )

    def _pager_settings(self, limit: int) -> PagerSettings:
        return PagerSettings(
            vm=self.vm,
            generation=1,
            secret=self.secret,
            page_count=self.pages,
            limit_pages=limit,
            qemu_pid=self._pid,
            ram=str(self.ram / "guest.ram"),
            outbox=str(self.ram / "outbox.ram"),
            table=str(self.ram / "table"),
            control=str(self.folder / "pager.sock"),
            subs=tuple(
                SubAddress(f"sub{i}", each.address, each.port, each.capacity_pages, sub_code(i))
                for i, each in enumerate(self.servers)
            ),
            moves=str(self.ram / "moves"),
        )

    def _start(self, name: str, module: str) -> None:
        prefix = self.net.main if name == "pager" else self.net.subs
        with open(self.folder / f"{name}.log", "ab") as log:
            self.processes[name] = subprocess.Popen(
                [*prefix, sys.executable, "-m", module, str(self.folder / f"{name}.json")],
                stdout=log,
                stderr=log,
            )
        wait_for(lambda: self._answers(name), _START_TIMEOUT_S, f"{name} answers")

    def _answers(self, name: str) -> bool:
        code = self.processes[name].poll()
        if code is not None:
            raise PagingError(f"{name} ended with {code}: {self.log(name)}")
        try:
            return bool(self.status(name)["pid"] == self.processes[name].pid)
        except PagingError:
            return False

    def log(self, name: str) -> str:
        """What a process has said."""
        return (self.folder / f"{name}.log").read_text()

    def start_server(self, index: int) -> None:
        """Start a memory server, the first time or again."""
        name = f"sub{index}"
        settings.save(self.servers[index], self.folder / f"{name}.json")
        self._start(name, "dcres.paging.server")
        self.servers[index] = replace(self.servers[index], port=self.status(name)["port"])

    def start_pager(self) -> None:
        """Start the pager, the first time or again."""
        self._start("pager", "dcres.paging.pager")

    def kill(self, name: str) -> None:
        """Kill ``pager`` or ``subN``, so that it can do nothing more."""
        self.processes[name].send_signal(signal.SIGKILL)
        self.processes[name].wait()

    def status(self, name: str = "pager") -> dict[str, Any]:
        """Counters of ``pager`` or ``subN``."""
        return control.call(self.folder / f"{name}.sock", "status")

    def order(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Give the pager an order."""
        return control.call(self.folder / "pager.sock", do, timeout_s=30, **arguments)

    def close(self) -> None:
        """End what was started here; the folders are their owners'."""
        for process in self.processes.values():
            process.kill()
            process.wait()


class Rig(Paged):
    """The native writer, paged."""

    def __init__(
        self, folder: Path, ram: Path, program: Path, pages: int, net: Net = LOOPBACK
    ) -> None:
        self.writer = Writer(program, ram / "guest.ram", pages)
        super().__init__(folder, ram, self.writer.process.pid, pages, net)

    def close(self) -> None:
        """The same, and the writer."""
        self.writer.kill()
        super().close()


@contextmanager
def rig(
    program: Path, pages: int, limit: int, subs: tuple[int, ...], net: Net = LOOPBACK
) -> Iterator[Rig]:
    """A running `Rig`; everything it started is gone afterwards."""
    with (
        tempfile.TemporaryDirectory(prefix="dcres-rig-", dir="/dev/shm") as ram,
        tempfile.TemporaryDirectory(prefix="dcres-rig-") as run,
    ):
        made = Rig(Path(run), Path(ram), program, pages, net)
        try:
            made.start(limit, subs)
            yield made
        finally:
            made.close()
