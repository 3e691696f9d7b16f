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

import json
import os
import secrets
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self

from dcres.actors.awaiting_nodes import NodesWait, Tell, log_waiting
from dcres.actors.local_node import (
    CLUSTER_MARK,
    HOST_MARK,
    MIB,
    HeadRole,
    HostRole,
    LocalNode,
    Places,
    end_all,
    free_port,
    marked,
)
from dcres.config import HostSettings, format_size
from dcres.errors import ClusterError, Conflict, NoRoom, NotFound, StorageError
from dcres.linux.interrupt import uninterrupted
from dcres.linux.memory import free_for_guests
from dcres.linux.process import ProcessId

HEAD = "head"
HOST_FIELD = "{host}"  # in the store's path: every host has a store of its own

_SHARE_OF_FREE_MEMORY = 0.6
_STATE, _TOKEN, _HOSTS, _STORE = "cluster.json", "token", "hosts", "store"  # all in a home
_MOST_HOSTS = 240  # addresses 127.x.y.10 and up


@dataclass(frozen=True, slots=True)
class _State:
    """What ``cluster.json`` holds; paths and addresses as text."""

    id: str
    boot: str
    owner: tuple[int, int] | None  # pid and start time of who is starting it
    address: str
    network: str
    temp: str
    ram: str
    store: str
    memory_per_host: int
    dashboard_port: int | None
    next_host: int
    hosts: dict[str, str]  # name → address
    launcher: tuple[str, ...] = ()  # see `Places`


