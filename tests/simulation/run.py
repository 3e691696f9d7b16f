"""One run: a cluster, clients and faults, all decided by a seed; and what must hold at its end."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from dcres.actors.control.coordinator import Coordinator
from dcres.config import Layout
from dcres.errors import ActorGone, DcresError
from dcres.model.run_state import RunState, told
from tests.simulation.clock import Process, Signal, Simulated
from tests.simulation.cluster import Cluster, Faults, Host
from tests.simulation.fleet import Make, SimulatedFleet
from tests.simulation.guest import SimulatedVm
from tests.support.hosts import FakeSub
from tests.support.main_host import FakeMain

MIB = 1 << 20
_REST_S = 120.0
_LOOKS = 20
_MOST_EVENTS = 400_000  # for each VM

# What clients want, and how often: of a VM whose QEMU is there, and of one whose is not.
_WHEN_THERE = {"checkpoint": 16, "restore": 10, "start": 1, "resize": 3, "drain": 2, "pause": 2,
               "resume": 2, "stop": 1, "cancel": 2, "status": 2}  # fmt: skip
_WHEN_NOT = {"restore": 16, "start": 4, "checkpoint": 1, "stop": 1, "cancel": 1, "status": 1}


_KINDS = ("actor", "actor", "actor", "cut", "cut", "full", "coordinator", "coordinator", "lose",
          "qemu")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run is made of."""

    vms: int = 1
    hosts: int = 5
    room: int = 1
    operations: int = 6
    faults: int = 4  # at most, of these
    kinds: tuple[str, ...] = _KINDS
    apart_s: float = 10.0  # as a mean
    small: Faults = field(default_factory=Faults)  # of messages and orders
    main: Make = FakeMain
    sub: Make = FakeSub
    world: type[SimulatedVm] = SimulatedVm
    left_out: Mapping[str, object] = field(default_factory=dict)  # orders, and what is answered
    repeat: str = ""  # the command for a seed; only the suite's own plan has one by itself


REPEAT = "DCRES_SEEDS={seed} python -m pytest tests/simulation/test_seeds.py"


class Broken(AssertionError):
    """Something that must hold does not."""


class Driver:
    """A VM's coordinator, which may be killed and begins anew, and those who call it."""

    def __init__(self, run: Run, vm: str) -> None:
        self.run, self.vm = run, vm
        self.clock = run.clock
        self.process = Process(f"coordinator/{vm}")
        self.coordinator: Coordinator | None = None
        self._calls: list[tuple[Signal, list[Any]]] = []
        self._count = 0
        self._begin()

    def _begin(self) -> None:
        self.process = process = Process(f"coordinator/{self.vm}")

        def begin() -> None:
            made = Coordinator(self.vm, self.run.fleet, self.clock)
            self.coordinator = made

        self.clock.spawn_in(process, begin, process.name, f"{self.vm} recovery {self._number()}")

    def _number(self) -> int:
        self._count += 1
        return self._count

    def kill(self) -> None:
        """Ray starts another in a moment; once, if that is killed before it is there."""
        if self.process.killed:
            return
        self.clock.note(f"the coordinator of {self.vm} is killed")
        self.coordinator = None
        self.clock.kill(self.process)
        calls, self._calls = self._calls, []
        for come, told_ in calls:
            told_.append(ActorGone("the coordinator has died"))
            come.set()
        self.clock.after(self.clock.random.uniform(1.0, 3.0), self._begin)

    def call(self, what: str, order: Callable[[Coordinator], Any]) -> Any:
        """As a client: raises what the coordinator raises, and ActorGone when it dies."""
        while self.coordinator is None:
            self.clock.sleep(0.5)
        target, label = self.coordinator, f"{self.vm} {what} {self._number()}"
        come = self.clock.signal()
        told_: list[Any] = []
        self._calls.append((come, told_))

        def work() -> None:
            try:
                told_.append((order(target),))
            except Exception as error:
                told_.append(error)
            come.set()

        self.clock.note(f"{label} begins")
        self.clock.spawn_in(self.process, work, label, label)
        come.wait()
        with suppress(ValueError):
            self._calls.remove((come, told_))
        answer = told_[0]
        self.clock.note(f"{label}: {answer if isinstance(answer, Exception) else 'done'}")
        if isinstance(answer, DcresError):
            raise answer
        if isinstance(answer, Exception):
            raise Broken(f"{label} raised {answer!r}") from answer
        return answer[0]


