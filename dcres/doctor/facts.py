"""What is found out about this host, by trying it; nothing is judged here."""

from __future__ import annotations

import importlib
import importlib.metadata
import mmap
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dcres.actors.host import orphans
from dcres.config import HostSettings, default_cache, default_home
from dcres.errors import DcresError
from dcres.linux import inject, tmpfs
from dcres.linux.pagemap import WriteTracker
from dcres.linux.process import spawn_detached
from dcres.linux.tmpfs import Mount
from dcres.linux.userfaultfd import Userfaultfd
from dcres.model.pages import PAGE_SIZE
from dcres.vm.accel import Probe, probe_kvm
from dcres.vm.command import QEMU
from dcres.vm.guest import find_busybox, find_image

NATIVE = ("dcres.paging._hot", "dcres.storage.engine._bulk")  # optional modules in C
_YAMA = Path("/proc/sys/kernel/yama/ptrace_scope")
_CAP_SYS_PTRACE = 19
_PROBE_PAGES = 16


@dataclass(frozen=True, slots=True)
class Facts:
    """What was found on a host. A ``…_error`` is None when the thing worked."""

    machine: str
    kernel: str
    userfaultfd_error: str | None
    write_tracking_error: str | None
    injection_error: str | None
    root: bool
    cap_sys_ptrace: bool
    yama: int | None
    qemu: str | None
    qemu_img: str | None
    kvm: Probe | None
    ram: Path
    ram_mount: Mount
    ram_total_bytes: int
    ram_free_bytes: int
    shmem_thp: str
    store: Path
    store_free_bytes: int
    direct_io_error: str | None
    busybox_error: str | None
    guest_kernel: bool
    python: tuple[int, int, int]
    not_compiled: tuple[str, ...]
    ray: str | None
    orphans: tuple[str, ...] = ()  # a sentence for each cluster that has left something


def _error_of(attempt: Callable[[], object]) -> str | None:
    """What went wrong in `attempt`, in words; None when nothing did."""
    try:
        attempt()
    except (OSError, DcresError) as error:
        return str(error)
    return None


def _try_userfaultfd() -> None:
    with Userfaultfd.create() as uffd:
        uffd.enable()


def _try_write_tracking() -> None:
    """Write one page of a protected mapping of ours and see that the scan finds that page."""
    length_bytes = _PROBE_PAGES * PAGE_SIZE
    with mmap.mmap(-1, length_bytes) as memory, Userfaultfd.create() as uffd:
        start = int(np.frombuffer(memory, dtype=np.uint8).ctypes.data)
        uffd.enable()
        # Only writes are watched: a missing page would have to be brought by this very thread.
        uffd.register(start, length_bytes, missing=False)
        uffd.write_protect(start, length_bytes)
        memory[3 * PAGE_SIZE] = 1
        with WriteTracker(os.getpid(), start, _PROBE_PAGES) as tracker:
            found = tracker.scan().tolist()
    if found != [[3, 4]]:
        raise OSError(f"page 3 was written and PAGEMAP_SCAN tells of {found}")


def _try_injection() -> None:
    """Make another process call userfaultfd(2) and take the descriptor, as is done with QEMU."""
    with tempfile.TemporaryDirectory(prefix="dcres-doctor-") as folder:
        process = spawn_detached(["sleep", "60"], Path(folder) / "log")
        try:
            number = inject.make_userfaultfd(process.pid)
            os.close(inject.take(process.pid, number))
        finally:
            process.kill(signal.SIGKILL)


def _try_direct_io(folder: Path) -> None:
    """Write one aligned block with O_DIRECT, to a file that has no name where that can be."""
    with tempfile.TemporaryFile(dir=folder, prefix=".dcres-doctor-") as file:
        fd = os.open(f"/proc/self/fd/{file.fileno()}", os.O_WRONLY | os.O_DIRECT)
        try:
            with mmap.mmap(-1, PAGE_SIZE) as block:  # page-aligned, as O_DIRECT wants
                os.pwrite(fd, block, 0)
        finally:
            os.close(fd)


def _existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists: where `path` would be made."""
    return next(each for each in (path, *path.parents) if each.exists())


def _first_line(*argv: str) -> str | None:
    if shutil.which(argv[0]) is None:
        return None
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    return (done.stdout.splitlines() or [f"{argv[0]} says nothing"])[0]


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _cap_sys_ptrace() -> bool:
    found = re.search(r"^CapEff:\s*([0-9a-f]+)$", _read(Path("/proc/self/status")) or "", re.M)
    return found is not None and bool(int(found[1], 16) >> _CAP_SYS_PTRACE & 1)


def not_compiled() -> tuple[str, ...]:
    """The optional modules that were not built, or not for this Python."""

    def is_there(name: str) -> bool:
        try:
            importlib.import_module(name)
        except ImportError:
            return False
        return True

    return tuple(name for name in NATIVE if not is_there(name))


def _ray_version() -> str | None:
    try:
        return importlib.metadata.version("ray")
    except importlib.metadata.PackageNotFoundError:
        return None


def _kvm(home: Path) -> Probe | None:
    image = find_image(home / "guest")
    if image is None or shutil.which(QEMU) is None:
        return None
    return probe_kvm(image.kernel, default_cache())


def gather(settings: HostSettings) -> Facts:
    """Try everything on this host. Takes about 8 s the first time when KVM hangs."""
    home = default_home()
    ram, store = _existing(settings.ram), _existing(settings.store)
    memory, disk = os.statvfs(ram), os.statvfs(store)
    yama = _read(_YAMA)
    return Facts(
        machine=platform.machine(),
        kernel=platform.release(),
        userfaultfd_error=_error_of(_try_userfaultfd),
        write_tracking_error=_error_of(_try_write_tracking),
        injection_error=_error_of(_try_injection),
        root=os.geteuid() == 0,
        cap_sys_ptrace=_cap_sys_ptrace(),
        yama=None if yama is None else int(yama),
        qemu=_first_line(QEMU, "--version"),
        qemu_img=_first_line("qemu-img", "--version"),
        kvm=_kvm(home),
        ram=settings.ram,
        ram_mount=tmpfs.mount_here(ram),
        ram_total_bytes=memory.f_blocks * memory.f_frsize,
        ram_free_bytes=memory.f_bavail * memory.f_frsize,
        shmem_thp=tmpfs.shmem_enabled(),
        store=settings.store,
        store_free_bytes=disk.f_bavail * disk.f_frsize,
        direct_io_error=_error_of(lambda: _try_direct_io(store)),
        busybox_error=_error_of(find_busybox),
        guest_kernel=find_image(home / "guest") is not None,
        python=sys.version_info[:3],
        not_compiled=not_compiled(),
        ray=_ray_version(),
        orphans=tuple(map(str, orphans.find(settings.ram))),
    )
