"""The gateway to Ray: the one file that imports it.

The rest of dcres sees hosts, reservations and ports:

* a *reservation* is a placement group: memory set aside for a VM, one bundle per host;
* an `ActorPort` is the name of an actor and a way to call it. It is a plain value that can
  be sent to other actors. Errors of dcres come out of a call as themselves; an actor that
  cannot answer raises `ActorGone`.

Facts about Ray 2.60 that shaped this file:

* RAY_AUTH_MODE is read when ray is imported. `_set_environment` reads it again, so that the
  order of imports does not decide who can connect.
* Errors that a raylet reports are printed on *standard output*, with ``log_to_driver`` off
  too. Standard output belongs to the caller (JSON); they go to our log.
* A restartable actor whose placement group is removed is killed and then restarts for ever:
  it never runs and keeps its name. So actors are killed before their group is removed.
* A call to an actor that is restarting fails at once (``max_task_retries=0``) instead of
  waiting; nothing that an actor does to a VM may be repeated behind our back.
* When a worker dies, Ray kills its process group. Processes that have to outlive an actor
  need a session of their own (`dcres.linux.process.spawn_detached`).
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import ray
import ray.exceptions
from ray._private import worker as ray_worker
from ray._private.authentication.authentication_token_setup import (
    AuthenticationTokenLoader,
    Config,
)
from ray._private.node import GcsClient
from ray._private.state import state as ray_state
from ray.core.generated.gcs_pb2 import ActorTableData
from ray.util.placement_group import (
    PlacementGroup,
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from dcres.actors.room import MIB, HostInfo, free_sentence, host_named, require_room, whole_mib
from dcres.errors import ActorGone, ClusterError, Conflict, DcresError, NoRoom, NotFound

NAMESPACE = "dcres"

_CONNECT_TIMEOUT_S = 3.0
_REMOVE_TIMEOUT_S = 20.0
_POLL_S = 0.02
_THREADS = 16
_HEAD_RESOURCE = {"node:__internal_head__": 0.001}
_LIVE_GROUPS = ("PENDING", "CREATED", "RESCHEDULING")

_log = logging.getLogger("dcres.ray")
_T = TypeVar("_T")


# Connecting.


def connect(address: str, token_path: Path | None = None) -> None:
    """Connect this process to the cluster at `address` (``host:port``); repeatable.

    Inside a Ray worker, where Ray is connected already, nothing happens. Raises ClusterError
    within a few seconds if nothing answers there, or if the token is not the cluster's.
    """
    if ray.is_initialized():
        return
    _require_listener(address)
    _set_environment(token_path)
    _require_token(address, token_path)
    logging.getLogger("ray").setLevel(logging.ERROR)
    ray_worker.print_to_stdstream = _log_raylet_message
    # Ray's core takes SIGTERM over: it prints a stack and ends us with no cleaning up.
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address=address,
            namespace=NAMESPACE,
            log_to_driver=False,
            configure_logging=False,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
        raise ClusterError(f"cannot join the Ray cluster at {address}: {error}") from error
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def connected_address() -> str | None:
    """The cluster that this process is connected to; None when it is not."""
    return str(ray.get_runtime_context().gcs_address) if ray.is_initialized() else None


def disconnect() -> None:
    """Leave the cluster; detached actors and reservations stay. Repeatable."""
    ray.shutdown()


def _require_listener(address: str) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ClusterError(f"{address!r} is not the address of a Ray cluster; write host:port")
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ClusterError(
            f"no Ray cluster answers at {address} ({error.strerror or error}); "
            "start one with `dcres up`, or name another with --address"
        ) from None


def _set_environment(token_path: Path | None) -> None:
    if token_path is not None:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(token_path)
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    # As in local_cluster: a call to an actor that just died fails 1 s earlier.
    os.environ.setdefault("RAY_timeout_ms_task_wait_for_death_info", "100")
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _require_token(address: str, token_path: Path | None) -> None:
    """Ask once with our token; ray.init itself would ask for 20 s."""
    if token_path is not None and not token_path.is_file():
        raise ClusterError(f"the token file {token_path} of the cluster at {address} is missing")
    try:
        GcsClient(address=address)
    except ray.exceptions.AuthenticationError as error:
        raise ClusterError(
            f"the Ray cluster at {address} does not accept our token; "
            "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to the cluster's token file"
        ) from error
    except ray.exceptions.RayError as error:
        raise ClusterError(f"what listens at {address} is not a Ray cluster: {error}") from error


def _log_raylet_message(data: Mapping[str, Any], ignore_prefix: bool = False) -> None:
    for line in data["lines"]:
        _log.info("%s: %s", data.get("pid"), line)


def current_actor_name() -> str | None:
    """The name of the actor that this code runs in; None outside of one."""
    return ray.get_runtime_context().get_actor_name() or None


def own_node_address() -> str:
    """The address that other hosts reach this one at: that of the Ray node we belong to."""
    node_id = ray.get_runtime_context().get_node_id()
    for node in ray.nodes():
        if node["NodeID"] == node_id:
            return str(node["NodeManagerAddress"])
    raise ClusterError(f"Ray does not know this node ({node_id}); restart the command")


# Hosts.


def hosts() -> list[HostInfo]:
    """All hosts that Ray knows, by name; dead ones too, unless the name is in use again."""
    used = _reserved_by_node()
    found: dict[str, HostInfo] = {}
    for node in sorted(ray.nodes(), key=lambda node: bool(node["Alive"])):
        name = _host_name(node)
        if name is not None:
            found[name] = _host_info(name, node, used.get(node["NodeID"], 0))
    return [found[name] for name in sorted(found)]


def _host_name(node: Mapping[str, Any]) -> str | None:
    """The label ``dcres-host``; a dead node has lost its resources but not its labels."""
    name = node["Labels"].get("dcres-host")
    return None if name is None else str(name)


def _host_info(name: str, node: Mapping[str, Any], used_bytes: int) -> HostInfo:
    total = int(node["Resources"].get("vm_memory", 0)) * MIB
    return HostInfo(
        name=name,
        node_id=node["NodeID"],
        address=node["NodeManagerAddress"],
        memory_total_bytes=total,
        memory_free_bytes=max(total - used_bytes, 0),
        alive=node["Alive"],
    )


def _reserved_by_node() -> dict[str, int]:
    """Node id → bytes of vm_memory in placement groups.

    Ray's own view of available resources lags behind by a heartbeat; this table does not.
    """
    used: dict[str, int] = {}
    for group in placement_group_table().values():
        if group["state"] not in _LIVE_GROUPS:
            continue
        for index, resources in group["bundles"].items():
            node_id = group["bundles_to_node_id"].get(index, "")
            share = int(resources.get("vm_memory", 0)) * MIB
            used[node_id] = used.get(node_id, 0) + share
    return used


def run_on(host: str, function: Callable[..., _T], *args: Any, timeout_s: float = 60.0) -> _T:
    """Run a plain function once on `host` and return its result.

    Raises NotFound, what the function raises (as `ActorPort.call` does), and ClusterError.
    """
    return start_on(host, function, *args).result(timeout_s)


def start_on(host: str, function: Callable[..., Any], *args: Any) -> Pending:
    """As `run_on`, but for waiting: a host's first worker takes a second to come up."""
    strategy = NodeAffinitySchedulingStrategy(host_named(host, hosts()).node_id, soft=False)
    remote = ray.remote(num_cpus=0, max_retries=0)(function)
    what = f"{function.__name__} on {host}"
    return Pending(what, remote.options(scheduling_strategy=strategy).remote(*args))


