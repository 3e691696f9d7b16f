"""Remote paging for a process that is not QEMU: real pager, real memory servers, real faults."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from dcres.errors import PagingError
from dcres.linux.files import data_extents
from dcres.model.pages import PAGE_SIZE
from dcres.paging import control, settings
from dcres.paging.settings import PagerSettings, ServerSettings, SubAddress
from tests.support.wait import until

_SOURCE = Path(__file__).with_name("writer.c")


def build_writer(folder: Path) -> Path:
    """The native writer, compiled into `folder`."""
    program = folder / "writer"
    if not program.exists():
        subprocess.run(["gcc", "-O2", "-Wall", "-o", program, _SOURCE], check=True)
    return program


class Writer:
    """The native writer as a process that takes orders."""

    def __init__(self, program: Path, ram: Path, page_count: int) -> None:
        self.process = subprocess.Popen(
            [program, ram, str(page_count)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.process.stdout.readline()

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def answer(self) -> list[str]:
        assert self.process.stdout is not None
        return self.process.stdout.readline().split()

    def ask(self, line: str) -> list[str]:
        self.tell(line)
        return self.answer()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


class Rig:
    """A writer whose memory lies on this host and on memory servers."""

    def __init__(self, folder: Path, ram: Path, program: Path, pages: int) -> None:
        self.folder, self.ram, self.pages = folder, ram, pages
        self.vm, self.secret = uuid.uuid4().hex, secrets.token_hex(32)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.servers: list[ServerSettings] = []
        self.writer = Writer(program, ram / "guest.ram", pages)

    def start(self, limit: int, subs: tuple[int, ...]) -> None:
        """Memory servers, then the pager."""
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
            address="127.0.0.1",
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
            qemu_pid=self.writer.process.pid,
            ram=str(self.ram / "guest.ram"),
            outbox=str(self.ram / "outbox.ram"),
            table=str(self.ram / "table"),
            control=str(self.folder / "pager.sock"),
            subs=tuple(
                SubAddress(f"sub{i}", "127.0.0.1", server.port, server.capacity_pages)
                for i, server in enumerate(self.servers)
            ),
        )

    def _start(self, name: str, module: str) -> None:
        with open(self.folder / f"{name}.log", "ab") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", module, str(self.folder / f"{name}.json")],
                stdout=log,
                stderr=log,
            )
        until(lambda: self._answers(name), timeout_s=10, what=f"{name} answers")

    def _answers(self, name: str) -> bool:
        code = self.processes[name].poll()
        assert code is None, f"{name} ended with {code}: {self.log(name)}"
        try:
            return self.status(name)["pid"] == self.processes[name].pid
        except PagingError:
            return False

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def start_server(self, index: int) -> None:
        name = f"sub{index}"
        settings.save(self.servers[index], self.folder / f"{name}.json")
        self._start(name, "dcres.paging.server")
        self.servers[index] = replace(self.servers[index], port=self.status(name)["port"])

    def start_pager(self) -> None:
        self._start("pager", "dcres.paging.pager")

    def kill(self, name: str) -> None:
        self.processes[name].send_signal(signal.SIGKILL)
        self.processes[name].wait()

    def status(self, name: str = "pager") -> dict[str, Any]:
        return control.call(self.folder / f"{name}.sock", "status")

    def order(self, do: str, **arguments: Any) -> dict[str, Any]:
        return control.call(self.folder / "pager.sock", do, timeout_s=30, **arguments)

    def memory(self) -> bytes:
        """All of the memory, put together from every host, while the pager is frozen."""
        names = ["guest.ram", "outbox.ram", *(f"sub{i}.ram" for i in range(len(self.servers)))]
        whole = bytearray(self.pages * PAGE_SIZE)
        for name in names:
            fd = os.open(self.ram / name, os.O_RDONLY)
            try:
                for first, stop in data_extents(fd, self.pages).tolist():
                    at, length = first * PAGE_SIZE, (stop - first) * PAGE_SIZE
                    assert not any(whole[at : at + length]), f"{name}: a page is in two places"
                    whole[at : at + length] = os.pread(fd, length, at)
            finally:
                os.close(fd)
        return bytes(whole)

    def close(self) -> None:
        self.writer.kill()
        for process in self.processes.values():
            process.kill()
            process.wait()


@contextmanager
def rig(
    folder: Path, program: Path, pages: int, limit: int, subs: tuple[int, ...]
) -> Iterator[Rig]:
    """A running `Rig`; everything it started is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="dcres-test-", dir="/dev/shm") as ram:
        made = Rig(folder, Path(ram), program, pages)
        try:
            made.start(limit, subs)
            yield made
        finally:
            made.close()
