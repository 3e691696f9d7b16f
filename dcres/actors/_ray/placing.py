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

from dcres.actors._ray.actors import ActorPort
from dcres.actors._ray.connection import NAMESPACE
from dcres.actors._ray.nodes import hosts
from dcres.actors._ray.reservations import Reservation, group_named
from dcres.actors.room import host_named
from dcres.errors import Conflict

_THREADS = 16
_HEAD_RESOURCE = {"node:__internal_head__": 0.001}


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
        group = group_named(reservation.name)
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
