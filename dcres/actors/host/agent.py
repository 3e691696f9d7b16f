"""The host agent: the one class that Ray runs on every host of a VM.

It owns no state that matters; `dcres.actors.host.state` says where that is. What it is of the VM is
data: its role says which parts it consists of, and so which orders it takes.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence

from dcres.actors.host.part_service import PartService
from dcres.actors.host.roles import MainRole, PartsRole, SubRole, composed
from dcres.actors.host.site import Site
from dcres.actors.messages import Role
from dcres.errors import Conflict
from dcres.linux import priority


class HostAgent:
    """One VM on one host. Orders are those of `dcres.actors.protocol`, by group and name.

    After a failure the coordinator gives the orders `abandon` or `destroy`, which may be repeated.
    """

    def __init__(
        self,
        vm: str,
        role: Role,
        address: str = "127.0.0.1",
        cluster: str = "",
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        priority.take_normal()
        self.site = Site.of(vm, role, address, cluster, environ)
        self.parts = PartService(self.site)
        self._composing = threading.Lock()
        self._composed: dict[Role, MainRole | SubRole | PartsRole] = {}
        self.parts.adopt()
        self.composed.adopt()

    @property
    def role(self) -> Role:
        """What this host is of the VM now."""
        return self.site.state.role

    @property
    def composed(self) -> MainRole | SubRole | PartsRole:
        """The parts of the role that this host has now."""
        with self._composing:
            role = self.role
            if role not in self._composed:
                self._composed[role] = composed(role, self.site, self.parts)
            return self._composed[role]

    def perform(
        self, group: str, order: str, args: Sequence[object], kwargs: Mapping[str, object]
    ) -> object:
        """Carry out an order of a group; its answer.

        Raises what the order raises, Conflict for one that this host's role does not take.
        """
        return self.composed.duties.perform(group, order, args, kwargs)

    def become(self, role: Role) -> None:
        """Take the orders of another role from now on, also as an actor that is started again.

        Raises Conflict while something of the VM is here, and where no memory is set aside for it.
        """
        site = self.site
        if role is self.role:
            return
        if Role.PARTS in (role, self.role):
            raise Conflict(
                f"{self.role.words} of VM {site.vm} cannot become {role.words}: "
                "only main host and sub hosts have memory set aside"
            )
        with site.life.beginning():
            if site.state.now is not None:
                raise Conflict(
                    f"host {site.host} is {self.role.words} of VM {site.vm}, which is here; it can "
                    f"become {role.words} once that has ended"
                )
            site.folder.make()
            site.state.become(role)
