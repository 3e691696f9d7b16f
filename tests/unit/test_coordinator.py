"""The coordinator over hosts that do nothing but keep account, and fail when they are told to."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dcres.actors.control import checkpointing
from dcres.actors.control.concurrency import Threads
from dcres.actors.control.coordinator import Coordinator
from dcres.actors.host.meter import Meter
from dcres.actors.messages import (
    Foreseen,
    PageFlow,
    Progress,
)
from dcres.config import Layout
from dcres.errors import (
    ActorGone,
    CheckpointCorrupt,
    ClusterError,
    ConfigError,
    Conflict,
    DcresError,
    NoRoom,
    NotFound,
    OperationFailed,
    PagingError,
    QemuFailed,
    StoreFull,
    VmLost,
    VmOff,
)
from dcres.paging.settings import SubAddress
from dcres.storage.format.manifest import Manifest, dumps, loads
from dcres.storage.layout import MERGE_SEGMENTS, MOST_SEGMENTS
from tests.support.fake_fleet import fake_fleet
from tests.support.fleet import LocalFleet
from tests.support.speed import patience
from tests.support.wait import until
from tests.support.world import PAGES, World

SPEC: dict[str, Any] = {
    "name": "vm",
    "memory": "64MiB",
    "kernel": "/boot/vmlinuz",
    "layout": {"main": "32MiB", "subs": ["16MiB", "16MiB"]},
}
BEGINNINGS = ("serve", "boot", "run", "go")


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def fleet(world: World) -> Iterator[LocalFleet]:
    with fake_fleet(world) as made:
        yield made


@pytest.fixture
def coordinator(fleet: LocalFleet) -> Coordinator:
    return Coordinator("vm", fleet)


@pytest.fixture
def started(coordinator: Coordinator, world: World) -> Coordinator:
    coordinator.start(SPEC)
    world.done.clear()
    return coordinator


def manifest_of(world: World, facts: dict[str, Any]) -> Manifest:
    return loads(world.published[facts["checkpoint"]], Path("manifest.json"))


def require_nothing(world: World, fleet: LocalFleet) -> None:
    """Nothing of the VM is anywhere."""
    assert (world.state, world.serving, world.unfinished) == ({}, set(), set())
    assert world.serving_parts == world.pinning == set()
    assert (fleet.reserved, fleet.actors) == ({}, {})


# Start


def test_a_start_boots_everywhere_at_once_and_lets_the_guest_go_last(
    coordinator: Coordinator, world: World
) -> None:
    status = coordinator.start(SPEC)
    assert status["phase"] == "running"
    orders = [each for each in world.done if each.partition(".")[2] in BEGINNINGS]
    assert sorted(orders[:3]) == ["h0.boot", "h1.serve", "h2.serve"]
    assert orders[3:] == ["h0.run", "h0.go"]
    assert world.runs


def test_all_hosts_look_before_the_first_is_cleared(world: World, coordinator: Coordinator) -> None:
    """Another cluster's VM may have the folder of any of them."""
    world.fail["h2.require_free"] = Conflict("VM vm of another cluster is there")
    with pytest.raises(Conflict, match="of another cluster is there"):
        coordinator.start(SPEC)
    assert not [each for each in world.done if each.endswith((".clear", ".boot"))]


@pytest.mark.parametrize("where", ["h1.serve", "h2.serve", "h0.boot", "h0.run", "h0.go"])
@pytest.mark.parametrize("error", [NoRoom("no room on it"), ActorGone("it died")])
def test_a_start_that_fails_undoes_all(
    coordinator: Coordinator, world: World, fleet: LocalFleet, where: str, error: DcresError
) -> None:
    world.fail[where] = error
    with pytest.raises(DcresError, match=str(error)) as caught:
        coordinator.start(SPEC)
    host = where.partition(".")[0]
    assert isinstance(caught.value, type(error) if isinstance(error, NoRoom) else OperationFailed)
    assert f"{host}: {error}" in str(caught.value)
    assert [(each.host, each.kind) for each in caught.value.failed_on] == [
        (host, type(error).__name__)
    ]
    require_nothing(world, fleet)
    assert coordinator.status()["phase"] == "absent"
    world.fail.clear()
    assert coordinator.start(SPEC)["phase"] == "running"


def test_a_start_without_enough_hosts_reserves_nothing(
    coordinator: Coordinator, world: World, fleet: LocalFleet
) -> None:
    del fleet.hosts[2:]
    with pytest.raises(NoRoom):
        coordinator.start(SPEC)
    require_nothing(world, fleet)


def test_what_runs_cannot_be_started_or_restored(started: Coordinator, world: World) -> None:
    with pytest.raises(Conflict, match="dcres stop vm"):
        started.start(SPEC)
    facts = started.checkpoint("stop")
    with pytest.raises(Conflict, match="dcres stop vm"):
        started.restore(world.published[facts["checkpoint"]])
    assert world.runs


@pytest.mark.parametrize(
    ("trouble", "lost"),
    [(VmLost("QEMU has ended"), True), (PagingError("pager.sock does not answer"), False)],
)
def test_only_a_lost_vm_is_replaced_by_a_restore(
    started: Coordinator, world: World, trouble: DcresError, lost: bool
) -> None:
    text = world.published[started.checkpoint("stop")["checkpoint"]]
    world.fail["h0.status"] = trouble
    assert started.status()["phase"] == ("lost" if lost else "running")
    assert str(trouble) in started.status()["why"]
    if lost:
        world.hooks["h0.run"] = lambda: world.fail.clear()
        started.restore(text)
        assert world.count("h0.destroy") == 1
    else:
        with pytest.raises(Conflict):
            started.restore(text)
        assert world.count("h0.destroy") == 0
        world.fail.clear()
    assert started.status()["phase"] == "running"


def test_a_start_that_is_cancelled_in_its_last_moment_is_taken_down(
    coordinator: Coordinator, world: World, fleet: LocalFleet
) -> None:
    """Whoever cancelled it may have been killed, and would not stop it."""
    said: list[bool] = []
    world.hooks["h0.run"] = lambda: said.append(coordinator.cancel())
    with pytest.raises(Conflict, match="cancelled"):
        coordinator.start(SPEC)
    assert said == [True]
    require_nothing(world, fleet)


def test_a_start_is_given_up_when_whoever_wanted_it_is_gone(
    coordinator: Coordinator, world: World, fleet: LocalFleet
) -> None:
    """It was killed, and could not cancel."""

    def gone_meanwhile() -> None:
        fleet.gone.add("01000000")
        until(lambda: world.count("h0.destroy") > 0, 30, "the hosts are told to end")

    world.hooks["h0.run"] = gone_meanwhile
    with pytest.raises(Conflict, match="cancelled"):
        coordinator.start(SPEC, None, driver="01000000")
    require_nothing(world, fleet)
    world.hooks.clear()
    assert coordinator.start(SPEC, None, driver="02000000")["phase"] == "running"


def test_a_restore_whose_guest_may_run_by_now_goes_on_when_the_actor_dies(
    started: Coordinator, world: World, fleet: LocalFleet
) -> None:
    """Its disks are the checkpoint's for good then, and what they were is given up."""
    text = world.published[started.checkpoint("stop")["checkpoint"]]
    started.stop()
    ended, gone = world.count("h0.destroy"), world.count("h0.go")

    def die_twice() -> None:
        if world.count("h0.go") < gone + 3:
            fleet.actor("vm", 0).restart()

    world.hooks["h0.go"] = die_twice
    started.restore(text)
    assert world.runs
    assert (world.count("h0.destroy"), world.count("h0.go")) == (ended, gone + 3)


def test_a_cancelled_start_takes_all_down(
    coordinator: Coordinator, world: World, fleet: LocalFleet
) -> None:
    stopping = threading.Thread(target=coordinator.stop)

    def stop_meanwhile() -> None:
        stopping.start()
        until(lambda: world.count("h0.destroy") > 0, 30, "the hosts are told to end")

    world.hooks["h0.run"] = stop_meanwhile
    with pytest.raises(Conflict, match="cancelled"):
        coordinator.start(SPEC)
    stopping.join(patience(10))
    require_nothing(world, fleet)


