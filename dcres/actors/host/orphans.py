"""What is left of clusters that have ended: processes of VMs, and memory that nothing uses.

A VM outlives its control plane on purpose, so that an actor that Ray starts again adopts it. When
all of Ray is gone, and its record of the VM with it, nobody will: such a VM can only be ended, and
restored from a checkpoint. All is found by our marks, in the environment of processes and in
folders, and never by name. What may be in use is not named, and finding changes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcres.actors.host.vm_folder import FILES_MARK, VM_MARK, VmFolder
from dcres.actors.ray.local_home import RAM_MARK, Home
from dcres.actors.ray.local_node import CLUSTER_MARK, end_all
from dcres.errors import DcresError
from dcres.linux.files import is_open_for_writing
from dcres.linux.holding import is_held
from dcres.linux.marks import HOME_MARK, MARK, Mark
from dcres.linux.process import ProcessId, environments, sees
from dcres.linux.removal import OwnFolder
from dcres.model.whereabouts import Life

_SHARED_MEMORY = Path("/dev/shm")
_RAY_START = "ray.scripts.scripts"  # what every node of a local cluster is started by
_RAYLET = "raylet"
_OF_RAY = "RAY_RAYLET_PID"  # in the environment of what Ray's workers start
_CLUSTER = "cluster "


@dataclass(frozen=True, slots=True)
class Orphans:
    """What is left of one cluster; `cluster` is empty unless `dcres up` started it."""

    cluster: str
    home: Path | None
    processes: tuple[ProcessId, ...]
    runs: tuple[Path, ...]  # the VMs' run folders that processes tell of
    folders: tuple[OwnFolder, ...]  # guest memory

    @property
    def vms(self) -> tuple[str, ...]:
        """The VMs whose processes or memory these are."""
        names = {run.name for run in self.runs}
        for folder in self.folders:
            below = [folder.path, *folder.path.glob("*/*")]
            names |= {path.name for path in below if _is_of_vm(Mark.of(path))}
        return tuple(sorted(names))

    @property
    def memory_bytes(self) -> int:
        """What the guest memory takes."""
        return sum(path.lstat().st_blocks * 512 for path in self._files())

    def __str__(self) -> str:
        """What it is, in one line."""
        pids = ", ".join(str(process.pid) for process in self.processes)
        memory = ", ".join(str(folder.path) for folder in self.folders)
        what = [f"processes {pids}" if pids else "", f"memory in {memory}" if memory else ""]
        return f"{self.name}: {' and '.join(part for part in what if part)}"

    @property
    def name(self) -> str:
        """Whose it is."""
        vms = f"VM {' and '.join(self.vms)}" if self.vms else ""
        cluster = f"cluster {self.cluster}" if self.cluster else ""
        return " of ".join(part for part in (vms, cluster) if part) or "another cluster"

    def _files(self) -> Iterator[Path]:
        for folder in self.folders:
            yield from (path for path in folder.path.rglob("*") if path.is_file())

    def to_dict(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return {
            "cluster": self.cluster or None,
            "home": None if self.home is None else str(self.home),
            "vms": list(self.vms),
            "processes": [
                {"pid": each.pid, "command": " ".join(each.argv[:3])} for each in self.processes
            ],
            "memory": [str(folder.path) for folder in self.folders],
            "memory_bytes": self.memory_bytes,
        }


def find(ram: Path) -> list[Orphans]:
    """All that is left on this host; `ram` is its folder for guest memory. Changes nothing."""
    left: dict[str, list[tuple[ProcessId, dict[str, str]]]] = {}
    for process, environ in environments((CLUSTER_MARK, VM_MARK)):
        if CLUSTER_MARK in environ or _OF_RAY in environ:
            left.setdefault(environ.get(CLUSTER_MARK, ""), []).append((process, environ))
    ray_runs = _ray_runs()
    live = {id for id, found in left.items() if (ray_runs if not id else _lives(id, found))}
    memory = _memory(ram, {*live, ""} if ray_runs else live, set(left))
    clusters = sorted((set(left) | set(memory)) - live)
    return [_orphans(id, left.get(id, []), memory.get(id, ())) for id in clusters]


def end(orphans: Orphans, ram: Path) -> bool:
    """End and remove it; False if it is left no more. Raises DcresError if something stays."""
    now = next((each for each in find(ram) if each.cluster == orphans.cluster), None)
    if now is None:
        return False
    if now.cluster:
        end_all({CLUSTER_MARK: now.cluster})
    for process in now.processes:
        process.end(grace_s=1.0)
    for folder in now.folders:
        folder.remove()
    for run in now.runs:
        memory = ram / run.name  # where another cluster's may be
        VmFolder(run, memory, VmFolder(run, memory).owner).remove()
    if now.home is not None:
        _clear(Home(now.home), now.cluster)
    return True


def _clear(home: Home, cluster: str) -> None:
    """What the cluster left in its home, if that can be read and tells of it."""
    with suppress(DcresError):
        state = home.read()
        if state is not None and state.id == cluster and home.life(state) is Life.DEAD:
            with home.claimed() as claim:
                claim.clear(state)


def _orphans(
    cluster: str, left: list[tuple[ProcessId, dict[str, str]]], folders: tuple[OwnFolder, ...]
) -> Orphans:
    homes = {environ["DCRES_HOME"] for _, environ in left if environ.get("DCRES_HOME")}
    told = [(process, Path(environ[VM_MARK])) for process, environ in left if environ.get(VM_MARK)]
    # At the path that one in another container tells of, another VM's may be here.
    runs = {run for process, run in told if sees(process, run)}
    return Orphans(
        cluster=cluster,
        home=Path(min(homes)) if cluster and homes else None,
        processes=tuple(sorted((process for process, _ in left), key=lambda each: each.pid)),
        runs=tuple(sorted(runs)),
        folders=folders,
    )


def _lives(cluster: str, left: list[tuple[ProcessId, dict[str, str]]]) -> bool:
    """Whether a node of a local cluster runs, or it is being started."""
    if any(_RAY_START in process.argv for process, _ in left):
        return True
    for home in {environ.get("DCRES_HOME", "") for _, environ in left} - {""}:
        with suppress(DcresError):
            state = Home(Path(home)).read()
            if state is not None and state.id == cluster and is_held(Path(home) / HOME_MARK):
                return True
    return False


def _ray_runs() -> bool:
    """Whether a node of Ray is on this host, whose actors may adopt what they find."""
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit() and (entry / "comm").read_text().strip() == _RAYLET:
                return True
    return False


def _memory(ram: Path, live: set[str], seen: set[str]) -> dict[str, tuple[OwnFolder, ...]]:
    """Folders of guest memory by cluster, but those of clusters that are `live`.

    Of a cluster that has no process that is `seen` from here a process in another container may
    have it in use: then its files are open, or its mark is held.
    """
    found: dict[str, tuple[OwnFolder, ...]] = {}
    for place in {_SHARED_MEMORY, ram}:
        for path in sorted(place.iterdir()) if place.is_dir() else ():
            mark = Mark.of(path)
            if mark is None or not (mark.what == RAM_MARK or _is_of_vm(mark)):
                continue
            cluster = mark.whose.removeprefix(_CLUSTER) if mark.what == RAM_MARK else ""
            if cluster not in live and (cluster in seen or not _is_used(path)):
                found[cluster] = (*found.get(cluster, ()), OwnFolder(path, mark))
    return found


def _is_of_vm(mark: Mark | None) -> bool:
    return mark is not None and mark.what == FILES_MARK


def _is_used(folder: Path) -> bool:
    files = [Path(top) / name for top, _, names in os.walk(folder) for name in names]
    regular = [path for path in files if path.is_file() and not path.is_symlink()]
    return any(is_held(path) for path in regular if path.name == MARK) or any(
        map(is_open_for_writing, regular)
    )
