"""The nodes of a local cluster: which there are, by its record, and the start of more of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dcres.actors.ray.awaiting_nodes import NodesWait
from dcres.actors.ray.local_home import HOST_FIELD, Home, State
from dcres.actors.ray.local_node import HeadRole, HostRole, LocalNode
from dcres.config import HostSettings
from dcres.errors import ClusterError, NotFound

HEAD = "head"

_MOST_HOSTS = 240  # addresses 127.x.y.10 and up


class LocalNodes:
    """The nodes that the record in `home` names; `state` is what was written there last."""

    def __init__(self, home: Home, state: State) -> None:
        self._home = home
        self.state = state

    def settings(self, name: str) -> HostSettings:
        """The settings of host `name` (or of `HEAD`), as its actors see them. Raises NotFound."""
        address = self.state.hosts.get(name)
        if name == HEAD:
            address = self.state.address.partition(":")[0]
        if address is None:
            names = ", ".join(self.state.hosts)
            raise NotFound(f"no host {name} in this cluster; it has {names}")
        return HostSettings(
            name=name,
            run=self._home.hosts / name / "run",
            ram=Path(self.state.ram) / name,
            store=Path(self.state.store.replace(HOST_FIELD, name)),
            address=address,
        )

    def node(self, name: str) -> LocalNode:
        """The node of that name. Raises NotFound."""
        state, is_head = self.state, name == HEAD
        launcher = tuple(word.replace(HOST_FIELD, name) for word in state.launcher)
        return LocalNode(
            cluster=state.id,
            home=self._home.path,
            address=state.address,
            settings=self.settings(name),
            temp=Path(state.temp) / name,
            role=HeadRole(state.dashboard_port) if is_head else HostRole(state.memory_per_host),
            launcher=() if is_head else launcher,
        )

    def new_host(self) -> str:
        """Write one more host down; its name, which was never used before. Raises ClusterError."""
        state = self.state
        number = state.next_host
        if number >= _MOST_HOSTS:
            raise ClusterError(f"a local cluster has room for {_MOST_HOSTS} hosts; start a new one")
        hosts = {**state.hosts, f"h{number}": f"{state.network}.{10 + number}"}
        self._save(replace(state, next_host=number + 1, hosts=hosts))
        return f"h{number}"

    def forget(self, name: str) -> None:
        """The host is lost: the record names it no more."""
        hosts = {host: address for host, address in self.state.hosts.items() if host != name}
        self._save(replace(self.state, hosts=hosts))

    def launch_all(self, hosts: int, locks: tuple[int, ...], wait: NodesWait) -> None:
        """Start the head and `hosts` new hosts, and wait until they are a cluster."""
        head = self.node(HEAD)
        launched = {head: head.launch(locks)}
        # A host node waits for the head by itself once its port answers; to start them
        # only when the head is ready costs 3 s more.
        wait.for_port(self.state.address, head, launched[head])
        for node in [self.node(self.new_host()) for _ in range(hosts)]:
            launched[node] = node.launch(locks)
        wait.for_ready(launched)

    def launch(self, names: Sequence[str], locks: tuple[int, ...], wait: NodesWait) -> None:
        """Start these hosts at the same time, and wait until they are part of the cluster."""
        wait.for_ready({node: node.launch(locks) for node in map(self.node, names)})

    def _save(self, state: State) -> None:
        self.state = state
        self._home.write(state)