class LocalCluster:
    """A local cluster that `start` or `load` found running; see the module's docstring."""

    def __init__(self, home: Path, state: _State) -> None:
        self.home = home
        self._state = state

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
        when that takes long. Raises Conflict if one runs in `home` already, NoRoom, and
        ClusterError with a node's last words if it does not come up; nothing is left then.
        """
        home = home.absolute()
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        tmpfs = Path(os.environ.get("DCRES_RAM", "/dev/shm"))
        tmpfs.mkdir(parents=True, exist_ok=True)
        memory = _memory_for(hosts, memory_per_host, tmpfs)
        state = _new_state(tmpfs, store or default_store(home), memory, dashboard, places)
        cluster = cls(home, state)
        cluster._claim()
        try:
            cluster._bring_up(hosts, NodesWait(tell))
        except BaseException:
            with uninterrupted():  # a second Ctrl-C would leave nodes that nobody finds
                cluster.stop()
            raise
        return cluster

    @classmethod
    def load(cls, home: Path) -> LocalCluster:
        """The cluster that runs in `home`. Raises NotFound; cleans up what a dead one left."""
        home = home.absolute()
        missing = NotFound(f"no local cluster runs in {home}; start one with `dcres up`")
        try:
            state = _State(**json.loads((home / _STATE).read_text()))
        except FileNotFoundError:
            raise missing from None
        except (ValueError, TypeError):
            raise ClusterError(f"{home / _STATE} is damaged; remove it") from None
        cluster = cls(home, state)
        if not cluster._lives():
            cluster.stop()
            raise missing
        return cluster

    @property
    def id(self) -> str:
        """The value of ``DCRES_CLUSTER`` in every process of this cluster."""
        return self._state.id

    @property
    def address(self) -> str:
        """``host:port`` for the gateway to Ray."""
        return self._state.address

    @property
    def token_path(self) -> Path:
        """The private file with the token that every process of the cluster must show."""
        return self.home / _TOKEN

    @property
    def dashboard_url(self) -> str | None:
        """Where Ray jobs are submitted, if the cluster was started with a dashboard."""
        port = self._state.dashboard_port
        return None if port is None else f"http://127.0.0.1:{port}"

    @property
    def hosts(self) -> tuple[str, ...]:
        """The names of the host nodes, in the order they were started."""
        return tuple(self._state.hosts)

    @property
    def memory_per_host(self) -> int:
        """Bytes that VMs may use on each host."""
        return self._state.memory_per_host

    def settings(self, name: str) -> HostSettings:
        """The settings of host `name` (or of `HEAD`), as its actors see them. Raises NotFound."""
        address = self._state.hosts.get(name)
        if name == HEAD:
            address = self.address.partition(":")[0]
        if address is None:
            raise NotFound(f"no host {name} in this cluster; it has {', '.join(self.hosts)}")
        return HostSettings(
            name=name,
            run=self.home / _HOSTS / name / "run",
            ram=Path(self._state.ram) / name,
            store=Path(self._state.store.replace(HOST_FIELD, name)),
            address=address,
        )

    @property
    def store(self) -> str:
        """Where checkpoints go; with ``{host}`` in it when every host has a store of its own."""
        return self._state.store

    @property
    def shared_store(self) -> Path | None:
        """The store that all hosts have in common, if they do."""
        return None if HOST_FIELD in self._state.store else Path(self._state.store)

    def add_host(self) -> str:
        """Start one more host node and return its name; names are never used twice."""
        return self.add_hosts(1)[0]

    def add_hosts(self, count: int) -> tuple[str, ...]:
        """As `add_host`, for several that start at the same time; all of them, or none."""
        names: list[str] = []
        try:
            names.extend(self._new_host() for _ in range(count))
            launched = {node: node.launch() for node in map(self._node, names)}
            NodesWait(log_waiting).for_ready(launched)
        except BaseException:
            for name in names:
                self.kill_host(name)
            raise
        return tuple(names)

    def kill_host(self, name: str) -> None:
        """Lose host `name` as if its machine had failed: its processes, memory and run folder.

        All of it is gone when this returns; Ray notices 2 s later. What the host wrote into
        the store stays. Raises NotFound.
        """
        node = self._node(name)
        end_all({CLUSTER_MARK: self.id, HOST_MARK: name})
        for folder in (node.settings.ram, node.temp, node.settings.run):
            shutil.rmtree(folder, ignore_errors=True)
        hosts = {host: address for host, address in self._state.hosts.items() if host != name}
        self._save(replace(self._state, hosts=hosts))

    def stop(self) -> None:
        """End everything that runs on this cluster and remove all but the store; repeatable."""
        end_all({CLUSTER_MARK: self.id})
        for folder in (self._state.ram, self._state.temp, self.home / _HOSTS):
            shutil.rmtree(folder, ignore_errors=True)
        self.token_path.unlink(missing_ok=True)
        self._file.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def _file(self) -> Path:
        return self.home / _STATE

    def _claim(self) -> None:
        """Write cluster.json, unless a cluster runs (or is being started) in this home."""
        conflict = Conflict(f"a local cluster runs in {self.home} already; `dcres down` ends it")
        try:
            LocalCluster.load(self.home)
        except NotFound:
            try:
                _write_private(self._file, _text(self._state))
            except FileExistsError:
                raise conflict from None
        else:
            raise conflict

    def _save(self, state: _State) -> None:
        self._state = state
        beside = _beside(self._file)
        beside.unlink(missing_ok=True)
        _write_private(beside, _text(state))
        beside.replace(self._file)

    def _lives(self) -> bool:
        if self._state.boot != _boot_id():
            return False
        owner = self._state.owner
        being_started = owner is not None and ProcessId(*owner).alive
        return being_started or bool(marked({CLUSTER_MARK: self.id}))

    def _bring_up(self, hosts: int, wait: NodesWait) -> None:
        self.token_path.unlink(missing_ok=True)
        _write_private(self.token_path, secrets.token_hex(32))
        if self.shared_store is not None:  # else every node makes its own
            self.shared_store.mkdir(parents=True, exist_ok=True, mode=0o700)
        for folder in (self._state.temp, self._state.ram):
            Path(folder).mkdir(mode=0o700)
        head = self._node(HEAD)
        launched = {head: head.launch()}
        # A host node waits for the head by itself once its port answers; to start them
        # only when the head is ready costs 3 s more.
        wait.for_port(self.address, head, launched[head])
        for node in [self._node(self._new_host()) for _ in range(hosts)]:
            launched[node] = node.launch()
        wait.for_ready(launched)
        self._save(replace(self._state, owner=None))

    def _new_host(self) -> str:
        number = self._state.next_host
        if number >= _MOST_HOSTS:
            raise ClusterError(f"a local cluster has room for {_MOST_HOSTS} hosts; start a new one")
        hosts = {**self._state.hosts, f"h{number}": f"{self._state.network}.{10 + number}"}
        self._save(replace(self._state, next_host=number + 1, hosts=hosts))
        return f"h{number}"

    def _node(self, name: str) -> LocalNode:
        is_head = name == HEAD
        return LocalNode(
            cluster=self.id,
            home=self.home,
            address=self.address,
            settings=self.settings(name),
            temp=Path(self._state.temp) / name,
            role=HeadRole(self._state.dashboard_port)
            if is_head
            else HostRole(self.memory_per_host),
            launcher=() if is_head else self._launcher(name),
        )

    def _launcher(self, name: str) -> tuple[str, ...]:
        return tuple(word.replace(HOST_FIELD, name) for word in self._state.launcher)


def default_store(home: Path) -> Path:
    """The store of a cluster that was given no other."""
    return home / _STORE


def purgeable(home: Path) -> tuple[list[Path], list[Path]]:
    """What clusters have made in `home`, which `purge` removes, and what else is there."""
    state = home / _STATE
    made = {state, _beside(state), home / _TOKEN, home / _HOSTS, default_store(home)}
    children = sorted(home.iterdir())
    return [each for each in children if each in made], [
        each for each in children if each not in made
    ]


def purge(home: Path) -> tuple[list[Path], list[Path]]:
    """Remove what clusters have made in `home`, checkpoints too, and `home` if that was all.

    No cluster runs there. A store that was named stays where it is, also if a link in `home`
    leads to it. Returns what was removed and what is left. Raises StorageError.
    """
    made, left = purgeable(home)
    for path in made:
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        except OSError as error:
            why = f"{error.strerror}: {error.filename}"
            raise StorageError(f"cannot remove all of {path} ({why})") from None
    if left:
        return made, left
    try:
        home.rmdir()
    except OSError:  # a mount point, or a link
        return made, [home]
    return [*made, home], []


def _beside(path: Path) -> Path:
    return path.with_suffix(".new")


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


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _text(state: _State) -> str:
    return json.dumps(asdict(state), indent=1)


def _write_private(path: Path, text: str) -> None:
    """A new file that only its owner may read. FileExistsError if there is one."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "w") as file:
        file.write(text)


def _new_state(
    tmpfs: Path, store: Path, memory_per_host: int, dashboard: bool, places: Places | None = None
) -> _State:
    mark = secrets.token_hex(4)
    if places is None:
        places = Places(f"127.{1 + int(mark[:2], 16) % 254}.{int(mark[2:4], 16)}")
    network = places.network
    myself = ProcessId.of(os.getpid())
    return _State(
        id=mark,
        boot=_boot_id(),
        owner=None if myself is None else (myself.pid, myself.start_time),
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
