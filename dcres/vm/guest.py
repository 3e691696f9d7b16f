"""A guest that needs no disk: a distribution's kernel and an initramfs with the witness in it.

The initramfs is a gzip'd cpio archive in the "newc" format, which the kernel's
``Documentation/driver-api/early-userspace/buffer-format.rst`` describes. PyPI has no kept
library that writes it with device nodes and without root, so the thirty lines are here.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from dcres.errors import UnsupportedHost

# Debian's and Ubuntu's meta packages for kernels that run in VMs.
META_PACKAGES = ("linux-image-cloud-amd64", "linux-image-virtual")
APPLETS = ("cat", "dd", "md5sum", "mkdir", "mount", "printf", "sed", "sh", "sleep", "yes")
_KERNEL_PACKAGE = re.compile(r"linux-image-(unsigned-)?\d")
_DEPENDS = re.compile(r"^\s*\|?Depends:\s*(linux-image-\S+)", re.MULTILINE)
_DOWNLOAD_TIMEOUT_S = 300


@dataclass(frozen=True, slots=True)
class Entry:
    """One member of a cpio archive; `mode` holds the file's type as well (inode(7))."""

    name: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class GuestImage:
    """What a VM file names as ``kernel`` and ``initrd``."""

    kernel: Path
    initrd: Path


def cpio_newc(entries: Sequence[Entry]) -> bytes:
    """A cpio archive in the newc format: 13 numbers of 8 hex digits, name, data; padded to 4."""
    archive = bytearray()
    trailer = Entry("TRAILER!!!", 0)
    for inode, entry in enumerate([*entries, trailer], start=1):
        name = entry.name.encode() + b"\0"
        fields = (inode, entry.mode, 0, 0, 1, 0, len(entry.data), 0, 0, *entry.device, len(name), 0)
        archive += b"070701" + b"".join(b"%08x" % field for field in fields) + name
        archive += bytes(-len(archive) % 4) + entry.data
        archive += bytes(-len(archive) % 4)
    return bytes(archive)


def initramfs(init: bytes, files: Sequence[Entry] = ()) -> bytes:
    """A gzip'd initramfs with `init` as ``/init``, a console and `files`."""
    console = Entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    folder = Entry("dev", stat.S_IFDIR | 0o755)
    start = Entry("init", stat.S_IFREG | 0o755, init)
    return gzip.compress(cpio_newc([folder, console, start, *files]), compresslevel=1, mtime=0)


def _witness() -> bytes:
    return (resources.files("dcres") / "guest" / "init").read_bytes()


def build_initrd(target: Path, busybox: Path) -> None:
    """Write the witness's initramfs to `target`, with the static `busybox` in it.

    Does nothing when `target` was made from the same two already.
    """
    init, program = _witness(), busybox.read_bytes()
    made_from = hashlib.sha256(init + program).hexdigest()
    stamp = target.with_name(target.name + ".sha256")
    if target.exists() and stamp.exists() and stamp.read_text() == made_from:
        return
    binaries = [
        Entry("bin", stat.S_IFDIR | 0o755),
        Entry("bin/busybox", stat.S_IFREG | 0o755, program),
        *(Entry(f"bin/{applet}", stat.S_IFLNK | 0o777, b"busybox") for applet in APPLETS),
    ]
    _replace(stamp, b"")  # nobody takes a target that was cut short for this one
    _replace(target, initramfs(init, binaries))
    _replace(stamp, made_from.encode())


def find_busybox() -> Path:
    """The static busybox of this host. Raises UnsupportedHost when there is none."""
    # Debian's dynamic busybox would need its libraries in the guest; -static has none.
    path = shutil.which("busybox")
    if path is None:
        raise UnsupportedHost("busybox is not installed; run scripts/setup or apt install it")
    if b"/ld-linux" in Path(path).read_bytes()[:4096]:
        raise UnsupportedHost(f"{path} is not static; apt install busybox-static")
    return Path(path)


def find_image(cache: Path) -> GuestImage | None:
    """The guest that `prepare` left in `cache`, or None."""
    image = GuestImage(cache / "vmlinuz", cache / "initrd.gz")
    return image if image.kernel.is_file() and image.initrd.is_file() else None


def prepare(cache: Path) -> GuestImage:
    """Put kernel and initramfs into `cache` unless they are there; the network is used once.

    Raises UnsupportedHost when no kernel package can be had.
    """
    cache.mkdir(parents=True, exist_ok=True)
    kernel = cache / "vmlinuz"
    if not kernel.is_file():
        fetch_kernel(kernel)
    initrd = cache / "initrd.gz"
    build_initrd(initrd, find_busybox())
    return GuestImage(kernel, initrd)


def fetch_kernel(target: Path) -> None:
    """Take vmlinuz out of the distribution's package for VMs; nothing is installed."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as folder:
        try:
            image = _download(Path(folder))
        except UnsupportedHost:
            # The package lists may be absent, or name a version that the mirror has dropped.
            if os.geteuid() != 0:
                raise
            _run(["apt-get", "-qq", "update"], Path(folder))
            image = _download(Path(folder))
        _replace(target, image.read_bytes())


def _download(folder: Path) -> Path:
    package = _kernel_package(folder)
    # As root apt downloads as _apt, which must not be able to write here.
    _run(["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", package], folder)
    for archive in folder.glob("*.deb"):
        _run(["dpkg", "-x", archive.name, "package"], folder)
    images = sorted(folder.glob("package/boot/vmlinuz-*"))
    if not images:
        raise UnsupportedHost(f"the package {package} holds no kernel; set `kernel` in the VM file")
    return images[-1]


def _kernel_package(folder: Path) -> str:
    """The package that the first known meta package stands for, such as linux-image-6.1.0-…"""
    for meta in META_PACKAGES:
        try:
            answer = _run(["apt-cache", "depends", "--no-recommends", meta], folder)
        except UnsupportedHost:
            continue
        for name in depends_of(answer):
            if _KERNEL_PACKAGE.match(name):
                return name
    raise UnsupportedHost(
        f"apt knows none of {', '.join(META_PACKAGES)}; run apt-get update, or set `kernel` in "
        "the VM file"
    )


def depends_of(answer: str) -> list[str]:
    """The kernel packages in the answer of ``apt-cache depends``, first choice first."""
    return _DEPENDS.findall(answer)


def _run(argv: list[str], folder: Path) -> str:
    env = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    try:
        done = subprocess.run(
            argv,
            cwd=folder,
            env=env,
            capture_output=True,
            text=True,
            check=True,
            timeout=_DOWNLOAD_TIMEOUT_S,
        )
    except FileNotFoundError:
        raise UnsupportedHost(
            f"{argv[0]} is not here, so no guest kernel can be fetched; set `kernel` in the VM file"
        ) from None
    except subprocess.CalledProcessError as error:
        words = " / ".join(error.stderr.strip().splitlines()[-3:])
        raise UnsupportedHost(f"{' '.join(argv)} failed: {words}") from None
    except subprocess.TimeoutExpired:
        raise UnsupportedHost(f"{' '.join(argv)} took over {_DOWNLOAD_TIMEOUT_S} s") from None
    return done.stdout


def _replace(target: Path, data: bytes) -> None:
    """Write `target` as a whole or not at all, readable by all."""
    fd, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}-")
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        os.fchmod(fd, 0o644)
    Path(name).replace(target)