# Reservations.


@dataclass(frozen=True, slots=True)
class Reservation:
    """Memory set aside: bundle i on a host of its own. A plain value; see `reserve`."""

    name: str

    def host_of(self, bundle: int) -> str:
        """The host that bundle `bundle` lies on now. Raises NotFound if its host is dead."""
        node_id = self._table()["bundles_to_node_id"].get(bundle)
        for host in hosts():
            if host.node_id == node_id and host.alive:
                return host.name
        raise NotFound(f"part {bundle} of reservation {self.name} is on no live host")

    @property
    def hosts(self) -> tuple[str, ...]:
        """The host of every bundle, in order."""
        return tuple(self.host_of(bundle) for bundle in range(len(self._table()["bundles"])))

    def _table(self) -> Any:
        return placement_group_table(_group(self.name))


def reserve(
    name: str,
    shares_bytes: Sequence[int],
    hosts: Sequence[str] | None = None,
    timeout_s: float = 30.0,
) -> Reservation:
    """Set memory aside on as many different hosts as there are shares, or raise.

    With `hosts`, share i lies on host i. The reservation outlives this process; `release`
    ends it. Raises NoRoom with what is missing and what is free, Conflict if the name is
    taken, NotFound for a host that is not there.
    """
    taken = f"a reservation {name} exists already; release it first"
    if reservation(name) is not None:
        raise Conflict(taken)
    _require_room(shares_bytes, hosts)
    bundles = [{"vm_memory": float(whole_mib(share))} for share in shares_bytes]
    for bundle, host in zip(bundles, hosts or [], strict=False):
        bundle[f"host:{host}"] = 0.001
    try:
        group = placement_group(bundles, "STRICT_SPREAD", name=name, lifetime="detached")
    except ray.exceptions.RaySystemError as error:
        raise Conflict(taken) from error
    if group.wait(timeout_s):
        return Reservation(name)
    release(name)
    raise NoRoom(f"no memory for {name} within {timeout_s:.3g} s: {_free()}")


