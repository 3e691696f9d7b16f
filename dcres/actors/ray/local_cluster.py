"""A Ray cluster on this machine alone: one head node for control, and host nodes for VMs.

Every node is a ``ray start --block`` in a session of its own, outlives the process that
started it, and hands two marks in its environment to all that is ever started on it:
``DCRES_CLUSTER`` (this cluster) and ``DCRES_HOST`` (the host). By these marks, and never by
name, `LocalCluster.stop` and `LocalCluster.kill_host` find exactly their own processes.

Each cluster has a loopback network of its own, 127.x.y.0/24, and each node an address in it:
a memory server has an address of its own as on a real host, and of several nodes on one
machine a driver attaches to the head node, so that it survives the loss of any host.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Self

from dcres.actors.ray.awaiting_nodes import NodesWait, Tell, log_waiting
from dcres.actors.ray.local_home import (
    HOST_FIELD,
    Claim,
    Home,
    State,
    held_by_nodes,
    own_folders,
    this_place,
)
from dcres.actors.ray.local_node import (
    CLUSTER_MARK,
    HOST_MARK,
    MIB,
    Places,
    end_all,
    free_port,
)
from dcres.actors.ray.local_nodes import LocalNodes
from dcres.config import HostSettings, folder_of_environ, format_size, named_folder
from dcres.errors import Conflict, NoRoom, NotFound
from dcres.linux.interrupt import uninterrupted
from dcres.linux.memory import free_for_guests
from dcres.linux.removal import OwnFolder, create
from dcres.model.whereabouts import Life

_SHARE_OF_FREE_MEMORY = 0.6


class LocalCluster:
    """A local cluster that `start` or `load` found running; see the module's docstring."""

    def __init__(self, home: Home, state: State) -> None:
        self._home = home
        self._nodes = LocalNodes(home, state)

    @classmethod
    def start(
        cls,
        home: Path,
        hosts: int,
        memory_per_host: int | None = None,
        store: Path | None = None,
        *,
        dashboard: bool = False,
        places: Places | None = None,
        tell: Tell = log_waiting,
    ) -> Self:
        """Start a head node and `hosts` host nodes, h0, h1, …; takes about 7 s for three.

        All hosts have the folder `store` in common, unless ``{host}`` stands in its path: then
        each has one of its own, as machines with disks of their own do.
        `memory_per_host` is what VMs may use on each, in bytes; by default an equal part of
        most of the free memory. With `places` the nodes are in a network that is there already
        and that this process reaches, instead of on loopback. `tell` hears what is waited for
        when that takes long. Raises Conflict if one runs in `home` already, NotOurs where its
        names are taken by files of others, NoRoom, and ClusterError with a node's last words if
        it does not come up; nothing is left then.
        """
        place = Home(named_folder(home, "the home"))
        tmpfs = folder_of_environ("DCRES_RAM") or Path("/dev/shm")
        memory = _memory_for(hosts, memory_per_host, tmpfs)
        chosen = place.store if store is None else named_folder(store, "the store")
        place.require_usable(with_store=chosen == place.store)
        place.require_none_lives()
        state = _new_state(tmpfs, chosen, memory, dashboard, places)
        place.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        tmpfs.mkdir(parents=True, exist_ok=True)
        with place.claimed() as claim:
            claim.clear_dead()
            place.require_usable(with_store=chosen == place.store)
            return cls._started(claim, state, hosts, tell)

    @classmethod
    def _started(cls, claim: Claim, state: State, hosts: int, tell: Tell) -> Self:
        cluster = cls(claim.home, state)
        claim.home.write(state)
        try:
            cluster._bring_up(hosts, claim.lock, NodesWait(tell))
        except BaseException:
            with uninterrupted():  # a second Ctrl-C would leave nodes that nobody finds
                end_all({CLUSTER_MARK: state.id})
                claim.clear(cluster._nodes.state)
            raise
        claim.share()
        return cluster

    @classmethod
    def load(cls, home: Path) -> Self:
        """The cluster that runs in `home`, here or elsewhere. Changes nothing.

        Raises NotFound, and ClusterError for a record that cannot be read.
        """
        place = Home(home.absolute())
        state = place.read()
        if state is None:
            raise NotFound(place.none_runs)
        match place.life(state):
            case Life.HERE | Life.ELSEWHERE:
                return cls(place, state)
            case Life.DEAD:
                raise NotFound(place.none_runs)
            case Life.UNKNOWN:
                raise NotFound(place.not_judged(state))

    @classmethod
    def clear_dead(cls, home: Path) -> bool:
        """Remove what a cluster that has ended by itself left; whether one did.

        Raises Conflict for one of which nobody knows whether it has ended.
        """
        place = Home(home.absolute())
        if place.read() is None:
            return False
        place.require_none_lives()
        with place.claimed() as claim:
            return claim.clear_dead()

    @property
    def home(self) -> Path:
        """The folder with its record."""
        return self._home.path

    @property
    def id(self) -> str:
        """The value of ``DCRES_CLUSTER`` in every process of this cluster."""
        return self._nodes.state.id

    @property
    def address(self) -> str:
        """``host:port`` for the gateway to Ray."""
        return self._nodes.state.address

    @property
    def token_path(self) -> Path:
        """The private file with the token that every process of the cluster must show."""
        return self._home.token

    @property
    def dashboard_url(self) -> str | None:
        """Where Ray jobs are submitted, if the cluster was started with a dashboard."""
        port = self._nodes.state.dashboard_port
        return None if port is None else f"http://127.0.0.1:{port}"

    @property
    def hosts(self) -> tuple[str, ...]:
        """The names of the host nodes, in the order they were started."""
        return tuple(self._nodes.state.hosts)

    @property
    def memory_per_host(self) -> int:
        """Bytes that VMs may use on each host."""
        return self._nodes.state.memory_per_host

    def settings(self, name: str) -> HostSettings:
        """The settings of host `name` (or of `HEAD`), as its actors see them. Raises NotFound."""
        return self._nodes.settings(name)

    @property
    def store(self) -> str:
        """Where checkpoints go; with ``{host}`` in it when every host has a store of its own."""
        return self._nodes.state.store

    @property
    def shared_store(self) -> Path | None:
        """The store that all hosts have in common, if they do."""
        return None if HOST_FIELD in self._nodes.state.store else Path(self._nodes.state.store)

    def add_host(self) -> str:
        """Start one more host node and return its name; names are never used twice."""
        return self.add_hosts(1)[0]

    def add_hosts(self, count: int) -> tuple[str, ...]:
        """As `add_host`, for several that start at the same time; all of them, or none."""
        self.require_here()
        names: list[str] = []
        with held_by_nodes(self._nodes.state, self._home.held()) as locks:
            try:
                names.extend(self._nodes.new_host() for _ in range(count))
                self._nodes.launch(names, locks, NodesWait(log_waiting))
            except BaseException:
                for name in names:
                    self.kill_host(name)
                raise
        return tuple(names)

    def kill_host(self, name: str) -> None:
        """Lose host `name` as if its machine had failed: its processes, memory and run folder.

        All of it is gone when this returns; Ray notices 5 s later. What the host wrote into
        the store stays. Raises NotFound, and Conflict as `stop` does.
        """
        self.require_here()
        node = self._nodes.node(name)
        end_all({CLUSTER_MARK: self.id, HOST_MARK: name})
        self._nodes.forget(name)
        for path in (node.settings.ram, node.temp, node.settings.run):
            if path.exists():
                OwnFolder.around(path).remove_below(path)

    def stop(self) -> None:
        """End everything that runs on this cluster and remove all but the store; repeatable.

        Raises Conflict for a cluster whose processes cannot all be seen from here.
        """
        state = self._home.read()
        if state is None or state.id != self.id:
            return
        self.require_here()
        end_all({CLUSTER_MARK: self.id})
        with self._home.claimed() as claim:
            claim.clear(state)

    def require_here(self) -> None:
        """Raises Conflict for a cluster that lives where its processes cannot be seen."""
        if self._home.life(self._nodes.state) is Life.ELSEWHERE:
            raise Conflict(self._home.lives_elsewhere(self._nodes.state))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _bring_up(self, hosts: int, lock: int, wait: NodesWait) -> None:
        for path, mark in own_folders(self._home, self._nodes.state).items():
            OwnFolder.new(path, mark)
        fd, _ = create(self.token_path, os.O_WRONLY)
        with open(fd, "w") as file:
            file.write(secrets.token_hex(32))
        if self.shared_store is not None:  # else every node makes its own
            self.shared_store.mkdir(parents=True, exist_ok=True, mode=0o700)
        with held_by_nodes(self._nodes.state, os.dup(lock)) as locks:
            self._nodes.launch_all(hosts, locks, wait)


