"""What clusters, VMs and checkpoints share: the way to coordinators, and where checkpoints are."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dcres.actors import _ray
from dcres.actors.coordinator import Coordinator
from dcres.actors.fleet import coordinator_name
from dcres.actors.local_cluster import HOST_FIELD, LocalCluster
from dcres.actors.ports import Port
from dcres.api.catalogue import Catalogue, StoreHere, StoresOfHosts
from dcres.config import default_home
from dcres.errors import ConfigError, Conflict, DcresError, NotFound

_PREFIX = coordinator_name("")
_READY_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Session:
    """A connection to one cluster; `local` when all its hosts are on this machine."""

    address: str
    catalogue: Catalogue
    local: LocalCluster | None

    def coordinator(self, vm: str) -> Port:
        """The VM's coordinator, spawned unless there is one already."""
        name = coordinator_name(vm)
        port = _ray.find(name)
        if port is None:
            try:
                port = _ray.spawn(Coordinator, name, (vm,))
            except Conflict:
                # Somebody else was faster; the coordinator lets one of us begin.
                port = _ray.ActorPort(name)
        port.wait_ready(_READY_TIMEOUT_S)
        return port

    def existing(self, vm: str) -> Port:
        """The coordinator of a VM that there is. Raises NotFound."""
        port = _ray.find(coordinator_name(vm))
        if port is None:
            known = ", ".join(self.vms()) or "none"
            raise NotFound(f"there is no VM {vm} in the cluster; it has {known}")
        port.wait_ready(_READY_TIMEOUT_S)
        return port

    def retire(self, vm: str) -> None:
        """End the VM's coordinator unless there is something to coordinate."""
        name = coordinator_name(vm)
        with suppress(DcresError):
            if _ray.ActorPort(name).call("retire"):
                _ray.kill(name)

    def vms(self) -> list[str]:
        """The names of VMs that have a coordinator, whether they run or not."""
        return [name.removeprefix(_PREFIX) for name in _ray.list_actors(_PREFIX)]


def open_session(address: str | None, store: Path | None) -> Session:
    """Connect this process and find the store; see `dcres.connect`."""
    connected = _ray.connected_address()
    if connected is not None:
        if address not in (None, connected):
            raise Conflict(
                f"this process is connected to the cluster at {connected}; "
                f"close that connection before using {address}"
            )
        address = connected
    local = local_cluster_at(address or os.environ.get("RAY_ADDRESS"))
    if local is not None:
        address = local.address
    address = address or os.environ["RAY_ADDRESS"]
    _ray.connect(address, None if local is None else local.token_path)
    return Session(address, catalogue_of(store, local), local)


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

    The second value says whether a cluster was joined. Raises what `open_session` raises.
    """
    if store is None and address is None and "RAY_ADDRESS" not in os.environ:
        try:
            local = local_cluster_at(None)
        except NotFound:
            kept = default_home() / "store"
            if "DCRES_STORE" not in os.environ and not kept.is_dir():
                raise
            store = Path(os.environ.get("DCRES_STORE", kept))
        else:
            if local is None or local.shared_store is None:
                return open_session(None, None).catalogue, True
            return catalogue_of(None, local), False
    if store is not None or "DCRES_STORE" in os.environ:
        return catalogue_of(store, None), False
    return open_session(address, None).catalogue, True


def catalogue_of(store: Path | None, local: LocalCluster | None) -> Catalogue:
    """The checkpoints in the store that is named, else in the cluster's: one store, or many."""
    if store is None and local is not None:
        store = local.shared_store
    elif store is None and "DCRES_STORE" in os.environ:
        store = Path(os.environ["DCRES_STORE"])
    if store is not None and HOST_FIELD in str(store):
        raise ConfigError(
            f"{store} is many stores, one for each host; start their cluster, or name one of them"
        )
    return StoresOfHosts() if store is None else StoreHere(store.absolute())
