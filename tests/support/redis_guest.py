"""A guest whose only program is Debian's Redis, and a Redis of the same build on this host.

Kernel, its network modules and Redis come out of Debian packages that are downloaded and
unpacked into the cache at first use; nothing is installed and no service started. The initramfs
holds busybox, the modules, Redis and the shared libraries that it needs.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import re
import shlex
import shutil
import socket
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dcres.vm.guest import (
    META_PACKAGES,
    Entry,
    GuestImage,
    depends_of,
    find_busybox,
    initramfs,
)
from tests.support.speed import patience
from tests.support.wait import until

PACKAGE = "redis-tools"  # holds the program under its other name, and no service
PROGRAM = "usr/bin/redis-check-rdb"  # is redis-server when it is called so
DRIVERS = ("virtio_pci", "virtio_net")  # one that is built into the kernel has no file
APPLETS = ("insmod", "ip", "mount", "sh")
PORT = 6379
# No snapshots, no log file: Redis forks nothing, and what it knows is in memory alone.
SETTINGS = ("--save", "", "--appendonly", "no", "--enable-debug-command", "yes")
INIT = f"""#!/bin/sh
mount -t devtmpfs none /dev; mount -t proc none /proc; mount -t sysfs none /sys
for module in /modules/*; do insmod $module; done
ip link set lo up
ip address add 10.0.2.15/24 dev eth0
ip link set eth0 up
exec /bin/redis-server --port {PORT} --protected-mode no {shlex.join(SETTINGS)}
"""


def _run(argv: Sequence[str | Path], folder: Path, **env: str) -> str:
    done = subprocess.run(
        argv,
        cwd=folder,
        env={**os.environ, "LC_ALL": "C", **env},
        capture_output=True,
        text=True,
        timeout=patience(300),
    )
    assert done.returncode == 0, f"{argv}: {done.stderr}"
    return done.stdout


def _kernel_package(folder: Path) -> str:
    for meta in META_PACKAGES:
        found = depends_of(_run(["apt-cache", "depends", "--no-recommends", meta], folder))
        if found:
            return found[0]
    raise AssertionError(f"apt knows none of {META_PACKAGES}")


def _libraries_of(package: str, folder: Path) -> list[str]:
    answer = _run(["apt-cache", "depends", "--no-recommends", package], folder)
    # The C library must be the one that the dynamic loader here belongs to.
    found = re.findall(r"^\s*Depends:\s*(lib[\w.+-]+)$", answer, re.MULTILINE)
    return [name for name in found if name != "libc6"]


def _download(folder: Path) -> None:
    packages = [PACKAGE, *_libraries_of(PACKAGE, folder), _kernel_package(folder)]
    # As root apt downloads as _apt, which must not be able to write here.
    _run(["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", *packages], folder)
    for archive in folder.glob("*.deb"):
        _run(["dpkg", "-x", archive.name, "."], folder)
        archive.unlink()


def fetch(cache: Path) -> Path:
    """The packages, unpacked into a folder of `cache`; the network is used once."""
    target = cache / "redis"
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".redis-") as name:
        fresh = Path(name) / "unpacked"
        fresh.mkdir()
        try:
            _download(fresh)
        except AssertionError:
            # The package lists may be absent, or name a version that the mirror has dropped.
            _run(["apt-get", "-qq", "update"], fresh)
            _download(fresh)
        for other in ("doc", "locale", "man"):
            shutil.rmtree(fresh / "usr" / "share" / other, ignore_errors=True)
        fresh.rename(target)
    return target


def _library_path(packages: Path) -> str:
    found = {each.parent for each in packages.glob("usr/lib/**/*.so.*")}
    return ":".join(sorted(map(str, found)))


def shared_libraries(packages: Path) -> dict[str, Path]:
    """Redis's shared libraries and the dynamic loader: path in the guest → file here."""
    answer = _run(["ldd", packages / PROGRAM], packages, LD_LIBRARY_PATH=_library_path(packages))
    assert "not found" not in answer, answer
    named = re.findall(r"^\s*(\S+) => (/\S+)", answer, re.MULTILINE)
    loader = re.findall(r"^\s*(/\S*ld-linux\S*)", answer, re.MULTILINE)
    return {f"lib/{name}": Path(path) for name, path in named} | {
        path.lstrip("/"): Path(path) for path in loader
    }


def _modules(packages: Path) -> list[Entry]:
    """The drivers with what they depend on, named in the order of their loading."""
    loaded: dict[str, bytes] = {}

    def load(name: str) -> None:
        for path in packages.glob(f"lib/modules/**/{name}.ko*"):
            data = path.read_bytes()
            data = lzma.decompress(data) if path.suffix == ".xz" else data
            # A field of the section .modinfo, with names separated by commas.
            depends = re.search(rb"\0depends=([^\0]*)\0", data)
            for other in depends[1].decode().split(",") if depends else ():
                if other and other not in loaded:
                    load(other)
            loaded[name] = data

    for driver in DRIVERS:
        load(driver)
    return [
        Entry(f"modules/{place:02}-{name}.ko", stat.S_IFREG | 0o644, data)
        for place, (name, data) in enumerate(loaded.items())
    ]


