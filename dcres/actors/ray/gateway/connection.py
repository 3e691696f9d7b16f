"""Joining a Ray cluster with this process, and leaving it."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
from ray._private import worker as ray_worker
from ray._private.authentication.authentication_token_setup import (
    AuthenticationTokenLoader,
    Config,
)

from dcres.actors.ray.gateway.addresses import as_ray_writes
from dcres.actors.ray.gateway.looking import require_joinable
from dcres.errors import ClusterError, Conflict

NAMESPACE = "dcres"

_ASK_TIMEOUT_S = 10.0

_log = logging.getLogger("dcres.ray")


def connect(address: str, token_path: Path | None = None) -> bool:
    """Connect this process to the cluster at `address` (``host:port``); repeatable.

    Returns whether this call made the connection: if so, the caller is to leave. Otherwise it
    is there already, as inside a Ray worker, and somebody else's. Raises Conflict if it is to
    another cluster, and what `require_joinable` raises if nobody can join it from here.
    """
    connected = connected_address()
    if connected is not None:
        _require_same(connected, address)
        return False
    _set_environment(token_path)
    logging.getLogger("ray").setLevel(logging.ERROR)
    require_joinable(address)
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
    return True


def connected_address() -> str | None:
    """The cluster that this process is connected to; None when it is not."""
    return str(ray.get_runtime_context().gcs_address) if ray.is_initialized() else None


def disconnect() -> None:
    """Leave the cluster; detached actors and reservations stay. Repeatable."""
    ray.shutdown()


def _require_same(connected: str, address: str) -> None:
    if connected not in (address, as_ray_writes(address)):
        raise Conflict(
            f"this process is connected to the cluster at {connected}; "
            f"close that connection before using {address}"
        )


def _set_environment(token_path: Path | None) -> None:
    if token_path is not None:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(token_path)
        os.environ.pop("RAY_AUTH_TOKEN", None)  # would go before the file
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    # As in local_cluster: a call to an actor that just died fails 1 s earlier.
    os.environ.setdefault("RAY_timeout_ms_task_wait_for_death_info", "100")
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _log_raylet_message(data: Mapping[str, Any], ignore_prefix: bool = False) -> None:
    for line in data["lines"]:
        _log.info("%s: %s", data.get("pid"), line)


def current_actor_name() -> str | None:
    """The name of the actor that this code runs in; None outside of one."""
    return ray.get_runtime_context().get_actor_name() or None


def cluster_id() -> str:
    """The name that Ray's control service gave the cluster when it first began.

    It keeps it through restarts as far as it keeps anything: a head node that is started again
    without storage of its own begins another cluster.
    """
    return str(ray_worker.global_worker.gcs_client.cluster_id.hex())


def own_driver() -> str | None:
    """The Ray job whose driver this process is; None in a worker, which is not what a job is for.

    A detached actor outlives its job, so its job's end says nothing about what it wants.
    """
    worker = ray_worker.global_worker
    if worker.mode != ray.SCRIPT_MODE:
        return None
    return str(ray.get_runtime_context().get_job_id())


def driver_is_gone(driver: str) -> bool:
    """Whether that process has ended, as its raylet has seen, or its node died. ClusterError."""
    try:
        jobs = ray_worker.global_worker.gcs_client.get_all_job_info(
            job_or_submission_id=driver,
            skip_submission_job_info_field=True,
            skip_is_running_tasks_field=True,
            timeout=_ASK_TIMEOUT_S,
        )
    except ray.exceptions.RayError as error:
        raise ClusterError(f"not known whether job {driver} runs: {error}") from error
    return any(job.is_dead for job in jobs.values())


def own_node_address() -> str:
    """The address that other hosts reach this one at: that of the Ray node we belong to."""
    node_id = ray.get_runtime_context().get_node_id()
    for node in ray.nodes():
        if node["NodeID"] == node_id:
            return str(node["NodeManagerAddress"])
    raise ClusterError(f"Ray does not know this node ({node_id}); restart the command")
