"""What a restore would do and where: wishes, the choice of hosts, the plan and its numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from dcres.actors.control.choosing import Choice, Wish, decide, require_name, wish_of
from dcres.actors.control.coordinator import Coordinator
from dcres.actors.control.placing_restores import choose_hosts, foresee
from dcres.actors.control.room import MIB, HostInfo, Seen
from dcres.actors.host.page_loader import make_plan
from dcres.actors.messages import Foreseen, ForeseenRestore, Look, PageFlow, PlanOrder
from dcres.actors.ray import gateway
from dcres.actors.ray.fleet import RayFleet
from dcres.api import plan as api_plan
from dcres.api.catalogue import StoresOfHosts
from dcres.api.plan import RestorePlan, plan_restore
from dcres.api.resizing import DrainPlan, ResizePlan
from dcres.api.session import Session
from dcres.config import Layout
from dcres.errors import CheckpointCorrupt, ConfigError, Conflict, DcresError, NoRoom, NotFound
from dcres.linux.memory import available_bytes, free_for_guests
from dcres.model.pages import PAGE_SIZE
from dcres.model.phase import VmPhase
from dcres.model.restore_plan import ASSUMPTION, NETWORK_BYTES_PER_S, START_S, Flow
from dcres.storage.format.manifest import Manifest, dumps
from dcres.storage.store.store import Store
from tests.support.fleet import LocalFleet
from tests.support.ports import ScriptedPort
from tests.support.stored import PAGE_COUNT, store_with_demo

MEMORY = PAGE_COUNT * PAGE_SIZE
HALF = MEMORY // 2
ALL = ("h0", "h1", "h2")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return store_with_demo(tmp_path_factory.mktemp("choosing"))


@pytest.fixture(scope="module")
def manifest(store: Store) -> Manifest:
    (entry,) = store.list()
    assert entry.manifest is not None
    return entry.manifest


def seen(name: str, free_mib: int = 1, parts: tuple[str, ...] = ()) -> Seen:
    return Seen(HostInfo(name, f"id-{name}", "127.0.0.1", MIB, free_mib * MIB, True), parts)


class TestWish:
    def test_nothing_said(self, manifest: Manifest) -> None:
        assert wish_of(manifest, None, False, None) == Wish()

    def test_hosts(self, manifest: Manifest) -> None:
        assert wish_of(manifest, None, False, 3) == Wish(count=3)
        named = Wish(count=2, names=("a", "b"))
        assert wish_of(manifest, None, False, ["a", "b"]) == named
        assert wish_of(manifest, None, False, "a,b") == named
        assert named.settled is None

    def test_one_host(self, manifest: Manifest) -> None:
        whole = Layout(main=MEMORY)
        assert wish_of(manifest, None, True, None) == Wish(whole)
        named = wish_of(manifest, None, True, ["h7"])
        assert named.settled is not None
        assert (named.settled.layout, named.settled.hosts) == (whole, ("h7",))

    @pytest.mark.parametrize(
        ("layout", "single", "hosts"),
        [
            (Layout(main=MEMORY), True, None),
            (None, True, 2),
            (None, True, ["a", "b"]),
            (Layout(main=MEMORY), False, 3),
            (Layout(main=MEMORY), False, ["a", "b"]),
            (None, False, 0),
            (None, False, []),
        ],
    )
    def test_contradictions(
        self, layout: Layout | None, single: bool, hosts: Any, manifest: Manifest
    ) -> None:
        with pytest.raises(ConfigError):
            wish_of(manifest, layout, single, hosts)


class TestDecision:
    def test_found_where_there_is_room(self, manifest: Manifest) -> None:
        hosts = [seen("a", 5), seen("b", 4, ALL), seen("c", 0, ALL)]
        choice = decide(manifest, Wish(), hosts)
        assert (choice.layout, choice.hosts) == (Layout(main=MEMORY), ("b",))
        assert choice.why == "as few hosts as have room for 384 KiB, first those with its parts"

    def test_as_it_was_if_that_fits(self, manifest: Manifest) -> None:
        hosts = [seen("a"), seen("b", 1, ("h1",)), seen("c", 1, ("h0",)), seen("d")]
        choice = decide(manifest, Wish(count=3), hosts)
        assert choice.layout == Layout(main=HALF, subs=(HALF, HALF))
        assert choice.hosts == ("c", "b", "a")
        named = Wish(count=3, names=("d", "b", "a"))
        assert decide(manifest, named, hosts).hosts == ("d", "b", "a")

    def test_evenly_if_the_own_layout_does_not_fit(self, manifest: Manifest) -> None:
        large = manifest.model_copy(update={"memory_bytes": 6 * MIB})
        shares = {"main": 4 * MIB, "subs": [MIB, MIB]}
        spec = {**manifest.vm_spec, "memory": 6 * MIB, "layout": shares}
        large = large.model_copy(update={"vm_spec": spec})
        hosts = [seen("a", 3), seen("b", 2), seen("c", 1)]
        choice = decide(large, Wish(count=3), hosts)
        assert choice.layout == Layout(main=3 * MIB, subs=(2 * MIB, MIB))
        assert choice.hosts == ("a", "b", "c")
        named = decide(large, Wish(count=3, names=("c", "a", "b")), hosts)
        assert named.layout == Layout(main=MIB, subs=(3 * MIB, 2 * MIB))
        assert named.hosts == ("c", "a", "b")

    def test_another_number_of_hosts(self, manifest: Manifest) -> None:
        choice = decide(manifest, Wish(count=2), [seen("a"), seen("b"), seen("c", 1, ALL)])
        assert choice.hosts == ("c", "a")
        assert sum(choice.layout.shares) >= MEMORY

    def test_a_layout_finds_its_hosts(self, manifest: Manifest) -> None:
        layout = Layout(main=HALF, subs=(2 * MIB,))
        choice = decide(manifest, Wish(layout, 2), [seen("a", 3), seen("b", 1, ("h0",))])
        assert (choice.hosts, choice.why) == (("b", "a"), "as asked")

    @pytest.mark.parametrize(
        ("wish", "error", "words"),
        [
            (Wish(Layout(main=PAGE_SIZE)), ConfigError, "the layout holds 4 KiB"),
            (Wish(Layout(main=2 * MIB)), NoRoom, "a share of 2 MiB fits no host that is left"),
            (Wish(count=2, names=("a", "nix")), NotFound, "no host nix in the cluster; it has a"),
            (Wish(count=2, names=("a", "a")), ConfigError, "a host is named twice"),
            (Wish(count=5), NoRoom, "5 hosts are asked for"),
        ],
    )
    def test_what_cannot_be(
        self, wish: Wish, error: type[Exception], words: str, manifest: Manifest
    ) -> None:
        with pytest.raises(error, match=words):
            decide(manifest, wish, [seen("a"), seen("b")])

    def test_it_says_how_much_is_missing(self, manifest: Manifest) -> None:
        large = manifest.model_copy(update={"memory_bytes": 9 * MIB})
        with pytest.raises(NoRoom, match="9 MiB of memory, 4 MiB more than all hosts have room"):
            decide(large, Wish(), [seen("a", 3), seen("b", 2)])


def fleet_of(*hosts: Seen, planning: Callable[[str, PlanOrder], Flow] | None = None) -> LocalFleet:
    """A fleet that tells just this of its hosts."""
    by_name = {each.info.name: each for each in hosts}

    def looking(host: str, manifest: str, take_over: bool) -> Look:
        told = by_name[host]
        return Look(told.info.memory_free_bytes, told.parts, told.trouble)

    return LocalFleet(list(by_name), lambda *_: None, looking=looking, planning=planning)


def choose_while(
    manifest: Manifest, wish: Wish, *phases: VmPhase, hosts: tuple[Seen, ...] = ()
) -> Choice:
    """The choice for a VM that is in these phases, one after the other, each time it is asked."""
    left = list(phases)
    choice = choose_hosts(fleet_of(*hosts), manifest, wish, lambda: left.pop(0))
    assert left == []
    return choice


TWO = (seen("a"), seen("b"))


class TestChoosingHosts:
    def test_nobody_is_asked_if_all_is_said(self, manifest: Manifest) -> None:
        wish = Wish(Layout(main=MEMORY), 1, ("h9",))
        assert choose_while(manifest, wish).hosts == ("h9",)

    @pytest.mark.parametrize(
        ("phase", "words"),
        [
            (VmPhase.RUNNING, "runs already; stop it first with `dcres stop demo`"),
            (VmPhase.RESTORING, "VM demo is restoring; wait"),
            (VmPhase.UNKNOWN, "no answer from a host of VM demo, which may still run; wait, or"),
        ],
    )
    def test_a_vm_that_is_there(self, manifest: Manifest, phase: VmPhase, words: str) -> None:
        with pytest.raises(Conflict, match=words):
            choose_while(manifest, Wish(), phase, hosts=TWO)

    @pytest.mark.parametrize("phase", [VmPhase.LOST, VmPhase.OFF])
    def test_what_is_left_of_a_vm_is_no_hindrance(self, manifest: Manifest, phase: VmPhase) -> None:
        assert choose_while(manifest, Wish(), phase, hosts=TWO).hosts == ("a",)
        with pytest.raises(NoRoom):
            choose_while(manifest, Wish(count=3), phase, phase, hosts=TWO)

    def test_a_wish_that_cannot_be(self, manifest: Manifest) -> None:
        with pytest.raises(NotFound, match="no host typo in the cluster; it has a, b"):
            choose_while(manifest, Wish(count=1, names=("typo",)), VmPhase.LOST, hosts=TWO)
        with pytest.raises(ConfigError):
            choose_while(manifest, Wish(Layout(main=HALF)), VmPhase.LOST, hosts=TWO)

    def test_somebody_else_was_faster(self, manifest: Manifest) -> None:
        absent, starting = VmPhase.ABSENT, VmPhase.STARTING
        with pytest.raises(Conflict, match="VM demo is starting"):
            choose_while(manifest, Wish(count=3), absent, starting, hosts=TWO)
        with pytest.raises(NoRoom):
            choose_while(manifest, Wish(count=3), absent, absent, hosts=TWO)

    def test_a_host_that_says_nothing_is_named(self, manifest: Manifest) -> None:
        fleet = fleet_of(*TWO)
        fleet.looking = gone_from_a
        choice = choose_hosts(fleet, manifest, Wish(), lambda: VmPhase.ABSENT)
        assert choice.hosts == ("b",)
        assert choice.left_out == ("host a is left out: its disk is gone",)
        with pytest.raises(NoRoom, match=r"; host a is left out: its disk is gone$"):
            choose_hosts(fleet, manifest, Wish(count=2), lambda: VmPhase.ABSENT)


def gone_from_a(host: str, manifest: str, take_over: bool) -> Look:
    if host == "a":
        raise DcresError("its disk is gone")
    return Look(MIB, ())


class TestInsideTheCluster:
    """The coordinator answers alone: nothing of the caller's process takes part."""

    def test_it_chooses(self, manifest: Manifest) -> None:
        coordinator = Coordinator("demo", fleet_of(seen("a"), seen("b", 1, ALL)))
        choice = coordinator.choose(dumps(manifest), Wish())
        assert (choice.hosts, choice.layout) == (("b",), Layout(main=MEMORY))
        with pytest.raises(NoRoom):
            coordinator.choose(dumps(manifest), Wish(count=3))

    def test_it_plans(self, store: Store, manifest: Manifest) -> None:
        def planning(host: str, order: PlanOrder) -> Flow:
            return make_plan(store, order).flow

        fleet = fleet_of(seen("a"), seen("b", 1, ALL), planning=planning)
        fleet.dead.add("a")
        found = Coordinator("demo", fleet).plan_restore(dumps(manifest), Wish(), False, False)
        assert [each.host for each in found.hosts] == ["b"]
        assert sum(each.pages for each in found.hosts) == manifest.pages
        assert (found.problems, found.left_out) == ((), ())

    def test_not_beside_the_vm_itself(self, manifest: Manifest) -> None:
        fleet = fleet_of(seen("a", 1, ALL), planning=lambda host, order: ((1,), (1,), (1,)))
        coordinator = Coordinator("demo", fleet)
        coordinator._turn.become(coordinator._turn.situation.begun(VmPhase.STARTING))
        found = coordinator.plan_restore(dumps(manifest), Wish(), False, False)
        (problem,) = found.problems
        assert problem.startswith("VM demo is starting; wait until that is done")
        with pytest.raises(Conflict, match="VM demo is starting"):
            coordinator.choose(dumps(manifest), Wish())