class Run:
    """See the module. `go` raises Broken, whose text says how to repeat it."""

    def __init__(self, seed: int, plan: Plan) -> None:
        self.seed, self.plan = seed, plan
        self.clock = Simulated(seed, _MOST_EVENTS * plan.vms)
        hosts = {f"h{number}": Host(f"h{number}", plan.room) for number in range(plan.hosts)}
        self.cluster = Cluster(
            self.clock, hosts, replace(plan.small), make_vm=plan.world, left_out=plan.left_out
        )
        self.fleet = SimulatedFleet(self.cluster, plan.main, plan.sub)
        self.drivers: list[Driver] = []
        self.taken = 0
        self.done = 0

    def go(self) -> Run:
        """From the beginning to the end."""
        logging.getLogger("dcres.coordinator").disabled = True
        try:
            self.clock.run(self._main)
        except BaseException as error:
            error.add_note(self.how_to_repeat)
            raise
        finally:
            logging.getLogger("dcres.coordinator").disabled = False
        return self

    @property
    def how_to_repeat(self) -> str:
        """What happened, and how to see it again."""
        command = self.plan.repeat or (REPEAT if self.plan == Plan() else "")
        again = [f"again: {command.format(seed=self.seed)}"] if command else []
        return "\n".join([*self.clock.trace, *again])

    def _main(self) -> None:
        self.drivers = [Driver(self, f"vm{number}") for number in range(self.plan.vms)]
        clients = [
            self.clock.spawn_in(Process("client"), lambda each=each: self._client(each), "client")  # type: ignore[misc]
            for each in self.drivers
            for _ in range(self.clock.random.choice((1, 1, 2)))
        ]
        chaos = self.clock.spawn_in(Process("chaos"), self._disturb, "chaos")
        for task in [*clients, chaos]:
            task.join()
        self.cluster.mend()
        self.clock.sleep(_REST_S)
        broken = []
        for driver in self.drivers:
            try:
                Ending(self, driver).judge()
            except Broken as error:
                broken.append(str(error))
        if broken:
            raise Broken("; ".join(broken))

    # What goes wrong

    def _disturb(self) -> None:
        random = self.clock.random
        for _ in range(random.randint(0, self.plan.faults)):
            self.clock.sleep(random.expovariate(1 / self.plan.apart_s))
            host = random.choice(list(self.cluster.hosts))
            driver = random.choice(self.drivers)
            match random.choice(self.plan.kinds):
                case "actor":
                    if self.cluster.actors:
                        self.cluster.restart_actor(random.choice(list(self.cluster.actors)))
                case "cut":
                    self.cluster.cut(host, random.uniform(0.5, 30.0))
                case "full":
                    self._fill(self.cluster.vm(driver.vm))
                case "coordinator":
                    driver.kill()
                case "lose":
                    self.cluster.lose(host)
                case _:
                    self._kill_qemu(self.cluster.vm(driver.vm))

    def _fill(self, vm: SimulatedVm) -> None:
        self.clock.note(f"the store of {vm.vm} is full")
        vm.full = True
        self.clock.after(self.clock.random.uniform(1.0, 20.0), lambda: setattr(vm, "full", False))

    def _kill_qemu(self, vm: SimulatedVm) -> None:
        self.clock.note(f"QEMU of {vm.vm} is killed")
        vm.maimed |= bool(vm.qemus)
        vm.qemus.clear()
        vm.frozen = False
        vm.coming.clear()

    # What is wanted

    def _client(self, driver: Driver) -> None:
        with suppress(DcresError):
            driver.call("start", lambda each: each.start(_spec(driver.vm)))
        for _ in range(self.clock.random.randint(1, self.plan.operations)):
            self.clock.sleep(self.clock.random.expovariate(1 / 3.0))
            self.done += 1
            with suppress(DcresError):
                self._operate(driver)

    def _operate(self, driver: Driver) -> None:
        random, vm = self.clock.random, driver.vm
        chances = _WHEN_THERE if self.cluster.vm(vm).qemus else _WHEN_NOT
        match random.choices(list(chances), list(chances.values()))[0]:
            case "checkpoint":
                mode = random.choice(("live", "stop"))
                facts = driver.call(f"checkpoint {mode}", lambda each: each.checkpoint(mode))
                self.taken += 1
                if facts["checkpoint"] not in self.cluster.vm(vm).published:
                    raise Broken(f"{facts['checkpoint']} was told, and is not there")
            case "restore":
                self._restore(driver)
            case "start":
                driver.call("start", lambda each: each.start(_spec(vm)))
            case "resize":
                subs = [
                    size * MIB for size in random.choice(((16, 16), (24, 16), (16, 16, 8), (32,)))
                ]
                driver.call("resize", lambda each: each.resize(40 * MIB, subs))
            case "drain":
                held = list(self.fleet.reserved.get(vm, {0: "h0"}).values())
                host = random.choice(held[1:] or held)
                driver.call(f"drain {host}", lambda each: each.drain(host))
            case "pause":
                driver.call("pause", lambda each: each.pause())
            case "resume":
                driver.call("resume", lambda each: each.resume())
            case "stop":
                driver.call("stop", lambda each: each.stop())
            case "cancel":
                driver.call("cancel", lambda each: each.cancel())
            case _:
                driver.call("status", lambda each: each.status())

    def _restore(self, driver: Driver) -> None:
        random = self.clock.random
        published = list(self.cluster.vm(driver.vm).published.values())
        if not published:
            return
        text, lazy = random.choice(published), random.random() < 0.5
        layout = random.choice((None, None, Layout(main=64 * MIB)))
        if random.random() < 0.5:
            with suppress(DcresError):
                driver.call("stop", lambda each: each.stop())
        driver.call(f"restore {lazy}", lambda each: each.restore(text, layout, None, lazy))


