"""The API without a cluster: plans, statuses, attended operations, stores, the demo's verdict."""

from __future__ import annotations

import errno
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from io import StringIO
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import pytest
from rich.console import Console

import dcres
from dcres.actors.control.coordinator import Coordinator
from dcres.actors.control.publishing import checkpoint_facts
from dcres.actors.messages import Foreseen, PageFlow
from dcres.actors.ports import Pending
from dcres.actors.ray import gateway, local_cluster
from dcres.actors.ray.coordinators import Coordinators
from dcres.actors.ray.local_cluster import LocalCluster
from dcres.actors.ray.local_home import Home
from dcres.api import cluster as api_cluster
from dcres.api.catalogue import StoreHere, StoresOfHosts, listed_facts, verify
from dcres.api.cluster import Cluster
from dcres.api.operation import Attended, HostProgress, OperationProgress
from dcres.api.resizing import ResizePlan
from dcres.api.session import (
    Session,
    catalogue_of,
    named_store,
    open_catalogue,
    open_session,
)
from dcres.api.show import progress_bars
from dcres.api.status import HostStatus, VmStatus, status_of
from dcres.api.vm import Checkpoint, Vm
from dcres.config import VmSpec
from dcres.demo import Life, Story, layout_for
from dcres.errors import (
    ActorGone,
    ClusterError,
    ConfigError,
    Conflict,
    DcresError,
    NotFound,
    OperationFailed,
    VmLost,
)
from dcres.linux.interrupt import Terminated
from dcres.model.pages import PAGE_SIZE
from dcres.storage.format.manifest import Manifest
from dcres.storage.store.store import Store
from tests.support.ports import ScriptedPort
from tests.support.stored import PAGE_COUNT, memory, store_with_demo, take

