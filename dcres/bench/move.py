"""Moving memory at a restore: from a memory file on one host into RAM on another, over TCP.

A part server reads the memory file, verifies every page and sends it; the puller writes it into
a file on tmpfs. Both over loopback, where the processors are the limit, and between two network
namespaces with 1 Gbit between them, where the link is. Beside each a plain TCP copy.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from dcres.actors.host.part_server import PartServerSettings
from dcres.bench.result import Aim, Direction, Ratio, Row, Setup
from dcres.bench.rig import wait_for
from dcres.errors import PagingError, UnsupportedHost
from dcres.linux import network
from dcres.linux.files import opened
from dcres.model.handshake import Identity
from dcres.model.pages import PAGE_SIZE, Extents
from dcres.paging import control, settings
from dcres.paging.settings import SubAddress
from dcres.paging.transport.puller import pull
from dcres.storage import layout
from dcres.storage.atomic import write_durably
from dcres.storage.digest import file_sum
from dcres.storage.engine.bulk import write_fully
from dcres.storage.engine.memory_file import MemoryFileWriter
from dcres.storage.format.host_part import write_memory_tables
from dcres.storage.format.manifest import HostPart, Manifest, Mode, Role
from dcres.storage.store.pins import Hold
from dcres.storage.store.store import Store

T = TypeVar("T")

MIB = 1 << 20
RATIOS = {
    "move_over_link": Ratio("move_1gbit", "copy_1gbit"),
    "move_over_loopback": Ratio("move_loopback", "copy_loopback"),
}
AIMS = (Aim("move_over_link", Direction.AT_LEAST, 0.9),)
ONE_GBIT = "tbf rate 1gbit burst 256kb latency 50ms"  # for tc(8)
_PIECE_BYTES = 1 << 20
_START_TIMEOUT_S = 10.0
_HOST, _CHECKPOINT = "source", "move-20260101-000000-0000"


@dataclass(frozen=True, slots=True)
class Place:
    """A host: an address, and the network namespace that it is in, if not ours."""

    address: str
    namespace: str | None = None

    @property
    def prefix(self) -> list[str]:
        """What to put before a command that is to run there."""
        return [] if self.namespace is None else ["ip", "netns", "exec", self.namespace]

    def run(self, work: Callable[[], T]) -> T:
        """Do `work` so that the sockets it makes are there."""

        def there() -> T:
            if self.namespace is not None:
                network.enter(self.namespace)
            return work()

        with ThreadPoolExecutor(1) as pool:  # the thread ends, and its namespace with it
            return pool.submit(there).result()


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint of one part, and who may read it."""

    store: Path
    manifest: Manifest
    identity: Identity

    @property
    def memory(self) -> Path:
        """Its memory file."""
        return self.store / self.manifest.vm / self.manifest.checkpoint / _HOST / layout.MEMORY

    @property
    def extents(self) -> Extents:
        """All its pages."""
        return np.array([[0, self.manifest.page_count]], dtype=np.int64)


def measure(setup: Setup, rounds: int) -> list[Row]:
    """Every round's rows. Raises UnsupportedHost without iproute2."""
    length_bytes = (64 if setup.quick else 512) * MIB
    rows: list[Row] = []
    here = Place("127.0.0.1")
    source = _checkpoint(setup.folder / "move", length_bytes)
    with one_gbit() as (left, right):
        for at in range(rounds):
            setup.say(f"round {at + 1}: moving {length_bytes // MIB} MiB over loopback and 1 Gbit")
            forget(source.memory)
            rows.append(_move(source, here, here, "move_from_disk_loopback", at))
            rows.append(_move(source, here, here, "move_loopback", at))
            rows.append(plain_copy(here, here, length_bytes, "copy_loopback", at))
            rows.append(_move(source, left, right, "move_1gbit", at))
            rows.append(plain_copy(left, right, length_bytes, "copy_1gbit", at))
    return rows


@contextlib.contextmanager
def one_gbit() -> Iterator[tuple[Place, Place]]:
    """Two namespaces with a link of 1 Gbit between them; gone afterwards."""
    require_iproute()
    token = secrets.token_hex(3)
    left, right = (Place(f"10.77.0.{n}", f"dcres-{token}-{n}") for n in (1, 2))
    with contextlib.ExitStack() as made:
        for place in (left, right):
            run_command("ip", "netns", "add", str(place.namespace))
            made.callback(run_command, "ip", "netns", "delete", str(place.namespace))
        run_command(*f"ip -n {left.namespace} link add link0 type veth peer link0".split(),
             "netns", str(right.namespace))  # fmt: skip
        for place in (left, right):
            inside = f"-n {place.namespace}"
            run_command(*f"ip {inside} address add {place.address}/24 dev link0".split())
            run_command(*f"ip {inside} link set link0 up".split())
            run_command(*f"tc {inside} qdisc add dev link0 root {ONE_GBIT}".split())
        yield left, right


def require_iproute() -> None:
    """UnsupportedHost without the programs that networks are made with."""
    for program in ("ip", "tc"):
        if shutil.which(program) is None:
            raise UnsupportedHost(f"this needs {program}; apt install iproute2")


def run_command(*argv: str) -> None:
    """Run a program to its end. Raises UnsupportedHost with what it said when it fails."""
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UnsupportedHost(f"{' '.join(argv)} failed: {done.stderr.strip()}")