class Ending:
    """What must hold of a VM once nothing goes wrong any more and nobody wants anything."""

    def __init__(self, run: Run, driver: Driver) -> None:
        self._run, self._driver, self._clock = run, driver, run.clock
        self._vm = run.cluster.vm(driver.vm)

    def judge(self) -> None:
        """Raises Broken."""
        facts = self._at_rest()
        self._require_what_always_holds()
        self._require_as_told(facts)
        if facts["phase"] == "running":
            self._do("checkpoint stop", lambda each: each.checkpoint("stop"))
            self._require_what_always_holds()
            self._require(not self._vm.unfinished, f"left in the store: {self._vm.unfinished}")
            self._require_as_told(self._do("status", lambda each: each.status()))
        self._stop()
        if self._vm.published:
            self._restore()
            self._stop()
        self._require_what_always_holds()

    def _do(self, what: str, order: Callable[[Coordinator], Any]) -> Any:
        try:
            return self._driver.call(what, order)
        except DcresError as error:
            raise Broken(f"{self._vm.vm}: {what}, with nothing in the way: {error}") from error

    def _at_rest(self) -> dict[str, Any]:
        for _ in range(_LOOKS):
            facts: dict[str, Any] = self._do("status", lambda each: each.status())
            if facts["phase"] in ("running", "absent", "lost", "off"):
                return facts
            self._clock.sleep(_REST_S)
        raise Broken(f"{self._vm.vm} does not come to rest: {facts}")

    def _require(self, holds: bool, why: str) -> None:
        if not holds:
            raise Broken(f"{self._vm.vm}: {why}")

    def _require_what_always_holds(self) -> None:
        self._require(not self._vm.wrong, "; ".join(self._vm.wrong))
        for checkpoint in self._vm.published:
            flaws = self._vm.flaws(checkpoint)
            self._require(not flaws, "; ".join(flaws))
        self._require_one_operation_at_a_time()

    def _require_one_operation_at_a_time(self) -> None:
        changes = self._run.cluster.changes.get(self._vm.vm, [])
        ended, before = set(), ""
        for label in changes:
            self._require(label not in ended, f"{label} goes on after {before} has begun")
            if before and label != before:
                ended.add(before)
            before = label

    def _require_as_told(self, facts: dict[str, Any]) -> None:
        """What the coordinator says of the VM is so, and a guest that can run is as it was told."""
        vm, phase = self._vm, facts["phase"]
        held = self._run.fleet.reserved.get(vm.vm, {})
        if phase == "absent":
            self._require(not self._left(), f"it is absent, and {self._left()} is there")
            self._require(not held, f"it is absent, and {held} is reserved")
            return
        if phase in ("lost", "off"):
            self._require(bool(facts["why"]), f"it is {phase}, and nobody says why")
            subs = {host for index, host in held.items() if index}
            whole = bool(vm.qemus) and subs <= vm.serving and not vm.maimed
            self._require(not whole, f"it is said to be {phase} and is not")
            return
        self._require(len(vm.qemus) == 1, f"it is said to run, on {list(vm.qemus)}")
        ((main, now),) = vm.qemus.items()
        self._require(main == held.get(0), f"it runs on {main}, and {held} is reserved")
        found = vm.states[main]["found"]
        state = told(now, None if found is None else RunState(found))
        self._require(not vm.frozen and state == vm.meant, f"it is {state} and not {vm.meant}")
        self._require(vm.states[main]["checkpoint"] is None, "a checkpoint is not over")
        hosts = vm.states[main]["hosts"]
        self._require(sorted(hosts) == sorted(held.values()), f"{hosts}, and {held} is reserved")
        serving = vm.serving - (self._unswept - set(hosts))
        self._require(serving == set(hosts[1:]), f"{vm.serving} serve {hosts}")
        self._require(not vm.serving_parts and not vm.pinning, "parts are served or pinned still")

    def _left(self) -> list[str]:
        vm = self._vm
        there = {*vm.states, *vm.qemus, *vm.serving, *vm.serving_parts, *vm.pinning, *vm.keeping}
        return sorted(there - self._unswept)

    @property
    def _unswept(self) -> set[str]:
        """Hosts that did not answer when they were to be rid of the VM: it may be there still."""
        return {host for name, host in self._run.fleet.unswept if name == self._vm.vm}

    def _stop(self) -> None:
        self._do("stop", lambda each: each.stop())
        self._require(not self._left(), f"{self._left()} is there after a stop")
        actors = [each.name for each in self._run.cluster.actors.values() if each.vm == self._vm.vm]
        self._require(not actors, f"{actors} are there after a stop")
        self._require(self._vm.vm not in self._run.fleet.reserved, "it is reserved after a stop")

    def _restore(self) -> None:
        text = list(self._vm.published.values())[-1]
        self._do("restore", lambda each: each.restore(text))
        self._require(len(self._vm.qemus) == 1, "it does not run after a restore")


def _spec(vm: str) -> dict[str, Any]:
    return {
        "name": vm,
        "memory": "64MiB",
        "kernel": "/boot/vmlinuz",
        "layout": {"main": "32MiB", "subs": ["16MiB", "16MiB"]},
    }
