"""Memory servers and part servers as processes, and somebody who speaks the protocol to them."""

from __future__ import annotations

import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dcres.actors.host.part_server import PartServerSettings
from dcres.errors import PagingError
from dcres.model import wire
from dcres.model.handshake import NONCE_BYTES, ClientHandshake, Identity, Role, ServerHandshake
from dcres.model.pages import PAGE_SIZE, Extents, extents_of_pages
from dcres.model.wire import Decoder, Endpoint, Frame, Kind
from dcres.paging import control, settings
from dcres.paging.settings import ServerSettings, SubAddress
from dcres.storage.format.manifest import Manifest
from dcres.storage.store.store import Store
from tests.support.speed import patience
from tests.support.wait import until

VM = "ab" * 16
SECRET = "cd" * 32
ME = Identity(bytes.fromhex(VM), 3, bytes.fromhex(SECRET))


def extents(*pages: int) -> Extents:
    return extents_of_pages(np.array(sorted(pages), dtype=np.int64))


def content(page: int, version: int = 0) -> bytes:
    return (page * 1000 + version).to_bytes(8, "little") * (PAGE_SIZE // 8)


def packed_pages(which: Extents, version: int = 0) -> bytes:
    """The payload of a frame that carries them."""
    return wire.pack_extents(which) + b"".join(wire.pack_data([data_of(which, version)]))


def data_of(which: Extents, version: int = 0) -> bytes:
    pages = (page for first, stop in which.tolist() for page in range(first, stop))
    return b"".join(content(page, version) for page in pages)


@dataclass(frozen=True)
class Server:
    """A running process."""

    process: subprocess.Popen[bytes]
    folder: Path
    name: str

    @property
    def port(self) -> int:
        return int(self.status()["port"])

    @property
    def address(self) -> SubAddress:
        return SubAddress(self.name, "127.0.0.1", self.port, 0)

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint("127.0.0.1", self.port)

    def order(self, do: str, **arguments: Any) -> dict[str, Any]:
        return control.call(self.folder / f"{self.name}.sock", do, **arguments)

    def status(self) -> dict[str, Any]:
        return self.order("status")

    def log(self) -> str:
        return (self.folder / f"{self.name}.log").read_text()

    def answers(self) -> bool:
        assert self.process.poll() is None, self.log()
        try:
            return bool(self.status()["pid"] == self.process.pid)
        except PagingError:
            return False


@contextmanager
def _running(module: str, folder: Path, name: str) -> Iterator[Server]:
    with open(folder / f"{name}.log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", module, str(folder / f"{name}.json")], stdout=log, stderr=log
        )
    server = Server(process, folder, name)
    try:
        until(server.answers, what=f"{name} answers")
        yield server
    finally:
        process.kill()
        process.wait()


@contextmanager
def memory_server(
    folder: Path,
    name: str,
    page_count: int,
    capacity: int | None = None,
    generation: int = ME.generation,
) -> Iterator[Server]:
    """A memory server of `ME`, unless it is of another generation."""
    chosen = ServerSettings(
        vm=VM,
        generation=generation,
        secret=SECRET,
        page_count=page_count,
        capacity_pages=page_count if capacity is None else capacity,
        address="127.0.0.1",
        port=0,
        store=str(folder / f"{name}.ram"),
        control=str(folder / f"{name}.sock"),
    )
    settings.save(chosen, folder / f"{name}.json")
    with _running("dcres.paging.server", folder, name) as server:
        yield server


def slice_settings(
    folder: Path, name: str, store: Store, manifest: Manifest, parts: tuple[str, ...]
) -> PartServerSettings:
    """Of a part server for `ME`."""
    return PartServerSettings(
        vm=VM,
        generation=ME.generation,
        secret=SECRET,
        address="127.0.0.1",
        port=0,
        control=str(folder / f"{name}.sock"),
        parts=tuple(store.memory_part(manifest, host) for host in parts),
    )


@contextmanager
def part_server(folder: Path, name: str, chosen: PartServerSettings) -> Iterator[Server]:
    """A part server."""
    settings.save(replace(chosen, control=str(folder / f"{name}.sock")), folder / f"{name}.json")
    with _running("dcres.actors.host.part_server", folder, name) as server:
        yield server


