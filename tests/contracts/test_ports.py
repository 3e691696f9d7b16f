"""What the coordinator relies on in a port, held against Ray's actors and against our own."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import pytest

from dcres.actors.host.agent import HostAgent
from dcres.actors.messages import PlanOrder, Role
from dcres.actors.ports import Port
from dcres.actors.protocol import Machine, Parts, Presence
from dcres.actors.ray import gateway
from dcres.config import HostSettings
from dcres.errors import ActorGone, ClusterError, Conflict, DcresError
from tests.support.actors import Probe
from tests.support.errors import ALL_ERRORS, example
from tests.support.fleet import LocalActor, LocalPort
from tests.support.speed import patience
from tests.support.wait import until


class World(Protocol):
    """Where actors live: starts one, kills its process, names one that is not there."""

    def spawn(self, *args: Any) -> Port: ...
    def host(self, vm: str, role: Role) -> Port: ...
    def kill(self, port: Port) -> None: ...
    def has(self, port: Port) -> bool: ...
    def missing(self) -> Port: ...


class LocalWorld:
    """Actors of this process; a killed one is back after a moment, as with Ray."""

    def __init__(self, folder: Path) -> None:
        self.actors: dict[str, LocalActor] = {}
        self.folder = folder

    def spawn(self, *args: Any) -> Port:
        name = f"probe-{len(self.actors)}"
        self.actors[name] = LocalActor(name, partial(Probe, *args))
        return LocalPort(name, self.actors)

    def host(self, vm: str, role: Role) -> Port:
        run, ram, store = (self.folder / name for name in ("run", "ram", "store"))
        settings = HostSettings(name="h0", run=run, ram=ram, store=store)
        self.actors[vm] = LocalActor(vm, partial(HostAgent, vm, role, environ=settings.environ()))
        return LocalPort(vm, self.actors)

    def kill(self, port: Port) -> None:
        assert isinstance(port, LocalPort)
        self.actors[port.name].restart()

    def has(self, port: Port) -> bool:
        return False  # it fails as it is spawned

    def missing(self) -> Port:
        return LocalPort("nobody", self.actors)

    def close(self) -> None:
        for actor in self.actors.values():
            actor.close()


class RayWorld:
    """Actors on the cluster."""

    def __init__(self, name: str) -> None:
        self.name = name

    def spawn(self, *args: Any) -> Port:
        number = len(gateway.list_actors(self.name))
        return gateway.spawn(Probe, f"{self.name}-{number}", args)

    def host(self, vm: str, role: Role) -> Port:
        return gateway.spawn(HostAgent, f"{self.name}-{vm}", (vm, role))

    def kill(self, port: Port) -> None:
        assert isinstance(port, gateway.ActorPort)
        os.kill(port.pid(), signal.SIGKILL)

    def has(self, port: Port) -> bool:
        assert isinstance(port, gateway.ActorPort)
        return gateway.find(port.name) is not None

    def missing(self) -> Port:
        return gateway.ActorPort(f"{self.name}-nobody")


@pytest.fixture(params=["local", pytest.param("ray", marks=pytest.mark.cluster)])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    if request.param == "ray":
        yield RayWorld(request.getfixturevalue("unique"))
        return
    made = LocalWorld(tmp_path)
    yield made
    made.close()


@pytest.fixture
def port(world: World) -> Port:
    made = world.spawn("value")
    made.wait_ready(patience(30))
    return made


def test_a_call_returns_what_the_method_returns(port: Port) -> None:
    assert port.call(Probe.get) == "value"
    assert port.call(Probe.set, {"a": [1, 2]}) is None
    assert port.submit(Probe.get).result(patience(10)) == {"a": [1, 2]}


def test_a_host_takes_the_orders_of_its_role(world: World) -> None:
    """Errors name the order, and not how it came there."""
    host = world.host("contract", Role.SUB)
    host.wait_ready(patience(30))
    found = host.call(Presence.describe)
    assert (found.role, found.present) == (Role.SUB, False)
    host.call(Presence.require_free, take_over=True)
    with pytest.raises(Conflict, match=r"a sub host of .* does not take the order machine\.pause"):
        host.call(Machine.pause)
    with pytest.raises(ClusterError, match=r"contract\.plan failed: AttributeError"):
        host.call(Parts.plan, cast(PlanOrder, None))


def test_values_are_copies(port: Port) -> None:
    mine = [1]
    port.call(Probe.set, mine)
    mine.append(2)
    got = port.call(Probe.get)
    assert isinstance(got, list)
    got.append(3)
    assert port.call(Probe.get) == [1]


def test_every_error_keeps_its_type_and_its_text(port: Port) -> None:
    for cls in ALL_ERRORS:
        with pytest.raises(DcresError) as caught:
            port.call(Probe.fail, cls)
        assert type(caught.value) is cls
        assert str(caught.value) == str(example(cls))
        assert vars(caught.value) == vars(example(cls))


def test_any_other_exception_is_a_cluster_error(port: Port) -> None:
    with pytest.raises(ClusterError, match=r"break_down.*KeyError.*key") as caught:
        port.call(Probe.break_down)
    assert type(caught.value) is ClusterError


def test_time_over_is_a_cluster_error_and_the_call_goes_on(port: Port) -> None:
    with pytest.raises(ClusterError, match=r"hold.* did not answer") as caught:
        port.within(0.05).call(Probe.hold, 0.5)
    assert type(caught.value) is ClusterError
    pending = port.submit(Probe.hold, 0.3)
    with pytest.raises(ClusterError):
        pending.result(0.01)
    assert pending.result(patience(10)) is None


def test_calls_run_side_by_side(port: Port) -> None:
    slow = port.submit(Probe.hold, 3.0)
    assert port.call(Probe.get) == "value"
    with pytest.raises(ClusterError, match="did not answer"):
        slow.result(0.01)
    slow.result(patience(10))


@pytest.mark.parametrize(
    "use",
    [lambda port: port.call(Probe.get), lambda port: port.wait_ready(0.1)],
    ids=["call", "wait_ready"],
)
def test_an_actor_that_is_not_there(world: World, use: Callable[[Port], object]) -> None:
    with pytest.raises(ActorGone, match="nobody"):
        use(world.missing())


def test_a_constructor_that_fails_says_why(world: World) -> None:
    broken = world.spawn(None, "no room at all")
    with pytest.raises(DcresError, match="no room at all"):
        broken.wait_ready(patience(30))


def test_a_constructor_that_failed_long_ago_says_why(world: World) -> None:
    """Ray frees its name, so nobody finds it; who spawned it is told."""
    broken = world.spawn(None, "no room at all")
    until(lambda: not world.has(broken), 30, "its name is free")
    with pytest.raises(DcresError, match="no room at all"):
        broken.wait_ready(patience(30))


def test_a_call_under_way_is_lost_with_the_actor_and_it_comes_back(
    world: World, port: Port
) -> None:
    port.call(Probe.set, "changed")
    lost = port.submit(Probe.hold, 10)
    world.kill(port)
    with pytest.raises(ActorGone):
        lost.result(patience(30))
    port.wait_ready(patience(30))
    until(lambda: port.call(Probe.get) == "value", 30, "it begins anew")
