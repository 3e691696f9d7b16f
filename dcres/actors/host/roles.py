"""What a host agent consists of in each role, and which part takes which orders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import assert_never

from dcres.actors.host.account import Account
from dcres.actors.host.checkpoint_stop import CheckpointStop
from dcres.actors.host.core_load import CoreLoad
from dcres.actors.host.host_saver import HostSaver
from dcres.actors.host.launch import Launch
from dcres.actors.host.main_machine import MainMachine
from dcres.actors.host.main_saver import MainSaver
from dcres.actors.host.memory_server import MemoryServer
from dcres.actors.host.name_in_store import NameInStore
from dcres.actors.host.page_moves import PageMoves
from dcres.actors.host.pager import Pager
from dcres.actors.host.part_service import PartService
from dcres.actors.host.presence import MainPresence, PartsPresence, SubPresence
from dcres.actors.host.qemu import Qemu
from dcres.actors.host.site import Site
from dcres.actors.host.standing import Standing
from dcres.actors.host.sub_saver import SubSaver
from dcres.actors.host.vm_view import VmView
from dcres.actors.messages import Role
from dcres.actors.protocol import Machine, Paging, Parts, Presence, Saving, Serving
from dcres.errors import Conflict


@dataclass(frozen=True, slots=True)
class Duties:
    """The part that takes the orders of each group; None for a group that the role does not have.

    `host` is whose they are, for errors.
    """

    host: str
    presence: Presence
    parts: Parts
    saving: Saving | None = None
    machine: Machine | None = None
    paging: Paging | None = None
    serving: Serving | None = None

    def perform(
        self, group: str, order: str, args: Sequence[object], kwargs: Mapping[str, object]
    ) -> object:
        """Carry out an order; its answer. Raises Conflict for one of another role."""
        part: object = getattr(self, group)
        if part is None:
            raise Conflict(f"{self.host} does not take the order {group}.{order}")
        answer: object = getattr(part, order)(*args, **kwargs)
        return answer


def _words(site: Site, role: Role) -> str:
    return f"{site.host}, {role.words} of VM {site.vm},"


class MainRole:
    """A main host: QEMU, its pager, and the VM's name in the store."""

    def __init__(self, site: Site, parts: PartService) -> None:
        self._site = site
        record = site.settings.run / f"{site.vm}.generation"
        name = NameInStore(site.store, site.vm, site.host, record)
        self.qemu = Qemu(site.vm, site.state)
        self.pager = Pager(site.folder, lambda: self.qemu.is_running)
        self.standing = Standing(site.vm, site.state)
        self.saver = HostSaver(
            site,
            site.guest_ram,
            self.pager.control,
            self.pager.patient,
            lambda: self.qemu.is_running,
        )
        account = Account(self.pager, site.store)
        self.stop = CheckpointStop(site, self.saver, self.qemu, self.pager, self.standing, account)
        self.core = CoreLoad(site, self.qemu)
        self.launch = Launch(site, self.qemu, self.pager, self.core, name)
        view = VmView(site, self.qemu, self.pager, self.standing)
        self.saving = MainSaver(
            site, self.saver, self.qemu, self.pager, view, self.standing, self.stop, name, account
        )
        self.machine = MainMachine(
            site,
            self.qemu,
            self.pager,
            self.standing,
            name,
            self.launch,
            self.core,
            self.stop,
            self.saving,
            view,
        )
        self.paging = PageMoves(site, self.qemu, self.pager)
        self.presence = MainPresence(
            site, parts, self.qemu, self.pager.daemon, self.saver, name, view
        )
        self.duties = Duties(
            _words(site, Role.MAIN), self.presence, parts, self.saving, self.machine, self.paging
        )

    def adopt(self) -> None:
        """Go on with what an actor before this one began."""
        state = self._site.state.now
        # Before its pager is there a VM that is being started is nothing to adopt.
        if state is not None and state.paged and self.qemu.is_running:
            self.pager.daemon.adopt()


class SubRole:
    """A sub host: a memory server."""

    def __init__(self, site: Site, parts: PartService) -> None:
        self._site = site
        self.server = MemoryServer(site)
        self.saver = HostSaver(
            site,
            site.store_file,
            self.server.control,
            self.server.patient,
            lambda: site.state.now is not None,
        )
        self.saving = SubSaver(site, self.saver, self.server)
        self.presence = SubPresence(site, parts, self.server, self.saver)
        self.duties = Duties(
            _words(site, Role.SUB), self.presence, parts, self.saving, serving=self.server
        )

    def adopt(self) -> None:
        """Go on with what an actor before this one began."""
        if self._site.state.now is not None:
            self.server.daemon.adopt()


class PartsRole:
    """A host that has parts of a checkpoint and nothing of the VM."""

    def __init__(self, site: Site, parts: PartService) -> None:
        self.presence = PartsPresence(site, parts)
        self.duties = Duties(_words(site, Role.PARTS), self.presence, parts)

    def adopt(self) -> None:
        """There is nothing but the parts."""


def composed(role: Role, site: Site, parts: PartService) -> MainRole | SubRole | PartsRole:
    """What a host of this role consists of."""
    match role:
        case Role.MAIN:
            return MainRole(site, parts)
        case Role.SUB:
            return SubRole(site, parts)
        case Role.PARTS:
            return PartsRole(site, parts)
        case _:
            assert_never(role)