MEMORY = PAGE_COUNT * PAGE_SIZE


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store with one checkpoint of VM demo over h0, h1 and h2."""
    return store_with_demo(tmp_path_factory.mktemp("api"))


@pytest.fixture
def manifest(store: Store) -> Manifest:
    (entry,) = store.list()
    assert entry.manifest is not None
    return entry.manifest


class TestFacade:
    def test_every_name_is_there(self) -> None:
        for name in dcres.__all__:
            assert getattr(dcres, name) is not None
        assert set(dcres.__all__) <= set(dir(dcres))

    def test_other_names_are_not(self) -> None:
        with pytest.raises(AttributeError, match="has no attribute 'nix'"):
            _ = dcres.nix


MAIN = {
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
    "bringing_in": False,
    "pages_to_move": 7,
}
SUB = {
    "host": "h1",
    "role": "sub",
    "held_pages": 3,
    "capacity_pages": 4,
    "pages_in": 1,
    "pages_out": 2,
}


class TestStatus:
    def test_from_a_coordinator(self) -> None:
        status = status_of({"vm": "v", "phase": "running", "why": "", "hosts": [MAIN, SUB]})
        assert [each.pages for each in status.hosts] == [5, 3]
        assert [each.fill for each in status.hosts] == [0.625, 0.75]
        assert (status.pages, status.accel) == (8, "tcg")
        assert repr(status) == "<VmStatus v running: h0 20 KiB/32 KiB, h1 12 KiB/16 KiB>"
        assert "<td>h1</td>" in status._repr_html_()
        assert (status.bringing_in, status.pages_to_bring) == (False, 0)

    def test_during_a_lazy_restore(self) -> None:
        main = {**MAIN, "bringing_in": True, "pages_to_move": 512}
        status = status_of({"vm": "v", "phase": "running", "why": "", "hosts": [main, SUB]})
        assert repr(status).endswith("h1 12 KiB/16 KiB; bringing in: 2 MiB left>")
        assert "running, bringing in: 2 MiB left" in status._repr_html_()
        assert status.to_dict()["pages_to_bring"] == 512

    def test_names_the_hosts_that_the_guest_may_wait_for(self) -> None:
        silent = {"state": "greeting", "trouble": "it has not answered for 10 s"}
        links = {"h1": {"state": "ready", "trouble": ""}, "h2": silent}
        answer = {"vm": "v", "phase": "running", "why": "", "hosts": [{**MAIN, "links": links}]}
        assert status_of(answer).why == "h2 is not connected (it has not answered for 10 s)"
        assert status_of({**answer, "why": "h3 is gone"}).why == "h3 is gone"

    @pytest.mark.parametrize(
        ("run_state", "advice", "bad"),
        [
            ("running", "", False),
            ("paused", "`dcres resume v` lets it run", False),
            ("io-error", "then `dcres resume v` tries again", True),
            ("guest-panicked", "`dcres console v`", True),
        ],
    )
    def test_of_a_guest_that_stands_still(self, run_state: str, advice: str, bad: bool) -> None:
        main = {**MAIN, "run_state": run_state, "failed_disks": ["/d.qcow2: nospace"] * bad}
        answer = {"vm": "v", "phase": "running", "why": "", "generation": 3, "hosts": [main, SUB]}
        status = status_of(answer)
        assert (status.phase, status.doing, status.run_state) == ("running", run_state, run_state)
        assert (status.is_bad, status.generation, status.answers) == (bad, 3, True)
        assert advice in status.advice
        for shown in (repr(status), status._repr_html_()):
            assert run_state in shown
            assert advice in shown
            assert ("/d.qcow2: nospace" in shown) is bad
        assert status.to_dict()["advice"] == status.advice
        busy = status_of({**answer, "phase": "checkpointing"})
        assert (busy.doing, busy.advice) == ("checkpointing", "")

    def test_of_hosts_that_do_not_answer(self) -> None:
        """The numbers are the last that they gave, if they ever gave any."""
        silent = {"host_state": "silent", "host_why": "no answer", "silent_since": "12:00"}
        main, never = {**MAIN, **silent}, {"host": "h2", **silent}
        answer = {"vm": "v", "phase": "unknown", "why": "no answer", "hosts": [main, SUB, never]}
        status = status_of(answer)
        assert [each.role for each in status.hosts] == ["main", "sub", "sub"]
        assert [each.answers for each in status.hosts] == [False, True, False]
        assert [each.pages for each in status.hosts] == [5, 3, 0]
        assert (status.run_state, status.answers, status.is_bad) == ("", False, True)
        assert status.hosts[2].silent_since == "12:00"
        assert "v unknown: h0 20 KiB/32 KiB" in repr(status)
        assert "no answer" in repr(status)

    def test_without_hosts(self) -> None:
        status = status_of({"vm": "v", "phase": "lost", "why": "h0 is gone", "hosts": []})
        assert repr(status) == "<VmStatus v lost: h0 is gone>"
        assert HostStatus("h", "sub", 1, 0, 0, 0).fill == 0


P = ParamSpec("P")
R = TypeVar("R")

DONE = {"vm": "v"}


class FakePending:
    """A call that ends when it is told to."""

    def __init__(self, result: object) -> None:
        self.ended = threading.Event()
        self._result = result

    def result(self, timeout_s: float | None = None) -> Any:
        self.ended.wait()
        if isinstance(self._result, Exception):
            raise self._result
        return self._result


class FakeCoordinator(ScriptedPort):
    """A coordinator whose one operation ends when it is asked for progress, or cancelled."""

    def __init__(self, result: object, at_progress: Callable[[], None] | None = None) -> None:
        self.pending = FakePending(result)
        self.called: list[str] = []
        self._at_progress = at_progress or self.pending.ended.set

    def submit(
        self, order: Callable[Concatenate[Any, P], R], /, *args: P.args, **kwargs: P.kwargs
    ) -> Pending[R]:
        self.called.append(order.__name__)
        return self.pending

    def answer(self, order: str, *args: Any) -> Any:
        self.called.append(order)
        if order == "progress":
            self._at_progress()
            part = {"host": "h0", "what": "save", "done_bytes": 1, "total_bytes": 2}
            live = {**part, "host": "h1", "bytes_per_s": 9.0, "pages_left": 7}
            hosts = [part, {**live, "estimated_downtime_seconds": 0.25}]
            return {"vm": "v", "phase": "saving", "hosts": hosts}
        if order == "cancel":
            self.pending.ended.set()
        return None


def attended(
    coordinator: FakeCoordinator, title: str, progress: Callable[[OperationProgress], None]
) -> Attended:
    return Attended(coordinator, title, progress)


def interrupt() -> None:
    raise KeyboardInterrupt


class TestAttending:
    def test_progress_is_told_and_the_result_returned(self) -> None:
        seen: list[OperationProgress] = []
        coordinator = FakeCoordinator(DONE)
        assert attended(coordinator, "t", seen.append).run(Coordinator.restore, "{}") == DONE
        assert seen == [
            OperationProgress(
                "v",
                "saving",
                (
                    HostProgress("h0", "save", 1, 2),
                    HostProgress("h1", "save", 1, 2, 9.0, 7, 0.25),
                ),
            )
        ]
        assert (seen[0].done_bytes, seen[0].total_bytes, seen[0].bytes_per_s) == (2, 4, 9.0)

    def test_a_failure_comes_out_as_itself(self) -> None:
        coordinator = FakeCoordinator(Conflict("no"))
        with pytest.raises(Conflict, match="no"):
            attended(coordinator, "t", lambda _: None).run(Coordinator.start, {})

    def test_a_coordinator_that_restarts_is_no_reason_to_fail(self) -> None:
        coordinator = FakeCoordinator(DONE)

        def restarting() -> None:
            coordinator.pending.ended.set()
            raise ActorGone("it is being restarted")

        coordinator._at_progress = restarting
        assert attended(coordinator, "t", lambda _: None).run(Coordinator.start, {}) == DONE

    def test_a_checkpoint_that_is_interrupted_is_cancelled(self) -> None:
        coordinator = FakeCoordinator(OperationFailed("it was given up", {}), interrupt)
        with pytest.raises(KeyboardInterrupt, match="it was given up"):
            attended(coordinator, "t", lambda _: None).run(Coordinator.checkpoint)
        assert coordinator.called == ["checkpoint", "progress", "cancel"]

    @pytest.mark.parametrize(
        ("order", "result", "words"),
        [
            (
                Coordinator.checkpoint,
                {"checkpoint": "v-1"},
                "checkpoint v-1 was published before that",
            ),
            (Coordinator.pause, {}, "drain of h1 from v was done before that"),
        ],
    )
    def test_what_was_done_before_it_could_be_given_up_is_said(
        self,
        order: Callable[[Coordinator], dict[str, Any]],
        result: dict[str, Any],
        words: str,
    ) -> None:
        coordinator = FakeCoordinator(result, interrupt)
        with pytest.raises(KeyboardInterrupt, match=f"^{words}$"):
            attended(coordinator, "drain of h1 from v", lambda _: None).run(order)

    def test_a_start_that_ended_all_the_same_is_taken_down(self) -> None:
        coordinator = FakeCoordinator(DONE, interrupt)
        with pytest.raises(KeyboardInterrupt, match=r"^cancelled: start of v$"):
            attended(coordinator, "start of v", lambda _: None).run(Coordinator.start, {})
        assert coordinator.called == ["start", "progress", "cancel", "stop"]

    @pytest.mark.parametrize("error", [SystemExit(15), Terminated(), ValueError("show")])
    def test_nothing_goes_on_that_nobody_waits_for(self, error: BaseException) -> None:
        """A handler of the program's own, SIGTERM, a function for progress: whatever raises."""

        def raise_it(_: object) -> None:
            raise error

        coordinator = FakeCoordinator(DONE, lambda: None)
        with pytest.raises(type(error)) as caught:
            attended(coordinator, "t", raise_it).run(Coordinator.restore, "{}")
        assert caught.value is error
        assert coordinator.called == ["restore", "progress", "cancel", "stop"]

    def test_what_sigterm_ended_is_logged(self, caplog: pytest.LogCaptureFixture) -> None:
        def term(_: object) -> None:
            raise Terminated

        coordinator = FakeCoordinator({"checkpoint": "v-1"}, lambda: None)
        with pytest.raises(Terminated):
            attended(coordinator, "checkpoint of v", term).run(Coordinator.checkpoint)
        words = "SIGTERM during checkpoint of v: checkpoint v-1 was published before that"
        assert caplog.messages == [words]

    def test_a_start_that_was_refused_touches_nothing(self) -> None:
        coordinator = FakeCoordinator(Conflict("it runs already"), interrupt)
        with pytest.raises(KeyboardInterrupt):
            attended(coordinator, "t", lambda _: None).run(Coordinator.restore, "{}")
        assert "stop" not in coordinator.called


