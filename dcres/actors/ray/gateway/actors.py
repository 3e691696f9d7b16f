"""Actors by name: called, found, ended."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Concatenate, ParamSpec, TypeVar

import ray

from dcres.actors.protocol import deadline_s, group_of
from dcres.actors.ray.gateway.calls import Pending
from dcres.actors.ray.gateway.connection import NAMESPACE
from dcres.errors import ActorGone, ClusterError

_REMOVE_TIMEOUT_S = 20.0
_POLL_S = 0.02


P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class ActorPort:
    """An actor by name: callable from any process of the cluster, and picklable.

    `timeout_s` is how long an answer may take; None: as long as its order says. `_spawned` is
    Ray's handle in the process that spawned the actor: when the constructor fails, Ray frees
    the name at once, and tells the reason to holders of the handle alone.
    """

    name: str
    timeout_s: float | None = None
    _spawned: Any = field(default=None, repr=False, compare=False)

    def __reduce__(self) -> tuple[type[ActorPort], tuple[str, float | None]]:
        return ActorPort, (self.name, self.timeout_s)

    def within(self, timeout_s: float) -> ActorPort:
        """The same actor, whose answers may take `timeout_s`."""
        return replace(self, timeout_s=timeout_s)

    def submit(
        self, order: Callable[Concatenate[Any, P], R], /, *args: P.args, **kwargs: P.kwargs
    ) -> Pending[R]:
        """Start a call and return at once. Raises ActorGone if there is no such actor."""
        timeout_s = deadline_s(order) if self.timeout_s is None else self.timeout_s
        group, name = group_of(order), order.__name__
        if not group:
            return self._submit(name, timeout_s, *args, **kwargs)
        pending: Pending[R] = self._submit("perform", timeout_s, group, name, args, kwargs)
        return pending.named(f"{self.name}.{name}")

    def call(
        self, order: Callable[Concatenate[Any, P], R], /, *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """Give an order and wait for its result; it runs once, or not at all, or unknown.

        Raises the DcresError that the method raised; ActorGone if the actor is dead, is being
        restarted or died during the call (what it did until then is unknown); ClusterError
        for any other exception (its traceback is in ``__cause__``) and when time is over (the
        call may go on).
        """
        return self.submit(order, *args, **kwargs).result()

    def _submit(self, method: str, timeout_s: float, *args: Any, **kwargs: Any) -> Pending[Any]:
        reference = getattr(self._handle(), method).remote(*args, **kwargs)
        return Pending(f"{self.name}.{method}", reference, timeout_s)

    def _begun(self, timeout_s: float) -> Pending[Any]:
        handle = self._spawned or self._handle()
        return Pending(f"{self.name}.__ray_ready__", handle.__ray_ready__.remote(), timeout_s)

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until the actor answers, through a restart if need be. Raises ActorGone.

        An actor whose constructor raised a DcresError raises it here.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                left_s = max(deadline - time.monotonic(), 0.01)
                self._begun(left_s).result()
            except ActorGone:
                if time.monotonic() > deadline or find(self.name) is None:
                    raise
                time.sleep(_POLL_S)
            else:
                return

    def pid(self, timeout_s: float = 10.0) -> int:
        """The process that the actor runs in now."""
        return int(self._submit("__ray_call__", timeout_s, _pid).result())

    def _handle(self) -> Any:
        try:
            return ray.get_actor(self.name, namespace=NAMESPACE)
        except ValueError:
            raise ActorGone(f"there is no actor {self.name} in the cluster") from None


def _pid(_: object) -> int:
    return os.getpid()


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
    poll(lambda: find(actor_name) is None, f"actor {actor_name} does not end")


def poll(done: Callable[[], bool], otherwise: str) -> None:
    """Wait until `done`; ClusterError(`otherwise`) when it takes too long."""
    deadline = time.monotonic() + _REMOVE_TIMEOUT_S
    while not done():
        if time.monotonic() > deadline:
            raise ClusterError(otherwise)
        time.sleep(_POLL_S)