def _require_room(shares_bytes: Sequence[int], names: Sequence[str] | None) -> None:
    require_room(shares_bytes, names, hosts())


def _free() -> str:
    return free_sentence(hosts())


def reservation(name: str) -> Reservation | None:
    """The reservation of that name, if there is one."""
    try:
        table = placement_group_table(_group(name))
    except NotFound:
        return None
    return Reservation(name) if table.get("state") in _LIVE_GROUPS else None


def list_reservations(prefix: str) -> list[str]:
    """The names of live reservations that begin with `prefix`, sorted."""
    groups = placement_group_table().values()
    names = (group["name"] for group in groups if group["state"] in _LIVE_GROUPS)
    return sorted(name for name in names if name.startswith(prefix))


def release(name: str) -> None:
    """End a reservation and every actor in it; true when this returns. Repeatable."""
    try:
        group = _group(name)
    except NotFound:
        return
    for actor_name in _actors_in(group):
        kill(actor_name)
    remove_placement_group(group)
    _poll(lambda: reservation(name) is None, f"reservation {name} does not go away")


def _group(name: str) -> PlacementGroup:
    try:
        return get_placement_group(name)
    except ValueError:
        raise NotFound(f"there is no reservation {name}") from None


def _actors_in(group: PlacementGroup) -> list[str]:
    """The names of the live actors in a group, which only the raw actor table tells."""
    accessor = ray_state._connect_and_get_accessor()
    rows = (ActorTableData.FromString(row) for row in accessor.get_actor_table(None, None))
    return [
        row.name
        for row in rows
        if row.placement_group_id == group.id.binary() and row.state != ActorTableData.DEAD
    ]


# Actors.


@dataclass(frozen=True, slots=True)
class Pending:
    """A call under way; `what` names it in errors."""

    what: str
    _reference: Any

    def result(self, timeout_s: float) -> Any:
        """Wait for the answer. Raises what the call raised; see `ActorPort.call`."""
        try:
            return ray.get(self._reference, timeout=timeout_s)
        except ray.exceptions.GetTimeoutError:
            raise ClusterError(f"{self.what} did not answer within {timeout_s:.3g} s") from None
        except ray.exceptions.RayError as error:
            raise _translate(self.what, error) from error


def _translate(what: str, error: ray.exceptions.RayError) -> DcresError:
    """The error of dcres that a Ray error stands for."""
    if isinstance(error, ray.exceptions.ActorDiedError) and error.args:
        # An actor whose __init__ raised: the reason is the first argument.
        error = error.args[0] if isinstance(error.args[0], ray.exceptions.RayTaskError) else error
    if isinstance(error, ray.exceptions.RayTaskError):
        cause = error.cause
        if isinstance(cause, DcresError):
            return cause
        return ClusterError(f"{what} failed: {type(cause).__name__}: {cause}")
    if isinstance(error, ray.exceptions.RayActorError):
        return ActorGone(f"{what}: the actor has died or is restarting; try again shortly")
    if isinstance(error, ray.exceptions.WorkerCrashedError | ray.exceptions.NodeDiedError):
        return ActorGone(f"{what}: its process or host has died")
    return ClusterError(f"{what}: Ray failed ({type(error).__name__}: {error})")


