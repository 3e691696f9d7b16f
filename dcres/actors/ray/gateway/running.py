"""Functions that run once on a host.

A Ray task needs a worker process of its job's own, so every command would start one on every
host that it asks something: 1.2 s of a core each. So each host has one *runner*, a detached
actor that is started when first needed and then answers whoever asks, in milliseconds. What may
take long is a task: Ray ends it when the process that wanted it is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, Generic, Self, TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dcres.actors.control.room import host_named
from dcres.actors.ray.gateway.actors import ActorPort
from dcres.actors.ray.gateway.calls import Pending
from dcres.actors.ray.gateway.nodes import hosts
from dcres.actors.ray.gateway.placing import spawn
from dcres.errors import ActorGone, Conflict
from dcres.linux import priority

RUNNERS = "dcres-runner/"

_T = TypeVar("_T")


class Runner:
    """Runs functions, several at once, on the host where it is."""

    def __init__(self) -> None:
        priority.take_normal()

    def run(self, function: Callable[..., _T], *args: Any) -> _T:
        """Its result; raises what it raises."""
        return function(*args)


def run_on(host: str, function: Callable[..., _T], *args: Any, timeout_s: float = 60.0) -> _T:
    """Run a plain function once on `host` and return its result.

    Raises NotFound, what the function raises (as `ActorPort.call` does), and ClusterError.
    """
    return start_on(host, function, *args).result(timeout_s)


def start_on(host: str, function: Callable[..., _T], *args: Any) -> Pending[_T]:
    """As `run_on`, but for waiting: a host's runner takes a second to come up."""
    # A host that comes back under its name is another node, and its runner another actor.
    runner = ActorPort(f"{RUNNERS}{host_named(host, hosts()).node_id}")
    what = f"{function.__name__} on {host}"
    try:
        return runner.submit(Runner.run, function, *args).named(what)
    except ActorGone:
        with suppress(Conflict):  # somebody else was first
            spawn(Runner, runner.name, on_host=host, max_restarts=0)
        return runner.submit(Runner.run, function, *args).named(what)


def run_apart(host: str, function: Callable[..., _T], *args: Any, timeout_s: float) -> _T:
    """As `run_on`, in a process that ends when this one does."""
    task = _task(host, function).remote(*args)
    pending: Pending[_T] = Pending(_what(host, function), task, timeout_s)
    return pending.result()


class Stream(Generic[_T]):
    """What a generator on a host yields, as it comes; see `stream_apart`."""

    def __init__(self, what: str, references: Any, timeout_s: float) -> None:
        self._what = what
        self._references = references
        self._timeout_s = timeout_s

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> _T:
        """Raises what the generator raised, and ClusterError, as `Pending.result` does."""
        pending: Pending[_T] = Pending(self._what, next(self._references), self._timeout_s)
        return pending.result()

    def cancel(self) -> None:
        """Interrupt the generator, wherever it is; may be called by another thread.

        To be repeated until it has ended: between two values the interrupt is lost in Ray's code.
        """
        ray.cancel(self._references)


def stream_apart(
    host: str, function: Callable[..., Iterator[_T]], *args: Any, timeout_s: float
) -> Stream[_T]:
    """Run a generator function as `run_apart` does; each value may take `timeout_s`."""
    references = _task(host, function, num_returns="streaming").remote(*args)
    return Stream(_what(host, function), references, timeout_s)


def _task(host: str, function: Callable[..., Any], **options: Any) -> Any:
    strategy = NodeAffinitySchedulingStrategy(host_named(host, hosts()).node_id, soft=False)
    task = ray.remote(num_cpus=0, max_retries=0)(function)
    return task.options(scheduling_strategy=strategy, **options)


def _what(host: str, function: Callable[..., Any]) -> str:
    return f"{function.__name__} on {host}"
