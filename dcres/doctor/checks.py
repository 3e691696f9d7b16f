"""What the facts of a host mean: a check for each thing, and the remedy where one fails. Pure."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from dcres.config import format_size
from dcres.doctor.facts import NATIVE, Facts
from dcres.linux import tmpfs
from dcres.vm.command import QEMU

NEEDED_KERNEL = (6, 7)
NEEDED_PYTHON = (3, 11)
LITTLE_RAM_BYTES = 1 << 30
LITTLE_DISK_BYTES = 2 << 30
_SLOWER = dict(
    zip(
        NATIVE,
        (
            "page-in takes about twice as long",
            "saving and loading scattered pages takes up to half as long again",
        ),
        strict=True,
    )
)


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
    slower = "; ".join(f"{_SLOWER[name]} without {name}" for name in facts.not_compiled)
    return [
        _check(
            "modules in C",
            not slower,
            slower or f"{' and '.join(NATIVE)} were compiled",
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