class GoneFile(StringIO):
    """A terminal that was closed, or a pipe that nobody reads."""

    def __init__(self, error: OSError | None) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        if self.error is not None:
            raise self.error
        return super().write(text)


class TestBars:
    @pytest.mark.parametrize(
        ("terminal", "error"),
        [
            (True, OSError(errno.EIO, "it was closed")),
            (False, OSError(errno.EIO, "it was closed")),
            (False, BrokenPipeError()),
        ],
    )
    def test_work_goes_on_that_nobody_sees(self, terminal: bool, error: OSError) -> None:
        file = GoneFile(None)
        console = Console(file=file, force_terminal=terminal, width=120)
        with progress_bars("drain h1", console) as show:
            for phase, file.error in (("resizing", None), ("moving", error), ("resizing", error)):
                show(OperationProgress("v", phase, (HostProgress(phase, "copy", 1, 2),)))
            file.error = None

    def test_pages_on_their_way_are_one_bar(self) -> None:
        console = Console(file=StringIO(), force_terminal=True, width=120)
        with progress_bars("drain h1", console) as show:
            for left in (512, 128):
                show(OperationProgress("v", "resizing", pages_to_move=left))
        assert "1.5/2.0 MiB" in text_of(console)

    def test_each_host_has_its_rate_and_what_is_left(self) -> None:
        console = Console(file=StringIO(), force_terminal=True, width=160)
        with progress_bars("checkpoint", console) as show:
            show(copying(2, 300))
        text = text_of(console)
        assert re.search(r"h0 copy, 300 pages left ≈ 80 ms .*3 MiB/s", text)
        assert re.search(r"h1 copy, 5 pages left ≈ 61 ms .*1 MiB/s", text)
        assert re.search(r"checkpoint \(copying, round 2, ≈ 80 ms of downtime\).*4 MiB/s", text)

    def test_without_a_terminal_a_line_for_every_phase_and_round(self) -> None:
        console = Console(file=StringIO(), width=40)
        with progress_bars("checkpoint", console) as show:
            show(OperationProgress("v", "preparing", (HostProgress("h0", "", 0, 0),)))
            for done in (copying(1, 900), copying(1, 900), copying(2, 300)):
                show(done)
            show(OperationProgress("v", "publishing"))
        assert text_of(console).splitlines() == [
            "checkpoint: preparing",
            "checkpoint: copying, round 1, ≈ 80 ms of downtime; "
            "h0 3 MiB/s, 900 pages left ≈ 80 ms; h1 1 MiB/s, 5 pages left ≈ 61 ms",
            "checkpoint: copying, round 2, ≈ 80 ms of downtime; "
            "h0 3 MiB/s, 300 pages left ≈ 80 ms; h1 1 MiB/s, 5 pages left ≈ 61 ms",
            "checkpoint: publishing",
        ]


