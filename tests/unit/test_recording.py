"""When the record of what is to run is written: by a coordinator over hosts that are made up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from dcres.actors.control.coordinator import Coordinator
from dcres.errors import CheckpointCorrupt, ClusterError, Conflict, StoreFull
from dcres.storage.format.manifest import dumps
from tests.support.fake_fleet import fake_fleet
from tests.support.fleet import LocalFleet
from tests.support.world import World
from tests.unit.test_coordinator import SPEC, manifest_of, require_nothing


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
def started(coordinator: Coordinator) -> Coordinator:
    coordinator.start(SPEC)
    return coordinator


def said(world: World) -> list[tuple[int, str, int, str]]:
    return [(each.version, str(each.desired), each.generation, each.by) for each in world.records]


def test_a_start_is_on_record_before_it_is_done(coordinator: Coordinator, world: World) -> None:
    seen: list[bool] = []
    world.hooks["h0.record"] = lambda: seen.append(world.runs)
    coordinator.start(SPEC, by="ann")
    assert seen == [True], "a guest that never ran is not to be brought back"
    assert said(world) == [(1, "running", 1, "ann")]
    assert (world.records[0].spec["name"], world.records[0].cluster) == ("vm", "test")


def test_a_stop_is_on_record_before_anything_ends(started: Coordinator, world: World) -> None:
    ended: list[int] = []
    world.hooks["h0.record"] = lambda: ended.append(world.count("h0.destroy"))
    started.stop("bob")
    assert ended == [0]
    assert said(world)[1:] == [(2, "stopped", 1, "bob")]


def test_a_restore_is_on_record(started: Coordinator, world: World) -> None:
    manifest = manifest_of(world, started.checkpoint("stop"))
    started.stop()
    started.restore(dumps(manifest), by="ann")
    assert said(world)[1:] == [(2, "stopped", 1, ""), (3, "running", 2, "ann")]


def test_a_life_that_another_has_followed_is_none(
    coordinator: Coordinator, fleet: LocalFleet, world: World
) -> None:
    world.fail["h0.record"] = Conflict("another life has begun")
    with pytest.raises(Conflict, match="another life has begun"):
        coordinator.start(SPEC)
    require_nothing(world, fleet)
    assert coordinator.status()["phase"] == "absent"


def test_a_guest_that_runs_is_not_ended_for_want_of_a_record(
    coordinator: Coordinator, fleet: LocalFleet, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.fail["h0.record"] = StoreFull("no room")
    coordinator.start(SPEC)
    assert world.runs
    assert "VM vm is not on record as running: no room" in caplog.text


@pytest.mark.parametrize("order", ["h0.describe", "h0.recorded", "h0.record"])
def test_an_answer_that_is_lost_is_asked_for_again(
    coordinator: Coordinator, fleet: LocalFleet, world: World, order: str
) -> None:
    """When the guest runs, and when a checkpoint was published."""

    def once() -> None:
        del world.hooks[order]
        raise ClusterError("it did not answer")

    world.hooks[order] = once
    coordinator.start(SPEC)
    assert said(world) == [(1, "running", 1, "")]
    if order == "h0.recorded":  # after it was published
        world.hooks[order] = once
        assert coordinator.checkpoint("stop")["checkpoint"] in world.published


def test_a_coordinator_begins_though_the_main_host_does_not_answer(
    started: Coordinator, fleet: LocalFleet, world: World
) -> None:
    world.records.clear()
    for order in ("h0.recorded", "h0.record", "h0.describe"):
        world.fail[order] = ClusterError("it did not answer")
        after = Coordinator("vm", fleet)
        del world.fail[order]
        assert after.status()["phase"] == "running"


def test_a_stop_that_cannot_be_recorded_leaves_the_vm(started: Coordinator, world: World) -> None:
    world.fail["h0.record"] = StoreFull("no room")
    with pytest.raises(StoreFull):
        started.stop()
    assert world.runs
    assert started.status()["phase"] == "running"
    del world.fail["h0.record"]
    started.stop()
    assert said(world)[-1][1] == "stopped"


def test_a_stop_wins_over_who_was_faster(started: Coordinator, world: World) -> None:
    def overtake() -> None:
        del world.hooks["h0.record"]
        world.records.append(replace(world.records[-1], version=2, by="another"))

    world.hooks["h0.record"] = overtake
    started.stop("bob")
    assert said(world)[1:] == [(2, "running", 1, "another"), (3, "stopped", 1, "bob")]


def test_a_main_host_that_is_gone_does_not_keep_a_vm(
    started: Coordinator, fleet: LocalFleet, world: World
) -> None:
    fleet.actor("vm", 0).die()
    fleet.dead.add("h0")
    started.stop()
    assert len(world.records) == 1
    assert fleet.reserved == {}


def test_a_record_that_says_nothing_does_not_keep_a_vm(
    started: Coordinator, fleet: LocalFleet, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.fail["h0.recorded"] = CheckpointCorrupt("record.json says nothing")
    started.stop()
    assert fleet.reserved == {}
    assert "VM vm is not on record as stopped: record.json says nothing" in caplog.text


def test_another_cluster_s_record_stays(started: Coordinator, world: World) -> None:
    world.records[-1] = replace(world.records[-1], cluster="another")
    started.stop()
    assert len(world.records) == 1


def test_what_a_coordinator_could_not_record_its_successor_does(
    started: Coordinator, fleet: LocalFleet, world: World
) -> None:
    """It died when the guest ran, and before the record was written."""
    world.records.clear()
    assert Coordinator("vm", fleet).status()["phase"] == "running"
    assert said(world) == [(1, "running", 1, "")]
    Coordinator("vm", fleet)
    assert len(world.records) == 1


def test_a_stop_that_was_cut_off_is_not_undone(
    started: Coordinator, fleet: LocalFleet, world: World
) -> None:
    """The coordinator died when the stop was on record, and before anything had ended."""
    world.records.append(world.records[-1].stopped("now", "bob"))
    after = Coordinator("vm", fleet)
    assert after.status()["phase"] == "running"
    after.checkpoint("stop")
    after.stop("carl")
    assert said(world)[1:] == [(2, "stopped", 1, "bob")], "it was said already"


def test_a_vm_that_cannot_be_recorded_is_found_all_the_same(
    started: Coordinator, fleet: LocalFleet, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.records.clear()
    world.fail["h0.record"] = StoreFull("no room")
    assert Coordinator("vm", fleet).status()["phase"] == "running"
    assert "VM vm is not on record as running: no room" in caplog.text