# Checkpoint


@pytest.mark.parametrize("mode", ["stop", "live"])
def test_a_checkpoint_runs_through_its_steps(started: Coordinator, world: World, mode: str) -> None:
    facts = started.checkpoint(mode)
    manifest = manifest_of(world, facts)
    assert [part.host for part in manifest.hosts] == ["h0", "h1", "h2"]
    assert (facts["mode"], facts["pages"]) == (mode, 3 * PAGES)
    assert facts["downtime_seconds"] == 0.5
    steps = [each.partition(".")[2] for each in world.done]
    order = ["prepare", "synchronise", "finish", "stage", "resume", "save", "publish"]
    assert [
        step for index, step in enumerate(steps) if step in order and step not in steps[:index]
    ] == order
    assert world.runs
    assert not world.unfinished


@pytest.mark.parametrize("merging", [True, False])
def test_increments_go_on_for_as_long_as_segments_are_merged(
    started: Coordinator, world: World, merging: bool
) -> None:
    """Where a host does not, that fails no checkpoint; in the end one is full."""
    if not merging:
        world.fail["h1.compact"] = StoreFull("the disk is full")
    full = {}
    for number in range(MOST_SEGMENTS + 2):
        facts = started.checkpoint("stop")
        if facts["base"] is None:
            full[number] = facts["full_because"]
        many = max(len(part.segments or ()) for part in manifest_of(world, facts).hosts)
        if merging and many == MERGE_SEGMENTS:
            until(partial(world.merged.get, (str(facts["checkpoint"]), "h2")))
    assert [*full] == ([0] if merging else [0, MOST_SEGMENTS])
    assert world.runs


STEPS = [
    "h0.prepare", "h1.prepare", "h2.synchronise", "h0.finish", "h0.stage", "h1.stage",
    "h0.save", "h2.save", "h0.publish",
]  # fmt: skip


@pytest.mark.parametrize("step", STEPS)
def test_a_checkpoint_that_fails_resumes_and_discards(
    started: Coordinator, world: World, step: str
) -> None:
    world.fail[step] = StoreFull("the disk is full")
    with pytest.raises(OperationFailed, match="the disk is full") as caught:
        started.checkpoint("stop")
    host = step.partition(".")[0]
    ends = [each for each in world.done if each.endswith((".halt", ".abandon"))]
    if step == "h0.publish":  # the main host ends that first, to know whether it was published
        assert ends.pop(0) == "h0.halt"
    assert [each.partition(".")[2] for each in ends] == ["halt"] * 3 + ["abandon"] * 3
    if step in ("h0.finish", "h0.stage", "h1.stage"):  # else it was resumed already, or not stopped
        assert world.done.index("h0.halt") < world.done.index("h0.resume")
    assert caught.value.failures == {host: "the disk is full"}
    assert "the VM goes on" in str(caught.value)
    assert world.runs
    assert not world.unfinished
    assert not world.published
    assert started.status()["phase"] == "running"
    world.fail.clear()
    assert started.checkpoint("stop")["checkpoint"] in world.published


@pytest.mark.parametrize("step", ["resume", "publish", "abandon"])
def test_what_may_be_repeated_is_repeated_when_the_actor_dies_in_it(
    started: Coordinator, world: World, step: str
) -> None:
    def once() -> None:
        world.fail.pop(f"h0.{step}", None) if world.count(f"h0.{step}") > 1 else None

    world.fail[f"h0.{step}"] = ActorGone("it died")
    world.hooks[f"h0.{step}"] = once
    if step == "abandon":
        world.fail["h1.save"] = StoreFull("full")
        with pytest.raises(OperationFailed, match="full"):
            started.checkpoint("stop")
    else:
        assert started.checkpoint("stop")["checkpoint"] in world.published
    assert world.count(f"h0.{step}") == 2
    assert world.runs
    assert not world.unfinished


def test_a_vm_that_cannot_go_on_is_not_said_to_go_on(started: Coordinator, world: World) -> None:
    world.fail["h0.finish"] = VmLost("QEMU has ended")
    world.fail["h0.resume"] = VmLost("QEMU has ended")
    with pytest.raises(OperationFailed, match="the VM is lost, and earlier") as caught:
        started.checkpoint("stop")
    assert "the VM goes on" not in str(caught.value)


@pytest.mark.parametrize("error", [VmLost("QEMU does not answer"), RuntimeError("of Ray itself")])
def test_a_vm_that_could_not_go_on_is_told_again(
    started: Coordinator, world: World, error: Exception
) -> None:
    world.fail["h0.resume"] = error
    world.hooks["h0.publish"] = lambda: world.fail.clear()
    assert started.checkpoint("stop")["checkpoint"] in world.published
    assert world.runs
    assert started.status()["phase"] == "running"


def test_a_vm_whose_paging_goes_on_and_qemu_does_not_is_told_again(
    started: Coordinator, world: World
) -> None:
    """After its core was saved QEMU is not "paused" (qapi/run-state.json, postmigrate)."""

    def thaw_only() -> None:
        world.frozen = False

    world.hooks["h0.resume"] = thaw_only
    world.fail["h0.resume"] = VmLost("QEMU refused cont: the image is locked")
    world.hooks["h0.publish"] = lambda: world.fail.clear()
    started.checkpoint("stop")
    assert world.runs


def test_a_vm_that_stands_still_for_a_checkpoint_given_up_is_told_again(
    started: Coordinator, world: World
) -> None:
    world.fail["h0.resume"] = VmLost("QEMU does not answer")
    world.fail["h1.save"] = StoreFull("the disk is full")
    world.hooks["h1.halt"] = lambda: world.fail.clear()
    with pytest.raises(OperationFailed):
        started.checkpoint("stop")
    assert world.runs
    assert started.status()["phase"] == "running"


def test_a_checkpoint_whose_vm_stands_still_is_no_success(
    started: Coordinator, world: World
) -> None:
    world.fail["h0.resume"] = VmLost("QEMU does not answer")
    with pytest.raises(VmLost, match="was taken, but the VM is stopped: QEMU does not answer"):
        started.checkpoint("stop")
    assert started.status()["phase"] == "lost"
    world.fail.clear()
    assert started.status()["phase"] == "running"
    assert world.runs


SILENCE = ClusterError("it did not answer within 10 s")
STANDING = ("paused", "prelaunch", "io-error", "guest-panicked", "watchdog")


@pytest.mark.parametrize("mode", ["live", "stop"])
@pytest.mark.parametrize("state", STANDING)
def test_a_vm_that_stands_still_is_saved_and_stands_as_it_did(
    started: Coordinator, fleet: LocalFleet, world: World, state: str, mode: str
) -> None:
    world.run_state = state
    for _ in range(2):
        manifest = manifest_of(world, started.checkpoint(mode))
        assert (manifest.run_state, world.run_state) == (state, "postmigrate")
        assert started.status()["hosts"][0]["run_state"] == state
    assert successor(fleet).status()["hosts"][0]["run_state"] == state
    facts = started.status()
    assert (facts["phase"], world.frozen) == ("running", False)
    started.resume()
    assert world.runs
    assert started.status()["hosts"][0]["run_state"] == "running"


