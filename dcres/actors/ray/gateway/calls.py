"""Calls under way, their answers, and what their errors mean."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import ray
import ray.exceptions

from dcres.actors.protocol import DEADLINE_S
from dcres.errors import ActorGone, ClusterError, DcresError

R = TypeVar("R")


@dataclass(frozen=True)
class Pending(Generic[R]):
    """A call under way; `what` names it in errors, and `timeout_s` is how long it may take."""

    what: str
    _reference: Any
    timeout_s: float = DEADLINE_S

    def named(self, what: str) -> Pending[R]:
        """The same call under another name."""
        return replace(self, what=what)

    def result(self, timeout_s: float | None = None) -> R:
        """Wait for the answer. Raises what the call raised; see `ActorPort.call`."""
        if timeout_s is None:
            timeout_s = self.timeout_s
        try:
            answer: R = ray.get(self._reference, timeout=timeout_s)
            return answer
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


def gather(
    pendings: Mapping[str, Pending[R]], timeout_s: float
) -> tuple[dict[str, R], dict[str, Exception]]:
    """Wait for calls on several hosts: the results of those that succeeded, and the failures.

    Every call gets its chance: one failure does not end the waiting for the others.
    """
    deadline = time.monotonic() + timeout_s
    results: dict[str, R] = {}
    failures: dict[str, Exception] = {}
    for host, pending in pendings.items():
        try:
            results[host] = pending.result(max(deadline - time.monotonic(), 0.0))
        except DcresError as error:
            failures[host] = error
    return results, failures
