"""Plain classes for the tests of the gateway to run as actors; workers import them from here."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from dcres.actors.ray import gateway
from dcres.actors.ray.gateway import ActorPort, Reservation
from dcres.config import HostSettings
from dcres.errors import DcresError
from dcres.linux.process import ProcessId, spawn_detached
from tests.support.errors import example
from tests.support.speed import patience


class Probe:
    """An actor that does whatever a test wants to see."""

    def __init__(self, value: object = None, fail_with: str | None = None) -> None:
        self.value = value
        if fail_with is not None:
            raise DcresError(fail_with)

    def get(self) -> object:
        return self.value

    def set(self, value: object) -> None:
        self.value = value

    def host(self) -> str:
        return os.environ["DCRES_HOST"]

    def where(self) -> tuple[str | None, str]:
        return gateway.current_actor_name(), gateway.own_node_address()

    def has_imported(self, module: str) -> bool:
        return module in sys.modules

    def hold(self, seconds: float) -> None:
        """Keep a call under way: the waiting itself is what is tested."""
        time.sleep(seconds)

    def fail(self, cls: type[DcresError]) -> None:
        raise example(cls)

    def break_down(self) -> None:
        raise KeyError("key")

    def ask(self, other: ActorPort, order: Callable[[Probe], object]) -> object:
        return other.within(patience(10)).call(order)

    def spawn(self, name: str, reservation: Reservation, bundle: int) -> ActorPort:
        return gateway.spawn(Probe, name, ("nested",), reservation=reservation, bundle=bundle)

    def start_process(self, log: Path) -> ProcessId:
        return spawn_detached(["sleep", "600"], log=log)


def host_of_task() -> str:
    return os.environ["DCRES_HOST"]


def settings_of_task() -> HostSettings:
    return HostSettings.from_environ(os.environ)


def task_that_fails(cls: type[DcresError]) -> None:
    raise example(cls)


def host_and_pid() -> tuple[str, int]:
    return os.environ["DCRES_HOST"], os.getpid()


def counting(stop: int, error: type[DcresError] | None) -> Iterator[tuple[str, int]]:
    """This host's name with numbers; then an error, if one is given."""
    for number in range(stop):
        yield os.environ["DCRES_HOST"], number
    if error is not None:
        raise example(error)


def for_ever(started: Path, ended: Path) -> Iterator[int]:
    """Waits after its first value until it is interrupted, and then says so in a file."""
    started.touch()
    try:
        yield 1
        never = threading.Event()  # an interrupt of Python's own wakes no wait without an end
        while not never.wait(0.05):
            pass
    finally:
        ended.touch()
