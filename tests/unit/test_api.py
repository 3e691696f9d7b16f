"""The API without a cluster: plans, statuses, attended operations, stores, the demo's verdict."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dcres
from dcres.actors.room import MIB, HostInfo
from dcres.api import cluster as api_cluster
from dcres.api.catalogue import StoreHere
from dcres.api.interrupt import interrupt_on_signals, uninterrupted
from dcres.api.operation import OperationProgress, attend
from dcres.api.plan import plan_restore, wanted_layout
from dcres.api.session import open_catalogue
from dcres.api.status import HostStatus, VmStatus, status_of
from dcres.api.vm import Checkpoint, listed_facts, verify
from dcres.config import Layout, VmSpec, vm_spec
from dcres.demo import Life, Story, layout_for
from dcres.errors import ActorGone, ConfigError, Conflict, NotFound
from dcres.model.pages import PAGE_SIZE
from dcres.storage.manifest import Manifest
from dcres.storage.store import Store
from tests.support.stored import PAGE_COUNT, memory, take

MEMORY = PAGE_COUNT * PAGE_SIZE
HALF = MEMORY // 2


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store with one checkpoint of VM demo over h0, h1 and h2."""
    folder = tmp_path_factory.mktemp("api")
    ram = memory(folder / "ram", np.ones(PAGE_COUNT, dtype=bool))
    store = Store(folder / "store")
    taken = take(store, ram)
    layout = {"main": HALF, "subs": [HALF, HALF]}
    spec = vm_spec({"name": "demo", "memory": MEMORY, "kernel": "/vmlinuz", "layout": layout})
    values = spec.model_dump(mode="json", by_alias=True)
    store.publish(taken.model_copy(update={"vm_spec": values, "disks": ()}))
    return store


@pytest.fixture
def manifest(store: Store) -> Manifest:
    (entry,) = store.list()
    assert entry.manifest is not None
    return entry.manifest


def host(name: str, free_mib: int = 1, *, alive: bool = True) -> HostInfo:
    return HostInfo(name, f"id-{name}", "127.0.0.1", MIB, free_mib * MIB, alive)


class TestFacade:
    def test_every_name_is_there(self) -> None:
        for name in dcres.__all__:
            assert getattr(dcres, name) is not None
        assert set(dcres.__all__) <= set(dir(dcres))

    def test_other_names_are_not(self) -> None:
        with pytest.raises(AttributeError, match="has no attribute 'nix'"):
            _ = dcres.nix


class TestWantedLayout:
    def test_as_it_was(self, manifest: Manifest) -> None:
        assert wanted_layout(manifest, None, False, None) == (None, None)
        assert wanted_layout(manifest, None, False, 3) == (None, None)
        assert wanted_layout(manifest, None, False, ["a", "b", "c"]) == (None, ["a", "b", "c"])

    def test_one_host(self, manifest: Manifest) -> None:
        whole = Layout(main=MEMORY)
        assert wanted_layout(manifest, None, True, None) == (whole, None)
        assert wanted_layout(manifest, None, True, ["h7"]) == (whole, ["h7"])
        assert wanted_layout(manifest, None, False, 1) == (whole, None)

    def test_another_number_of_hosts_is_divided_evenly(self, manifest: Manifest) -> None:
        layout, _ = wanted_layout(manifest, None, False, 2)
        assert layout == Layout(main=HALF, subs=(HALF,))

    @pytest.mark.parametrize(
        ("layout", "single", "hosts"),
        [
            (Layout(main=MEMORY), True, None),
            (None, True, 2),
            (None, True, ["a", "b"]),
            (Layout(main=MEMORY), False, 3),
            (None, False, 0),
        ],
    )
    def test_contradictions(
        self, layout: Layout | None, single: bool, hosts: Any, manifest: Manifest
    ) -> None:
        with pytest.raises(ConfigError):
            wanted_layout(manifest, layout, single, hosts)


