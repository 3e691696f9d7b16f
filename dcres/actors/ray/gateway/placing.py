"""Where actors run: in a bundle of a reservation, on a host, or on the head node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from dcres.actors.control.room import host_named
from dcres.actors.ray.gateway import spares
from dcres.actors.ray.gateway.actors import ActorPort
from dcres.actors.ray.gateway.connection import NAMESPACE, current_actor_name
from dcres.actors.ray.gateway.nodes import hosts
from dcres.actors.ray.gateway.reservations import Reservation, group_named
from dcres.errors import Conflict

_THREADS = 16
_HEAD = "node:__internal_head__"


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
    node_id, placement = _place(reservation, bundle, on_host)
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
        actor = remote.remote(*args)
    except (ValueError, ray.exceptions.ActorAlreadyExistsError) as error:
        raise Conflict(f"an actor {actor_name} exists already; stop it first") from error
    if current_actor_name() is None:  # a command or a notebook, which may end before long
        actor.__ray_call__.remote(spares.order_from, node_id)
    else:
        spares.order_soon(node_id)
    return ActorPort(actor_name, _spawned=actor)


def _place(
    reservation: Reservation | None, bundle: int, on_host: str | None
) -> tuple[str, dict[str, Any]]:
    """The id of the node that an actor will run on ("" for none), and the options that say so."""
    if reservation is not None:
        strategy: Any = PlacementGroupSchedulingStrategy(group_named(reservation.name), bundle)
        return reservation.node_id_of(bundle), {"scheduling_strategy": strategy}
    if on_host is not None:
        node_id = host_named(on_host, hosts()).node_id
        strategy = NodeAffinitySchedulingStrategy(node_id, soft=False)
        return node_id, {"scheduling_strategy": strategy}
    head = next((node["NodeID"] for node in ray.nodes() if _HEAD in node["Resources"]), "")
    return head, {"resources": {_HEAD: 0.001}}