def planned(
    manifest: Manifest,
    wish: Wish,
    fleet: LocalFleet,
    phase: VmPhase = VmPhase.ABSENT,
    *,
    lazy: bool = False,
) -> RestorePlan:
    found = foresee(fleet, manifest, wish, phase, lazy=lazy, take_over=False)
    hosts, problems = found.hosts, found.problems
    return RestorePlan(manifest.vm, manifest.checkpoint, hosts, problems, lazy, found.chosen)


class TestRestorePlan:
    def plan(
        self, store: Store, manifest: Manifest, wish: Wish, hosts: list[Seen], lazy: bool = False
    ) -> RestorePlan:
        def planning(host: str, order: PlanOrder) -> Flow:
            assert manifest.main.host in next(
                each.parts for each in hosts if each.info.name == host
            )
            return make_plan(store, order).flow

        return planned(manifest, wish, fleet_of(*hosts, planning=planning), lazy=lazy)

    def test_a_store_that_all_share(self, store: Store, manifest: Manifest) -> None:
        hosts = [seen(name, 1, ALL) for name in ("a", "b", "c")]
        plan = self.plan(store, manifest, Wish(count=3), hosts)
        assert plan.possible
        assert [each.role for each in plan.hosts] == ["main", "sub", "sub"]
        assert sum(each.pages for each in plan.hosts) == manifest.pages
        assert (plan.moved_bytes, plan.to_dict()["pages_moved"]) == (0, 0)
        small = sum(file.length_bytes for part in manifest.hosts for file in part.files)
        assert plan.verify_bytes >= manifest.pages * PAGE_SIZE + small
        assert all(each.read_bytes > each.pages * PAGE_SIZE for each in plan.hosts if each.pages)

    def test_stores_of_their_own(self, store: Store, manifest: Manifest) -> None:
        """h1 takes over; h0 is none of the VM's any more and serves its part; h2 has its own."""
        hosts = [seen("h0", 0, ("h0",)), seen("h1", 1, ("h1",)), seen("h2", 1, ("h2",))]
        layout = Layout(main=HALF, subs=(HALF,))
        plan = self.plan(store, manifest, Wish(layout, 2, ("h1", "h2")), hosts)
        main, sub, server = plan.hosts
        h0, h1, h2 = (part.pages for part in manifest.hosts)
        assert (server.host, server.role, server.memory_bytes) == ("h0", "parts", 0)
        assert server.served_bytes == h0 * PAGE_SIZE
        assert main.moved_from["h0"] + sub.moved_from.get("h0", 0) == h0 * PAGE_SIZE
        assert main.pages + sub.pages == h0 + h1 + h2
        assert plan.moved_bytes == sum(each.served_bytes for each in plan.hosts)
        for each in plan.hosts:
            assert each.verify_bytes == each.read_bytes + each.served_bytes
        values = plan.to_dict()
        assert [each["host"] for each in values["layout"]] == ["h1", "h2"]
        assert [each["host"] for each in values["servers"]] == ["h0"]
        assert values["bytes_moved"] == values["pages_moved"] * PAGE_SIZE == plan.moved_bytes
        slowest = max(
            each.moved_bytes / NETWORK_BYTES_PER_S for each in plan.hosts if each.moved_bytes
        )
        assert plan.seconds >= START_S + slowest
        assert plan.seconds == plan.whole_seconds

    def test_lazily(self, store: Store, manifest: Manifest) -> None:
        """One part server for each part; the guest does not wait for them."""
        hosts = [seen(name, 1, ALL) for name in ("a", "b")]
        layout = Layout(main=HALF, subs=(HALF,))
        plan = self.plan(store, manifest, Wish(layout, 2, ("a", "b")), hosts, lazy=True)
        main, sub = plan.hosts
        assert main.served_bytes == sub.moved_bytes == sub.pages * PAGE_SIZE
        assert (plan.lazy, plan.seconds) == (True, START_S)
        assert plan.whole_seconds > plan.seconds

    def test_a_part_that_nobody_has(self, store: Store, manifest: Manifest) -> None:
        hosts = [seen("a", 1, ("h0", "h2"))]
        plan = self.plan(store, manifest, Wish(), hosts)
        assert not plan.possible
        assert "the part that h1 saved of checkpoint" in plan.problems[0]
        assert "bring that host back" in repr(plan)

    def test_no_room_and_a_vm_that_runs(self, manifest: Manifest) -> None:
        plan = planned(manifest, Wish(), fleet_of(seen("a", 0)), VmPhase.RUNNING)
        assert plan.problems[0].startswith("VM demo runs already")
        assert "384 KiB" not in plan.problems[1]
        assert "1 MiB more than all hosts have room for" in plan.problems[1]
        assert plan.to_dict()["layout"] == []

    def test_damage_that_the_planner_finds(self, manifest: Manifest) -> None:
        def planning(host: str, order: PlanOrder) -> Flow:
            raise CheckpointCorrupt("pages.arrow was altered")

        plan = planned(manifest, Wish(), fleet_of(seen("a", 1, ALL), planning=planning))
        assert plan.problems == ("pages.arrow was altered",)

    def test_for_people(self, store: Store, manifest: Manifest) -> None:
        plan = self.plan(store, manifest, Wish(), [seen("a", 1, ALL)])
        assert repr(plan).startswith(f"<RestorePlan {manifest.checkpoint} onto a 384 KiB: ")
        assert repr(plan).endswith("runs after ≈ 1.0 s>")
        assert "<td>a</td><td>main</td>" in plan._repr_html_()
        assert "1000 MB/s from each host's store" in ASSUMPTION