class TestPlan:
    def test_each_host_reads_its_own_part(self, manifest: Manifest) -> None:
        plan = plan_restore(manifest, None, ["a", "b", "c"], [host("a"), host("b"), host("c")])
        assert plan.possible
        assert [each.host for each in plan.hosts] == ["a", "b", "c"]
        assert [each.pages for each in plan.hosts] == [part.pages for part in manifest.hosts]
        for planned, part in zip(plan.hosts, manifest.hosts, strict=True):
            small = sum(file.length_bytes for file in part.files)
            assert planned.read_bytes == part.pages * PAGE_SIZE + small
        assert plan.to_dict()["possible"] is True

    def test_one_host_reads_everything(self, manifest: Manifest) -> None:
        plan = plan_restore(manifest, Layout(main=MEMORY), None, [host("a", 0), host("b")])
        assert [(each.host, each.pages) for each in plan.hosts] == [("b", manifest.pages)]

    def test_too_few_hosts(self, manifest: Manifest) -> None:
        plan = plan_restore(manifest, None, None, [host("a"), host("b"), host("c", alive=False)])
        assert not plan.possible
        assert "3 hosts are needed" in repr(plan)
        assert "?" in [each.host for each in plan.hosts]

    def test_a_layout_that_cannot_hold_it(self, manifest: Manifest) -> None:
        plan = plan_restore(manifest, Layout(main=PAGE_SIZE), None, [host("a")])
        assert plan.hosts == ()
        assert "the layout holds 4 KiB" in plan.problems[0]

    def test_a_vm_that_runs(self, manifest: Manifest) -> None:
        hosts = [host(name) for name in "abc"]
        assert "runs; stop it first" in plan_restore(manifest, None, None, hosts, True).problems[0]


class TestStatus:
    def test_from_a_coordinator(self) -> None:
        main = {
            "host": "h0",
            "role": "main",
            "pages": [5, 3, 9],
            "limit_pages": 8,
            "pages_in": 1,
            "pages_out": 2,
            "page_in_median_us": 100.0,
            "page_in_p99_us": 200.0,
            "accel": "tcg",
            "run_state": "running",
            "console": "/console",
        }
        sub = {
            "host": "h1",
            "role": "sub",
            "held_pages": 3,
            "capacity_pages": 4,
            "pages_in": 1,
            "pages_out": 2,
        }
        status = status_of({"vm": "v", "phase": "running", "why": "", "hosts": [main, sub]})
        assert [each.pages for each in status.hosts] == [5, 3]
        assert [each.fill for each in status.hosts] == [0.625, 0.75]
        assert (status.pages, status.accel) == (8, "tcg")
        assert repr(status) == "<VmStatus v running: h0 20 KiB/32 KiB, h1 12 KiB/16 KiB>"
        assert "<td>h1</td>" in status._repr_html_()

    def test_without_hosts(self) -> None:
        status = status_of({"vm": "v", "phase": "lost", "why": "h0 is gone", "hosts": []})
        assert repr(status) == "<VmStatus v lost: h0 is gone>"
        assert HostStatus("h", "sub", 1, 0, 0, 0).fill == 0


class FakePending:
    """A call that ends when it is told to."""

    def __init__(self, result: object) -> None:
        self.ended = threading.Event()
        self._result = result

    def result(self, timeout_s: float) -> Any:
        self.ended.wait()
        if isinstance(self._result, Exception):
            raise self._result
        return self._result


class FakeCoordinator:
    """A coordinator whose one operation ends when it is asked for progress, or cancelled."""

    def __init__(self, result: object, at_progress: Callable[[], None] | None = None) -> None:
        self.pending = FakePending(result)
        self.called: list[str] = []
        self._at_progress = at_progress or self.pending.ended.set

    def submit(self, method: str, *args: Any) -> FakePending:
        self.called.append(method)
        return self.pending

    def call(self, method: str, *args: Any, timeout_s: float = 60.0) -> Any:
        self.called.append(method)
        if method == "progress":
            self._at_progress()
            part = {"host": "h0", "what": "save", "done_bytes": 1, "total_bytes": 2}
            return {"vm": "v", "phase": "saving", "hosts": [part]}
        if method == "cancel":
            self.pending.ended.set()
        return None

    def wait_ready(self, timeout_s: float) -> None: ...


