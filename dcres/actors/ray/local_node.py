"""One Ray node on this machine: its command line, its environment, its end.

Facts about Ray that shaped this file:

* An agent that finds port 52365 taken retries for 3.5 s before the node is ready; so another.
  Not port 0: the raylet then waits for the agent to write down which it got, and ends after 30 s
  that no setting changes. Two agents per node that import Ray need longer than that where many
  nodes start at once, or the machine is slow or busy. Of one of the ports the raylet is not even
  told (Ray 2.60), so we write it down before the agent does.
* Workers and agents overwrite their title, and with it a random part of what
  /proc/PID/environ shows: their marks vanish. They stay in the session of their node's
  ``ray start``, whose own mark is never overwritten, so they are found by session.
* Ray's sockets live below --temp-dir, and a socket's path ends at 107 bytes.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from dcres.config import HostSettings
from dcres.errors import ClusterError
from dcres.linux.process import ProcessId, find_marked, spawn_detached

CLUSTER_MARK = "DCRES_CLUSTER"
HOST_MARK = "DCRES_HOST"
MIB = 1 << 20

LONGEST_START_S = 3600  # of a node: a guard against one that hangs

_END_TIMEOUT_S = 20.0
_READY = "Ray runtime started"
_PROMISE = ("--listen-port", "--node_id", "--session_dir")  # in a raylet's command line
# Below the ephemeral ports (32768…), so that no outgoing connection takes one in between,
# and above Ray's worker ports (10002–19999).
_PORTS = range(20000, 24000)
_AGENT_PORTS = range(24000, 32000)
_AGENT_OPTIONS = (
    "--dashboard-agent-listen-port",
    "--dashboard-agent-grpc-port",
    "--metrics-export-port",
    "--runtime-env-agent-port",
)
_OBJECT_STORE_BYTES = 80_000_000
RAY_ENVIRON = {
    "RAY_AUTH_MODE": "token",
    # A host's death is noticed after 5 s instead of 13.5 s. Three checks of 500 ms, which would
    # notice it after 2 s, declared hosts dead that only had to wait for a busy processor.
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "5",
    # A call to an actor that just died fails up to 1 s earlier.
    "RAY_timeout_ms_task_wait_for_death_info": "100",
    # Guest memory is tmpfs and counts as used: the monitor would kill actors for it.
    "RAY_memory_monitor_refresh_ms": "0",
    # How long Ray waits for processes of its own that are being started. It would give a machine
    # that is slow or busy 5 to 60 s; dcres sees whether they live, and says what it waits for.
    "RAY_raylet_start_wait_time_s": str(LONGEST_START_S),
    "RAY_NUM_REDIS_GET_RETRIES": "300",  # of a node, for the head's answer: about 1 s each
    "RAY_gcs_rpc_server_connect_timeout_s": "120",
    "RAY_agent_register_timeout_ms": "600000",
    "RAY_worker_register_timeout_seconds": "600",
    "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "600",
    # What every worker does first; ray.init would say so for one job's workers.
    "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR": "dcres.actors.preload.import_actors",
}


@dataclass(frozen=True, slots=True)
class HeadRole:
    """The head node: control only, no memory for VMs."""

    dashboard_port: int | None


@dataclass(frozen=True, slots=True)
class HostRole:
    """A host node, with `memory_bytes` for VMs."""

    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Places:
    """Where a cluster's nodes are, when it is not this machine's loopback.

    `network` is the first three numbers of a /24 network: the head node has the address .1 in it
    and host hN the address .(10+N). `launcher` stands before the command of every host node, and
    with it before all that ever runs there: ``ip netns exec {host}``, say; ``{host}`` in it is
    the host's name.
    """

    network: str
    launcher: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LocalNode:
    """All that it takes to start one node; `address` is the cluster's, not the node's."""

    cluster: str
    home: Path
    address: str
    settings: HostSettings
    temp: Path
    role: HeadRole | HostRole
    launcher: tuple[str, ...] = ()  # what `ray start` is started by; see `Places`

    @property
    def log(self) -> Path:
        """What ``ray start`` prints."""
        return self.settings.run.parent / "ray.log"

    def launch(self, locks: Sequence[int]) -> ProcessId:
        """Start the node, in a session of its own; it makes itself ready in about 5 s.

        It holds the descriptors `locks` as long as it lives.
        """
        self.settings.run.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.settings.ram.mkdir(mode=0o700)
        self.temp.mkdir(mode=0o700)
        if isinstance(self.role, HostRole):
            self.settings.store.mkdir(parents=True, exist_ok=True, mode=0o700)
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block"]
        return spawn_detached(
            [*self.launcher, *ray, *self.arguments()],
            log=self.log,
            env=self.environ(),
            cwd=self.temp,
            inherited=locks,
        )

    def promise_agent(self, raylet: Sequence[str]) -> None:
        """Write down where the agent will listen, for the raylet with that command line."""
        text = "\n".join(raylet)
        found = [re.search(rf"{option}=(\S+)", text) for option in _PROMISE]
        if None in found or not raylet:  # another version of Ray, or it has ended
            return
        port, node_id, folder = (each[1] for each in found if each is not None)
        path = Path(folder) / f"dashboard_agent_listen_port_{node_id}"
        if not path.exists():
            beside = path.with_suffix(".dcres")
            beside.write_text(port)
            beside.replace(path)

    def is_ready(self) -> bool:
        """Whether the node says that it is part of the cluster."""
        return _READY in self.log.read_text(errors="replace")

    def arguments(self) -> list[str]:
        """The options of ``ray start``."""
        common = [
            "--log-style=record",
            "--log-color=false",
            "--disable-usage-stats",
            f"--node-ip-address={self.settings.address}",
            f"--node-name={self.settings.name}",
            f"--temp-dir={self.temp}",
            "--num-cpus=1",
            f"--object-store-memory={_OBJECT_STORE_BYTES}",
            "--include-log-monitor=false",
            *map("{}={}".format, _AGENT_OPTIONS, agent_ports(self.settings.address)),
        ]
        match self.role:
            case HeadRole(port):
                return [*common, *self._head_arguments(port)]
            case HostRole(memory_bytes):
                return [*common, *self._host_arguments(memory_bytes)]

    def _host_arguments(self, memory_bytes: int) -> list[str]:
        name = self.settings.name
        resources = {"vm_memory": memory_bytes // MIB, f"host:{name}": 1}
        return [
            f"--address={self.address}",
            f"--resources={json.dumps(resources)}",
            f"--labels=dcres-host={name}",
        ]

    def _head_arguments(self, dashboard_port: int | None) -> list[str]:
        arguments = ["--head", f"--port={self.address.rpartition(':')[2]}", "--no-monitor"]
        arguments.append(f"--ray-client-server-port={free_port()}")
        if dashboard_port is None:
            return [*arguments, "--include-dashboard=false"]
        return [*arguments, "--include-dashboard=true", f"--dashboard-port={dashboard_port}"]

    def environ(self) -> dict[str, str]:
        """The environment of the node and of all that is started on it."""
        inherited = {key: text for key, text in os.environ.items() if not key.startswith("RAY_")}
        return {
            **inherited,
            **RAY_ENVIRON,
            # ``python`` in a Ray job's entry point is the Python that dcres is installed for.
            "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}",
            "RAY_AUTH_TOKEN_PATH": str(self.home / "token"),
            "DCRES_HOME": str(self.home),
            CLUSTER_MARK: self.cluster,
            **self.settings.environ(),
        }


def free_port() -> int:
    """A port that nothing on this machine listens on."""
    for _ in range(200):
        port = secrets.choice(_PORTS)
        if _is_free(port):
            return port
    raise ClusterError(f"no free port between {_PORTS.start} and {_PORTS.stop}")


def agent_ports(address: str) -> list[int]:
    """Ports for the agents of the node with that address, which nothing listens on.

    They are looked for from a place that the address gives: an agent opens its port seconds later,
    and nodes that start meanwhile are to find other ones.
    """
    _, *network, node = map(int, address.split("."))
    first = (network[0] << 8 | network[1]) * 16 + node * len(_AGENT_OPTIONS)
    ports = (_AGENT_PORTS[(first + step) % len(_AGENT_PORTS)] for step in range(len(_AGENT_PORTS)))
    found = list(islice(filter(_is_free, ports), len(_AGENT_OPTIONS)))
    if len(found) < len(_AGENT_OPTIONS):
        raise ClusterError(f"no free ports between {_AGENT_PORTS.start} and {_AGENT_PORTS.stop}")
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            # Ray's servers listen on every address, so every address is asked.
            probe.bind(("0.0.0.0", port))
        except OSError:
            return False
        return True


def marked(marks: Mapping[str, str]) -> set[ProcessId]:
    """The processes that carry all of `marks`, without ourselves."""
    found = [set(find_marked(key, value)) for key, value in marks.items()]
    return {process for process in set.intersection(*found) if process.pid != os.getpid()}


def end_all(marks: Mapping[str, str]) -> None:
    """SIGKILL whatever carries `marks`, and the rest of its nodes, until nothing is left."""
    sessions: set[int] = set()
    deadline = time.monotonic() + _END_TIMEOUT_S
    while True:
        carriers = marked(marks)
        sessions |= _sessions_led_by(carriers)
        processes = carriers | _in_sessions(sessions)
        if not processes:
            return
        if time.monotonic() > deadline:
            pids = sorted(process.pid for process in processes)
            raise ClusterError(f"processes {pids} do not end; end them by hand")
        for process in processes:
            process.kill(signal.SIGKILL)
        for process in processes:
            process.wait_gone(_END_TIMEOUT_S)


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return 0


def _sessions_led_by(processes: set[ProcessId]) -> set[int]:
    """Their sessions, except those that a stranger leads, such as a terminal's."""
    pids = {process.pid for process in processes}
    sessions = {_session(pid) for pid in pids} - {0}
    leaders = {session: ProcessId.of(session) for session in sessions}
    return {s for s, leader in leaders.items() if s in pids or leader is None or not leader.alive}


def _in_sessions(sessions: set[int]) -> set[ProcessId]:
    pids = (int(entry) for entry in os.listdir("/proc") if entry.isdigit())
    found = (ProcessId.of(pid) for pid in pids if _session(pid) in sessions)
    mine = os.getpid()
    return {process for process in found if process and process.alive and process.pid != mine}