@pytest.mark.parametrize("step", ["h1.prepare", "h0.finish", "h1.stage", "h0.save", "h0.publish"])
@pytest.mark.parametrize("state", ["paused", "io-error"])
def test_a_vm_that_stands_still_is_not_let_go_by_a_checkpoint_that_fails(
    started: Coordinator, fleet: LocalFleet, world: World, step: str, state: str
) -> None:
    """Nor by whoever comes after a coordinator that died in it."""
    world.run_state = state
    world.fail[step] = StoreFull("the disk is full")
    with pytest.raises(OperationFailed, match=rf"the VM is as it was \({state}\)"):
        started.checkpoint("stop")
    assert started.status()["hosts"][0]["run_state"] == state
    world.fail[step] = world.fail["h0.resume"] = ActorGone("this coordinator is dead")
    found: list[Coordinator] = []

    def take_over() -> None:
        if not found:
            world.fail.pop("h0.resume")
            found.append(successor(fleet))

    world.hooks[step] = take_over
    with pytest.raises(DcresError):
        started.checkpoint("stop")
    assert found[0].status()["hosts"][0]["run_state"] == state
    assert not world.frozen
    assert not world.unfinished


@pytest.mark.parametrize(
    ("state", "why"),
    [
        ("shutdown", "VM vm is off: its guest has shut down"),
        ("suspended", "sleeps; wake it first"),
        ("internal-error", "cannot go on"),
        ("postmigrate", "another monitor has put VM vm into"),
    ],
)
def test_what_cannot_be_saved_and_left_as_it_is_is_refused_first(
    started: Coordinator, world: World, state: str, why: str
) -> None:
    world.run_state = state
    with pytest.raises(Conflict, match=why):
        started.checkpoint("stop")
    assert not [each for each in world.done if "prepare" in each]
    assert world.run_state == state


def test_a_vm_is_paused_and_resumed_while_nothing_else_is_done(
    started: Coordinator, world: World
) -> None:
    assert started.pause()["hosts"][0]["run_state"] == "paused"
    assert started.resume()["hosts"][0]["run_state"] == "running"
    refused: list[str] = []

    def pause_meanwhile() -> None:
        for call in (started.pause, started.resume):
            with pytest.raises(Conflict, match="VM vm is checkpointing") as caught:
                call()
            refused.append(str(caught.value))

    world.hooks["h1.stage"] = pause_meanwhile
    started.checkpoint("stop")
    assert len(refused) == 2
    assert world.runs
    started.stop()
    for call in (started.pause, started.resume):
        with pytest.raises(NotFound, match="VM vm does not run"):
            call()
    assert started.status()["phase"] == "absent"


@pytest.mark.parametrize(("state", "after"), [("paused", "paused"), ("io-error", "running")])
def test_a_restore_lets_run_what_nobody_had_paused(
    started: Coordinator, world: World, state: str, after: str
) -> None:
    world.run_state = state
    text = world.published[started.checkpoint("stop")["checkpoint"]]
    started.stop()
    facts = started.restore(text)
    assert (facts["run_state"], world.run_state) == (after, after)
    assert 0 <= facts["guest_clock_behind_seconds"] < 3600


@pytest.mark.parametrize(
    ("error", "phase"),
    [(VmLost("QEMU has ended"), "lost"), (VmOff("it was told"), "off"), (SILENCE, "unknown")],
)
def test_a_vm_that_is_not_there_is_not_paused(
    started: Coordinator, fleet: LocalFleet, world: World, error: DcresError, phase: str
) -> None:
    """Whether the coordinator has seen it well or not."""
    world.fail["h0.status"] = world.fail["h0.go"] = world.fail["h0.pause"] = error
    for coordinator in (started, successor(fleet)):
        for call in (coordinator.pause, coordinator.resume):
            with pytest.raises(type(error), match=str(error)):
                call()
        assert coordinator.status()["phase"] == phase


@pytest.mark.parametrize(
    ("error", "phase"), [(VmLost("QEMU has ended"), "lost"), (VmOff("it was told to end"), "off")]
)
def test_nobody_says_that_a_vm_goes_on_which_has_ended(
    started: Coordinator, world: World, error: VmLost, phase: str
) -> None:
    """Before its checkpoint, or in the middle of it."""
    world.fail["h0.save"] = error
    with pytest.raises(OperationFailed, match=rf"the VM is {phase}, and earlier .*\(h0: {error}"):
        started.checkpoint("stop")
    world.fail["h0.status"] = error
    with pytest.raises(type(error), match=str(error)):
        started.checkpoint("stop")


def test_a_host_that_does_not_answer_an_order_is_named(started: Coordinator, world: World) -> None:
    world.fail["h0.pause"] = SILENCE
    told = r"host h0 of VM vm does not answer \(it did not.*`dcres status vm` says"
    with pytest.raises(ClusterError, match=told):
        started.pause()


def test_how_far_the_guests_clock_is_behind_counts_from_the_stop(
    started: Coordinator, world: World
) -> None:
    """In a checkpoint of an earlier version, which does not say when that was, from its begin."""
    text = world.published[started.checkpoint("stop")["checkpoint"]]
    taken = loads(text, Path("manifest.json"))
    ages = []
    for machine in ({**taken.machine, "stopped": "2026-03-01T13:00:00Z"}, {}):
        started.stop()
        changes = {"created": "2026-03-01T12:00:00Z", "machine": machine}
        facts = started.restore(dumps(taken.model_copy(update=changes)))
        ages.append(facts["guest_clock_behind_seconds"])
    since = datetime.now(UTC) - datetime(2026, 3, 1, 13, tzinfo=UTC)
    assert ages[0] == pytest.approx(since.total_seconds(), abs=60)
    assert ages[1] == pytest.approx(ages[0] + 3600, abs=60)


@pytest.mark.parametrize("state", [VmLost("QEMU has ended"), VmOff("QEMU was told to end"), None])
def test_there_is_room_before_what_is_left_of_a_vm_is_ended(
    started: Coordinator, fleet: LocalFleet, world: World, state: DcresError | None
) -> None:
    text = world.published[started.checkpoint("stop")["checkpoint"]]
    if state is None:
        world.run_state = "shutdown"
    else:
        world.fail["h0.status"] = state
    phase = started.status()["phase"]
    assert phase == ("off" if state is None or isinstance(state, VmOff) else "lost")
    fleet.crowded = {"h1", "h2"}
    world.done.clear()
    with pytest.raises(NoRoom):
        started.start(SPEC)
    for hosts in (None, ["h0", "h1", "h3"]):
        with pytest.raises(NoRoom):
            started.restore(text, None, hosts)
    assert "h0.destroy" not in world.done
    assert started.status()["phase"] == phase
    fleet.crowded = set()
    world.hooks["h0.destroy"] = lambda: world.fail.clear()
    started.restore(text)
    assert started.status()["phase"] == "running"
    assert world.runs


def test_nothing_of_a_vm_is_ended_while_a_host_is_silent(
    started: Coordinator, fleet: LocalFleet, world: World
) -> None:
    world.fail["h2.status"] = ClusterError("it did not answer within 10 s")
    status = started.status()
    assert (status["phase"], status["hosts"][2]["host_state"]) == ("unknown", "silent")
    with pytest.raises(Conflict, match="which may still run; wait, or end what is left"):
        started.start(SPEC)
    assert world.runs
    world.fail.clear()
    assert started.status()["phase"] == "running"


def test_a_coordinator_may_be_retired_twice(coordinator: Coordinator) -> None:
    """Whoever asked first may have been interrupted before it ended the actor."""
    assert coordinator.retire()
    assert coordinator.retire()


def test_a_publishing_that_may_be_under_way_is_halted_before_it_is_looked_for(
    started: Coordinator, world: World
) -> None:
    world.lost_answers.add("h0.publish")
    started.checkpoint("stop")
    assert world.done.index("h0.halt") < world.done.index("h0.published")


def test_a_checkpoint_is_published_even_if_the_answer_is_lost(
    started: Coordinator, world: World
) -> None:
    world.lost_answers.add("h0.publish")
    assert started.checkpoint("stop")["checkpoint"] in world.published
    assert "h1.abandon" not in world.done


def test_parts_are_kept_when_nobody_knows_whether_they_are_published(
    started: Coordinator, world: World
) -> None:
    world.fail["h0.publish"] = ClusterError("h0 did not answer")
    world.fail["h0.published"] = ActorGone("h0 is gone")
    with pytest.raises(OperationFailed, match="its parts are kept"):
        started.checkpoint("stop")
    assert "h1.abandon" not in world.done
    assert {host for _, host in world.unfinished} == {"h0", "h1", "h2"}