class Frames:
    """A blocking connection that sends and receives frames."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(10)
        self.sock = sock
        self._decoder = Decoder(memoryview(bytearray(4 << 20)))
        self._frames = self._receive()

    def send(self, kind: Kind, request: int = 0, payload: bytes = b"") -> None:
        self.sock.sendall(wire.frame(kind, request, payload))

    def next(self) -> Frame:
        """The next frame; valid until the one after."""
        return next(self._frames)

    def _receive(self) -> Iterator[Frame]:
        while True:
            yield from self._decoder.frames()
            length = self.sock.recv_into(self._decoder.receive_into())
            if length == 0:
                raise EOFError("the connection ended")
            self._decoder.received(length)


class Client(Frames):
    """A pager or reader that does what the test says."""

    def __init__(self, server: Server, role: Role = Role.PAGER, me: Identity = ME) -> None:
        super().__init__(socket.create_connection(("127.0.0.1", server.port), timeout=patience(10)))
        self._number = 0
        try:
            self.page_count = self._greet(ClientHandshake(me, secrets.token_bytes(32), role))
        except BaseException:
            self.sock.close()
            raise

    def _greet(self, handshake: ClientHandshake) -> int:
        answer: bytes | None = handshake.hello()
        while answer is not None:
            self.sock.sendall(answer)
            answer = handshake.answer(self.next())
        return handshake.page_count

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def tell(self, kind: Kind, payload: bytes) -> int:
        """Send a request; its number."""
        self._number += 1
        self.send(kind, self._number, payload)
        return self._number

    def ask(self, kind: Kind, payload: bytes) -> tuple[Kind, bytes]:
        """Send a request and wait for its answer."""
        number = self.tell(kind, payload)
        frame = self.next()
        assert frame.request == number
        return frame.kind, bytes(frame.payload)

    def page_out(self, which: Extents, version: int = 0) -> None:
        assert self.ask(Kind.PAGE_OUT, packed_pages(which, version))[0] is Kind.STORED

    def release(self, which: Extents) -> None:
        assert self.ask(Kind.RELEASE, wire.pack_extents(which))[0] is Kind.RELEASED

    def page_in(self, which: Extents) -> bytes:
        kind, payload = self.ask(Kind.PAGE_IN, wire.pack_extents(which))
        assert kind is Kind.PAGES, payload
        found, data = wire.unpack_pages(memoryview(payload), self.page_count)
        assert found.tolist() == which.tolist()
        return bytes(data)

    def peek(self, which: Extents) -> tuple[Extents, bytes]:
        kind, payload = self.ask(Kind.PEEK, wire.pack_extents(which))
        assert kind is Kind.PAGES, payload
        found, data = wire.unpack_pages(memoryview(payload), self.page_count, may_be_none=True)
        return found, bytes(data)

    def fetch(self, source: Endpoint, which: Extents) -> int:
        """Send FETCH and do not wait; its number."""
        return self.tell(Kind.FETCH, wire.pack_fetch(source, which))

    def fetched(self, number: int) -> list[int]:
        """Wait for FETCHED; the pages it names."""
        frame = self.next()
        assert (frame.kind, frame.request) == (Kind.FETCHED, number), bytes(frame.payload)
        found = wire.unpack_only_extents(frame.payload, self.page_count, may_be_none=True)
        return [page for first, stop in found.tolist() for page in range(first, stop)]

    def here(self) -> list[int]:
        """All pages on the server."""
        _, bits = self.ask(Kind.EXISTENCE, wire.pack_range(0, self.page_count))
        mask = wire.unpack_mask(memoryview(bits), self.page_count)
        return [int(page) for page in np.flatnonzero(mask)]


class HeldSource:
    """A server that answers a PEEK when the test says so, and with what it says."""

    def __init__(self, page_count: int) -> None:
        self._page_count = page_count
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(10)
        self.endpoint = Endpoint("127.0.0.1", self._listener.getsockname()[1])
        self._client: Frames | None = None

    def __enter__(self) -> HeldSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.hang_up()
        self._listener.close()

    def greet(self) -> Role:
        """Let the next connection prove itself; what it is."""
        self._client = Frames(self._listener.accept()[0])
        handshake = ServerHandshake(ME, secrets.token_bytes(NONCE_BYTES), self._page_count)
        while not handshake.accepted:
            self._client.sock.sendall(handshake.answer(self._client.next()))
        return handshake.role

    def asked(self) -> tuple[int, Extents]:
        """The next PEEK: its number and what it asks for."""
        assert self._client is not None
        frame = self._client.next()
        assert frame.kind is Kind.PEEK
        return frame.request, wire.unpack_only_extents(frame.payload, self._page_count)

    def answer(self, number: int, which: Extents, version: int = 0) -> None:
        assert self._client is not None
        self._client.send(Kind.PAGES, number, packed_pages(which, version))

    def hang_up(self) -> None:
        if self._client is not None:
            self._client.sock.close()
            self._client = None


class Target:
    """Memory that pages are pulled into."""

    def __init__(self, page_count: int) -> None:
        self.data = bytearray(page_count * PAGE_SIZE)
        self.pages: list[int] = []

    def write(self, first: int, stop: int, data: memoryview) -> None:
        self.data[first * PAGE_SIZE : stop * PAGE_SIZE] = data
        self.pages += range(first, stop)


def ended(client: Client) -> bytes:
    """The ERROR that ends the connection."""
    frame = client.next()
    assert frame.kind is Kind.ERROR
    text = bytes(frame.payload)
    with pytest.raises(EOFError):
        client.next()
    return text
