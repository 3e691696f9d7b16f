"""A fleet without Ray: hosts' actors as objects of this process, behind ports like an actor's.

`LocalPort` keeps the promises of `dcres.actors.ray.gateway.ActorPort` (the contract tests hold both
to them): values are copied on their way, errors of dcres come out as themselves, everything else
as ClusterError, and an actor that has died raises ActorGone until it is there again.
"""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from dcres.actors.control.room import Around, HostInfo, Seen
from dcres.actors.host import looking_around
from dcres.actors.host.agent import HostAgent
from dcres.actors.host.page_loader import parse
from dcres.actors.host.vm_folder import VmFolder
from dcres.actors.messages import Look, PlanOrder, Role, roles_of
from dcres.actors.ports import Port
from dcres.actors.protocol import Presence, deadline_s, group_of
from dcres.actors.ray.fleet import sweep
from dcres.config import HostSettings
from dcres.errors import ActorGone, ClusterError, Conflict, DcresError, NoRoom
from dcres.model.restore_plan import Flow
from dcres.storage.store.store import Store

_POLL_S = 0.01
_THREADS = 16
_ROOM = 1 << 40


def _copy(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class LocalPending(Generic[R]):
    """A call under way in a thread."""

    what: str
    future: Future[R]
    timeout_s: float

    def result(self, timeout_s: float | None = None) -> R:
        if timeout_s is None:
            timeout_s = self.timeout_s
        try:
            return self.future.result(timeout_s)
        except TimeoutError:
            if not self.future.done():
                raise ClusterError(f"{self.what} did not answer in {timeout_s:.3g} s") from None
            raise ClusterError(f"{self.what} failed: TimeoutError") from None
        except DcresError:
            raise
        except Exception as error:
            raise ClusterError(f"{self.what} failed: {type(error).__name__}: {error}") from error


class LocalActor:
    """One object, its threads, and whether it is there."""

    def __init__(self, name: str, make: Callable[[], Any]) -> None:
        self.name = name
        self.restarts = 0
        self._make = make
        self._failure: DcresError | None = None
        self._object: Any = None
        self._calls: set[Future[Any]] = set()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(_THREADS, name)
        self._construct()

    def _construct(self) -> None:
        try:
            self._object = self._make()
        except DcresError as error:
            self._failure = error

    def submit(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], timeout_s: float
    ) -> LocalPending[Any]:
        what = f"{self.name}.{args[1] if method == 'perform' else method}"
        if self._failure is not None:
            raise _copy(self._failure)
        target = self._object
        answer: Future[Any] = Future()
        if target is None:
            answer.set_exception(ActorGone(f"{what}: the actor has died or is being restarted"))
            return LocalPending(what, answer, timeout_s)
        given = _copy((args, kwargs))
        with self._lock:
            self._calls.add(answer)
        self._pool.submit(self._run, getattr(target, method), given, answer)
        return LocalPending(what, answer, timeout_s)

    def _run(
        self,
        method: Callable[..., Any],
        given: tuple[tuple[Any, ...], dict[str, Any]],
        answer: Future[Any],
    ) -> None:
        args, kwargs = given
        try:
            result = _copy(method(*args, **kwargs))
        except BaseException as error:
            failure = _copy(error)
            self._settle(answer, lambda: answer.set_exception(failure))
        else:
            self._settle(answer, lambda: answer.set_result(result))

    def _settle(self, answer: Future[Any], settle: Callable[[], None]) -> None:
        with self._lock:
            if answer in self._calls:
                self._calls.discard(answer)
                settle()

    def die(self) -> None:
        """As if its process were killed: calls under way are lost, it answers no more."""
        if isinstance(self._object, HostAgent):
            self._object.site.folder.release()  # the end of its process closes it
        with self._lock:
            calls, self._calls = self._calls, set()
            self._object = None
        for answer in calls:
            answer.set_exception(ActorGone(f"{self.name}: the actor has died"))

    def restart(self) -> None:
        """As Ray does it: the constructor again."""
        self.die()
        self.restarts += 1
        self._construct()

    def close(self) -> None:
        self.die()
        self._pool.shutdown(wait=False, cancel_futures=True)

    @property
    def object(self) -> Any:
        """The object itself, for a test that looks inside."""
        return self._object

    @property
    def ready(self) -> bool:
        return self._object is not None or self._failure is not None