def test_a_host_that_is_gone_does_not_keep_the_vm_standing(
    started: Coordinator, world: World
) -> None:
    """Its actor answers nothing for long: the main host goes on without it."""
    gone, resumed = threading.Event(), threading.Event()
    world.fail["h1.stage"] = ActorGone("h1 is gone")
    world.hooks["h1.halt"] = lambda: gone.wait(patience(20))
    world.hooks["h0.resume"] = resumed.set
    errors: list[OperationFailed] = []

    def take() -> None:
        try:
            started.checkpoint("stop")
        except OperationFailed as error:
            errors.append(error)

    taking = threading.Thread(target=take)
    taking.start()
    assert resumed.wait(patience(10))
    gone.set()
    taking.join(patience(10))
    assert errors[0].failures == {"h1": "h1 is gone"}


def test_a_vm_that_was_left_standing_goes_on_when_its_host_answers(
    started: Coordinator, world: World
) -> None:
    world.fail["h1.stage"] = StoreFull("full")
    world.fail["h0.resume"] = ClusterError("h0 did not answer")
    with pytest.raises(OperationFailed, match=r"to go on \(h0 did not answer\) and is"):
        started.checkpoint("stop")
    assert world.frozen
    world.fail.clear()
    assert started.status()["phase"] == "running"
    assert world.runs
    assert started.checkpoint("stop")["checkpoint"] in world.published


def test_parts_that_do_not_fit_together_are_not_published(
    started: Coordinator, world: World
) -> None:
    world.saved_pages["h1"] = PAGES + 1
    with pytest.raises(OperationFailed, match="h1 saved 11 pages, not the 10"):
        started.checkpoint("stop")
    assert not world.published
    assert not world.unfinished
    assert world.runs


def test_one_operation_at_a_time(started: Coordinator, world: World) -> None:
    text = world.published[started.checkpoint("stop")["checkpoint"]]
    go_on = threading.Event()
    world.hooks["h1.save"] = lambda: go_on.wait(patience(20))
    result: list[Any] = []
    working = threading.Thread(target=lambda: result.append(started.checkpoint("stop")))
    working.start()
    until(lambda: world.count("h1.save") == 2, 30, "it saves")
    refusals: list[Callable[[], object]] = [
        lambda: started.checkpoint("stop"),
        lambda: started.start(SPEC),
        lambda: started.restore(text),
        lambda: started.resize(16 << 20),
    ]
    for refused in refusals:
        with pytest.raises(Conflict, match="is checkpointing; wait"):
            refused()
    assert started.progress()["phase"] == "saving"
    go_on.set()
    working.join(patience(10))
    assert result[0]["checkpoint"] in world.published


def test_a_guest_that_begins_to_write_is_not_stopped_yet(
    started: Coordinator, world: World
) -> None:
    world.left = [0, 10**6, 0]  # by one of the hosts, when they synchronise for the first time
    taken = started.checkpoint("live")
    steps = [each for each in world.done if each.startswith("h0.")]
    last = [each.partition(".")[2] for each in steps[steps.index("h0.prepare") :]]
    assert last[:6] == ["prepare", "copy", "synchronise", "copy", "synchronise", "finish"]
    assert taken["rounds"] == 4


def test_a_guest_that_never_stops_writing_is_stopped(started: Coordinator, world: World) -> None:
    world.left = [10**6] * 99
    assert started.checkpoint("live", max_rounds=5)["rounds"] == 5


def test_no_round_is_made_beyond_the_bound(started: Coordinator, world: World) -> None:
    world.left = [10**6] * 99
    assert started.checkpoint("live", max_rounds=1)["rounds"] == 1


def test_progress_tells_what_is_left_on_each_host(started: Coordinator, world: World) -> None:
    seen: list[dict[str, Any]] = []
    world.hooks["h0.copy"] = world.hooks["h0.finish"] = lambda: seen.append(started.progress())
    taken = started.checkpoint("live")
    first, last = seen[0], seen[-1]
    assert first["phase"] == "copying"
    assert set(first["hosts"][0]) == {"host", "what", "done_bytes", "total_bytes", "bytes_per_s"}
    assert (last["phase"], last["round"]) == ("finishing", taken["rounds"])
    assert last["pages_left"] == {"h0": 0, "h1": 0, "h2": 0}
    assert [host["pages_left"] for host in last["hosts"]] == [0, 0, 0]
    for host in last["hosts"]:
        assert host["estimated_downtime_seconds"] == last["estimated_downtime_seconds"] > 0


def test_a_meter_knows_the_rate_of_what_is_under_way() -> None:
    now = [100.0]
    meter = Meter(lambda: now[0])
    assert meter.progress == Progress()
    with meter.measuring("copy", 100):
        assert meter.progress == Progress("copy", 0, 100 * 4096, 0.0)
        now[0] += 2.0
        meter.done(10)
        now[0] += 50.0  # nothing is done, and nothing is said of it
        assert meter.progress == Progress("copy", 10 * 4096, 100 * 4096, 5 * 4096.0)
    with meter.measuring("save", 4):
        assert meter.progress == Progress("save", 0, 4 * 4096, 0.0)


def test_a_host_that_does_not_come_back_is_not_waited_for_again(
    started: Coordinator, world: World, fleet: LocalFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpointing, "_DISCARD_TIMEOUT_S", 0.2)
    world.hooks["h1.copy"] = fleet.actor("vm", 1).die
    began = time.monotonic()
    with pytest.raises(OperationFailed, match="h1 of its hosts does not answer") as caught:
        started.checkpoint("live")
    assert "the VM goes on" not in str(caught.value)
    assert time.monotonic() - began < patience(10)  # it would be a minute for every step and try
    assert list(caught.value.failures) == ["h1"]
    assert {"h0.halt", "h2.halt", "h0.abandon", "h2.abandon"} <= set(world.done)
    assert not {"h1.halt", "h1.abandon"} & set(world.done)
    world.hooks.clear()
    fleet.actor("vm", 1).restart()
    assert started.checkpoint("live")["checkpoint"] in world.published


def test_cancel_gives_a_checkpoint_up(started: Coordinator, world: World) -> None:
    assert started.cancel() is False
    world.hooks["h1.prepare"] = lambda: started.cancel()
    with pytest.raises(OperationFailed, match="cancelled by the user") as caught:
        started.checkpoint("stop")
    assert caught.value.failed_on == (), "no host has failed"
    assert world.runs
    assert not world.unfinished


def test_no_checkpoint_of_what_does_not_run(coordinator: Coordinator) -> None:
    with pytest.raises(NotFound, match="does not run"):
        coordinator.checkpoint("stop")


# Restore


@pytest.fixture
def checkpoint(started: Coordinator, world: World) -> str:
    text = world.published[started.checkpoint("stop")["checkpoint"]]
    started.stop()
    world.done.clear()
    return text


def test_a_restore_on_hosts_of_the_same_shape(
    coordinator: Coordinator, world: World, checkpoint: str
) -> None:
    facts = coordinator.restore(checkpoint)
    assert [each["pages"] for each in facts["layout"]] == [PAGES] * 3
    assert world.state["loaded"] == [("h0", None)]
    assert (facts["pages_moved"], facts["lazy"]) == (0, False)
    assert list(facts["parts_seconds"]) == ["reserve", "plan", "boot", "run"]
    assert facts["seconds"] == pytest.approx(sum(facts["parts_seconds"].values()))
    assert world.runs


def test_a_restore_on_one_host_loads_every_part(
    coordinator: Coordinator, world: World, checkpoint: str
) -> None:
    coordinator.restore(checkpoint, Layout(main=64 << 20))
    assert world.state["loaded"] == [("h0", None), ("h1", None), ("h2", None)]


