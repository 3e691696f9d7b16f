"""A simulated cluster: hosts and a network that fail, and what Ray does about it.

Messages take time, are lost, or wait until a host that was cut off is back. An actor that dies is
started again in a moment; of a host that is lost the cluster learns late, and then its actors may
come up elsewhere, where nothing of their VM is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from dcres.actors.protocol import deadline_s
from dcres.errors import ActorGone, ClusterError, DcresError
from tests.simulation.clock import Killed, Process, Signal, Simulated
from tests.simulation.guest import SimulatedVm

P = ParamSpec("P")
R = TypeVar("R")

_POLL_S = 0.2
_LOOKS = {"describe", "status", "progress", "published", "require_free", "plan_moves", "parts_here",
          "parts_trouble", "incarnation", "ready"}  # fmt: skip
# Of a lazy restore that has come to its end beside whatever is done, and of whoever cancels.
_BESIDE = {"settle_moves", "end_serving_parts", "destroy"}


@dataclass
class Faults:
    """How often what goes wrong, while anything does."""

    on: bool = True
    lost: float = 0.004  # of all messages
    slow: float = 0.03  # of all messages: by seconds
    dies: float = 0.02  # of all points in the middle of an order


@dataclass
class Host:
    """A machine of the cluster."""

    name: str
    room: int  # shares that it can take
    up: bool = True
    known_lost: bool = False  # to Ray
    cut_until_s: float = 0.0


class Answer(Generic[R]):
    """A call under way; see `dcres.actors.ports.Pending`."""

    def __init__(self, cluster: Cluster, what: str, timeout_s: float) -> None:
        self._cluster = cluster
        self._what = what
        self._timeout_s = timeout_s
        self._come: Signal = cluster.clock.signal()
        self._result: R | None = None
        self._error: BaseException | None = None

    def settle(self, result: R | None, error: BaseException | None = None) -> None:
        """The first answer counts."""
        if not self._come.is_set():
            self._result, self._error = result, error
            self._come.set()

    def result(self, timeout_s: float | None = None) -> R:
        seconds = self._timeout_s if timeout_s is None else timeout_s
        if not self._come.wait(seconds):
            raise ClusterError(f"{self._what} did not answer in {seconds:.3g} s")
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]


class Actor:
    """An object on a host, and the process in which its orders are carried out."""

    def __init__(
        self, cluster: Cluster, name: str, vm: str, host: str, make: Callable[[str], object]
    ) -> None:
        self.cluster, self.name, self.vm, self.host = cluster, name, vm, host
        self.removed = False
        self.object: object | None = None
        self.waiting: list[Answer[Any]] = []
        self._make = make
        self.process = Process(name)
        self.begin()

    def begin(self) -> None:
        """Its process is there."""
        if not self.removed and self.object is None and self.cluster.hosts[self.host].up:
            self.process = Process(self.name)
            self.object = self._make(self.host)

    def die(self, back_s: float | None) -> None:
        """Its process is not; it is back after `back_s`."""
        if self.object is None:
            return
        self.object = None
        self.cluster.vm(self.vm).forget(self.host)
        self.cluster.clock.kill(self.process)
        if self.cluster.hosts[self.host].up:
            self.fail_calls()
        if back_s is not None:
            self.cluster.clock.after(back_s, self.begin)

    def fail_calls(self) -> None:
        """Whoever waits for an answer learns that none will come."""
        waiting, self.waiting = self.waiting, []
        for answer in waiting:
            answer.settle(None, ActorGone(f"{self.name}: the actor has died"))

    def remove(self) -> None:
        """For good, as `ray.kill` does it."""
        self.removed = True
        self.die(None)
        self.fail_calls()

    def carry_out(self, order: str, args: tuple[Any, ...], answer: Answer[Any], label: str) -> None:
        """The order has come."""
        if self.object is None:
            if self.cluster.hosts[self.host].up:
                answer.settle(None, ActorGone(f"{self.name} is being started again"))
            return
        target, process = self.object, self.process

        def work() -> None:
            result = error = None
            try:
                result = getattr(target, order)(*args) if order != "ready" else None
            except DcresError as caught:
                error = caught
            except Killed:
                if not process.killed:  # it died in the middle of the order
                    self.die(self.cluster.clock.random.uniform(1.0, 3.0))
                raise
            self.cluster.deliver(
                self.host, lambda: self._told(answer, result, error), lambda: self.lost(answer)
            )

        self.cluster.clock.spawn_in(process, work, f"{self.name}.{order}", label)

    def lost(self, answer: Answer[Any]) -> None:
        """Whether the order was carried out nobody knows: the connection broke."""
        self._told(answer, None, ActorGone(f"{self.name} is not to be reached"))

    def _told(self, answer: Answer[Any], result: Any, error: DcresError | None) -> None:
        if answer in self.waiting:
            self.waiting.remove(answer)
        answer.settle(result, error)


class SimulatedPort:
    """See `dcres.actors.ports.Port`."""

    def __init__(self, cluster: Cluster, name: str, timeout_s: float | None = None) -> None:
        self.name = name
        self._cluster = cluster
        self._timeout_s = timeout_s

    def within(self, timeout_s: float) -> SimulatedPort:
        return SimulatedPort(self._cluster, self.name, timeout_s)

    def submit(
        self, order: Callable[Concatenate[Any, P], R], /, *args: P.args, **kwargs: P.kwargs
    ) -> Answer[R]:
        assert not kwargs, "no order is given by keyword"
        seconds = deadline_s(order) if self._timeout_s is None else self._timeout_s
        return self._cluster.send(self.name, order.__name__, args, seconds)

    def call(
        self, order: Callable[Concatenate[Any, P], R], /, *args: P.args, **kwargs: P.kwargs
    ) -> R:
        return self.submit(order, *args, **kwargs).result()

    def wait_ready(self, timeout_s: float) -> None:
        deadline_s = self._cluster.clock.now_s() + timeout_s
        while True:
            left_s = max(deadline_s - self._cluster.clock.now_s(), 0.01)
            try:
                ready: Answer[None] = self._cluster.send(self.name, "ready", (), left_s)
                return ready.result()
            except ActorGone:
                if left_s <= _POLL_S or self.name not in self._cluster.actors:
                    raise
                self._cluster.clock.sleep(_POLL_S)


@dataclass
class Cluster:
    """Hosts, actors and VMs, and the messages between them."""

    clock: Simulated
    hosts: dict[str, Host]
    faults: Faults = field(default_factory=Faults)
    actors: dict[str, Actor] = field(default_factory=dict)
    vms: dict[str, SimulatedVm] = field(default_factory=dict)
    changes: dict[str, list[str]] = field(default_factory=dict)  # who changed what, by VM
    make_vm: type[SimulatedVm] = SimulatedVm
    left_out: Mapping[str, object] = field(default_factory=dict)  # orders that reach no host

    def vm(self, name: str) -> SimulatedVm:
        """What there is of a VM."""
        if name not in self.vms:
            self.vms[name] = self.make_vm(name, self.clock, self._dies)
        return self.vms[name]

    def _dies(self, host: str) -> bool:
        return self._happens(self.faults.dies)

    def _happens(self, chance: float) -> bool:
        return self.faults.on and self.clock.random.random() < chance

    def reachable(self, host: str) -> bool:
        """Whether messages come there at once."""
        there = self.hosts[host]
        return there.up and there.cut_until_s <= self.clock.now_s()

    def send(self, name: str, order: str, args: tuple[Any, ...], timeout_s: float) -> Answer[Any]:
        """An order for an actor. Raises ActorGone where there is none of that name."""
        self.clock.require_process()
        if name not in self.actors:
            raise ActorGone(f"there is no actor {name} in the cluster")
        actor, label = self.actors[name], self.clock.current.label
        answer: Answer[Any] = Answer(self, f"{name}.{order}", timeout_s)
        if order not in _LOOKS | _BESIDE and label:
            self.changes.setdefault(actor.vm, []).append(label)
        if order in self.left_out:
            answer.settle(self.left_out[order])
            return answer
        if self.hosts[actor.host].known_lost:
            answer.settle(None, ActorGone(f"{name}: its host is dead"))
            return answer
        actor.waiting.append(answer)
        self.deliver(
            actor.host,
            lambda: actor.carry_out(order, args, answer, label),
            lambda: actor.lost(answer),
        )
        return answer

    def deliver(self, host: str, then: Callable[[], None], lost: Callable[[], None]) -> None:
        """A message to or from a host comes, late or never; `lost` is when that is noticed."""
        if self._happens(self.faults.lost):
            self.clock.note(f"a message of {host} is lost")
            if self.clock.random.random() < 0.7:
                lost()
            return
        slow = self.clock.random.uniform(0.1, 4.0) if self._happens(self.faults.slow) else 0.0
        self.clock.after(
            slow + self.clock.random.uniform(0.0005, 0.005), lambda: self._come(host, then)
        )

    def _come(self, host: str, then: Callable[[], None]) -> None:
        left_s = self.hosts[host].cut_until_s - self.clock.now_s()
        if left_s > 0.0:
            self.clock.after(left_s + self.clock.random.random(), lambda: self._come(host, then))
        elif self.hosts[host].up:
            then()

    # What goes wrong

    def restart_actor(self, name: str) -> None:
        """An actor's process is killed."""
        self.clock.note(f"{name} is killed")
        self.actors[name].die(self.clock.random.uniform(1.0, 3.0))

    def cut(self, host: str, seconds: float) -> None:
        """A host cannot be reached for so long."""
        self.clock.note(f"{host} is cut off for {seconds:.1f} s")
        self.hosts[host].cut_until_s = self.clock.now_s() + seconds

    def lose(self, host: str) -> None:
        """A host is gone; Ray notices after a while."""
        self.clock.note(f"{host} is lost")
        self.hosts[host].up = False
        for actor in self._on(host):
            actor.die(None)
        for vm in self.vms.values():
            vm.lose(host)
        self.clock.after(self.clock.random.uniform(5.0, 14.0), lambda: self._notice(host))

    def _on(self, host: str) -> list[Actor]:
        return [actor for actor in self.actors.values() if actor.host == host]

    def _notice(self, host: str) -> None:
        if self.hosts[host].up:
            return
        self.clock.note(f"{host} is known to be lost")
        self.hosts[host].known_lost = True
        for actor in self._on(host):
            actor.fail_calls()

    def mend(self) -> None:
        """All hosts are there, empty where they were lost, and nothing goes wrong any more."""
        self.clock.note("all is mended")
        self.faults.on = False
        for host in self.hosts.values():
            host.up, host.known_lost = True, False
            host.cut_until_s = min(host.cut_until_s, self.clock.now_s())
        for actor in list(self.actors.values()):
            if actor.object is None:
                actor.fail_calls()
                self.clock.after(self.clock.random.uniform(1.0, 3.0), actor.begin)
        for vm in self.vms.values():
            vm.full = False
