"""The folder of guest memory: a tmpfs whose pages are small, so that each can leave by itself.

A huge page of tmpfs is punched 4 KiB at a time by zeroing these, and the pipe that a page left
through still refers to them: a page-out would send zeros, and the guest get wrong memory. The
kernel makes huge pages by the mount's ``huge=``, of which ``advise`` is no shelter (QEMU asks for
them with MADV_HUGEPAGE); ``force`` and ``deny`` in shmem_enabled override every mount.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from dcres.errors import UnsupportedHost

SHMEM_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
_MOUNTS = Path("/proc/mounts")
_ESCAPED = re.compile(r"\\([0-7]{3})")  # space, tab, newline and backslash in proc(5)'s mounts


@dataclass(frozen=True, slots=True)
class Mount:
    """Where a folder lies; `huge` is the mount's ``huge=``, empty where it has none."""

    point: str = ""
    filesystem: str = ""
    huge: str = ""

    @property
    def is_tmpfs(self) -> bool:
        """Whether what lies there is memory."""
        return self.filesystem == "tmpfs"


def mount_of(mounts: str, path: Path) -> Mount:
    """The mount that holds `path`, from ``/proc/mounts``' text."""
    best, found = -1, Mount()
    for line in mounts.splitlines():
        _, point, kind, options, *_ = line.split()
        point = _ESCAPED.sub(lambda code: chr(int(code[1], 8)), point)
        depth = len(Path(point).parts)
        # A later mount on the same point hides the earlier one.
        if path.is_relative_to(point) and depth >= best:
            huge = re.search(r"\bhuge=(\w+)", options)
            best, found = depth, Mount(point, kind, huge[1] if huge else "")
    return found


def makes_huge_pages(huge: str, shmem_enabled: str) -> bool:
    """Whether a tmpfs with this ``huge=`` may have huge pages, under this shmem_enabled."""
    return shmem_enabled == "force" or (shmem_enabled != "deny" and huge not in ("", "never"))


def remedy(mount: Mount, shmem_enabled: str) -> str:
    """What to do about huge pages on `mount`."""
    if shmem_enabled == "force":
        return f"echo never >{SHMEM_ENABLED}, and keep huge= out of the mounts"
    return f"mount -o remount,huge=never {mount.point}"


def trouble(folder: Path, host: str, mount: Mount, shmem_enabled: str) -> str:
    """Why guest memory may not lie in `folder` of `host`, with the remedy; empty if it may."""
    another = "name a folder on a tmpfs by DCRES_RAM"
    if not mount.is_tmpfs:
        kind = mount.filesystem or "nothing"
        return f"guest memory of host {host} would lie in {folder}, which is on {kind}; {another}"
    if not makes_huge_pages(mount.huge, shmem_enabled):
        return ""
    forced = shmem_enabled == "force"
    why = f"{SHMEM_ENABLED} says force" if forced else f"it has huge={mount.huge}"
    return (
        f"the tmpfs at {mount.point} of host {host} makes huge pages ({why}), of which no single "
        f"page can leave, so the guest would get wrong memory; {remedy(mount, shmem_enabled)}, or "
        f"{another}"
    )


def shmem_enabled() -> str:
    """The kernel's setting for all of tmpfs; empty where it does not know huge pages."""
    try:
        found = re.search(r"\[(\w+)\]", SHMEM_ENABLED.read_text())
    except OSError:
        return ""
    return found[1] if found else ""


def mount_here(folder: Path) -> Mount:
    """The mount that holds `folder`, or would once it is made."""
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    return mount_of(_MOUNTS.read_text(), there.resolve())


def require_small_pages(folder: Path, host: str) -> None:
    """UnsupportedHost unless guest memory may lie in `folder` of `host`, which is this one."""
    if why := trouble(folder, host, mount_here(folder), shmem_enabled()):
        raise UnsupportedHost(why)
