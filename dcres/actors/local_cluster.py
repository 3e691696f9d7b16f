"""A Ray cluster on this machine alone: one head node for control, and host nodes for VMs.

Every node is a ``ray start --block`` in a session of its own, outlives the process that
started it, and hands two marks in its environment to all that is ever started on it:
``DCRES_CLUSTER`` (this cluster) and ``DCRES_HOST`` (the host). By these marks, and never by
name, `LocalCluster.stop` and `LocalCluster.kill_host` find exactly their own processes.

Facts about Ray that shaped this file:

* Each cluster has a loopback network of its own, 127.x.y.0/24, and each node an address in
  it. Ray's fixed ports (10001, 52365) then never meet those of another cluster, a memory
  server has an address of its own as on a real host, and drivers attach to the head node.
* An agent that finds port 52365 taken retries for 3.5 s before the node is ready; so port 0.
* Workers and agents overwrite their title, and with it a random part of what
  /proc/PID/environ shows: their marks vanish. They stay in the session of their node's
  ``ray start``, whose own mark is never overwritten, so they are found by session.
* Ray's sockets live below --temp-dir, and a socket's path ends at 107 bytes.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self

from dcres.config import HostSettings, format_size
from dcres.errors import ClusterError, Conflict, NoRoom, NotFound
from dcres.linux.process import ProcessId, find_marked, spawn_detached

CLUSTER_MARK = "DCRES_CLUSTER"
HOST_MARK = "DCRES_HOST"
HEAD = "head"
MIB = 1 << 20

_SHARE_OF_FREE_MEMORY = 0.6
_START_TIMEOUT_S = 90.0
_STOP_TIMEOUT_S = 20.0
_POLL_S = 0.05
_READY = "Ray runtime started"
# Below the ephemeral ports (32768…), so that no outgoing connection takes one in between,
# and above Ray's worker ports (10002–19999).
_PORTS = range(20000, 32000)
_OBJECT_STORE_BYTES = 80_000_000
_RAY_ENVIRON = {
    "RAY_AUTH_MODE": "token",
    # A host's death is noticed in 1.4 s instead of 13.5 s.
    "RAY_health_check_initial_delay_ms": "500",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "500",
    "RAY_health_check_failure_threshold": "3",
    # A call to an actor that just died fails after 0.3 s instead of 1.3 s.
    "RAY_timeout_ms_task_wait_for_death_info": "100",
    # Guest memory is tmpfs and counts as used: the monitor would kill actors for it.
    "RAY_memory_monitor_refresh_ms": "0",
}


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
    dashboard: str | None
    next_host: int
    hosts: dict[str, str]


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return 0


def _marked(marks: Mapping[str, str]) -> set[ProcessId]:
    """The processes that carry all of `marks`, without ourselves."""
    found = [set(find_marked(key, value)) for key, value in marks.items()]
    return {process for process in set.intersection(*found) if process.pid != os.getpid()}


def _in_sessions(sessions: set[int]) -> set[ProcessId]:
    pids = (int(entry) for entry in os.listdir("/proc") if entry.isdigit())
    found = (ProcessId.of(pid) for pid in pids if _session(pid) in sessions)
    return {process for process in found if process is not None and process.alive}


def _end_all(marks: Mapping[str, str]) -> None:
    """SIGKILL whatever carries `marks` or shares a session with it, until nothing is left."""
    sessions: set[int] = set()
    deadline = time.monotonic() + _STOP_TIMEOUT_S
    while True:
        marked = _marked(marks)
        sessions |= {_session(process.pid) for process in marked} - {0, 1, os.getsid(0)}
        processes = marked | _in_sessions(sessions)
        if not processes:
            return
        if time.monotonic() > deadline:
            pids = sorted(process.pid for process in processes)
            raise ClusterError(f"processes {pids} do not end; end them by hand")
        for process in processes:
            process.kill(signal.SIGKILL)
        for process in processes:
            process.wait_gone(_STOP_TIMEOUT_S)


def _free_port(address: str) -> int:
    for _ in range(200):
        port = secrets.choice(_PORTS)
        with socket.socket() as probe:
            try:
                # Ray's GCS listens on every address, so every address is asked.
                probe.bind(("0.0.0.0", port))
            except OSError:
                continue
            return port
    raise ClusterError(f"no free port between {_PORTS.start} and {_PORTS.stop} on {address}")


def _free_memory(tmpfs: Path) -> int:
    """Bytes that guests may fill: free memory, as far as the tmpfs at `tmpfs` reaches."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    filesystem = os.statvfs(tmpfs)
    return min(available * 1024, filesystem.f_bavail * filesystem.f_frsize)


