"""Control groups that limit how fast their processes read and write one disk.

Facts about Linux that shape this module:

* Version 1 (``blkio.throttle``) counts what a process itself submits: reads, and writes with
  O_DIRECT. Buffered writes are submitted later by the kernel's flusher, which is in no group, and
  pass without limit. Version 2 (``io.max``) counts those as well, on file systems that can say
  whose they are. So what shall be limited is written with O_DIRECT.
* Limits are those of whole disks; the name of a partition is refused.
* A group with a process in it cannot be removed, and a child is in its parent's group.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from dcres.errors import UnsupportedHost
from dcres.linux.process import ProcessId
from dcres.linux.removal import remove_if_empty

ROOT = Path("/sys/fs/cgroup")
_DEVICES = Path("/sys/dev/block")
_END_TIMEOUT_S = 20.0
_POLL_S = 0.01


def disk_under(path: Path, devices: Path = _DEVICES) -> str:
    """``major:minor`` of the whole disk that `path` lies on. Raises UnsupportedHost."""
    number = os.stat(path).st_dev
    device = devices / f"{os.major(number)}:{os.minor(number)}"
    if not device.exists():
        raise UnsupportedHost(
            f"{path} is not on a disk whose rate can be limited; choose a folder on one"
        )
    found = device.resolve()
    if (found / "partition").exists():
        found = found.parent
    return (found / "dev").read_text().strip()


@dataclass(frozen=True, slots=True)
class DiskGroup:
    """A control group; `disk_group` makes one."""

    folder: Path
    version: int
    disk: str  # major:minor

    @property
    def entrance(self) -> Path:
        """A process that writes its pid here, or a 0, is in the group; so are its children."""
        return self.folder / "cgroup.procs"

    def limit(self, bytes_per_s: int | None) -> None:
        """From now on the group reads, and writes, at most so much; None: as the disk can."""
        if self.version == 2:
            rate = "max" if bytes_per_s is None else str(bytes_per_s)
            (self.folder / "io.max").write_text(f"{self.disk} rbps={rate} wbps={rate}")
            return
        for way in ("read", "write"):
            file = self.folder / f"blkio.throttle.{way}_bps_device"
            file.write_text(f"{self.disk} {bytes_per_s or 0}")

    def remove(self) -> None:
        """End every process in the group, and the group. Raises UnsupportedHost, after a while."""
        deadline = time.monotonic() + _END_TIMEOUT_S
        while True:
            for line in self.entrance.read_text().split():
                process = ProcessId.of(int(line))
                if process is not None:
                    process.kill()
            if remove_if_empty(self.folder):
                return
            if time.monotonic() > deadline:
                raise UnsupportedHost(f"{self.folder} cannot be removed: it is still in use")
            time.sleep(_POLL_S)


@contextmanager
def disk_group(name: str, disk: str, root: Path = ROOT) -> Iterator[DiskGroup]:
    """A new group for `disk`, without a limit; afterwards it and all processes in it are gone.

    Raises UnsupportedHost where there are no control groups for disks, or not for us.
    """
    with ExitStack() as made:
        if (root / "blkio" / "blkio.throttle.write_bps_device").exists():
            group = DiskGroup(root / "blkio" / name, 1, disk)
        elif "io" in _words(root / "cgroup.controllers"):
            _hand_down(root, made)
            group = DiskGroup(root / name, 2, disk)
        else:
            raise UnsupportedHost(
                f"{root} has neither blkio.throttle nor the io controller; mount cgroup2 there"
            )
        try:
            group.folder.mkdir()
        except OSError as error:
            raise UnsupportedHost(f"no control group {group.folder}: {error.strerror}") from None
        made.callback(group.remove)
        yield group


def _words(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


def _hand_down(root: Path, made: ExitStack) -> None:
    """Let groups below `root` limit disks, until `made` is closed."""
    control = root / "cgroup.subtree_control"
    if "io" in _words(control):
        return
    try:
        control.write_text("+io")
    except OSError as error:
        raise UnsupportedHost(f"{control} does not take +io: {error.strerror}") from None
    made.callback(control.write_text, "-io")
