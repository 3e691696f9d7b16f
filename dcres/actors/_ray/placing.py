"""Where code runs: actors in a bundle, on a host or on the head node; functions on a host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import ray
import ray.exceptions
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from dcres.actors._ray.actors import ActorPort
from dcres.actors._ray.calls import Pending
from dcres.actors._ray.connection import NAMESPACE
from dcres.actors._ray.nodes import hosts
from dcres.actors._ray.reservations import Reservation, group_named
from dcres.actors.room import host_named
from dcres.errors import Conflict

_THREADS = 16
_HEAD_RESOURCE = {"node:__internal_head__": 0.001}

_T = TypeVar("_T")


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


def run_on(host: str, function: Callable[..., _T], *args: Any, timeout_s: float = 60.0) -> _T:
    """Run a plain function once on `host` and return its result.

    Raises NotFound, what the function raises (as `ActorPort.call` does), and ClusterError.
    """
    answer: _T = start_on(host, function, *args).result(timeout_s)
    return answer


def start_on(host: str, function: Callable[..., Any], *args: Any) -> Pending:
    """As `run_on`, but for waiting: a host's first worker takes a second to come up."""
    strategy = NodeAffinitySchedulingStrategy(host_named(host, hosts()).node_id, soft=False)
    remote = ray.remote(num_cpus=0, max_retries=0)(function)
    what = f"{function.__name__} on {host}"
    return Pending(what, remote.options(scheduling_strategy=strategy).remote(*args))
