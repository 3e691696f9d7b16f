"""A worker process in reserve on every host, so that the next actor there starts soon.

Most of the time until an actor answers is its process: the interpreter, and what it imports. Ray
can be told to start one ahead that belongs to no job yet, and gives it to the next actor. So
whoever starts an actor orders the next process for that node. What that process imports ahead is
in `dcres.actors.preload`.
"""

from __future__ import annotations

import logging
import threading

import grpc
import ray
from ray._private.grpc_utils import init_grpc_channel
from ray.core.generated.common_pb2 import Language
from ray.core.generated.node_manager_pb2 import PrestartWorkersRequest
from ray.core.generated.node_manager_pb2_grpc import NodeManagerServiceStub

_AFTER_S = 2.0  # by then what the actor was started for is done, or takes long anyway
_KEEP_S = 365 * 24 * 3600
_TIMEOUT_S = 5.0

_log = logging.getLogger("dcres.ray")


def order_soon(node_id: str) -> None:
    """Have that node start a process in a while, if this one lives until then.

    If that fails, the next actor there takes a second longer; nothing else depends on it.
    """
    timer = threading.Timer(_AFTER_S, _order, (node_id,))
    timer.daemon = True
    timer.start()


def order_from(_: object, node_id: str) -> None:
    """`order_soon`, to be run by an actor."""
    order_soon(node_id)


def _order(node_id: str) -> None:
    for node in ray.nodes():
        if node["NodeID"] == node_id and node["Alive"]:
            try:
                _prestart(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}")
            except grpc.RpcError as error:
                _log.warning("no spare process for the next actor: %s", error)


def _prestart(address: str) -> None:
    """Source: NodeManagerService.PrestartWorkers in Ray's node_manager.proto."""
    request = PrestartWorkersRequest(
        language=Language.PYTHON, num_workers=1, keep_alive_duration_secs=_KEEP_S
    )
    request.runtime_env_info.serialized_runtime_env = "{}"
    channel = init_grpc_channel(address)
    try:
        NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=_TIMEOUT_S)
    finally:
        channel.close()
