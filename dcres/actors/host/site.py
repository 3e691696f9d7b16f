"""Where one VM is on one host: what all parts of its agent there share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from dcres.actors.host.life import Life
from dcres.actors.host.meter import Meter
from dcres.actors.host.state import StateFile
from dcres.actors.host.vm_folder import VmFolder
from dcres.actors.messages import Role
from dcres.config import HostSettings
from dcres.storage.store.store import Store


def name_of_parts(vm: str) -> str:
    """What `vm` is called where only parts of it are; no VM has such a name."""
    return f"{vm}.parts"


@dataclass(frozen=True, slots=True)
class Site:
    """One VM's folders and records on one host."""

    vm: str
    settings: HostSettings
    folder: VmFolder
    store: Store
    state: StateFile
    life: Life = field(default_factory=Life)
    meter: Meter = field(default_factory=Meter)

    @classmethod
    def of(
        cls, vm: str, role: Role, address: str, cluster: str, environ: Mapping[str, str]
    ) -> Self:
        """As the environment says; the folders are held if they are the cluster's."""
        settings = HostSettings.from_environ(environ, address)
        name = name_of_parts(vm) if role is Role.PARTS else vm
        folder = VmFolder.of(settings, name, cluster)
        folder.resume()
        return cls(vm, settings, folder, Store(settings.store), StateFile(folder, role))

    @property
    def host(self) -> str:
        """The host's name."""
        return self.settings.name

    @property
    def guest_ram(self) -> Path:
        """QEMU's memory, on a main host."""
        return self.folder.ram / "guest.ram"

    @property
    def store_file(self) -> Path:
        """The memory server's pages, on a sub host."""
        return self.folder.ram / "store.ram"