def purge(home: Path) -> tuple[list[Path], list[Path]]:
    """Remove what clusters have put into `home`, checkpoints too, and `home` if that was all.

    Returns what was removed and what is left. Raises Conflict if one lives, HostError.
    """
    place = Home(home)
    place.require_none_lives()
    own, _ = place.remains()
    with place.claimed() as claim:
        claim.purge()
    left = sorted(home.iterdir()) if home.exists() else []
    removed = [path for path in own if path not in left]
    return [*removed, *([] if home.exists() else [home])], left


def _memory_for(hosts: int, wanted: int | None, tmpfs: Path) -> int:
    """Bytes per host, whole MiB. NoRoom if `wanted` does not fit `hosts` times."""
    free = free_for_guests(tmpfs)
    if wanted is None:
        return max(int(free * _SHARE_OF_FREE_MEMORY / max(hosts, 1)) // MIB, 1) * MIB
    if wanted * hosts > free:
        raise NoRoom(
            f"{hosts} hosts of {format_size(wanted)} do not fit into {tmpfs}, which has "
            f"{format_size(free)}; give the hosts less, or set DCRES_RAM to a larger tmpfs"
        )
    return wanted


def _new_state(
    tmpfs: Path, store: Path, memory_per_host: int, dashboard: bool, places: Places | None = None
) -> State:
    mark = secrets.token_hex(4)
    if places is None:
        places = Places(f"127.{1 + int(mark[:2], 16) % 254}.{int(mark[2:4], 16)}")
    network = places.network
    here = this_place()
    return State(
        id=mark,
        boot=here.boot,
        machine=here.machine,
        host=here.host,
        pids=here.pids,
        address=f"{network}.1:{free_port()}",
        network=network,
        temp=f"/tmp/dcres-{mark}",
        ram=str(tmpfs.absolute() / f"dcres-{mark}"),
        store=str(store.absolute()),
        memory_per_host=memory_per_host,
        dashboard_port=free_port() if dashboard else None,
        next_host=0,
        hosts={},
        launcher=places.launcher,
    )