def test_parts_that_a_host_has_not_come_from_one_that_has(
    coordinator: Coordinator, world: World, fleet: LocalFleet, checkpoint: str
) -> None:
    world.stores = {"h0": ("h0",), "h1": ("h1",), "h2": (), "h3": ("h2",)}
    facts = coordinator.restore(checkpoint, Layout(main=32 << 20, subs=(32 << 20,)))
    assert "h3.serve_parts h2" in world.done
    assert facts["pages_moved"] == PAGES
    assert facts["bytes_moved"] == PAGES * 4096
    assert world.serving_parts == world.pinning == set()
    assert "h3.destroy" in world.done
    assert fleet.visiting == {}


def test_a_new_main_host_gets_the_old_ones_tables(
    coordinator: Coordinator, world: World, checkpoint: str
) -> None:
    world.stores = {"h0": ("h1",), "h1": ("h0", "h2")}
    coordinator.restore(checkpoint, Layout(main=32 << 20, subs=(32 << 20,)))
    assert "h1.plan" in world.done
    assert "h1.read_main_part" in world.done
    assert world.state["resumption"].main_part is not None
    assert world.state["loaded"] == [("h0", SubAddress("h1", "127.0.0.1", 2))]


def test_a_checkpoint_is_kept_while_it_is_loaded(
    coordinator: Coordinator, world: World, checkpoint: str
) -> None:
    pinning: list[set[str]] = []
    world.hooks["h0.boot"] = lambda: pinning.append(set(world.pinning))
    coordinator.restore(checkpoint)
    assert pinning == [{"h0", "h1", "h2"}]
    assert world.pinning == set()


def test_a_host_outside_the_vm_keeps_its_part_before_anything_is_loaded(
    coordinator: Coordinator, world: World, checkpoint: str
) -> None:
    world.stores = {"h0": ("h0",), "h1": ("h1",), "h2": (), "h3": ("h2",)}
    everybody = {"h0", "h1", "h3"}
    world.hooks["h0.plan"] = lambda: until(lambda: world.pinning == everybody, 5, "all keep it")
    coordinator.restore(checkpoint, Layout(main=32 << 20, subs=(32 << 20,)))
    assert world.pinning == set()


def test_a_host_that_dies_after_a_restore_does_not_undo_it(
    coordinator: Coordinator, world: World, fleet: LocalFleet, checkpoint: str
) -> None:
    """What it kept went with it; the others let go of theirs."""
    world.stores = {"h0": ("h0",), "h1": ("h1",), "h2": (), "h3": ("h2",)}
    world.fail["h1.end_serving_parts"] = ActorGone("h1 has died")
    coordinator.restore(checkpoint, Layout(main=32 << 20, subs=(32 << 20,)))
    assert world.runs
    assert world.pinning == {"h1"}
    assert fleet.visiting == {}


def test_what_a_restore_kept_is_let_go_of_by_the_next_coordinator(
    coordinator: Coordinator, world: World, fleet: LocalFleet, checkpoint: str
) -> None:
    coordinator.restore(checkpoint)
    world.pinning = {"h0", "h2"}
    assert successor(fleet).status()["phase"] == "running"
    assert world.pinning == set()


def test_a_part_that_is_nowhere_is_named(
    coordinator: Coordinator, world: World, fleet: LocalFleet, checkpoint: str
) -> None:
    world.stores = dict.fromkeys(fleet.hosts, ("h0", "h2"))
    with pytest.raises(NotFound, match="that h1 saved"):
        coordinator.restore(checkpoint)
    require_nothing(world, fleet)


def test_a_lazy_restore_serves_parts_until_every_page_is_there(
    coordinator: Coordinator, world: World, checkpoint: str
) -> None:
    world.moving = True
    facts = coordinator.restore(checkpoint, lazy=True)
    assert facts["lazy"]
    assert world.state["loaded"] == []
    assert set(world.state["resumption"].sources) == {"h0", "h1", "h2"}
    assert world.serving_parts == {"h0"}
    assert world.runs
    with pytest.raises(Conflict, match="still being restored"):
        coordinator.resize(16 << 20)
    world.trouble = "h0/memory.img: page 7 was altered"
    until(lambda: "page 7" in coordinator.status()["why"], 30, "the trouble is told")
    assert world.pinning == {"h0", "h1", "h2"}, "actors keep it if a part server dies"
    world.moving = False
    until(lambda: not world.serving_parts, 30, "the part server is ended")
    until(lambda: not world.pinning, 30, "the checkpoint may be deleted")
    assert "h0.settle_moves" in world.done


def test_a_lazy_restore_boots_while_the_plan_is_made(
    coordinator: Coordinator, world: World, checkpoint: str
) -> None:
    begun = ["h0.boot", "h0.serve_parts h0 h1 h2", "h1.serve", "h2.serve"]
    world.hooks["h0.plan"] = lambda: until(
        lambda: set(begun) <= set(world.done), 10, "what needs no plan has begun"
    )
    coordinator.restore(checkpoint, lazy=True)
    assert world.done.index("h0.plan") < world.done.index("h0.run")


def test_pages_that_nobody_would_serve_are_not_taken_for_zeros(
    coordinator: Coordinator, world: World, fleet: LocalFleet, checkpoint: str
) -> None:
    manifest = loads(checkpoint, Path("manifest.json"))
    first, second, *others = manifest.hosts
    hosts = (first, second.model_copy(update={"pages": 0}), *others)
    wrong = dumps(manifest.model_copy(update={"hosts": hosts}))
    with pytest.raises(CheckpointCorrupt, match="h1 pages that it did not save"):
        coordinator.restore(wrong, lazy=True)
    require_nothing(world, fleet)


def test_a_lazy_restore_whose_plan_fails_leaves_nothing(
    coordinator: Coordinator, world: World, fleet: LocalFleet, checkpoint: str
) -> None:
    world.fail["h0.plan"] = CheckpointCorrupt("h0/pages.arrow was altered")
    with pytest.raises(CheckpointCorrupt, match=r"pages\.arrow"):
        coordinator.restore(checkpoint, lazy=True)
    require_nothing(world, fleet)
    assert world.serving_parts == set()
    assert "h0.run" not in world.done