def _entries(packages: Path) -> list[Entry]:
    files = {
        "bin/busybox": find_busybox(),
        "bin/redis-server": packages / PROGRAM,
        **shared_libraries(packages),
    }
    folders = sorted({path.rpartition("/")[0] for path in files} | {"modules", "proc", "sys"})
    return [
        *(Entry(name, stat.S_IFDIR | 0o755) for name in folders),
        *(
            Entry(name, stat.S_IFREG | 0o755, path.read_bytes())
            for name, path in sorted(files.items())
        ),
        *(Entry(f"bin/{name}", stat.S_IFLNK | 0o777, b"busybox") for name in APPLETS),
        *_modules(packages),
    ]


def redis_image(cache: Path) -> GuestImage:
    """Kernel and initramfs of the Redis guest, made at first use and kept in `cache`."""
    packages = fetch(cache)
    kernel = next(iter(sorted(packages.glob("boot/vmlinuz-*"))))
    made_from = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    initrd = packages / f"initrd-{made_from[:16]}.gz"
    if not initrd.exists():
        fresh = initrd.with_suffix(f".{os.getpid()}")
        fresh.write_bytes(initramfs(INIT.encode(), _entries(packages)))
        for old in packages.glob("initrd-*.gz"):
            old.unlink(missing_ok=True)
        fresh.rename(initrd)
    return GuestImage(kernel, initrd)


def forward_args(port: int) -> list[str]:
    """QEMU's arguments for a user-mode network that forwards `port` of this host to Redis."""
    return [
        *("-netdev", f"user,id=n0,restrict=on,hostfwd=tcp:127.0.0.1:{port}-:{PORT}"),
        *("-device", "virtio-net-pci,netdev=n0,romfile="),
    ]


class RedisError(Exception):
    """An error that Redis answered with."""


class Redis:
    """A connection to Redis: requests as arrays of bulk strings, answers as Python values.

    The protocol is https://redis.io/docs/latest/develop/reference/protocol-spec/ (RESP2).
    """

    def __init__(self, address: tuple[str, int] | Path, timeout_s: float = 60.0) -> None:
        family = socket.AF_UNIX if isinstance(address, Path) else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(patience(timeout_s))
            self._socket.connect(str(address) if isinstance(address, Path) else address)
            self._answers = self._socket.makefile("rb")
        except BaseException:
            self._socket.close()
            raise

    def close(self) -> None:
        self._answers.close()
        self._socket.close()

    def __enter__(self) -> Redis:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self, *words: str | int) -> Any:
        """One request and its answer. Raises RedisError, ConnectionError, TimeoutError."""
        return self.calls([words])[0]

    def calls(self, requests: Sequence[Sequence[str | int]]) -> list[Any]:
        """Several requests in one go, and their answers."""
        self._socket.sendall(b"".join(_request(words) for words in requests))
        return [self._answer() for _ in requests]

    def _answer(self) -> Any:
        line = self._answers.readline()
        if not line.endswith(b"\r\n"):
            raise ConnectionError("Redis closed the connection")
        kind, rest = line[:1], line[1:-2].decode()
        match kind:
            case b"+":
                return rest
            case b":":
                return int(rest)
            case b"-":
                raise RedisError(rest)
            case b"$":
                return None if rest == "-1" else self._bulk(int(rest))
            case b"*":
                return [self._answer() for _ in range(int(rest))]
        raise ConnectionError(f"not an answer of Redis: {line!r}")

    def _bulk(self, length_bytes: int) -> str:
        data = self._answers.read(length_bytes + 2)
        if len(data) != length_bytes + 2:
            raise ConnectionError("Redis closed the connection")
        return data[:-2].decode()


def _request(words: Sequence[str | int]) -> bytes:
    parts = [str(word).encode() for word in words]
    return b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%b\r\n" % (len(p), p) for p in parts)


def answers(address: tuple[str, int] | Path) -> bool:
    """Whether a Redis answers there."""
    try:
        with Redis(address, timeout_s=2.0) as redis:
            return bool(redis.call("PING") == "PONG")
    except (OSError, RedisError):
        return False


@contextmanager
def redis_here(packages: Path, folder: Path) -> Iterator[Redis]:
    """A connection to an empty Redis on this host, which ends with the ``with`` block."""
    path = folder / "redis.sock"
    argv = ["redis-server", *("--port", "0", "--unixsocket", str(path), "--dir", str(folder))]
    process = subprocess.Popen(
        [*argv, *SETTINGS],
        executable=packages / PROGRAM,
        env={**os.environ, "LD_LIBRARY_PATH": _library_path(packages)},
        stdout=subprocess.DEVNULL,
    )
    try:
        until(lambda: answers(path), 30, "Redis answers on this host")
        with Redis(path) as redis:
            yield redis
    finally:
        process.kill()
        process.wait()