class LocalPort:
    """An actor of this process by name, in a registry of actors."""

    def __init__(
        self, name: str, actors: Mapping[str, LocalActor], timeout_s: float | None = None
    ) -> None:
        self.name = name
        self._actors = actors
        self._timeout_s = timeout_s

    def within(self, timeout_s: float) -> LocalPort:
        return LocalPort(self.name, self._actors, timeout_s)

    def submit(
        self, order: Callable[Concatenate[Any, P], R], /, *args: P.args, **kwargs: P.kwargs
    ) -> LocalPending[R]:
        timeout_s = deadline_s(order) if self._timeout_s is None else self._timeout_s
        group, name = group_of(order), order.__name__
        if group:
            return self._actor().submit("perform", (group, name, args, kwargs), {}, timeout_s)
        return self._actor().submit(name, args, kwargs, timeout_s)

    def call(
        self, order: Callable[Concatenate[Any, P], R], /, *args: P.args, **kwargs: P.kwargs
    ) -> R:
        return self.submit(order, *args, **kwargs).result()

    def wait_ready(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not self._actor().ready:
            if time.monotonic() > deadline:
                raise ActorGone(f"{self.name} is not back within {timeout_s:.3g} s")
            time.sleep(_POLL_S)
        left_s = max(deadline - time.monotonic(), 0.01)
        self._actor().submit("__str__", (), {}, left_s).result()

    def _actor(self) -> LocalActor:
        try:
            return self._actors[self.name]
        except KeyError:
            raise ActorGone(f"there is no actor {self.name} in the cluster") from None


Make = Callable[[str, Role, str], Any]  # VM, role, host → the actor's object


@dataclass
class LocalFleet:
    """Hosts that have room for one VM each; see `dcres.actors.ports.Fleet`."""

    hosts: list[str]
    make: Make
    actors: dict[str, LocalActor] = field(default_factory=dict)
    reserved: dict[str, dict[int, str]] = field(default_factory=dict)  # host by index
    extra: dict[tuple[str, int], int] = field(default_factory=dict)
    holding: Callable[[str, str], tuple[str, ...]] = lambda host, manifest: ()
    make_visitor: Callable[[str, str], Any] | None = None
    visiting: dict[str, list[str]] = field(default_factory=dict)
    sweeper: Callable[[str, str], None] | None = None
    swept: list[str] = field(default_factory=list)
    dead: set[str] = field(default_factory=set)
    crowded: set[str] = field(default_factory=set)  # hosts that can set nothing more aside
    name: str = "test"  # of the cluster
    looking: Callable[[str, str, bool], Look] | None = None  # host, manifest, take_over
    planning: Callable[[str, PlanOrder], Flow] | None = None
    room: dict[str, int] = field(default_factory=dict)  # bytes that a host can set aside
    gone: set[str] = field(default_factory=set)  # drivers that have ended

    def cluster(self) -> str:
        return self.name

    def reserve(
        self,
        vm: str,
        shares: Sequence[int],
        hosts: Sequence[str] | None,
        roles: Sequence[Role] = (),
    ) -> list[str]:
        if vm in self.reserved:
            raise Conflict(f"a reservation {vm} exists already; release it first")
        names = list(hosts or self.hosts)[: len(shares)]
        if len(names) < len(shares):
            raise NoRoom(f"VM {vm} wants {len(shares)} hosts and {len(names)} are there")
        self.reserved[vm] = dict(enumerate(names))
        for index, role in enumerate(roles or roles_of(len(names))):
            self._spawn(vm, index, role, names[index])
        return names

    def _spawn(self, vm: str, index: int, role: Role, host: str) -> None:
        name = self.actor_name(vm, index)
        self.actors[name] = LocalActor(name, lambda: self.make(vm, role, host))

    @staticmethod
    def actor_name(vm: str, index: int) -> str:
        return f"host/{vm}/{index}"

    def actor(self, vm: str, index: int) -> LocalActor:
        return self.actors[self.actor_name(vm, index)]

    def driver_is_gone(self, driver: str) -> bool:
        return driver in self.gone

    def indices(self, vm: str) -> list[int]:
        held = self.reserved.get(vm, {})
        return sorted(index for index in held if self.actor_name(vm, index) in self.actors)

    def find(self, vm: str) -> list[Port]:
        names = (self.actor_name(vm, index) for index in self.indices(vm))
        return [LocalPort(name, self.actors) for name in names]

    def room_for(self, vm: str, extras: Mapping[int, int], shares: Sequence[int]) -> list[str]:
        crowded = self.crowded & set(self.hosts_of(vm, [at for at in extras if extras[at]]))
        if crowded:
            raise NoRoom(f"a share does not fit host {', '.join(crowded)}")
        free = [host for host in self.hosts if host not in self.reserved[vm].values()]
        if len(free) < len(shares):
            raise NoRoom(f"no host that is not the VM's already has {shares[-1]} bytes free")
        return free[: len(shares)]

    def require_room(self, vm: str, shares: Sequence[int], hosts: Sequence[str] | None) -> None:
        names = [host for host in hosts or self.hosts if host not in self.crowded | self.dead]
        if len(names) < len(shares):
            raise NoRoom(f"VM {vm} wants {len(shares)} hosts and {len(names)} have room")

    def extend(self, vm: str, index: int, extra: int) -> None:
        self.extra[vm, index] = extra

    def add(self, vm: str, share: int, host: str, role: Role = Role.SUB) -> Port:
        held = self.reserved[vm]
        index = max(held) + 1
        held[index] = host
        self._spawn(vm, index, role, host)
        return LocalPort(self.actor_name(vm, index), self.actors)

    def dismiss(self, vm: str, index: int) -> None:
        self.actors.pop(self.actor_name(vm, index)).close()
        del self.reserved[vm][index]

    def release(self, vm: str) -> None:
        self.leave(vm)
        for index in self.indices(vm):
            self.dismiss(vm, index)
        self.reserved.pop(vm, None)

    def alive(self, host: str) -> bool:
        return host not in self.dead

    def hosts_of(self, vm: str, indices: Sequence[int]) -> list[str]:
        held = self.reserved.get(vm, {})
        return [held[index] for index in indices if index in held]

    def sweep(self, vm: str, host: str) -> None:
        self.swept.append(host)
        if self.sweeper is not None:
            self.sweeper(vm, host)

    def holders(self, manifest: str) -> dict[str, tuple[str, ...]]:
        found = {host: self.holding(host, manifest) for host in self.hosts}
        return {host: parts for host, parts in found.items() if parts}

    def look_around(self, vm: str, manifest: str, *, take_over: bool) -> Around:
        seen, left_out = [], []
        for number, host in enumerate(self.hosts):
            if host in self.dead:
                continue
            room = 0 if host in self.crowded else self.room.get(host, _ROOM)
            info = HostInfo(host, f"id-{number}", f"127.0.0.{number + 1}", room, room, True)
            try:
                if self.looking is None:
                    look = Look(room, self.holding(host, manifest))
                else:
                    look = self.looking(host, manifest, take_over)
            except DcresError as error:
                left_out.append(f"host {host} is left out: {error}")
                continue
            info = replace(info, memory_free_bytes=min(room, look.free_bytes))
            seen.append(Seen(info, look.parts, look.trouble))
        return Around(tuple(seen), tuple(left_out))

    def flow_on(self, host: str, order: PlanOrder) -> Flow:
        assert self.planning is not None
        return self.planning(host, order)

    def visit(self, vm: str, host: str) -> Port:
        assert self.make_visitor is not None
        name, make = f"parts/{vm}/{host}", self.make_visitor
        self.actors[name] = LocalActor(name, lambda: make(vm, host))
        self.visiting.setdefault(vm, []).append(name)
        return LocalPort(name, self.actors)

    def leave(self, vm: str) -> None:
        for name in self.visiting.pop(vm, []):
            with suppress(DcresError):
                LocalPort(name, self.actors).call(Presence.destroy)
            self.actors.pop(name).close()


def real_hosts(
    settings: Mapping[str, HostSettings], main: type[HostAgent] = HostAgent
) -> LocalFleet:
    """A fleet whose hosts are real but for Ray: QEMU, pagers and memory servers of their own."""

    def make(vm: str, role: Role, host: str) -> HostAgent:
        own = settings[host]
        kind = main if role is Role.MAIN else HostAgent
        return kind(vm, role, own.address, fleet.cluster(), own.environ())

    def holding(host: str, manifest: str) -> tuple[str, ...]:
        return Store(settings[host].store).parts_here(parse(manifest))

    def make_visitor(vm: str, host: str) -> HostAgent:
        return make(vm, Role.PARTS, host)

    def sweeper(vm: str, host: str) -> None:
        sweep(VmFolder.of(settings[host], vm, fleet.cluster()))

    def looking(host: str, manifest: str, take_over: bool) -> Look:
        return looking_around.look(settings[host], manifest, fleet.cluster(), take_over)

    def planning(host: str, order: PlanOrder) -> Flow:
        return looking_around.flow(settings[host], order)

    fleet = LocalFleet(
        list(settings),
        make,
        holding=holding,
        make_visitor=make_visitor,
        sweeper=sweeper,
        looking=looking,
        planning=planning,
    )
    return fleet
