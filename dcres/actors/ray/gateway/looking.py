"""Whether this process can join a cluster, found out before Ray's core tries.

The core answers what is wrong with a C++ stack on standard error and the end of the process, or
after 40 s and more. So all that may be wrong is looked at here first, over gRPC from Python, which
waits as long as we say and prints nothing.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
from ray._common.usage.usage_constants import CLUSTER_METADATA_KEY
from ray._private import ray_constants, services
from ray._private.grpc_utils import init_grpc_channel
from ray._private.utils import check_version_info, compute_version_info
from ray.core.generated.gcs_pb2 import GcsNodeInfo
from ray.core.generated.gcs_service_pb2 import (
    GetAllNodeInfoRequest,
    GetClusterIdRequest,
    InternalKVGetRequest,
)
from ray.core.generated.gcs_service_pb2_grpc import (
    InternalKVGcsServiceStub,
    NodeInfoGcsServiceStub,
)

from dcres.actors.ray.gateway.addresses import split
from dcres.errors import ClusterError

_CONNECT_TIMEOUT_S = 3.0
_ANSWER_TIMEOUT_S = 10.0
_NODE_TIMEOUT_S = 3.0  # a node that is just starting may not be in the cluster's table yet
_POLL_S = 0.2


def require_joinable(address: str) -> None:
    """Raise ClusterError unless a driver here can join the cluster at `address`.

    Somebody has to listen there, be a Ray cluster that accepts our token, run the same Ray and
    Python as we do, and have a node on this machine. Each takes seconds to find out at most.
    """
    require_listener(address)
    require_token()
    with _head(address) as head:
        head.require_ray()
        head.require_same_versions()
        head.require_node_here()


def require_listener(address: str) -> None:
    """Raise ConfigError if `address` is none, ClusterError if nobody listens there."""
    try:
        socket.create_connection(split(address), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ClusterError(
            f"no Ray cluster answers at {address} ({error.strerror or error}); "
            "start one with `dcres up`, or name another with --address or RAY_ADDRESS"
        ) from None


def require_token() -> None:
    """Raise ClusterError if there should be a token and is none: Ray's core aborts then."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token" or os.environ.get("RAY_AUTH_TOKEN"):
        return
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    try:
        why = "" if path.read_bytes().strip() else "it is empty"
    except OSError as error:
        why = error.strerror or str(error)
    if why:
        raise ClusterError(
            f"cannot read a token from {path} ({why}); set RAY_AUTH_TOKEN_PATH to the cluster's "
            "token file, or RAY_AUTH_MODE=disabled for a cluster without one"
        )


@dataclass(frozen=True, slots=True)
class _Head:
    """The head node of a cluster, asked by a process that has not joined it."""

    address: str
    nodes: NodeInfoGcsServiceStub
    values: InternalKVGcsServiceStub

    def require_ray(self) -> None:
        self._ask(self.nodes.GetClusterId, GetClusterIdRequest())

    def require_same_versions(self) -> None:
        text = self._value(ray_constants.KV_NAMESPACE_CLUSTER, CLUSTER_METADATA_KEY)
        if not text:
            return
        there = json.loads(text)
        try:
            check_version_info(there, "")
        except RuntimeError:
            ours = compute_version_info()
            raise ClusterError(
                f"the cluster at {self.address} runs Ray {there['ray_version']} on Python "
                f"{there['python_version']}, and this is Ray {ours[0]} on Python {ours[1]}; "
                "install dcres here with the cluster's versions of both"
            ) from None

    def require_node_here(self) -> None:
        deadline = time.monotonic() + _NODE_TIMEOUT_S
        while not (found := self._nodes_here()):
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"no node of the Ray cluster at {self.address} runs on this machine, and dcres "
                    f"joins a cluster through one; {self._elsewhere()}"
                )
            time.sleep(_POLL_S)
        # Ray's driver attaches to the head node if that is here, else to any.
        node = next((node for node in found if node.is_head_node), found[0])
        for path in (node.raylet_socket_name, node.object_store_socket_name):
            self._require_socket(path)

    def _nodes_here(self) -> list[GcsNodeInfo]:
        """Those that live, by the ids of the raylets that run on this machine."""
        ids = [bytes.fromhex(each) for each in services.find_node_ids()]
        if not ids:
            return []
        selector = GetAllNodeInfoRequest.NodeSelector
        request = GetAllNodeInfoRequest(
            node_selectors=[selector(node_id=each) for each in ids],
            state_filter=GcsNodeInfo.GcsNodeState.ALIVE,
        )
        return list(self._ask(self.nodes.GetAllNodeInfo, request).node_info_list)

    def _require_socket(self, path: str) -> None:
        """Whoever is in another container than the node's Ray sees its process, not its files."""
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(_CONNECT_TIMEOUT_S)
            try:
                probe.connect(path.removeprefix("unix://"))
            except OSError as error:
                raise ClusterError(
                    f"the node of the Ray cluster at {self.address} on this machine cannot be "
                    f"reached at {path} ({error.strerror or error}); run dcres in the container "
                    f"and as the user that Ray runs in there, or {self._elsewhere()}"
                ) from None

    def _elsewhere(self) -> str:
        """How a command can be run on a node."""
        host = self.address.rpartition(":")[0]
        on_node = f"run it on a node, `ssh {host.strip('[]')} dcres --address {self.address} …`"
        place = self._value(ray_constants.KV_NAMESPACE_DASHBOARD, "webui:url")
        port = urlsplit(f"//{place}").port if place else None
        if port is None:
            return on_node
        submit = f"ray job submit --address http://{host}:{port}"
        return f"{on_node}, or as a Ray job, `{submit} -- dcres …`"

    def _value(self, namespace: bytes, key: str | bytes) -> str:
        """A value that the cluster keeps under a name; empty if there is none."""
        key = key.encode() if isinstance(key, str) else key
        request = InternalKVGetRequest(namespace=namespace, key=key)
        return bytes(self._ask(self.values.InternalKVGet, request).value).decode()

    def _ask(self, call: Any, request: Any) -> Any:
        try:
            return call(request, timeout=_ANSWER_TIMEOUT_S)
        except grpc.RpcError as error:
            raise self._failure(error) from None

    def _failure(self, error: grpc.RpcError) -> ClusterError:
        if error.code() is grpc.StatusCode.UNAUTHENTICATED:
            return ClusterError(
                f"the Ray cluster at {self.address} does not accept our token; "
                "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to the cluster's token file"
            )
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            why = f"no answer in {_ANSWER_TIMEOUT_S:.3g} s"
        else:
            why = str(error.details())
            why = "it speaks another protocol" if "HTTP/2" in why else why
        return ClusterError(
            f"what listens at {self.address} does not answer as a Ray cluster ({why}); "
            "write host:port of the cluster's head as `ray start --head` says them"
        )


@contextmanager
def _head(address: str) -> Iterator[_Head]:
    # As in Ray's core: hosts of a cluster are not behind a proxy for the web.
    channel = init_grpc_channel(address, options=[("grpc.enable_http_proxy", 0)])
    try:
        yield _Head(address, NodeInfoGcsServiceStub(channel), InternalKVGcsServiceStub(channel))
    finally:
        channel.close()
