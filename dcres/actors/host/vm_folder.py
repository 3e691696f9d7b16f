"""Where one VM's files are on one host, and the mark that its processes carry."""

from __future__ import annotations

import re
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dcres.config import HostSettings
from dcres.errors import NotOurs
from dcres.linux.files import require_own
from dcres.linux.process import ProcessId, find_marked, sees
from dcres.linux.removal import Mark, OwnFolder

VM_MARK = "DCRES_VM_RUN"
FILES_MARK = "files"

_FILE_OF_VM = re.compile(
    r"(state|pager|server|slices)\.(json|new|pid|log|sock)|qmp\.sock|(console|qemu)\.log"
    r"|(guest|store|outbox)\.ram|(table|moves)(\.new|\.lock)?|changes|incoming|vmcore"
)


@dataclass(frozen=True, slots=True)
class VmFolder:
    """Where one VM's files are on one host."""

    run: Path
    ram: Path

    @classmethod
    def of(cls, settings: HostSettings, vm: str) -> VmFolder:
        """The folders of `vm` on the host with these settings."""
        return cls(settings.run / vm, settings.ram / vm)

    def make(self) -> None:
        """Create both, private to us and marked.

        Raises NotOurs where there is something else, HostError where somebody else could reach it.
        """
        for folder in (self.run, self.ram):
            folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                OwnFolder.made(folder, _mark(folder), earlier=_of_a_vm)
            except NotOurs as error:
                raise NotOurs(f"{error} by DCRES_RUN or DCRES_RAM") from None
            require_own(folder.parent)
            require_own(folder)

    def remove(self) -> None:
        """Remove the RAM; of the run folder keep nothing but logs. What is not ours stays."""
        run, ram = map(_own, (self.run, self.ram))
        if ram is not None:
            ram.remove()
        if run is not None:
            run.clear(keep=lambda path: path.suffix == ".log")

    def remove_file(self, path: Path) -> None:
        """Remove the file `path` of the VM, if it is there. What is not ours stays."""
        folder = _own(path.parent)
        if folder is not None:
            folder.remove_file(path)

    @property
    def ram_bytes(self) -> int:
        """What the VM takes of the host's memory: its files on tmpfs, without their holes."""
        total = 0
        for path in self.ram.rglob("*"):
            with suppress(FileNotFoundError):  # paging makes some and removes them
                total += path.stat().st_blocks * 512
        return total

    @property
    def state(self) -> Path:
        """What the actor has to know when it is started again."""
        return self.run / "state.json"


def _mark(folder: Path) -> Mark:
    return Mark(FILES_MARK, f"VM {folder.name}")


def _of_a_vm(names: Collection[str]) -> bool:
    """Whether these are names of files of a VM, as an earlier dcres left them without a mark."""
    return all(map(_FILE_OF_VM.fullmatch, names))


def _own(folder: Path) -> OwnFolder | None:
    return OwnFolder.taken(folder, _mark(folder), _of_a_vm)


def marker(folder: VmFolder) -> dict[str, str]:
    """The environment of every process that is started for a VM on this host."""
    return {VM_MARK: str(folder.run)}


def processes_of(folder: VmFolder) -> list[ProcessId]:
    """All that runs for the VM on this host; not what another container has at the same path."""
    found = [each for pair in marker(folder).items() for each in find_marked(*pair)]
    return [process for process in found if sees(process, folder.run)]


def end_leftovers(folder: VmFolder) -> None:
    """End processes of the VM on this host that no state file tells of.

    An actor that was killed between starting a process and writing that down left them.
    """
    for process in processes_of(folder):
        process.end(grace_s=1.0)