@pytest.mark.parametrize(
    ("layout", "match"),
    [
        (Layout(main=16 << 20), "holds 16 MiB and the VM has 64 MiB"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(
    coordinator: Coordinator,
    world: World,
    fleet: LocalFleet,
    checkpoint: str,
    layout: Layout,
    match: str,
) -> None:
    with pytest.raises(ConfigError, match=match):
        coordinator.restore(checkpoint, layout)
    require_nothing(world, fleet)


@pytest.mark.parametrize("where", ["h2.serve", "h0.run", "h0.go"])
def test_a_restore_that_fails_leaves_nothing(
    coordinator: Coordinator, world: World, fleet: LocalFleet, checkpoint: str, where: str
) -> None:
    world.fail[where] = CheckpointCorrupt("h2/memory.img was altered")
    with pytest.raises(CheckpointCorrupt, match=r"memory\.img"):
        coordinator.restore(checkpoint)
    require_nothing(world, fleet)


def test_a_lost_vm_whose_restore_fails_is_there_no_more(
    started: Coordinator, world: World, fleet: LocalFleet
) -> None:
    text = world.published[started.checkpoint("stop")["checkpoint"]]
    fleet.dead.add("h1")
    world.fail["h1.status"] = ActorGone("h1 is dead")
    assert started.status()["phase"] == "lost"
    fleet.hosts = ["h0", "h2", "h3"]
    world.fail["h0.run"] = CheckpointCorrupt("vmcore was altered")
    with pytest.raises(CheckpointCorrupt):
        started.restore(text)
    assert started.status()["phase"] == "absent"
    require_nothing(world, fleet)


def test_a_start_fails_with_its_first_host(
    coordinator: Coordinator, world: World, fleet: LocalFleet
) -> None:
    """However long another one still loads."""
    go_on = threading.Event()
    world.hooks["h1.serve"] = lambda: go_on.wait(patience(20))
    world.hooks["h1.destroy"] = go_on.set  # as a real host ends what it loads
    world.fail["h0.boot"] = QemuFailed("QEMU ended at once")
    with pytest.raises(QemuFailed, match="ended at once"):
        coordinator.start(SPEC)
    require_nothing(world, fleet)


def test_a_host_whose_actor_does_not_answer_is_swept(
    started: Coordinator, world: World, fleet: LocalFleet
) -> None:
    world.fail["h2.destroy"] = ActorGone("its actor is dead")
    started.stop()
    assert fleet.swept == ["h2"]
    assert "vm" not in fleet.reserved, "after that nothing can be started there any more"


def test_what_an_earlier_life_left_is_cleared_before_anything_starts(
    coordinator: Coordinator, world: World
) -> None:
    coordinator.start(SPEC)
    first = min(world.done.index(each) for each in ("h0.boot", "h1.serve", "h2.serve"))
    assert all(world.done.index(f"{host}.clear") < first for host in ("h0", "h1", "h2"))


def test_a_manifest_that_was_altered_is_refused(
    coordinator: Coordinator, world: World, fleet: LocalFleet, checkpoint: str
) -> None:
    with pytest.raises(CheckpointCorrupt, match=r"manifest\.json"):
        coordinator.restore(checkpoint.replace('"tick": 1', '"tick": 2'))
    require_nothing(world, fleet)


# Other shares while the VM runs

MIB = 1 << 20


def steps(world: World, *names: str) -> list[str]:
    """What was done, of the kinds named, in order."""
    return [each for each in world.done if each.partition(".")[2].split()[0] in names]


def test_a_sub_host_joins(started: Coordinator, world: World, fleet: LocalFleet) -> None:
    world.to_move = [100]
    started.resize(subs_bytes=[8 * MIB, 24 * MIB, 8 * MIB])
    assert steps(world, "resize", "serve", "reshape", "move_into", "set_layout") == [
        "h1.resize 2048",
        "h2.resize 6144",
        "h3.serve",
        "h0.reshape h1 h2 h3 [2048, 6144, 2048]",
        "h0.move_into [2048, 6144, 2048]",
        "h0.move_into [2048, 6144, 2048]",
        "h0.set_layout",
    ]
    assert fleet.extra == {("vm", 2): 8 * MIB}
    assert fleet.reserved["vm"] == {0: "h0", 1: "h1", 2: "h2", 3: "h3"}
    assert world.state["shares"] == {"h1": 8 * MIB, "h2": 24 * MIB, "h3": 8 * MIB}


def test_a_sub_host_is_drained_and_leaves(
    started: Coordinator, world: World, fleet: LocalFleet
) -> None:
    started.resize(48 * MIB)
    world.done.clear()
    started.drain("h1")
    assert steps(world, "resize", "reshape", "move_into", "destroy") == [
        "h1.resize 0",
        "h2.resize 4096",
        "h0.reshape h1 h2 [0, 4096]",
        "h0.move_into [0, 4096]",
        "h0.reshape h2 [4096]",
        "h1.destroy",
    ]
    assert fleet.reserved["vm"] == {0: "h0", 2: "h2"}
    assert [each["host"] for each in started.status()["hosts"]] == ["h0", "h2"]
    started.stop()
    require_nothing(world, fleet)


def test_growing_twice_sets_all_of_it_aside(started: Coordinator, fleet: LocalFleet) -> None:
    started.resize(40 * MIB, [24 * MIB, 16 * MIB])
    started.resize(48 * MIB, [32 * MIB, 16 * MIB])
    assert fleet.extra == {("vm", 0): 16 * MIB, ("vm", 1): 16 * MIB}


def test_a_change_that_fails_takes_the_main_hosts_share_back(
    started: Coordinator, world: World
) -> None:
    world.fail["h0.move_into [6144, 4096]"] = NoRoom("no room")
    with pytest.raises(NoRoom):
        started.resize(48 * MIB, [24 * MIB, 16 * MIB])
    assert steps(world, "limit")[-1] == "h0.limit 8192"
    assert world.state["spec"]["layout"] == {"main": 32 * MIB, "subs": [16 * MIB, 16 * MIB]}


def test_a_drain_can_be_planned(started: Coordinator, world: World) -> None:
    assert "16 MiB more" in started.plan_drain("h1").problem
    started.resize(48 * MIB)
    world.done.clear()
    foreseen = started.plan_drain("h1")
    assert foreseen.flows == (PageFlow("h0", "h2", PAGES),)
    assert foreseen.hosts[1] == ("h1", 16 * MIB, 0)
    assert changes(world) == []
    with pytest.raises(NotFound, match="h9 is no sub host"):
        started.plan_drain("h9")


def changes(world: World) -> list[str]:
    """What was done that is more than to look."""
    return [each for each in world.done if each.split()[0].partition(".")[2] not in LOOKS]


LOOKS = ("describe", "status", "plan_moves")


def test_a_resize_can_be_planned(started: Coordinator, world: World, fleet: LocalFleet) -> None:
    before = dict(fleet.reserved["vm"]), dict(world.state), dict(world.capacities)
    foreseen = started.plan_resize(24 * MIB, [24 * MIB, 16 * MIB, 8 * MIB])
    assert foreseen.problem == ""
    assert foreseen.hosts == (
        ("h0", 32 * MIB, 24 * MIB),
        ("h1", 16 * MIB, 24 * MIB),
        ("h2", 16 * MIB, 16 * MIB),
        ("h3", 0, 8 * MIB),
    )
    assert [each.target for each in foreseen.flows] == ["h1", "h2", "h3"]
    assert changes(world) == []
    assert (fleet.reserved["vm"], world.state, world.capacities) == before
    assert fleet.extra == {}
    capacities = {"h1": 6144, "h2": 4096, "h3": 2048}
    assert f"h0.plan_moves {capacities} 6144 True" in world.done
    started.plan_resize(40 * MIB)
    assert f"h0.plan_moves { {'h1': 4096, 'h2': 4096} } 10240 False" in world.done
    after = started.resize(24 * MIB, [24 * MIB, 16 * MIB, 8 * MIB])
    assert [each["host"] for each in after["hosts"]] == [host for host, *_ in foreseen.hosts]
    assert world.capacities == capacities


REFUSED = {
    "the memory is not held": (16 * MIB, None),
    "a main host without a share": (0, [64 * MIB]),
    "too many sub hosts": (None, [16 * MIB] * 201),
    "more hosts than there are": (None, [16 * MIB] * 4),
    "a host that has no room": (None, [24 * MIB, 16 * MIB]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_plan_says_is_what_is_refused(
    started: Coordinator, world: World, fleet: LocalFleet, case: str
) -> None:
    fleet.crowded = {"h1"}
    shares: tuple[Any, ...] = REFUSED[case]
    before = started.status(), dict(world.state)
    foreseen = started.plan_resize(*shares)
    with pytest.raises((ConfigError, NoRoom)) as refused:
        started.resize(*shares)
    assert foreseen.problem == str(refused.value)
    assert foreseen.flows == ()
    assert foreseen.hosts[0][:2] == ("h0", 32 * MIB)
    assert changes(world) == [], "nothing was begun"
    assert (started.status(), world.state) == before


def test_a_host_that_would_join_has_no_name_without_room(started: Coordinator) -> None:
    hosts = started.plan_resize(subs_bytes=[16 * MIB] * 4).hosts
    assert [host for host, *_ in hosts] == ["h0", "h1", "h2", "", ""]


def test_a_share_of_nothing_does_not_join(started: Coordinator, world: World) -> None:
    started.resize(subs_bytes=[16 * MIB, 16 * MIB, 0])
    assert "h3.serve" not in world.done


def test_pages_that_do_not_fit_are_a_problem(started: Coordinator, world: World) -> None:
    plan = f"h0.plan_moves { {'h1': 4096, 'h2': 6144} } 8192 True"
    world.fail[plan] = NoRoom("give them 2 MiB more")
    foreseen = started.plan_resize(subs_bytes=[16 * MIB, 24 * MIB])
    assert (foreseen.problem, foreseen.flows) == ("give them 2 MiB more", ())
    with pytest.raises(NoRoom, match="give them 2 MiB more"):
        started.resize(subs_bytes=[16 * MIB, 24 * MIB])
    assert changes(world) == [], "nothing was begun"


def test_a_change_that_could_not_be_undone_is_undone_before_the_next(
    started: Coordinator, world: World, fleet: LocalFleet
) -> None:
    world.fail["h3.serve"] = PagingError("no memory server")
    world.fail["h3.destroy"] = ActorGone("it has died")
    shares = [16 * MIB] * 3
    with pytest.raises(PagingError):
        started.resize(subs_bytes=shares)
    with pytest.raises(ClusterError, match="VM vm is unknown: it has died"):
        started.resize(subs_bytes=shares)
    assert world.state["reshaping"]
    with pytest.raises(Conflict, match="was not brought to an end; the next resize or drain"):
        started.plan_resize(subs_bytes=shares)
    world.fail.clear()
    assert len(started.resize(subs_bytes=shares)["hosts"]) == 4
    assert fleet.indices("vm") == [0, 1, 2, 3]
    assert not world.state["reshaping"]


@pytest.mark.parametrize("order", [("resize", 40 * MIB), ("drain", "h1")])
def test_nobody_changes_shares_of_a_vm_that_is_lost_or_busy(
    started: Coordinator, world: World, fleet: LocalFleet, order: tuple[str, Any]
) -> None:
    method, argument = order
    started.resize(48 * MIB)
    fleet.dead.add("h2")
    world.fail["h2.describe"] = ActorGone("it has died")
    world.done.clear()
    foreseen: Foreseen = getattr(started, f"plan_{method}")(argument)
    with pytest.raises(VmLost, match="host h2 of VM vm is gone") as lost:
        getattr(started, method)(argument)
    assert foreseen.problem == str(lost.value)
    assert changes(world) == []
    world.fail.clear()

    def ask() -> None:
        for each in (method, f"plan_{method}"):
            with pytest.raises(Conflict, match="VM vm is checkpointing; wait until that is done"):
                getattr(started, each)(argument)

    world.hooks["h0.prepare"] = ask
    started.checkpoint("stop")


def test_what_has_no_room_elsewhere_is_not_drained(started: Coordinator, world: World) -> None:
    with pytest.raises(ConfigError, match="16 MiB more"):
        started.drain("h1")
    with pytest.raises(NotFound, match="no sub host"):
        started.drain("h0")
    assert steps(world, "resize", "reshape") == []


@pytest.mark.parametrize("where", ["h0.move_into [0, 4096]", "h0.reshape h1 h2 [0, 4096]"])
def test_a_drain_that_fails_gives_the_share_back(
    started: Coordinator, world: World, where: str
) -> None:
    started.resize(48 * MIB)
    world.fail[where] = NoRoom("no room")
    with pytest.raises(NoRoom):
        started.drain("h1")
    assert world.capacities == {"h1": 4096, "h2": 4096}
    assert world.state["hosts"] == ["h0", "h1", "h2"]
    assert not world.state.get("reshaping")
    assert started.status()["phase"] == "running"


def test_a_drain_can_be_cancelled(started: Coordinator, world: World) -> None:
    started.resize(48 * MIB)
    world.to_move = [100]
    world.hooks["h0.move_into [0, 4096]"] = lambda: setattr(world, "moving", True)
    failures: list[Exception] = []

    def drain() -> None:
        try:
            started.drain("h1")
        except Conflict as error:
            failures.append(error)

    thread = threading.Thread(target=drain)
    thread.start()
    until(lambda: "h0.move_into [0, 4096]" in world.done, 30, "pages move")
    assert started.cancel()
    thread.join(patience(5))
    assert "was cancelled" in str(failures[0])
    assert world.capacities == {"h1": 4096, "h2": 4096}
    assert world.runs
    assert world.count("h1.destroy") == 0


def test_nobody_waits_for_pages_of_a_host_that_is_gone(
    started: Coordinator, world: World, fleet: LocalFleet
) -> None:
    started.resize(48 * MIB)

    def lose() -> None:
        world.moving = True
        fleet.dead.add("h2")

    world.to_move = [100]
    world.hooks["h0.move_into [0, 4096]"] = lose
    with pytest.raises(VmLost, match="host h2 of VM vm is gone; restore a checkpoint"):
        started.drain("h1")
    assert world.count("h1.destroy") == 0


# The coordinator's own death: a new one finds the hosts as the old one left them


def successor(fleet: LocalFleet) -> Coordinator:
    return Coordinator("vm", fleet)


def test_it_finds_nothing(fleet: LocalFleet, world: World) -> None:
    assert successor(fleet).status()["phase"] == "absent"


def test_it_gives_a_bare_reservation_back(fleet: LocalFleet, world: World) -> None:
    fleet.reserved["vm"] = {0: "h0"}
    successor(fleet)
    require_nothing(world, fleet)


def test_it_finds_a_running_vm(started: Coordinator, fleet: LocalFleet, world: World) -> None:
    found = successor(fleet)
    assert found.status()["phase"] == "running"
    assert world.count("h0.resume") == 0
    assert found.checkpoint("stop")["checkpoint"] in world.published


@pytest.mark.parametrize("where", ["h1.serve", "h0.run", "h0.go"])
def test_it_takes_down_a_start_that_was_not_finished(
    coordinator: Coordinator, fleet: LocalFleet, world: World, where: str
) -> None:
    taken: list[Coordinator] = []
    world.hooks[where] = lambda: taken.append(successor(fleet)) if not taken else None
    with pytest.raises(DcresError):
        coordinator.start(SPEC)
    until(lambda: bool(taken), 30, "the other one has looked")
    assert taken[0].status()["phase"] == "absent"
    require_nothing(world, fleet)


@pytest.mark.parametrize("step", ["h0.finish", "h1.stage", "h0.save", "h0.publish"])
def test_it_gives_up_a_checkpoint_that_was_not_published(
    started: Coordinator, fleet: LocalFleet, world: World, step: str
) -> None:
    found: list[Coordinator] = []
    world.hooks[step] = lambda: found.append(successor(fleet)) if not found else None
    world.fail[step] = ActorGone("this coordinator is dead")
    world.fail["h0.publish"] = ActorGone("this coordinator is dead")
    with pytest.raises(DcresError):
        started.checkpoint("stop")
    assert found[0].status()["phase"] == "running"
    assert world.runs
    assert not world.unfinished
    assert not world.published


def test_it_keeps_a_checkpoint_that_was_published(
    started: Coordinator, fleet: LocalFleet, world: World
) -> None:
    facts = started.checkpoint("stop")
    world.state["checkpoint"] = facts["checkpoint"]  # killed before the host forgot it
    world.done.clear()
    assert successor(fleet).status()["phase"] == "running"
    assert world.count("h0.abandon") == 0
    assert facts["checkpoint"] in world.published


def test_it_reports_a_vm_whose_host_does_not_answer(
    started: Coordinator, fleet: LocalFleet, world: World
) -> None:
    world.fail["h1.describe"] = ClusterError("h1 did not answer within 10 s")
    found = successor(fleet)
    world.fail["h1.status"] = ActorGone("h1 is dead")
    status = found.status()
    assert status["phase"] == "unknown", "silence is no proof"
    assert "UTC host h1 of VM vm does not answer" in status["why"]
    assert [each["host_state"] for each in status["hosts"]] == ["answers", "silent", "answers"]
    fleet.dead.add("h1")
    status = found.status()
    assert status["phase"] == "lost"
    assert "host h1 of VM vm is gone" in status["why"]
    assert status["generation"] == 1
    assert [each["host"] for each in status["hosts"]] == ["h0", "h1", "h2"]
    assert world.runs  # nobody took it down


def test_it_tries_again_when_the_host_answers(
    started: Coordinator, fleet: LocalFleet, world: World
) -> None:
    """A VM that was paused for a checkpoint goes on, although the first look failed."""
    found: list[Coordinator] = []

    def take_over() -> None:
        if not found:
            world.fail["h0.describe"] = ClusterError("h0 did not answer within 10 s")
            found.append(successor(fleet))

    world.hooks["h1.stage"] = take_over
    world.fail["h1.stage"] = world.fail["h0.resume"] = ActorGone("this coordinator is dead")
    with pytest.raises(DcresError):
        started.checkpoint("stop")
    assert world.frozen
    assert "h0.abandon" not in world.done, "the main host remembers why the VM is paused"
    assert found[0].status()["phase"] == "unknown"
    world.fail.clear()
    assert found[0].status()["phase"] == "running"
    assert world.runs
    assert found[0].checkpoint("stop")["checkpoint"] in world.published


def test_a_vm_that_ended_with_its_coordinator_can_be_restored(
    started: Coordinator, fleet: LocalFleet, world: World
) -> None:
    checkpoint = world.published[started.checkpoint("stop")["checkpoint"]]
    world.fail["h0.status"] = VmLost("QEMU of VM vm has ended")
    world.hooks["h0.destroy"] = lambda: world.fail.clear()
    found = successor(fleet)
    assert found.status()["phase"] == "lost"
    found.restore(checkpoint)
    assert world.runs


def test_a_publishing_under_way_ends_before_parts_are_removed(
    started: Coordinator, fleet: LocalFleet, world: World
) -> None:
    """The main host's disk hangs longer than the guest waits for it, and then answers."""
    world.state["checkpoint"] = "vm-20260101-000000-0000"
    answers: list[Exception | None] = [ClusterError("h0.halt did not answer within 20 s"), None]

    def halt() -> None:
        error = answers.pop(0)
        if error is not None:
            raise error
        world.published["vm-20260101-000000-0000"] = "by now"

    world.hooks["h0.halt"] = halt
    assert successor(fleet).status()["phase"] == "running"
    assert world.runs
    assert world.count("h1.abandon") == 0


def test_the_guest_goes_on_although_a_sub_host_does_not_answer(
    started: Coordinator, fleet: LocalFleet, world: World
) -> None:
    world.hooks["h1.stage"] = lambda: world.fail.update(
        {"h1.describe": ClusterError("h1 did not answer within 10 s")}
    )
    world.fail["h1.stage"] = world.fail["h0.resume"] = ActorGone("this coordinator is dead")
    with pytest.raises(DcresError):
        started.checkpoint("stop")
    assert not world.runs
    del world.fail["h0.resume"]
    assert successor(fleet).status()["phase"] == "unknown"
    assert world.runs


def test_it_tells_of_a_host_that_was_lost_meanwhile(
    started: Coordinator, fleet: LocalFleet, world: World
) -> None:
    world.serving.discard("h2")  # Ray has moved its actor to another host
    status = successor(fleet).status()
    assert status["phase"] == "lost"
    assert "h2" in status["why"]
    assert world.state["running"], "nobody took it down"


def test_stop_may_be_repeated_and_ends_what_was_lost(
    started: Coordinator, fleet: LocalFleet, world: World
) -> None:
    world.fail["h2.destroy"] = ActorGone("h2 is dead")
    started.stop()
    started.stop()
    assert world.state == {}
    assert fleet.reserved == {}


def test_it_gives_shares_back_that_were_being_changed(
    started: Coordinator, fleet: LocalFleet, world: World
) -> None:
    started.resize(48 * MIB)
    world.capacities["h1"] = 0
    world.state["reshaping"] = True
    found = successor(fleet)
    assert world.capacities == {"h1": 4096, "h2": 4096}
    assert "h0.stop_moves" in world.done
    assert found.status()["phase"] == "running"
    assert not world.state["reshaping"]


def test_it_ends_a_host_that_was_about_to_join(
    started: Coordinator, fleet: LocalFleet, world: World
) -> None:
    fleet.add("vm", 8 * MIB, "h3")
    found = successor(fleet)
    assert "h3.destroy" in world.done
    assert [each["host"] for each in found.status()["hosts"]] == ["h0", "h1", "h2"]
    assert world.runs


# The store


@pytest.mark.parametrize(
    ("stores", "looked_at"),
    [({}, ("h0", "h1", "h2")), ({"h1": "its own"}, ("h0", "h2")), ({"h0": "its own"}, ("h0",))],
)
def test_the_main_host_looks_at_the_parts_in_its_own_store(
    started: Coordinator, world: World, stores: dict[str, str], looked_at: tuple[str, ...]
) -> None:
    world.saved_to = stores
    started.checkpoint()
    assert set(world.looked_at) == set(looked_at)


def test_a_name_that_is_another_cluster_s_is_refused_before_anything_is_started(
    coordinator: Coordinator, world: World, fleet: LocalFleet
) -> None:
    world.fail["h0.claim"] = Conflict("VM vm of another cluster has this name")
    with pytest.raises(Conflict, match="another cluster"):
        coordinator.start(SPEC)
    assert not any(world.count(f"{host}.{what}") for host in fleet.hosts for what in BEGINNINGS)
    require_nothing(world, fleet)
    world.fail.clear()
    coordinator.start(SPEC, take_over=True)
    assert world.count("h0.claim True") == 1


def test_ids_are_in_order_though_the_clock_is_set_back(
    started: Coordinator, fleet: LocalFleet
) -> None:
    noon = datetime(2026, 3, 1, 12, tzinfo=UTC)
    times = [noon, noon, noon - timedelta(hours=1), noon]

    class Clock(Threads):
        def utc(self) -> datetime:
            return times[min(len(names), 3)]

    names: list[str] = []
    later = Coordinator("vm", fleet, Clock())
    for _ in range(4):
        names.append(later.checkpoint()["checkpoint"])
    assert names == [f"vm-20260301-120000-{number:04x}" for number in range(4)]


# The journal


def entries(journal: dict[str, Any] | None) -> list[str]:
    """What was told and heard, as `dcres status --json` shows it."""
    assert journal is not None
    return [
        f"{each.get('instruction') or each['event']} {each.get('host', '')}".strip()
        for each in journal["entries"]
    ]


def test_the_journal_of_an_operation_is_told_while_it_is_under_way_and_after(
    started: Coordinator, world: World
) -> None:
    seen: list[dict[str, Any]] = []
    world.hooks["h0.finish"] = lambda: seen.append(started.status())
    taken = started.checkpoint("stop")["checkpoint"]
    now, last = seen[0]["operation"], seen[0]["last_operation"]
    assert (now["operation"], last["operation"]) == (f"checkpoint {taken}", "start")
    assert entries(now)[-1] == "Finish h0"
    assert entries(last)[0] == "LookAround"
    after = started.status()
    assert after["operation"] is None
    assert entries(after["last_operation"])[-2:] == ["Publish h0", "Published h0"]
    times = [each["at_s"] for each in after["last_operation"]["entries"]]
    assert times == sorted(times)
    assert "5e5e" not in json.dumps(after), "no secret"


def test_an_error_has_the_journal_of_its_operation(started: Coordinator, world: World) -> None:
    world.fail["h1.save"] = StoreFull("the disk is full")
    with pytest.raises(OperationFailed) as caught:
        started.checkpoint("stop")
    said = caught.value.to_dict()
    assert said["failures"] == [{"host": "h1", "type": "StoreFull", "message": "the disk is full"}]
    assert "Failed" in [each.get("event") for each in said["journal"]]
    world.fail["h0.move_into [4096, 4096, 4096]"] = NoRoom("no room")
    with pytest.raises(NoRoom, match="h0: no room") as refused:
        started.resize(subs_bytes=[16 * MIB] * 3)
    assert [each.host for each in refused.value.failed_on] == ["h0"]
    assert refused.value.journal
