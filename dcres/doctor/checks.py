"""What this host can do for dcres, found out by doing it.

`gather` tries things and writes down what happened; `evaluate` turns these facts into checks
and is pure. A check that fails names the remedy.
"""

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
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np

from dcres.actors.host import orphans
from dcres.config import HostSettings, default_cache, default_home, format_size
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

NEEDED_KERNEL = (6, 7)
NEEDED_PYTHON = (3, 11)
LITTLE_RAM_BYTES = 1 << 30
LITTLE_DISK_BYTES = 2 << 30
_YAMA = Path("/proc/sys/kernel/yama/ptrace_scope")
_CAP_SYS_PTRACE = 19
_PROBE_PAGES = 16
# Optional modules in C, and what takes longer without.
_NATIVE = {
    "dcres.paging._hot": "page-in takes about twice as long",
    "dcres.storage.engine._bulk": (
        "saving and loading scattered pages takes up to half as long again"
    ),
}


class Status(StrEnum):
    """How a check went; ``warn``: dcres works, with a limit that the detail names."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at; `remedy` is empty when there is nothing to do."""

    name: str
    status: Status
    detail: str
    remedy: str = ""


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


def version_of(text: str) -> tuple[int, int]:
    """The first two numbers of a version; (0, 0) when there are none."""
    found = re.search(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _check(name: str, good: bool, detail: str, remedy: str, bad: Status = Status.FAIL) -> Check:
    return Check(name, Status.OK, detail) if good else Check(name, bad, detail, remedy)


def _kernel(facts: Facts) -> list[Check]:
    new_enough = version_of(facts.kernel) >= NEEDED_KERNEL
    upgrade = (
        "boot Linux 6.7 or newer (Debian 13, Ubuntu 24.04, or Debian 12 with a backports kernel)"
    )
    allow = upgrade if not new_enough else "run as root, and allow userfaultfd(2) in the container"
    uffd, tracking = facts.userfaultfd_error, facts.write_tracking_error
    return [
        _check("machine", facts.machine == "x86_64", facts.machine, "use an x86-64 machine"),
        _check("kernel", new_enough, f"Linux {facts.kernel}", upgrade),
        _check(
            "userfaultfd", uffd is None, uffd or "every feature that dcres needs is granted", allow
        ),
        _check(
            "write tracking", tracking is None, tracking or "PAGEMAP_SCAN found the write", allow
        ),
    ]


def _privileges(facts: Facts) -> list[Check]:
    who = "root" if facts.root else "an ordinary user"
    capability = "with" if facts.cap_sys_ptrace else "without"
    yama = "" if facts.yama is None else f", Yama ptrace_scope {facts.yama}"
    detail = f"{who} {capability} CAP_SYS_PTRACE{yama}"
    error = facts.injection_error
    if error is None:
        return [Check("privileges", Status.OK, f"{detail}; a process was traced")]
    remedy = "run as root or give CAP_SYS_PTRACE (docker run --cap-add SYS_PTRACE)"
    if facts.yama == 3:
        remedy = "Yama forbids all tracing: set kernel.yama.ptrace_scope below 3 and reboot"
    return [
        Check("privileges", Status.FAIL, f"{detail}; tracing a process failed: {error}", remedy)
    ]


def _qemu(facts: Facts) -> list[Check]:
    checks = [
        _check(
            "qemu",
            facts.qemu is not None and version_of(facts.qemu) >= (7, 2),
            facts.qemu or f"{QEMU} is not installed",
            "apt install qemu-system-x86 (7.2 or newer)",
        ),
        _check(
            "qemu-img",
            facts.qemu_img is not None,
            facts.qemu_img or "qemu-img is not installed",
            "apt install qemu-utils",
        ),
    ]
    if facts.kvm is None:
        words = "not tried: there is no guest kernel to try it with"
        return [*checks, Check("kvm", Status.WARN, words, "run scripts/setup")]
    words = facts.kvm.reason if facts.kvm.works else f"{facts.kvm.reason}; guests run under TCG"
    remedy = "use a host with hardware virtualisation for full speed"
    return [*checks, _check("kvm", facts.kvm.works, words, remedy, Status.WARN)]


def _ram(facts: Facts) -> list[Check]:
    mount = facts.ram_mount
    total, free = format_size(facts.ram_total_bytes), format_size(facts.ram_free_bytes)
    another = "name a folder on a tmpfs by DCRES_RAM"
    checks = [
        _check(
            "ram folder",
            mount.is_tmpfs,
            f"{facts.ram} is on {mount.filesystem or 'nothing'}",
            another,
        ),
        _check(
            "ram size",
            facts.ram_total_bytes >= LITTLE_RAM_BYTES,
            f"{total}, {free} free",
            f"containers give /dev/shm 64 MiB (docker run --shm-size); or {another}",
            Status.WARN,
        ),
    ]
    checks.append(
        _check(
            "huge pages",
            not tmpfs.makes_huge_pages(mount.huge, facts.shmem_thp),
            f"tmpfs huge={mount.huge or 'never'}, shmem_enabled {facts.shmem_thp or 'unknown'}",
            tmpfs.remedy(mount, facts.shmem_thp),
        )
    )
    return checks


def _store(facts: Facts) -> list[Check]:
    error = facts.direct_io_error
    return [
        _check(
            "store",
            error is None,
            f"{facts.store}: {error or 'O_DIRECT works'}",
            "name a folder on ext4, xfs or btrfs by DCRES_STORE",
        ),
        _check(
            "store size",
            facts.store_free_bytes >= LITTLE_DISK_BYTES,
            f"{format_size(facts.store_free_bytes)} free",
            "a checkpoint needs as much as the VM's memory: free some, or set DCRES_STORE",
            Status.WARN,
        ),
    ]


def _programs(facts: Facts) -> list[Check]:
    python = ".".join(map(str, facts.python))
    return [
        _check(
            "busybox",
            facts.busybox_error is None,
            facts.busybox_error or "static busybox for the demonstration guest",
            "apt install busybox-static",
            Status.WARN,
        ),
        _check(
            "guest",
            facts.guest_kernel,
            "the demonstration guest is " + ("here" if facts.guest_kernel else "not prepared"),
            "run scripts/setup",
            Status.WARN,
        ),
        _check("python", facts.python[:2] >= NEEDED_PYTHON, python, "use Python 3.11 or newer"),
        _check(
            "ray",
            facts.ray is not None,
            facts.ray or "not installed",
            "pip install 'ray[default]' where dcres is installed",
        ),
    ]


def _native(facts: Facts) -> list[Check]:
    slower = "; ".join(f"{_NATIVE[name]} without {name}" for name in facts.not_compiled)
    return [
        _check(
            "modules in C",
            not slower,
            slower or f"{' and '.join(_NATIVE)} were compiled",
            "apt install gcc libc6-dev python3-dev libxxhash-dev, then install dcres again",
            Status.WARN,
        )
    ]


def _orphans(facts: Facts) -> list[Check]:
    return [
        _check(
            "orphans",
            not facts.orphans,
            "; ".join(facts.orphans) or "no cluster that has ended left anything here",
            "no cluster can adopt them any more: end them by `dcres down --orphans`, then restore",
            Status.WARN,
        )
    ]


def evaluate(facts: Facts) -> list[Check]:
    """Every check, for the facts of one host; pure."""
    groups = (_kernel, _privileges, _qemu, _ram, _store, _programs, _native, _orphans)
    return [check for group in groups for check in group(facts)]


def as_json(checks: list[Check]) -> dict[str, Any]:
    """``{"ok": bool, "checks": [{"name", "status", "detail", "remedy"}]}`` for ``--json``."""
    ok = all(check.status is not Status.FAIL for check in checks)
    return {"ok": ok, "checks": [asdict(check) for check in checks]}


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


def _not_compiled() -> tuple[str, ...]:
    """The optional modules that were not built, or not for this Python."""

    def is_there(name: str) -> bool:
        try:
            importlib.import_module(name)
        except ImportError:
            return False
        return True

    return tuple(name for name in _NATIVE if not is_there(name))


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
        not_compiled=_not_compiled(),
        ray=_ray_version(),
        orphans=tuple(map(str, orphans.find(settings.ram))),
    )


def examine(settings: HostSettings) -> list[Check]:
    """`gather` and `evaluate`: what ``dcres doctor`` shows."""
    return evaluate(gather(settings))
