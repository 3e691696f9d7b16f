"""What clusters, VMs and checkpoints share: the way to coordinators, and where checkpoints are."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from dcres.actors.control.coordinator import Coordinator
from dcres.actors.ports import Port
from dcres.actors.ray import gateway
from dcres.actors.ray.coordinators import Coordinators
from dcres.actors.ray.local_cluster import LocalCluster
from dcres.actors.ray.local_home import HOST_FIELD, Home
from dcres.actors.ray.local_node import CLUSTER_MARK
from dcres.api.catalogue import Catalogue, StoreHere, StoresOfHosts
from dcres.config import default_home, store_of_environ
from dcres.errors import ConfigError, DcresError, NotFound

_STATUS_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Session:
    """A connection to one cluster; `local` when all its hosts are on this machine.

    `joined`: dcres made it. Otherwise it was there before, and is its maker's to end.
    """

    address: str
    catalogue: Catalogue
    local: LocalCluster | None
    joined: bool = field(default=False, kw_only=True)

    def close(self) -> None:
        """Leave the cluster if dcres joined it; what goes on there goes on."""
        if self.joined:
            gateway.disconnect()

    def existing(self, vm: str) -> Port:
        """The coordinator of a VM that there is. Raises NotFound."""
        port = Coordinators().find(vm)
        if port is None:
            raise self._unknown(vm)
        return port

    def require(self, vm: str) -> None:
        """Raise NotFound unless the VM runs, is lost or is being worked on.

        Only its own coordinator is asked; if that is silent, there is something to be done.
        """
        port = Coordinators().peek(vm)
        if port is None:
            raise self._unknown(vm)
        try:
            phase = port.within(_STATUS_TIMEOUT_S).call(Coordinator.status)["phase"]
        except DcresError:
            return
        if phase == "absent":
            raise self._unknown(vm)

    def _unknown(self, vm: str) -> NotFound:
        known = [each for each in self.vms() if each != vm]
        similar = get_close_matches(vm, known)
        hint = f"it has {', '.join(known) or 'none'};"
        if similar:
            hint = f"did you mean {' or '.join(similar)}?"
        return NotFound(f"there is no VM {vm} in the cluster; {hint} see `dcres list`")

    def vms(self) -> list[str]:
        """The names of VMs that have a coordinator, whether they run or not."""
        return Coordinators().names()


def open_session(address: str | None, store: Path | None) -> Session:
    """Connect this process and find the store; see `dcres.connect`."""
    named = _named(address)
    local = local_cluster_at(named)
    address = local.address if local is not None else str(named)
    catalogue = catalogue_of(named_store(store), local)
    try:
        joined = gateway.connect(address, None if local is None else local.token_path)
    except DcresError:
        if local is not None:
            local.require_here()  # else this says why none answers
        raise
    return Session(address, catalogue, local, joined=joined)


def _named(address: str | None) -> str | None:
    """The address of the cluster that is meant; None if nothing names one."""
    connected = gateway.connected_address()
    if connected is not None and address in (None, "auto"):
        return connected
    if address is not None:
        return gateway.resolve(address)
    named = os.environ.get(gateway.ADDRESS_VARIABLE)
    return gateway.resolve(named, gateway.ADDRESS_VARIABLE) if named else None


def local_cluster_at(address: str | None) -> LocalCluster | None:
    """The cluster of this machine's home if it is the one meant: its address, or none named.

    Raises NotFound when none is named and none runs.
    """
    try:
        local = LocalCluster.load(default_home())
    except NotFound:
        if address is None:
            raise
        return None
    return local if address in (None, local.address) else None


def open_catalogue(address: str | None, store: Path | None) -> tuple[Catalogue, bool]:
    """The checkpoints, without joining a cluster if they are to be found on this machine.

    The second value says whether a cluster was joined, which is then to be left. Raises what
    `open_session` raises.
    """
    named = named_store(store)
    if named is not None:
        return catalogue_of(named, None), False
    if address is not None or os.environ.get(gateway.ADDRESS_VARIABLE):
        return _joining(address)
    try:
        local = local_cluster_at(None)
    except NotFound:
        given, kept = store_of_environ(), Home(default_home()).store
        if given is None and not kept.is_dir():
            raise
        return catalogue_of(_one_store(given or kept), None), False
    if local is None or local.shared_store is None:
        return _joining(None)
    return catalogue_of(None, local), False


def _joining(address: str | None) -> tuple[Catalogue, bool]:
    session = open_session(address, None)
    return session.catalogue, session.joined


def named_store(store: Path | None) -> Path | None:
    """The one store to read: `store` where it is given, else what DCRES_STORE names, if anything.

    With ``{host}`` in it the variable is for `dcres up` and names no single store. In a process
    of a local cluster it is the store of that host alone. Raises ConfigError.
    """
    if store is not None:
        return _one_store(store)
    named = None if CLUSTER_MARK in os.environ else store_of_environ()
    return None if named is None or HOST_FIELD in str(named) else named.absolute()


def _one_store(store: Path) -> Path:
    if HOST_FIELD in str(store):
        raise ConfigError(
            f"{store} is many stores, one for each host; start their cluster, or give one of them"
        )
    return store.absolute()


def catalogue_of(store: Path | None, local: LocalCluster | None) -> Catalogue:
    """The checkpoints in `store` where it is given, else in the cluster's: one store, or many."""
    if store is None and local is not None:
        store = local.shared_store
    return StoresOfHosts() if store is None else StoreHere(store)