def text_of(console: Console) -> str:
    assert isinstance(console.file, StringIO)
    return re.sub("\x1b\\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue())


def copying(round_: int, left: int) -> OperationProgress:
    """A live checkpoint over two hosts after that round."""
    hosts = (
        HostProgress("h0", "copy", 1 << 20, 2 << 20, 3 << 20, left, 0.08),
        HostProgress("h1", "copy", 1 << 20, 2 << 20, 1 << 20, 5, 0.061),
    )
    return OperationProgress("v", "copying", hosts, round_, {"h0": left, "h1": 5}, 0.08)


@dataclass(frozen=True)
class FakeSession(ScriptedPort, Session):
    """A session whose one VM answers `status` as told, one answer after the other."""

    answers: list[dict[str, Any]] = field(default_factory=list)
    asked: list[Any] = field(default_factory=list)
    done: dict[str, Any] = field(
        default_factory=lambda: {"vm": "v", "phase": "running", "why": "", "hosts": [MAIN, SUB]}
    )

    def existing(self, vm: str) -> Any:
        return self

    def answer(self, order: str, *args: Any) -> Any:
        if order in ("status", "pause", "resume"):
            return self.answers.pop(0)
        return []

    def submit(
        self, order: Callable[Concatenate[Any, P], R], /, *args: P.args, **kwargs: P.kwargs
    ) -> Pending[R]:
        self.asked.append((order.__name__, *args))
        pending = FakePending(self.done)
        pending.ended.set()
        return pending


def session_with(*answers: dict[str, Any]) -> FakeSession:
    return FakeSession("nowhere", StoresOfHosts(), None, list(answers))


def answer(**main: Any) -> dict[str, Any]:
    return {"vm": "v", "phase": "running", "why": "", "hosts": [{**MAIN, **main}, SUB]}


class TestChangesOfShares:
    def test_sizes_are_read_and_sent(self) -> None:
        session = session_with()
        vm = Vm(session, "v")
        assert vm.resize("64MiB", progress=False).phase == "running"
        vm.resize(subs=["1MiB", 8192], progress=False)
        vm.resize(subs=[], progress=False)
        vm.resize(subs="", progress=False)
        vm.drain("h1", progress=False)
        assert session.asked == [
            ("resize", 64 << 20, None),
            ("resize", None, [1 << 20, 8192]),
            ("resize", None, []),
            ("resize", None, []),
            ("drain", "h1"),
        ]

    @pytest.mark.parametrize("subs", ["1MiB,8KiB", " 1MiB, 8KiB,", ("1MiB", "8KiB")])
    def test_sizes_in_one_string(self, subs: str | tuple[str, ...]) -> None:
        session = session_with()
        Vm(session, "v").resize(subs=subs, progress=False)
        assert session.asked == [("resize", None, [1 << 20, 8192])]

    def test_nothing_asked_for(self) -> None:
        with pytest.raises(ConfigError, match="no new share for VM v; give main, subs or both"):
            Vm(session_with(), "v").resize()
        with pytest.raises(ConfigError, match="'x' is not a size"):
            Vm(session_with(), "v").resize(subs=["x"])


@dataclass(frozen=True)
class PlanningSession(FakeSession):
    """Its coordinator foresees something, or refuses."""

    foreseen: Foreseen | DcresError = field(default_factory=lambda: Foreseen(()))

    def answer(self, order: str, *args: Any) -> Any:
        self.asked.append((order, *args))
        if isinstance(self.foreseen, DcresError):
            raise self.foreseen
        return self.foreseen


class TestPlanningOtherShares:
    def planned(self, answer: Foreseen | DcresError) -> Vm:
        session = PlanningSession("nowhere", StoresOfHosts(), None, foreseen=answer)
        self.asked = session.asked
        return Vm(session, "v")

    def test_sizes_are_read_and_sent(self) -> None:
        foreseen = Foreseen((("h0", 1, 2),), (PageFlow("h0", "h1", 3),))
        vm = self.planned(foreseen)
        assert vm.plan_resize("64MiB", "1MiB,8KiB") == ResizePlan.of("v", foreseen)
        assert vm.plan_drain("h0").moves == {"h1": 3}
        assert self.asked == [
            ("plan_resize", 64 << 20, [1 << 20, 8192]),
            ("plan_drain", "h0"),
        ]
        with pytest.raises(ConfigError, match="no new share for VM v"):
            vm.plan_resize()
        with pytest.raises(ConfigError, match="'x' is not a size"):
            vm.plan_resize(subs=["x"])

    def test_a_refusal_is_a_problem(self) -> None:
        vm = self.planned(Conflict("VM v is checkpointing"))
        for plan in (vm.plan_resize("64MiB"), vm.plan_drain("h1")):
            assert (plan.possible, plan.problems) == (False, ("VM v is checkpointing",))

    def test_nobody_there(self) -> None:
        vm = self.planned(NotFound("VM v does not run"))
        with pytest.raises(NotFound):
            vm.plan_resize("64MiB")
        with pytest.raises(NotFound):
            vm.plan_drain("h1")


class TestStandingStill:
    def test_pause_and_resume_are_the_coordinators(self) -> None:
        session = session_with(answer(run_state="paused"), answer())
        vm = Vm(session, "v")
        assert vm.pause().doing == "paused"
        assert vm.resume().doing == "running"

    def test_the_console_of_a_guest_that_has_shut_down(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """And not where the main host does not answer."""
        monkeypatch.setattr(gateway, "run_on", lambda host, function, *args: function(*args))
        console = tmp_path / "console.log"
        console.write_text("bye")
        main = {**MAIN, "run_state": "shutdown", "console": str(console), "host_state": "off"}
        off = {"vm": "v", "phase": "off", "why": "its guest has shut down", "hosts": [main]}
        silent = {**off, "phase": "unknown", "hosts": [{**main, "host_state": "silent"}]}
        vm = Vm(session_with(off, silent), "v")
        assert vm.console() == "bye"
        with pytest.raises(VmLost, match="VM v is unknown: its guest has shut down"):
            vm.console()


class TestWaitingUntilWhole:
    def test_ends_when_nothing_is_left_to_bring(self) -> None:
        session = session_with(answer(bringing_in=True), answer(bringing_in=False))
        assert Vm(session, "v").wait_until_whole().bringing_in is False
        assert session.answers == []

    def test_a_vm_that_is_lost(self) -> None:
        session = session_with({"vm": "v", "phase": "lost", "why": "h1 is gone", "hosts": []})
        with pytest.raises(VmLost, match="h1 is gone"):
            Vm(session, "v").wait_until_whole()

    def test_not_for_ever(self) -> None:
        session = session_with(answer(bringing_in=True, pages_to_move=256))
        with pytest.raises(ClusterError, match="after 0 s 1 MiB of VM v are still in its"):
            Vm(session, "v").wait_until_whole(0)


class TestCheckpoints:
    def test_verified_with_progress(self, store: Store, manifest: Manifest) -> None:
        seen: list[OperationProgress] = []
        catalogue = StoreHere(store.root)
        report = verify(catalogue, manifest.checkpoint, seen.append)
        assert report.ok
        assert report.pages == manifest.pages
        assert seen[-1].done_bytes == seen[-1].total_bytes == manifest.pages * PAGE_SIZE

    def test_as_an_object(self, store: Store, manifest: Manifest) -> None:
        session = Session("nowhere", StoreHere(store.root), None)
        checkpoint = Checkpoint(session, manifest)
        assert repr(checkpoint).startswith(f"<Checkpoint {manifest.checkpoint} (stop): h0 ")
        assert checkpoint.created.isoformat() == "2026-03-01T12:00:00+00:00"
        assert checkpoint.inspect()["memory_bytes"] == MEMORY
        assert checkpoint.verify(progress=False).ok
        assert checkpoint.facts["pages"] == manifest.pages

    def test_taken_where_this_machine_does_not_read(
        self, store: Store, manifest: Manifest, tmp_path: Path
    ) -> None:
        facts = checkpoint_facts(manifest, 1.5)
        for root in (tmp_path, store.root):
            session = FakeSession("nowhere", StoreHere(root), None, done=facts)
            taken = Vm(session, "demo").checkpoint(progress=False)
            assert (taken.id, taken.vm) == (manifest.checkpoint, "demo")
            assert taken.facts == facts
            assert repr(taken) == repr(Checkpoint(session, manifest))
            if root == store.root:
                assert taken.manifest == manifest
            else:
                with pytest.raises(NotFound):
                    taken.inspect()

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

    def test_stores_of_the_hosts(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        many = tmp_path / "{host}"
        shared = local_cluster_with(tmp_path, tmp_path / "store")
        private = local_cluster_with(tmp_path, many)
        assert shared.settings("h1").store == shared.shared_store == tmp_path / "store"
        assert private.settings("h1").store == tmp_path / "h1"
        assert private.store == str(many)
        assert isinstance(catalogue_of(None, shared), StoreHere)
        assert isinstance(catalogue_of(None, private), StoresOfHosts)
        assert isinstance(catalogue_of(tmp_path / "h1", private), StoreHere)
        with pytest.raises(ConfigError, match="many stores, one for each host"):
            named_store(many)
        monkeypatch.setenv("DCRES_STORE", str(many))
        monkeypatch.setenv("DCRES_HOME", str(tmp_path))
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        with pytest.raises(ConfigError, match="many stores, one for each host"):
            open_catalogue(None, None)

    @pytest.mark.parametrize(
        ("option", "environ", "inside", "read"),
        [
            ("option", "environ", False, "option"),
            (None, "environ", False, "environ"),
            (None, "", False, "cluster"),
            (None, "{host}", False, "cluster"),
            (None, "h0", True, "cluster"),
        ],
    )
    def test_which_store_is_read_beside_a_local_cluster(
        self,
        option: str | None,
        environ: str,
        inside: bool,
        read: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        local = local_cluster_with(tmp_path, tmp_path / "cluster")
        monkeypatch.setattr(LocalCluster, "load", lambda _: local)
        monkeypatch.setattr(gateway, "connect", lambda *_: False)
        monkeypatch.setattr(gateway, "connected_address", lambda: None)
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        monkeypatch.setenv("DCRES_STORE", environ and str(tmp_path / environ))
        if inside:
            monkeypatch.setenv("DCRES_CLUSTER", local.id)
        given = None if option is None else tmp_path / option
        catalogue, joined = open_catalogue(None, given)
        assert not joined
        for found in (catalogue, open_session(None, given).catalogue):
            assert isinstance(found, StoreHere)
            assert found._store.root == tmp_path / read


def local_cluster_with(home: Path, store: Path) -> LocalCluster:
    """One that has never been started, with hosts h0 and h1."""
    state = local_cluster._new_state(home, store, 1 << 20, False)
    hosts = {"h0": "127.0.0.2", "h1": "127.0.0.3"}
    return LocalCluster(Home(home), replace(state, hosts=hosts))


class TestSpecs:
    def test_given_as_values_or_a_file(self, tmp_path: Path) -> None:
        values = {"name": "v", "memory": 4096, "kernel": "k", "layout": {"main": 4096}}
        spec = api_cluster._spec_of(values)
        assert isinstance(spec, VmSpec)
        assert api_cluster._spec_of(spec) is spec
        file = tmp_path / "vm.yaml"
        file.write_text("{name: v, memory: 4096, kernel: k, layout: {main: 4096}}")
        assert api_cluster._spec_of(str(file)).kernel == tmp_path / "k"

    @pytest.mark.parametrize("hosts", ["h1,h2", ["h1", "h2"], ("h1", "h2")])
    def test_hosts_are_named_one_by_one_or_in_one_string(
        self, hosts: str | tuple[str, ...], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        session = session_with()
        monkeypatch.setattr(Coordinators, "obtain", lambda *_: session)
        monkeypatch.setattr(gateway, "own_driver", lambda: None)
        values = {"name": "v", "memory": 4096, "kernel": "k", "layout": {"main": 4096}}
        Cluster(session).start(values, hosts, progress=False)
        (called,) = session.asked
        assert called[0] == "start"
        assert called[2] == ["h1", "h2"]

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