def _memory_for(hosts: int, wanted: int | None, tmpfs: Path) -> int:
    """Bytes per host, whole MiB. NoRoom if `wanted` does not fit `hosts` times."""
    free = _free_memory(tmpfs)
    if wanted is None:
        return max(int(free * _SHARE_OF_FREE_MEMORY / hosts) // MIB, 1) * MIB
    if wanted * hosts > free:
        raise NoRoom(
            f"{hosts} hosts of {format_size(wanted)} do not fit into {tmpfs}, which has "
            f"{format_size(free)}; give the hosts less, or set DCRES_RAM to a larger tmpfs"
        )
    return wanted


def _tail(path: Path, lines: int = 12) -> str:
    try:
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
    except OSError:
        return "(no log)"


def _remove_tree(path: str) -> None:
    """Remove a folder that this file made; anything else is left alone."""
    if Path(path).name.startswith("dcres-") or Path(path).parent.name.startswith("dcres-"):
        shutil.rmtree(path, ignore_errors=True)


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
    ) -> LocalCluster:
        """Start a head node and `hosts` host nodes, h0, h1, …; takes about 7 s for three.

        `memory_per_host` is what VMs may use on each, in bytes; by default an equal part of
        most of the free memory. Raises Conflict if one runs in `home` already, NoRoom, and
        ClusterError with the end of the log if a node does not come up; nothing is left then.
        """
        home = home.absolute()
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        tmpfs = Path(os.environ.get("DCRES_RAM", "/dev/shm"))
        tmpfs.mkdir(parents=True, exist_ok=True)
        memory = _memory_for(hosts, memory_per_host, tmpfs)
        cluster = cls(home, _new_state(tmpfs, store or home / "store", memory, dashboard))
        cluster._claim()
        try:
            cluster._bring_up(hosts)
        except BaseException:
            cluster.stop()
            raise
        return cluster

    @classmethod
    def load(cls, home: Path) -> LocalCluster:
        """The cluster that runs in `home`. Raises NotFound; cleans up what a dead one left."""
        home = home.absolute()
        missing = NotFound(f"no local cluster runs in {home}; start one with `dcres up`")
        try:
            state = _State(**json.loads((home / "cluster.json").read_text()))
        except FileNotFoundError:
            raise missing from None
        except (ValueError, TypeError):
            raise ClusterError(f"{home}/cluster.json is damaged; remove it") from None
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
        return self.home / "token"

    @property
    def dashboard_url(self) -> str | None:
        """Where Ray jobs are submitted, if the cluster was started with a dashboard."""
        return self._state.dashboard

    @property
    def hosts(self) -> tuple[str, ...]:
        """The names of the host nodes, in the order they were started."""
        return tuple(self._state.hosts)

    @property
    def memory_per_host(self) -> int:
        """Bytes that VMs may use on each host."""
        return self._state.memory_per_host

    def settings(self, name: str) -> HostSettings:
        """The settings of host `name`, as its actors see them. Raises NotFound."""
        address = self._state.hosts.get(name)
        if name == HEAD:
            address = self._state.address.partition(":")[0]
        if address is None:
            raise NotFound(f"no host {name} in this cluster; it has {', '.join(self.hosts)}")
        return HostSettings(
            name=name,
            run=self.home / "hosts" / name / "run",
            ram=Path(self._state.ram) / name,
            store=Path(self._state.store),
            address=address,
        )

    def add_host(self) -> str:
        """Start one more host node and return its name; names are never used twice."""
        name = self._new_host()
        node = self._launch(name)
        try:
            self._await_ready({name: node})
        except BaseException:
            self.kill_host(name)
            raise
        return name

    def kill_host(self, name: str) -> None:
        """Lose host `name` as if its machine had failed: its processes, memory and run folder.

        All of it is gone when this returns; Ray notices 1 to 2 s later. What the host wrote
        into the store stays. Raises NotFound.
        """
        settings = self.settings(name)
        _end_all({CLUSTER_MARK: self.id, HOST_MARK: name})
        _remove_tree(str(settings.ram))
        _remove_tree(f"{self._state.temp}/{name}")
        shutil.rmtree(settings.run, ignore_errors=True)
        hosts = {host: address for host, address in self._state.hosts.items() if host != name}
        self._save(replace(self._state, hosts=hosts))

    def stop(self) -> None:
        """End everything that runs on this cluster and remove all but the store; repeatable."""
        _end_all({CLUSTER_MARK: self.id})
        _remove_tree(self._state.ram)
        _remove_tree(self._state.temp)
        shutil.rmtree(self.home / "hosts", ignore_errors=True)
        self.token_path.unlink(missing_ok=True)
        (self.home / "cluster.json").unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # How a cluster comes up.

    def _claim(self) -> None:
        """Write cluster.json, unless a cluster runs (or is being started) in this home."""
        try:
            running = type(self).load(self.home)
        except NotFound:
            running = None
        try:
            if running is None:
                self._save(self._state, exclusive=True)
                return
        except FileExistsError:
            pass
        raise Conflict(f"a local cluster runs in {self.home} already; `dcres down` ends it")

    def _lives(self) -> bool:
        if self._state.boot != _boot_id():
            return False
        return bool(_marked({CLUSTER_MARK: self.id})) or self._is_starting()

    def _is_starting(self) -> bool:
        owner = self._state.owner
        return owner is not None and ProcessId(*owner).alive

    def _save(self, state: _State, *, exclusive: bool = False) -> None:
        self._state = state
        path = self.home / "cluster.json"
        text = json.dumps(asdict(state), indent=1)
        if exclusive:
            _write_private(path, text)
        else:
            beside = path.with_suffix(".new")
            beside.unlink(missing_ok=True)
            _write_private(beside, text)
            beside.replace(path)

    def _bring_up(self, hosts: int) -> None:
        self.token_path.unlink(missing_ok=True)
        _write_private(self.token_path, secrets.token_hex(32))
        Path(self._state.store).mkdir(parents=True, exist_ok=True)
        for folder in (self._state.temp, self._state.ram):
            Path(folder).mkdir(mode=0o700)
        nodes = {HEAD: self._launch(HEAD)}
        # A host node waits for the head by itself once its port answers; to start them
        # only when the head is ready costs 3 s more.
        self._await_port(nodes[HEAD])
        for name in [self._new_host() for _ in range(hosts)]:
            nodes[name] = self._launch(name)
        self._await_ready(nodes)
        self._save(replace(self._state, owner=None))

    def _new_host(self) -> str:
        number = self._state.next_host
        if number >= 240:
            raise ClusterError("a local cluster has room for 240 hosts; start a new one")
        hosts = {**self._state.hosts, f"h{number}": f"{self._state.network}.{10 + number}"}
        self._save(replace(self._state, next_host=number + 1, hosts=hosts))
        return f"h{number}"

    def _launch(self, name: str) -> ProcessId:
        settings = self.settings(name)
        settings.run.mkdir(parents=True, exist_ok=True, mode=0o700)
        settings.ram.mkdir(mode=0o700)
        temp = Path(self._state.temp) / name
        temp.mkdir(mode=0o700)
        return spawn_detached(
            [sys.executable, "-m", "ray.scripts.scripts", *self._arguments(settings, temp)],
            log=self._log(name),
            env=self._environ(settings),
            cwd=temp,
        )

    def _arguments(self, settings: HostSettings, temp: Path) -> list[str]:
        common = [
            "start",
            "--block",
            "--log-style=record",
            "--log-color=false",
            "--disable-usage-stats",
            f"--node-ip-address={settings.address}",
            f"--node-name={settings.name}",
            f"--temp-dir={temp}",
            "--num-cpus=1",
            f"--object-store-memory={_OBJECT_STORE_BYTES}",
            "--include-log-monitor=false",
            "--dashboard-agent-listen-port=0",
        ]
        if settings.name == HEAD:
            return [*common, *self._head_arguments()]
        resources = {"vm_memory": self.memory_per_host // MIB, f"host:{settings.name}": 1}
        return [
            *common,
            f"--address={self.address}",
            f"--resources={json.dumps(resources)}",
            f"--labels=dcres-host={settings.name}",
        ]

    def _head_arguments(self) -> list[str]:
        port = self.address.rpartition(":")[2]
        arguments = ["--head", f"--port={port}", "--no-monitor"]
        arguments.append(f"--ray-client-server-port={_free_port(self._state.network)}")
        if self.dashboard_url is None:
            return [*arguments, "--include-dashboard=false"]
        dashboard_port = self.dashboard_url.rpartition(":")[2]
        return [*arguments, "--include-dashboard=true", f"--dashboard-port={dashboard_port}"]

    def _environ(self, settings: HostSettings) -> dict[str, str]:
        inherited = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("RAY_", "DCRES_"))
        }
        return {
            **inherited,
            **_RAY_ENVIRON,
            "RAY_AUTH_TOKEN_PATH": str(self.token_path),
            "DCRES_HOME": str(self.home),
            CLUSTER_MARK: self.id,
            **settings.environ(),
        }

    def _log(self, name: str) -> Path:
        return self.home / "hosts" / name / "ray.log"

    def _await_port(self, head: ProcessId) -> None:
        address, _, port = self.address.rpartition(":")
        deadline = time.monotonic() + _START_TIMEOUT_S
        while True:
            self._require_alive(HEAD, head, deadline)
            try:
                socket.create_connection((address, int(port)), timeout=1).close()
            except OSError:
                time.sleep(_POLL_S)
            else:
                return

    def _await_ready(self, nodes: Mapping[str, ProcessId]) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        waiting = dict(nodes)
        while waiting:
            for name, node in list(waiting.items()):
                self._require_alive(name, node, deadline)
                if _READY in self._log(name).read_text(errors="replace"):
                    del waiting[name]
            time.sleep(_POLL_S)

    def _require_alive(self, name: str, node: ProcessId, deadline: float) -> None:
        late = time.monotonic() > deadline
        if node.alive and not late:
            return
        why = "was not ready in time" if late else "ended"
        log = self._log(name)
        raise ClusterError(f"Ray's node {name} {why}; the end of its log:\n{_tail(log)}")


def _write_private(path: Path, text: str) -> None:
    """A new file that only its owner may read. FileExistsError if there is one."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "w") as file:
        file.write(text)


def _new_state(tmpfs: Path, store: Path, memory_per_host: int, dashboard: bool) -> _State:
    mark = secrets.token_hex(4)
    network = f"127.{1 + int(mark[:4], 16) % 254}.{int(mark[4:6], 16)}"
    myself = ProcessId.of(os.getpid())
    url = f"http://127.0.0.1:{_free_port(network)}" if dashboard else None
    return _State(
        id=mark,
        boot=_boot_id(),
        owner=None if myself is None else (myself.pid, myself.start_time),
        address=f"{network}.1:{_free_port(network)}",
        network=network,
        temp=f"/tmp/dcres-{mark}",
        ram=str(tmpfs.absolute() / f"dcres-{mark}"),
        store=str(store.absolute()),
        memory_per_host=memory_per_host,
        dashboard=url,
        next_host=0,
        hosts={},
    )
