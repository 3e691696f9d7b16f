"""Where one VM's files are on one host, and the mark that its processes carry."""

from __future__ import annotations

import re
import threading
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from dcres.actors.host.folder_claim import FolderClaim
from dcres.config import HostSettings
from dcres.errors import Conflict, NotOurs
from dcres.linux.files import require_own
from dcres.linux.machine import boot_id, machine_id
from dcres.linux.marks import Mark
from dcres.linux.process import ProcessId, find_marked, sees
from dcres.linux.removal import OwnFolder
from dcres.model.ownership import Claimant

VM_MARK = "DCRES_VM_RUN"
FILES_MARK = "files"

_FILE_OF_VM = re.compile(
    r"(state|pager|server|parts|slices)\.(json|new|pid|log|sock)|qmp\.sock|(console|qemu)\.log"
    r"|(guest|store|outbox)\.ram|(table|moves)(\.new|\.lock)?|changes|incoming|vmcore"
)


@dataclass(frozen=True, slots=True)
class VmFolder:
    """Where one VM's files are on one host, for `cluster`: another's are not touched."""

    run: Path
    ram: Path
    cluster: str = ""
    host: str = ""
    _claims: dict[Path, FolderClaim] = field(init=False, repr=False, compare=False)
    _making: threading.Lock = field(
        default_factory=threading.Lock, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        me = Claimant(self.cluster, self.host, machine_id(), boot_id())
        chosen = {self.run: "DCRES_RUN", self.ram: "DCRES_RAM"}
        claims = {path: FolderClaim(path.name, path, name, me) for path, name in chosen.items()}
        object.__setattr__(self, "_claims", claims)

    @classmethod
    def of(cls, settings: HostSettings, vm: str, cluster: str = "") -> VmFolder:
        """The folders of `vm` on the host with these settings."""
        return cls(settings.run / vm, settings.ram / vm, cluster, settings.name)

    def make(self) -> None:
        """Create both, private to us and marked, and hold them.

        Raises NotOurs where there is something else, HostError where somebody else could reach it,
        Conflict where it is another cluster's.
        """
        with self._making:  # a boot and a part server make it at the same time
            for folder, claim in self._claims.items():
                while True:
                    own = self._made(folder)
                    if claim.take(seen=self._seen(folder)):
                        own.clear(keep=_is_log)
                    if claim.holds:  # else it was removed in between, as a sweep does
                        break

    def _made(self, folder: Path) -> OwnFolder:
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            own = OwnFolder.made(folder, _mark(folder), earlier=_of_a_vm)
        except NotOurs as error:
            raise NotOurs(f"{error} by DCRES_RUN or DCRES_RAM") from None
        require_own(folder.parent)
        require_own(folder)
        return own

    @property
    def owner(self) -> str:
        """The cluster whose the run folder is; empty if it is nobody's."""
        return self._claims[self.run].owner

    @property
    def is_ours(self) -> bool:
        """Whether what is in the run folder, and runs, is the cluster's; also if nothing is."""
        return self._claims[self.run].is_ours

    def trouble(self, *, take_over: bool) -> str:
        """Why `take` would refuse now; empty if it would not. Changes nothing."""
        told = (
            claim.trouble(seen=self._seen(folder), take_over=take_over)
            for folder, claim in self._claims.items()
        )
        return next(filter(None, told), "")

    def require_free(self, *, take_over: bool) -> None:
        """Conflict where `take` would refuse now. Changes nothing."""
        if why := self.trouble(take_over=take_over):
            raise Conflict(why)

    def take(self, *, take_over: bool = False) -> None:
        """Hold what is there: it is the cluster's from now on, and nobody else's until `release`.

        Repeatable. Raises Conflict where another cluster's VM is alive, and, unless `take_over`,
        where it may be.
        """
        for folder, claim in self._claims.items():
            if self._own(folder, whoever=True) is not None:
                claim.take(seen=self._seen(folder), take_over=take_over)

    def resume(self) -> bool:
        """Hold what is there if it is the cluster's; whether it is, or nothing is there."""
        for claim in self._claims.values():
            with suppress(Conflict):
                claim.take(ours_alone=True)
        return self.is_ours

    def release(self) -> None:
        """Hold nothing any more. Repeatable."""
        for claim in self._claims.values():
            claim.release()

    @property
    def held(self) -> tuple[int, ...]:
        """What every process of the VM inherits, to hold the folders as long as it lives."""
        return tuple(claim.fd for claim in self._claims.values() if claim.fd is not None)

    def _seen(self, folder: Path) -> bool:
        """Whether processes are seen that use it; those of the VM tell of its run folder alone."""
        return folder == self.run and not self.is_ours and bool(processes_of(self))

    def remove(self) -> None:
        """Remove the RAM; of the run folder keep nothing but logs. What is not ours stays."""
        run, ram = map(self._own, (self.run, self.ram))
        if ram is not None:
            ram.remove()
        if run is not None:
            run.clear(keep=_is_log)

    def remove_file(self, path: Path) -> None:
        """Remove the file `path` of the VM, if it is there. What is not ours stays."""
        folder = self._own(path.parent)
        if folder is not None:
            folder.remove_file(path)

    def _own(self, folder: Path, *, whoever: bool = False) -> OwnFolder | None:
        """The folder if it is a VM's of that name, and the cluster's, or `whoever`'s."""
        if not (whoever or self._claims[folder].is_ours):
            return None
        return OwnFolder.taken(folder, _mark(folder), _of_a_vm)

    @property
    def ram_bytes(self) -> int:
        """What the VM takes of the host's memory: its files on tmpfs, without their holes."""
        total = 0
        if not self._claims[self.ram].is_ours:
            return total
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


def _is_log(path: Path) -> bool:
    return path.suffix == ".log"


def marker(folder: VmFolder) -> dict[str, str]:
    """The environment of every process that is started for a VM on this host."""
    return {VM_MARK: str(folder.run)}


def processes_of(folder: VmFolder) -> list[ProcessId]:
    """All that runs for the VM on this host; not what another container has at the same path."""
    found = [each for pair in marker(folder).items() for each in find_marked(*pair)]
    return [process for process in found if sees(process, folder.run)]


def end_leftovers(folder: VmFolder) -> None:
    """End processes of the VM on this host that no state file tells of.

    An actor that was killed between starting a process and writing that down left them. Another
    cluster's stay.
    """
    for process in processes_of(folder) if folder.is_ours else ():
        process.end(grace_s=1.0)