def interrupt() -> None:
    raise KeyboardInterrupt


class TestAttending:
    def test_progress_is_told_and_the_result_returned(self) -> None:
        seen: list[OperationProgress] = []
        coordinator = FakeCoordinator("done")
        assert attend(coordinator, "restore", title="t", progress=seen.append) == "done"
        assert [(each.phase, each.done_bytes, each.total_bytes) for each in seen] == [
            ("saving", 1, 2)
        ]

    def test_a_failure_comes_out_as_itself(self) -> None:
        coordinator = FakeCoordinator(Conflict("no"))
        with pytest.raises(Conflict, match="no"):
            attend(coordinator, "start", title="t", progress=lambda _: None)

    def test_a_coordinator_that_restarts_is_no_reason_to_fail(self) -> None:
        coordinator = FakeCoordinator("done")

        def restarting() -> None:
            coordinator.pending.ended.set()
            raise ActorGone("it is being restarted")

        coordinator._at_progress = restarting
        assert attend(coordinator, "start", title="t", progress=lambda _: None) == "done"

    def test_a_checkpoint_that_is_interrupted_is_cancelled(self) -> None:
        coordinator = FakeCoordinator("done", interrupt)
        with pytest.raises(KeyboardInterrupt):
            attend(coordinator, "checkpoint", title="t", progress=lambda _: None)
        assert coordinator.called == ["checkpoint", "progress", "cancel"]

    def test_a_start_that_ended_all_the_same_is_taken_down(self) -> None:
        coordinator = FakeCoordinator("done", interrupt)
        with pytest.raises(KeyboardInterrupt):
            attend(coordinator, "start", title="t", progress=lambda _: None)
        assert coordinator.called == ["start", "progress", "cancel", "stop"]

    def test_a_start_that_was_refused_touches_nothing(self) -> None:
        coordinator = FakeCoordinator(Conflict("it runs already"), interrupt)
        with pytest.raises(KeyboardInterrupt):
            attend(coordinator, "restore", title="t", progress=lambda _: None)
        assert "stop" not in coordinator.called


class TestInterrupts:
    def test_sigterm_is_like_ctrl_c_except_while_cleaning_up(self) -> None:
        before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
        hangup = signal.getsignal(signal.SIGHUP)
        try:
            interrupt_on_signals()
            with uninterrupted():
                signal.raise_signal(signal.SIGTERM)
            with pytest.raises(KeyboardInterrupt, match="SIGTERM"):
                signal.raise_signal(signal.SIGTERM)
        finally:
            for number, handler in {**before, signal.SIGHUP: hangup}.items():
                signal.signal(number, handler)

    def test_in_a_thread_nothing_happens(self) -> None:
        done = []

        def work() -> None:
            interrupt_on_signals()
            with uninterrupted():
                done.append(True)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert done