@dataclass(frozen=True, slots=True)
class ActorPort:
    """An actor by name: callable from any process of the cluster, and picklable."""

    name: str

    def submit(self, method: str, *args: Any) -> Pending:
        """Start a call and return at once. Raises ActorGone if there is no such actor."""
        return Pending(f"{self.name}.{method}", getattr(self._handle(), method).remote(*args))

    def call(self, method: str, *args: Any, timeout_s: float = 60.0) -> Any:
        """Call `method` and wait for its result; it runs once, or not at all, or unknown.

        Raises the DcresError that the method raised; ActorGone if the actor is dead, is being
        restarted or died during the call (what it did until then is unknown); ClusterError
        for any other exception (its traceback is in ``__cause__``) and when `timeout_s` is
        over (the call may go on).
        """
        return self.submit(method, *args).result(timeout_s)

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until the actor answers, through a restart if need be. Raises ActorGone.

        An actor whose constructor raised a DcresError raises it here.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                self.call("__ray_ready__", timeout_s=max(deadline - time.monotonic(), 0.01))
            except ActorGone:
                if time.monotonic() > deadline or find(self.name) is None:
                    raise
                time.sleep(_POLL_S)
            else:
                return

    def pid(self, timeout_s: float = 10.0) -> int:
        """The process that the actor runs in now."""
        return int(self.call("__ray_call__", _pid, timeout_s=timeout_s))

    def _handle(self) -> Any:
        try:
            return ray.get_actor(self.name, namespace=NAMESPACE)
        except ValueError:
            raise ActorGone(f"there is no actor {self.name} in the cluster") from None


def _pid(_: object) -> int:
    return os.getpid()


def spawn(
    cls: type[Any],
    actor_name: str,
    args: Sequence[Any] = (),
    *,
    reservation: Reservation | None = None,
    bundle: int = 0,
    on_host: str | None = None,
    max_restarts: int = -1,
) -> ActorPort:
    """Start an actor of a plain class: on the host of a bundle, on a host, or on the head node.

    It is named and detached: it outlives this process, Ray starts it again when its process
    dies (`max_restarts`; -1: always), and its methods run in up to 16 threads, each call at
    most once. Returns before the constructor has run; see `ActorPort.wait_ready`. Raises
    Conflict if the name is taken, NotFound for a host that is not there.
    """
    placement: dict[str, Any] = {"resources": _HEAD_RESOURCE}
    if reservation is not None:
        group = _group(reservation.name)
        placement = {"scheduling_strategy": PlacementGroupSchedulingStrategy(group, bundle)}
    elif on_host is not None:
        node_id = host_named(on_host, hosts()).node_id
        placement = {"scheduling_strategy": NodeAffinitySchedulingStrategy(node_id, soft=False)}
    remote = ray.remote(num_cpus=0)(cls).options(
        name=actor_name,
        namespace=NAMESPACE,
        lifetime="detached",
        max_restarts=max_restarts,
        max_task_retries=0,
        max_concurrency=_THREADS,
        **placement,
    )
    try:
        remote.remote(*args)
    except (ValueError, ray.exceptions.ActorAlreadyExistsError) as error:
        raise Conflict(f"an actor {actor_name} exists already; stop it first") from error
    return ActorPort(actor_name)


def find(actor_name: str) -> ActorPort | None:
    """The actor of that name, whether it runs or is being restarted; None if there is none."""
    return ActorPort(actor_name) if actor_name in list_actors(actor_name) else None


def list_actors(prefix: str = "") -> list[str]:
    """The names of the actors of dcres that begin with `prefix`, sorted."""
    named = ray.util.list_named_actors(all_namespaces=True)
    names = (actor["name"] for actor in named if actor["namespace"] == NAMESPACE)
    return sorted(name for name in names if name.startswith(prefix))


def kill(actor_name: str) -> None:
    """End an actor for good, and free its name; what it spawned detached lives on. Repeatable."""
    try:
        ray.kill(ray.get_actor(actor_name, namespace=NAMESPACE), no_restart=True)
    except ValueError:
        return
    _poll(lambda: find(actor_name) is None, f"actor {actor_name} does not end")


def gather(
    pendings: Mapping[str, Pending], timeout_s: float
) -> tuple[dict[str, Any], dict[str, Exception]]:
    """Wait for calls on several hosts: the results of those that succeeded, and the failures.

    Every call gets its chance: one failure does not end the waiting for the others.
    """
    deadline = time.monotonic() + timeout_s
    results: dict[str, Any] = {}
    failures: dict[str, Exception] = {}
    for host, pending in pendings.items():
        try:
            results[host] = pending.result(max(deadline - time.monotonic(), 0.0))
        except DcresError as error:
            failures[host] = error
    return results, failures


def _poll(done: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + _REMOVE_TIMEOUT_S
    while not done():
        if time.monotonic() > deadline:
            raise ClusterError(otherwise)
        time.sleep(_POLL_S)