def _checkpoint(store: Path, length_bytes: int) -> Source:
    """A checkpoint with one part, full of noise; what nobody here reads is left out of it."""
    pages = length_bytes // PAGE_SIZE
    made, hold = Store(store), Hold()
    made.begin("move", _CHECKPOINT, hold)
    folder = made.host_folder("move", _CHECKPOINT, _HOST)
    hold.drop()
    with (
        tempfile.TemporaryFile(dir="/dev/shm") as memory,
        MemoryFileWriter(folder / layout.MEMORY, pages) as writer,
    ):
        for _ in range(0, length_bytes, _PIECE_BYTES):
            memory.write(os.urandom(_PIECE_BYTES))
        memory.flush()
        writer.save(memory.fileno(), np.array([[0, pages]], dtype=np.int64))
        saved = writer.seal()
    write_durably(folder / layout.VMCORE, b"no core")
    core = file_sum(folder / layout.VMCORE)
    part = HostPart(
        host=_HOST,
        role=Role.MAIN,
        share_bytes=length_bytes,
        pages=saved.pages,
        bytes_written=saved.bytes_written,
        file_bytes_allocated=saved.allocated_bytes,
        seconds=saved.seconds,
        files=(*write_memory_tables(folder, saved), core),
    )
    manifest = Manifest(
        checkpoint=_CHECKPOINT,
        vm="move",
        created="2026-01-01T00:00:00Z",
        mode=Mode.STOP,
        memory_bytes=length_bytes,
        generation=1,
        vm_spec={},
        qemu_version="none",
        accel="tcg",
        tick=0,
        hosts=(part,),
        vmcore=core,
        seconds=saved.seconds,
        downtime_seconds=saved.seconds,
    )
    return Source(store, manifest, Identity(secrets.token_bytes(16), 1, secrets.token_bytes(32)))


def forget(path: Path) -> None:
    """Drop a file from the page cache, so that it is read from the disk next."""
    with opened(path, os.O_RDONLY) as fd:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def _move(source: Source, left: Place, right: Place, what: str, at: int) -> Row:
    page_count = source.manifest.page_count
    with _serving(source, left) as address, tempfile.TemporaryFile(dir="/dev/shm") as target:
        fd = target.fileno()
        os.ftruncate(fd, page_count * PAGE_SIZE)

        def write(first: int, _: int, data: memoryview) -> None:
            write_fully(fd, data, first * PAGE_SIZE)

        started = time.perf_counter()
        right.run(lambda: pull(address, source.identity, page_count, source.extents, write))
        seconds = time.perf_counter() - started
    return _row(what, at, page_count * PAGE_SIZE, seconds)


@contextlib.contextmanager
def _serving(source: Source, place: Place) -> Iterator[SubAddress]:
    """A part server at `place`."""
    with tempfile.TemporaryDirectory(prefix="dcres-bench-") as name:
        folder, store = Path(name), Store(source.store)
        chosen = PartServerSettings(
            vm=source.identity.vm.hex(),
            generation=source.identity.generation,
            secret=source.identity.secret.hex(),
            address=place.address,
            port=0,
            control=str(folder / "parts.sock"),
            parts=(store.memory_part(source.manifest, _HOST),),
        )
        settings.save(chosen, folder / "parts.json")
        argv = [sys.executable, "-m", "dcres.actors.host.part_server", str(folder / "parts.json")]
        process = subprocess.Popen([*place.prefix, *argv], stderr=subprocess.DEVNULL)
        try:
            yield SubAddress(_HOST, place.address, _port(process, folder / "parts.sock"), 0)
        finally:
            process.kill()
            process.wait()


def _port(process: subprocess.Popen[bytes], control_path: Path) -> int:
    ports: list[int] = []

    def answers() -> bool:
        if process.poll() is not None:
            raise PagingError(f"the part server ended with {process.returncode}")
        with contextlib.suppress(PagingError):
            ports.append(control.call(control_path, "status")["port"])
        return bool(ports)

    wait_for(answers, _START_TIMEOUT_S, "the part server answers")
    return ports[0]


def plain_copy(left: Place, right: Place, length_bytes: int, what: str, at: int) -> Row:
    """The same bytes by nothing but send and receive, from memory to memory."""
    with left.run(lambda: socket.create_server((left.address, 0))) as listener:
        sender = threading.Thread(target=_send, args=(listener, length_bytes))
        sender.start()
        port = listener.getsockname()[1]
        with right.run(lambda: socket.create_connection((left.address, port))) as receiving:
            buffer = memoryview(bytearray(_PIECE_BYTES))
            left_bytes, started = length_bytes, time.perf_counter()
            while left_bytes:
                received = receiving.recv_into(buffer)
                if received == 0:
                    raise PagingError("the plain copy ended early")
                left_bytes -= received
            seconds = time.perf_counter() - started
        sender.join()
    return _row(what, at, length_bytes, seconds)


def _send(listener: socket.socket, length_bytes: int) -> None:
    piece = bytes(_PIECE_BYTES)
    with listener.accept()[0] as sending:
        for start in range(0, length_bytes, _PIECE_BYTES):
            sending.sendall(piece[: length_bytes - start])


def _row(what: str, at: int, length_bytes: int, seconds: float) -> Row:
    return Row(what, at, length_bytes / 1e6 / seconds, "MB/s", {"seconds": seconds})