class TestCheckpoints:
    def test_verified_with_progress(self, store: Store, manifest: Manifest) -> None:
        seen: list[OperationProgress] = []
        catalogue = StoreHere(store.root)
        report = verify(catalogue, manifest.checkpoint, seen.append)
        assert report.ok
        assert report.pages == manifest.pages
        assert seen[-1].done_bytes == seen[-1].total_bytes == manifest.pages * PAGE_SIZE

    def test_as_an_object(self, store: Store, manifest: Manifest) -> None:
        from dcres.api.session import Session

        session = Session("nowhere", StoreHere(store.root), None)
        checkpoint = Checkpoint(session, manifest)
        assert repr(checkpoint).startswith(f"<Checkpoint {manifest.checkpoint} (stop): h0 ")
        assert checkpoint.created.isoformat() == "2026-03-01T12:00:00+00:00"
        assert checkpoint.inspect()["memory_bytes"] == MEMORY
        assert checkpoint.verify(progress=False).ok
        assert checkpoint.facts["pages"] == manifest.pages

    def test_listed(self, store: Store, manifest: Manifest) -> None:
        (entry,) = StoreHere(store.root).list("demo")
        assert listed_facts(entry)["created"] == manifest.created
        assert StoreHere(store.root).get(manifest.checkpoint) == manifest

    def test_deleted(self, tmp_path: Path) -> None:
        ram = memory(tmp_path / "ram", np.ones(PAGE_COUNT, dtype=bool))
        store = Store(tmp_path / "store")
        taken = take(store, ram)
        store.publish(taken)
        catalogue = StoreHere(store.root)
        catalogue.delete(taken.checkpoint)
        with pytest.raises(NotFound):
            catalogue.get(taken.checkpoint)

    def test_found_without_a_cluster(
        self, store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        for name in ("RAY_ADDRESS", "DCRES_STORE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("DCRES_HOME", str(tmp_path))
        with pytest.raises(NotFound, match="dcres up"):
            open_catalogue(None, None)
        for ways in ("named", "environment", "home"):
            if ways == "environment":
                monkeypatch.setenv("DCRES_STORE", str(store.root))
            if ways == "home":
                monkeypatch.delenv("DCRES_STORE")
                monkeypatch.setenv("DCRES_HOME", str(store.root.parent))
            catalogue, joined = open_catalogue(None, store.root if ways == "named" else None)
            assert not joined
            assert len(catalogue.list()) == 1


class TestSpecs:
    def test_given_as_values_or_a_file(self, tmp_path: Path) -> None:
        values = {"name": "v", "memory": 4096, "kernel": "k", "layout": {"main": 4096}}
        spec = api_cluster._spec_of(values)
        assert isinstance(spec, VmSpec)
        assert api_cluster._spec_of(spec) is spec
        file = tmp_path / "vm.yaml"
        file.write_text("{name: v, memory: 4096, kernel: k, layout: {main: 4096}}")
        assert api_cluster._spec_of(str(file)).kernel == tmp_path / "k"

    def test_a_bad_size(self) -> None:
        with pytest.raises(ConfigError, match="unit 'MB' is not known"):
            api_cluster.memory_size("512MB")


def ticks(first: int, last: int, failures: int = 0) -> str:
    lines = [f"WITNESS tick={n} checks={n + 1} failures={failures}" for n in range(first, last + 1)]
    return "\n".join([*lines, ""])


class TestDemoStory:
    def test_layout(self) -> None:
        assert layout_for(512 << 20) == {"main": 256 << 20, "subs": [128 << 20, 128 << 20]}
        odd = layout_for((512 << 20) + PAGE_SIZE)
        assert odd["main"] + sum(odd["subs"]) == (512 << 20) + PAGE_SIZE

    def test_a_life(self) -> None:
        life = Life.of("ick=9 checks=9 failures=0\n" + ticks(10, 14))
        assert (life.first.tick, life.last.tick) == (10, 14)
        assert (life.checks, life.ticks) == (5, 5)
        assert Life.of("Linux boots").checks == 0

    def story(self, *consoles: str) -> Story:
        story = Story("tcg", "why", 512 << 20)
        story.lives = [Life.of(console) for console in consoles]
        return story

    def test_all_is_well(self) -> None:
        story = self.story(ticks(1, 12), ticks(10, 40), ticks(11, 30))
        assert (story.checks, story.failures, story.ticks_lost) == (12 + 31 + 20, 0, 0)
        assert story.good
        assert story.to_dict()["guest"] == {"checks": 63, "failures": 0, "ticks_lost": 0}

    def test_ticks_missing_in_a_life_or_between_two(self) -> None:
        assert self.story(ticks(1, 4) + ticks(6, 9)).ticks_lost == 1
        assert self.story(ticks(1, 12), ticks(15, 40)).ticks_lost == 2

    def test_a_failure(self) -> None:
        assert not self.story(ticks(1, 12), ticks(10, 40, failures=1)).good

    def test_a_problem(self) -> None:
        story = self.story(ticks(1, 12))
        story.problems.append("the guest booted again")
        assert not story.good

    def test_an_empty_status(self) -> None:
        assert VmStatus("v", "starting").pages == 0