@dataclass(frozen=True)
class Answering(ScriptedPort, Session):
    """A session whose VM has a coordinator, or none, that foresees this."""

    foreseen: ForeseenRestore | None = None
    asked: list[Any] = field(default_factory=list)

    def existing(self, vm: str) -> Any:
        if self.foreseen is None:
            raise NotFound(f"there is no VM {vm}")
        return self

    def answer(self, order: str, *args: Any) -> Any:
        self.asked.append((order, *args))
        return self.foreseen


class TestWhoPlans:
    def test_the_coordinator_where_there_is_one(
        self, manifest: Manifest, caplog: pytest.LogCaptureFixture
    ) -> None:
        foreseen = ForeseenRestore((), ("no",), "as asked", ("host b is left out: its disk",))
        session = Answering("nowhere", StoresOfHosts(), None, foreseen=foreseen)
        plan = plan_restore(session, manifest, Wish(), lazy=True, take_over=True)
        assert session.asked == [("plan_restore", dumps(manifest), Wish(), True, True)]
        assert (plan.problems, plan.chosen, plan.lazy) == (("no",), "as asked", True)
        assert "host b is left out: its disk" in caplog.text

    def test_this_process_where_there_is_none(
        self, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(api_plan, "RayFleet", lambda: fleet_of(seen("a", 0)))
        session = Answering("nowhere", StoresOfHosts(), None)
        (problem,) = plan_restore(session, manifest, Wish()).problems
        assert "more than all hosts have room for" in problem


def test_a_drain_plan_tells_its_sum() -> None:
    plan = DrainPlan("v", "h1", {"h2": 2, "h3": 3})
    assert plan.possible
    assert plan.to_dict()["bytes_moved"] == 5 * PAGE_SIZE
    assert "<DrainPlan h1 of v: h2 8 KiB" in repr(plan)


def test_a_drain_plan_is_what_the_coordinator_foresees() -> None:
    flows = (PageFlow("h1", "h2", 2), PageFlow("h3", "h2", 3), PageFlow("h1", "h0", 1))
    assert DrainPlan.of("v", "h1", Foreseen((), flows)).moves == {"h2": 5, "h0": 1}
    assert DrainPlan.of("v", "h1", Foreseen((), problem="no room")).problems == ("no room",)


def test_a_resize_plan_for_people() -> None:
    plan = ResizePlan.of("v", Foreseen((), (PageFlow("h1", "h2", 2), PageFlow("h0", "h2", 3))))
    assert plan.possible
    assert repr(plan) == "<ResizePlan v: h1 to h2 8 KiB, h0 to h2 12 KiB>"
    assert repr(ResizePlan.of("v", Foreseen((("h0", 1, 2),)))) == "<ResizePlan v: nothing to move>"
    assert repr(ResizePlan.of("v", Foreseen((), problem="no"))) == "<ResizePlan v: no>"


def test_free_memory_as_the_kernel_sees_it(tmp_path: Path) -> None:
    assert 0 < free_for_guests(tmp_path / "not" / "there") <= available_bytes() + (1 << 30)
    assert free_for_guests(tmp_path, reserve_bytes=1 << 60) == 0


def test_a_host_that_does_not_answer_is_left_out(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    infos = [HostInfo(name, name, "127.0.0.1", MIB, 3 * MIB, name != "dead") for name in "abc"]
    infos.append(HostInfo("dead", "d", "127.0.0.1", MIB, MIB, False))

    def run_on(host: str, function: Any, *args: Any, timeout_s: float) -> Look:
        if host == "b":
            raise DcresError("its disk is gone")
        assert args[1:] == ("this cluster", True)
        trouble = "its name is another's" if host == "c" else ""
        return Look(2 * MIB if host == "a" else 9 * MIB, ("h0",), trouble)

    monkeypatch.setattr(RayFleet, "held", lambda fleet, vm: {"a": MIB, "c": MIB})
    monkeypatch.setattr(gateway, "hosts", lambda: infos)
    monkeypatch.setattr(gateway, "cluster_id", lambda: "this cluster")
    monkeypatch.setattr(gateway, "run_on", run_on)
    found = RayFleet().look_around("demo", dumps(manifest), take_over=True)
    assert found.left_out == ("host b is left out: its disk is gone",)
    assert [(each.info.name, each.info.memory_free_bytes // MIB) for each in found.seen] == [
        ("a", 2),
        ("c", 4),  # with what is left of the VM there
    ]


def test_a_main_host_whose_store_has_another_cluster_s_vm_is_no_main_host(
    manifest: Manifest,
) -> None:
    why = "VM demo of another cluster has this name"
    hosts = [replace(seen("a", 9, ALL), trouble=why), seen("b", 9)]
    plan = planned(manifest, Wish(count=1, names=("a",)), fleet_of(*hosts))
    assert plan.problems == (why,)
    require_name(Choice(Layout(main=MEMORY), ("b", "a"), ""), hosts)
