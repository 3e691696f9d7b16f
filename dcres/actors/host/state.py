"""What a host knows of its VM: a file that outlives the actor, and the one owner of that file.

A host agent owns no state that matters but this: QEMU, pager and memory server are processes of
their own, and all that is known about them lies in files under the host's run folder. An actor
that Ray starts again finds them there and goes on.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from dcres.actors.host.vm_folder import VmFolder
from dcres.actors.messages import ChangeId, Role
from dcres.config import VmSpec
from dcres.errors import Conflict, NotFound
from dcres.linux.files import open_own
from dcres.model.run_state import RunState
from dcres.paging.settings import SubAddress
from dcres.vm.process import QemuProcess
from dcres.vm.reverting import Reverting


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Replace a small file of a host (mode 0600) in one step."""
    fresh = path.with_suffix(".new")
    with os.fdopen(open_own(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "w") as file:
        json.dump(values, file)
    fresh.rename(path)


def read_json(path: Path) -> dict[str, Any] | None:
    """The file's content; None when there is none."""
    try:
        values: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    return values


@dataclass(frozen=True, slots=True)
class BegunRevert:
    """Disks on their way back to a checkpoint, and the `boot` of the machine that they are from."""

    reverting: Reverting
    boot: str

    def to_dict(self) -> dict[str, object]:
        """Plain values for the state file; `from_dict` reads them back."""
        return {**self.reverting.to_dict(), "boot": self.boot}

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> BegunRevert:
        """What `to_dict` wrote."""
        return cls(Reverting.from_dict(values), str(values.get("boot")))


@dataclass(frozen=True, slots=True, kw_only=True)
class VmState:
    """One life of a VM as a host of it knows it; of a sub host only the first three.

    What a VM that an earlier dcres started has no word of is as here by default.
    """

    role: Role = Role.MAIN
    generation: int = 0
    reserved: int = 0  # bytes that were set aside for it when the host became one of its own
    vm: str = ""
    cluster: str = ""
    unclaimed: str = ""  # why its name in the store is not claimed
    unrecorded: str = ""  # why no record says that it is to run
    spec: VmSpec | None = None
    hosts: tuple[str, ...] = ()  # the main host first
    shares: Mapping[str, int] = field(default_factory=dict)  # bytes by sub host
    codes: tuple[int, ...] = ()  # of the sub hosts in the network page table
    qemu: QemuProcess | None = None
    accel: str = ""
    accel_why: str = ""
    qemu_version: str = ""
    machine: str = ""
    devices: Mapping[str, str] | None = None  # as they were at the start
    sources: tuple[SubAddress, ...] = ()  # the part servers of a lazy restore
    paged: bool = False  # its pager has begun
    running: bool = False  # its start or restore has come to its end
    checkpoint: str | None = None  # under way
    found: RunState | None = None  # in which a checkpoint found it
    stood: datetime | None = None  # since when the guest is paused
    reshaping: bool = False  # its shares are being changed
    change: int = 0  # of shares, whose orders it took last
    reverting: BegunRevert | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values, as the file has them."""
        return {each.name: _plain(getattr(self, each.name)) for each in fields(self)}

    @classmethod
    def of_json(cls, values: Mapping[str, Any], role: Role) -> VmState:
        """What `to_json` wrote, or an earlier dcres, which knew no role: then it is `role`."""
        known = {each.name: values[each.name] for each in fields(cls) if each.name in values}
        made = {
            name: _MADE[name](value) if name in _MADE and value is not None else value
            for name, value in known.items()
        }
        return cls(**{"role": role, **made})


_MADE: dict[str, Callable[[Any], Any]] = {
    "role": Role,
    "spec": VmSpec.model_validate,
    "hosts": tuple,
    "codes": tuple,
    "qemu": QemuProcess.from_dict,
    "sources": lambda values: tuple(SubAddress(**each) for each in values),
    "found": RunState,
    "stood": datetime.fromisoformat,
    "reverting": BegunRevert.from_dict,
}


def _plain(value: Any) -> Any:
    match value:
        case VmSpec():
            return value.model_dump(mode="json", by_alias=True)
        case QemuProcess() | BegunRevert():
            return value.to_dict()
        case SubAddress():
            return asdict(value)
        case datetime():
            return value.isoformat()
        case tuple():
            return [_plain(each) for each in value]
        case Mapping():
            return dict(value)
        case _:
            return value


def state_in(folder: VmFolder, role: Role = Role.MAIN) -> VmState | None:
    """What the state file in `folder` tells; None without one, and for another cluster's."""
    values = read_json(folder.state) if folder.is_ours else None
    return None if values is None else VmState.of_json(values, role)


class StateFile:
    """What a host knows of its VM, in memory and on disk; nothing else reads or writes it.

    `role` is what the host is as long as the file does not tell of another.
    """

    def __init__(self, folder: VmFolder, role: Role) -> None:
        self._folder = folder
        self._role = role
        self._changing = threading.Lock()
        self._state = state_in(folder, role)

    @property
    def now(self) -> VmState | None:
        """The life that is here; None if there is none."""
        state = self._state
        return state if state is not None and state.generation else None

    @property
    def role(self) -> Role:
        """What this host is of the VM."""
        state = self._state
        return self._role if state is None else state.role

    def require(self) -> VmState:
        """The life that is here. Raises NotFound."""
        if (now := self.now) is None:
            raise NotFound(f"host {self._folder.host} does not run VM {self._folder.run.name}")
        return now

    def begin(self, state: VmState) -> None:
        """A life begins here; the host's role is as it was."""
        with self._changing:
            self._write(replace(state, role=self.role))

    def change(self, how: Callable[[VmState], VmState]) -> None:
        """Durably, and one change at a time. Raises NotFound when nothing is here."""
        with self._changing:
            self._write(how(self.require()))

    def obey(self, change: ChangeId, *, begins: bool = False) -> None:
        """Take orders of that change of shares from now on, and of none before it.

        Raises Conflict for one that another has overtaken, or that `begins` a second time.
        """
        with self._changing:
            now = self.require()
            if change.generation != now.generation or change.number < now.change + begins:
                raise Conflict(
                    f"host {self._folder.host} was told too late: that change of shares of VM "
                    f"{self._folder.run.name} has been overtaken"
                )
            if change.number > now.change:
                self._write(replace(now, change=change.number))

    def become(self, role: Role) -> None:
        """Have another role from now on, also for an actor that is started again."""
        with self._changing:
            self._role = role
            self._write(replace(self._state or VmState(), role=role))

    def forget(self) -> VmState | None:
        """Nothing is here any more; what was."""
        with self._changing:
            was, self._state = self.now, None
            self._folder.remove_file(self._folder.state)
            return was

    def _write(self, state: VmState) -> None:
        self._state = state
        write_json(self._folder.state, state.to_json())
