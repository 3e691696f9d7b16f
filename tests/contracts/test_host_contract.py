"""What the coordinator relies on in a host, held against fake, real and Ray's hosts.

Orders are given through ports alone. The fakes of tests/support/hosts.py are what the coordinator's
own tests and the simulation run on, so they may allow nothing that a real host refuses.
"""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from itertools import count
from pathlib import Path

import pytest

from dcres.actors import messages
from dcres.actors.messages import (
    ChangeId,
    ClaimOrder,
    Finished,
    Incarnation,
    PartsOrder,
    PlanOrder,
    RunOrder,
    Saved,
    ServeOrder,
)
from dcres.actors.ports import Fleet, Port
from dcres.actors.protocol import Machine, Paging, Parts, Presence, Saving, Serving
from dcres.actors.ray import gateway
from dcres.actors.ray.fleet import RayFleet
from dcres.actors.ray.local_cluster import LocalCluster
from dcres.config import VmSpec, vm_spec
from dcres.errors import BaseUnusable, Conflict, DcresError, NotFound, PagingError, StorageError
from dcres.model.formats import DEFAULT_FORMAT
from dcres.model.pages import pages_of
from dcres.storage.digest import FileSum
from dcres.storage.format.manifest import HostPart, Manifest, Mode, Role, Segment, chain_upon, dumps
from dcres.storage.layout import MOST_SEGMENTS, VMCORE, checkpoint_id, memory_file
from tests.support.fleet import LocalFleet
from tests.support.hosts import FakeHost, FakeSub
from tests.support.main_host import FakeMain
from tests.support.speed import patience
from tests.support.vm import renamed, restart_main, rig, spec_of
from tests.support.world import World

VM = "vm"
STAGE_PAGES = 65536
FAKE = "fake"
REAL = pytest.param("real", marks=pytest.mark.vm)
RAY = pytest.param("ray", marks=[pytest.mark.cluster, pytest.mark.vm])

_numbers = count()


@dataclass
class Site:
    """Hosts that are reserved for a VM; `restart` kills an actor, and it is there again after."""

    fleet: Fleet
    spec: VmSpec
    restart: Callable[[int], None]
    exists: Callable[[str], bool]  # whether there is anything of a checkpoint in the store

    @property
    def ports(self) -> list[Port]:
        return self.fleet.find(VM)

    @property
    def main(self) -> Port:
        return self.ports[0]

    @property
    def subs(self) -> list[Port]:
        return self.ports[1:]

    def reserve(self) -> None:
        self.fleet.reserve(VM, self.spec.layout.shares, None)
        for port in self.ports:
            port.wait_ready(patience(30))

    def orders(self) -> tuple[RunOrder, ServeOrder]:
        """For main host and sub hosts, once the main host has begun a life."""
        generation = self.main.call(Machine.claim, ClaimOrder(self.fleet.cluster()))
        life = Incarnation(VM, generation, secrets.token_hex(32))
        hosts = tuple(port.call(Presence.describe).host for port in self.ports)
        share = pages_of(self.spec.layout.subs[0])
        return (
            RunOrder(life, self.spec, hosts, ()),
            ServeOrder(life, pages_of(self.spec.memory), share),
        )

    def start(self) -> None:
        """As a coordinator does it."""
        self.reserve()
        for port in self.ports:
            port.call(Presence.require_free, False)
            port.call(Presence.clear, False)
        run, serve = self.orders()
        self.main.call(Machine.boot, run)
        subs = tuple(port.call(Serving.serve, serve) for port in self.subs)
        self.main.call(Machine.run, replace(run, subs=subs))
        assert not self.main.call(Presence.describe).running
        self.main.call(Machine.go)

    def end(self) -> None:
        for port in self.ports:
            port.call(Presence.destroy)
        self.fleet.release(VM)


@contextmanager
def fake_site() -> Iterator[Site]:
    world = World()

    def make(vm: str, role: messages.Role, host: str) -> FakeHost:
        return (FakeMain if role is messages.Role.MAIN else FakeSub)(world, vm, host)

    def exists(checkpoint: str) -> bool:
        return checkpoint in {name for name, _ in world.parts}

    fleet = LocalFleet(["h0", "h1", "h2"], make)
    yield Site(fleet, a_spec(), lambda index: fleet.actor(VM, index).restart(), exists)
    fleet.release(VM)
    assert world.wrong == []


@contextmanager
def real_site() -> Iterator[Site]:
    with rig() as vm:

        def restart(index: int) -> None:
            assert index == 0
            dead = vm.main()
            restart_main(vm)
            dead.saver.end()  # what the end of its process would have closed

        yield Site(vm.fleet, a_spec(), restart, lambda name: (vm.store.root / VM / name).exists())


@contextmanager
def ray_site(cluster: LocalCluster) -> Iterator[Site]:
    fleet = RayFleet()

    def restart(index: int) -> None:
        port = fleet.find(VM)[index]
        assert isinstance(port, gateway.ActorPort)
        os.kill(port.pid(), signal.SIGKILL)
        port.wait_ready(patience(30))

    store = Path(cluster.store)
    try:
        yield Site(fleet, a_spec(), restart, lambda name: (store / VM / name).exists())
    finally:
        fleet.release(VM)


def a_spec() -> VmSpec:
    return vm_spec(spec_of(memory="160MiB", main="96MiB", subs=("32MiB", "32MiB"), fill=4))


@contextmanager
def opened(request: pytest.FixtureRequest) -> Iterator[Site]:
    match request.param:
        case "fake":
            opening = fake_site()
        case "real":
            opening = real_site()
        case _:
            opening = ray_site(request.getfixturevalue("cluster"))
    with opening as site:
        yield site


@pytest.fixture(scope="module", params=[FAKE, REAL])
def started(request: pytest.FixtureRequest) -> Iterator[Site]:
    """A VM that runs; whoever uses it leaves it so."""
    with opened(request) as site:
        site.start()
        yield site
        site.end()


@pytest.fixture(scope="module", params=[FAKE, REAL, RAY])
def anywhere(request: pytest.FixtureRequest) -> Iterator[Site]:
    """The same, as Ray's actors as well."""
    with opened(request) as site:
        site.start()
        yield site
        site.end()


@pytest.fixture(params=[FAKE, REAL])
def reserved(request: pytest.FixtureRequest) -> Iterator[Site]:
    """Hosts on which nothing of a VM is yet."""
    with opened(request) as site:
        site.reserve()
        yield site


def a_name() -> str:
    """A checkpoint."""
    return checkpoint_id(VM, datetime.now(UTC), f"{next(_numbers):04x}")


@pytest.fixture
def name() -> str:
    return a_name()


@pytest.fixture
def other() -> str:
    return a_name()


def prepare(site: Site, checkpoint: str, base: Manifest | None = None) -> None:
    text = "" if base is None else dumps(base)
    for port in site.ports:
        port.call(Saving.prepare, checkpoint, DEFAULT_FORMAT, text)


def stop(site: Site, checkpoint: str, base: Manifest | None = None) -> Finished:
    """All up to the stop, with every host's part in its hands."""
    prepare(site, checkpoint, base)
    finished = site.main.call(Machine.finish, checkpoint)
    for port in site.ports:
        port.call(Saving.stage, checkpoint, STAGE_PAGES, finished.changed)
    return finished


def save(site: Site, checkpoint: str, base: Manifest | None = None) -> Manifest:
    """All up to the last vote."""
    finished = stop(site, checkpoint, base)
    site.main.call(Machine.resume, checkpoint)
    saved = [port.call(Saving.save, checkpoint, finished.tick) for port in site.ports]
    require_placed(saved)
    return manifest_of(site, checkpoint, finished, saved, base)


def require_placed(saved: list[Saved]) -> None:
    """The main host has placed on each sub host what that one's part has."""
    main, *subs = saved
    assert [(each.pages, each.digest) for each in subs] == [
        (each.pages, each.digest) for each in main.placed
    ]


def publish(site: Site, manifest: Manifest) -> None:
    hosts = tuple(part.host for part in manifest.hosts)
    site.main.call(Machine.publish, dumps(manifest), hosts)


def manifest_of(
    site: Site, checkpoint: str, done: Finished, saved: list[Saved], base: Manifest | None = None
) -> Manifest:
    main = site.main.call(Presence.describe)
    parts = tuple(
        HostPart(
            host=each.host,
            role=Role.SUB if index else Role.MAIN,
            share_bytes=share,
            pages=each.pages,
            bytes_written=each.bytes_written,
            file_bytes_allocated=each.allocated_bytes,
            seconds=each.seconds,
            memory_file=memory_file(DEFAULT_FORMAT, checkpoint),
            segments=tuple(Segment(**one) for one in each.segments),
            files=tuple(FileSum(**file) for file in each.files),
        )
        for index, (each, share) in enumerate(zip(saved, site.spec.layout.shares, strict=True))
    )
    named = {segment.checkpoint for part in parts for segment in part.segments or ()}
    core = parts[0].file(VMCORE)
    assert core is not None
    return Manifest(
        checkpoint=checkpoint,
        vm=VM,
        created=done.stopped.strftime("%Y-%m-%dT%H:%M:%SZ"),
        mode=Mode.STOP,
        memory_format=DEFAULT_FORMAT,
        memory_bytes=site.spec.memory,
        generation=main.generation,
        vm_spec=site.spec.model_dump(mode="json", by_alias=True),
        qemu_version=main.qemu_version,
        accel=main.accel,
        machine={"type": main.machine},
        tick=done.tick,
        hosts=parts,
        vmcore=core,
        seconds=1.0,
        downtime_seconds=0.1,
        base=None if base is None else base.checkpoint,
        chain=chain_upon(base, checkpoint, named),
    )


def give_up(site: Site, checkpoint: str) -> None:
    """As a coordinator does it: all halt before the first removes anything."""
    site.main.call(Saving.halt, checkpoint)
    site.main.call(Machine.resume, checkpoint)
    for port in site.subs:
        port.call(Saving.halt, checkpoint)
    for port in site.ports:
        port.call(Saving.abandon, checkpoint)


def require_running(site: Site) -> None:
    """The guest runs, pages move, and no checkpoint is under way."""
    status = site.main.call(Machine.status)
    assert (status["run_state"], status["state"]) == ("running", "running")
    assert not status["held"]
    assert site.main.call(Presence.describe).checkpoint is None


def refused(error: type[DcresError], *orders: Callable[[], object]) -> None:
    for order in orders:
        with pytest.raises(DcresError) as caught:
            order()
        assert isinstance(caught.value, error), repr(caught.value)


def late(port: Port, checkpoint: str) -> list[Callable[[], object]]:
    """What a host does for a checkpoint that it has prepared."""
    return [
        lambda: port.call(Saving.copy, checkpoint),
        lambda: port.call(Saving.synchronise, checkpoint, False, STAGE_PAGES),
        lambda: port.call(Saving.stage, checkpoint, STAGE_PAGES),
        lambda: port.call(Saving.save, checkpoint, 1),
    ]


# A host on which nothing is


def test_a_host_says_what_it_is_before_anything_is_there(reserved: Site) -> None:
    roles = [port.call(Presence.describe).role for port in reserved.ports]
    assert roles == ["main", "sub", "sub"]
    for port in reserved.ports:
        assert not port.call(Presence.describe).present
        assert port.call(Presence.progress).done_bytes == 0
    refused(NotFound, lambda: reserved.main.call(Machine.status))
    refused(NotFound, lambda: reserved.main.call(Machine.go))
    for sub in reserved.subs:
        refused(NotFound, partial(sub.call, Serving.status))


def test_nothing_is_saved_where_nothing_is(reserved: Site, name: str) -> None:
    for port in reserved.ports:
        refused(NotFound, partial(port.call, Saving.prepare, name, DEFAULT_FORMAT))
        refused(Conflict, *late(port, name))
    assert not reserved.exists(name)


def test_every_life_has_a_greater_generation(reserved: Site) -> None:
    cluster = reserved.fleet.cluster()
    first = reserved.main.call(Machine.claim, ClaimOrder(cluster))
    second = reserved.main.call(Machine.claim, ClaimOrder(cluster))
    assert second > first
    assert reserved.main.call(Machine.claim, ClaimOrder(cluster, above=second + 10)) > second + 10


def test_a_life_that_the_actor_does_not_know_does_not_boot(reserved: Site) -> None:
    run, _ = reserved.orders()
    stale = replace(run.incarnation, generation=run.incarnation.generation - 1)
    refused(Conflict, lambda: reserved.main.call(Machine.boot, replace(run, incarnation=stale)))


def test_the_end_may_be_repeated_and_nothing_begins_after_it(reserved: Site) -> None:
    run, serve = reserved.orders()
    for port in reserved.ports:
        port.call(Presence.destroy)
        port.call(Presence.destroy)
        refused(Conflict, partial(port.call, Presence.clear, False))
    refused(
        Conflict,
        lambda: reserved.main.call(Machine.claim, ClaimOrder(reserved.fleet.cluster())),
        lambda: reserved.main.call(Machine.boot, run),
        lambda: reserved.main.call(Machine.run, run),
        *[partial(sub.call, Serving.serve, serve) for sub in reserved.subs],
    )
    assert not any(port.call(Presence.describe).present for port in reserved.ports)


# A VM that runs


def test_a_host_says_what_it_has(anywhere: Site) -> None:
    main = anywhere.main.call(Presence.describe)
    assert (main.present, main.running, main.checkpoint) == (True, True, None)
    assert main.spec is not None
    assert main.spec.layout == anywhere.spec.layout
    subs = [port.call(Presence.describe) for port in anywhere.subs]
    assert main.hosts == (main.host, *(each.host for each in subs))
    assert dict(main.shares) == dict(zip(main.hosts[1:], anywhere.spec.layout.subs, strict=True))
    assert all(each.present and each.role == "sub" for each in subs)
    assert anywhere.main.call(Machine.incarnation).generation == main.generation
    for port in anywhere.subs:
        assert port.call(Serving.status)["capacity_pages"] == pages_of(32 << 20)
    require_running(anywhere)


def test_a_guest_is_paused_and_goes_on_as_often_as_one_likes(started: Site) -> None:
    for order, state in ((Machine.pause, "paused"), (Machine.go, "running")):
        for _ in range(2):
            started.main.call(order)
            assert started.main.call(Machine.status)["run_state"] == state
    started.main.call(Machine.pause)
    started.main.call(Machine.go, True)
    assert started.main.call(Machine.status)["run_state"] == "paused"
    started.main.call(Machine.go)
    require_running(started)


def test_a_resume_is_safe_at_any_time(started: Site, name: str) -> None:
    for checkpoint in ("", name, name):
        started.main.call(Machine.resume, checkpoint)
        require_running(started)


def test_shares_are_being_changed_until_the_layout_is_set(started: Site) -> None:
    layout = started.spec.layout
    change = started.main.call(Presence.describe).next_change
    started.main.call(Paging.begin_reshape, change)
    assert started.main.call(Presence.describe).reshaping
    started.main.call(Paging.set_layout, change, layout)
    assert not started.main.call(Presence.describe).reshaping
    sub = started.subs[0]
    for pages in (pages_of(layout.subs[0]) * 2, pages_of(layout.subs[0])):
        assert sub.call(Serving.resize, change, pages).capacity_pages == pages
        assert sub.call(Serving.status)["capacity_pages"] == pages


def test_a_change_of_shares_that_was_overtaken_is_obeyed_no_more(started: Site) -> None:
    main, sub, layout = started.main, started.subs[0], started.spec.layout
    before = main.call(Presence.describe).next_change
    main.call(Paging.begin_reshape, before)
    after = main.call(Presence.describe).next_change
    main.call(Paging.stop_moves, after)
    address = sub.call(Serving.resize, after, pages_of(layout.subs[0]))
    host = main.call(Presence.describe).host
    too_late: list[Callable[[ChangeId], object]] = [
        lambda change: main.call(Paging.begin_reshape, change),
        lambda change: main.call(Paging.limit, change, 1),
        lambda change: main.call(Paging.reshape, change, (host,), ()),
        lambda change: main.call(Paging.move_into, change, {address.host: 1}),
        lambda change: main.call(Paging.stop_moves, change),
        lambda change: main.call(Paging.set_layout, change, layout),
        lambda change: sub.call(Serving.resize, change, 1),
    ]
    for change in (before, replace(after, generation=after.generation - 1)):
        for order in too_late:
            with pytest.raises(Conflict, match="has been overtaken"):
                order(change)
    found = main.call(Presence.describe)
    assert found.reshaping
    assert len(found.hosts) == len(started.subs) + 1
    assert sub.call(Serving.status)["capacity_pages"] == address.capacity_pages
    with pytest.raises(Conflict, match="has been overtaken"):
        main.call(Paging.begin_reshape, after)
    main.call(Paging.set_layout, after, layout)


# A checkpoint


def test_a_checkpoint_exists_once_it_is_published(anywhere: Site, name: str) -> None:
    manifest = save(anywhere, name)
    require_running_for(anywhere, name)
    assert not anywhere.main.call(Machine.published, name)
    hosts = tuple(part.host for part in manifest.hosts)
    for _ in range(2):
        anywhere.main.call(Machine.publish, dumps(manifest), hosts)
        assert anywhere.main.call(Machine.published, name)
        require_running(anywhere)
    altered = dumps(manifest.model_copy(update={"tick": manifest.tick + 1}))
    refused(Conflict, lambda: anywhere.main.call(Machine.publish, altered, hosts))
    for port in anywhere.ports:
        assert port.call(Parts.parts_here, dumps(manifest)) == hosts


def require_running_for(site: Site, checkpoint: str) -> None:
    """The guest runs, and the main host remembers the checkpoint that is not over."""
    assert site.main.call(Machine.status)["run_state"] == "running"
    assert site.main.call(Presence.describe).checkpoint == checkpoint


def test_what_is_published_stays_whoever_gives_it_up(started: Site, name: str) -> None:
    manifest = save(started, name)
    hosts = tuple(part.host for part in manifest.hosts)
    started.main.call(Machine.publish, dumps(manifest), hosts)
    give_up(started, name)
    give_up(started, name)
    assert started.main.call(Machine.published, name)
    assert started.main.call(Parts.parts_here, dumps(manifest)) == hosts


def test_rounds_come_before_the_stop(started: Site, name: str) -> None:
    prepare(started, name)
    for port in started.ports:
        assert port.call(Saving.copy, name).left_pages >= 0
        assert port.call(Saving.copy, name).left_pages >= 0
        assert port.call(Saving.synchronise, name, False, STAGE_PAGES) is None
        assert port.call(Saving.synchronise, name, True, STAGE_PAGES) is not None
    require_running_for(started, name)
    give_up(started, name)


def test_the_guest_stands_from_the_stop_to_the_resume(started: Site, name: str) -> None:
    stop(started, name)
    status = started.main.call(Machine.status)
    assert (status["held"], status["state"]) == (True, "frozen")
    for _ in range(2):
        started.main.call(Machine.resume, name)
        assert started.main.call(Machine.status)["run_state"] == "running"
    give_up(started, name)
    require_running(started)


def test_a_guest_that_stood_still_stands_after_it(started: Site, name: str) -> None:
    started.main.call(Machine.pause)
    finished = stop(started, name)
    assert finished.run_state == "paused"
    assert not started.main.call(Machine.status)["held"]
    give_up(started, name)
    status = started.main.call(Machine.status)
    assert (status["run_state"], status["state"]) == ("paused", "running")
    started.main.call(Machine.go)
    require_running(started)


def test_what_was_told_to_go_on_is_not_stopped_any_more(started: Site, name: str) -> None:
    prepare(started, name)
    started.main.call(Machine.resume, name)
    refused(Conflict, lambda: started.main.call(Machine.finish, name))
    assert started.main.call(Machine.status)["run_state"] == "running"
    give_up(started, name)


def test_steps_have_an_order(started: Site, name: str) -> None:
    """The main host votes only for what was paused, and takes the rest only then."""
    prepare(started, name)
    refused(Conflict, lambda: started.main.call(Saving.save, name, 1))
    refused(PagingError, lambda: started.main.call(Saving.stage, name, STAGE_PAGES))
    give_up(started, name)


def test_one_votes_once(started: Site, name: str) -> None:
    save(started, name)
    for port in started.ports:
        refused(Conflict, partial(port.call, Saving.save, name, 1))
    give_up(started, name)


def test_nothing_is_published_without_every_part(started: Site, name: str) -> None:
    finished = stop(started, name)
    started.main.call(Machine.resume, name)
    saved = started.main.call(Saving.save, name, finished.tick)
    hosts = started.main.call(Presence.describe).hosts
    as_if = [saved, *(replace(saved, host=host, pages=0) for host in hosts[1:])]
    text = dumps(manifest_of(started, name, finished, as_if))
    refused(StorageError, lambda: started.main.call(Machine.publish, text, hosts))
    assert not started.main.call(Machine.published, name)
    give_up(started, name)


def test_orders_for_another_checkpoint_are_refused(started: Site, name: str, other: str) -> None:
    prepare(started, name)
    for port in started.ports:
        refused(Conflict, *late(port, other))
        port.call(Saving.halt, other)
        port.call(Saving.copy, name)  # and change nothing
    give_up(started, name)


def test_one_that_begins_ends_the_one_before(started: Site, name: str, other: str) -> None:
    prepare(started, name)
    prepare(started, other)
    for port in started.ports:
        refused(Conflict, *late(port, name))
    assert started.main.call(Presence.describe).checkpoint == other
    give_up(started, other)
    prepare(started, another := a_name())
    assert not started.exists(name), "what is unfinished is swept once nobody saves it"
    give_up(started, another)
    require_running(started)


def test_what_was_halted_takes_no_more_orders(anywhere: Site, name: str) -> None:
    manifest = save(anywhere, name)
    for port in anywhere.ports:
        port.call(Saving.halt, name)
        port.call(Saving.halt, name)
        refused(Conflict, partial(port.call, Saving.prepare, name, DEFAULT_FORMAT))
        refused(Conflict, *late(port, name))
    refused(
        Conflict,
        lambda: anywhere.main.call(Machine.finish, name),
        lambda: anywhere.main.call(Machine.publish, dumps(manifest), ()),
    )
    give_up(anywhere, name)
    require_running(anywhere)


def test_what_is_given_up_leaves_nothing(anywhere: Site, name: str) -> None:
    stop(anywhere, name)
    assert anywhere.exists(name)
    for _ in range(2):
        give_up(anywhere, name)
        assert not anywhere.exists(name)
        require_running(anywhere)


def test_what_nobody_has_halted_leaves_nothing_either(
    anywhere: Site, name: str, other: str
) -> None:
    """The orders of a coordinator that has ended reached these hosts late."""
    for port in reversed(anywhere.ports):
        port.call(Saving.prepare, name, DEFAULT_FORMAT)
    prepare(anywhere, other)
    assert not anywhere.exists(name)
    give_up(anywhere, other)
    require_running(anywhere)


def test_nothing_is_given_up_that_never_began(started: Site, name: str) -> None:
    give_up(started, name)
    require_running(started)
    refused(Conflict, lambda: started.main.call(Saving.prepare, name, DEFAULT_FORMAT))


# Increments


def test_an_increment_is_upon_the_last_that_was_published(anywhere: Site, name: str) -> None:
    first = save(anywhere, name)
    assert anywhere.main.call(Machine.base).manifest != dumps(first), "it is not published yet"
    publish(anywhere, first)
    assert anywhere.main.call(Machine.base).manifest == dumps(first)
    second = save(anywhere, a_name(), first)
    assert second.pages >= first.pages
    assert [len(part.segments or ()) for part in second.hosts] == [2] * len(second.hosts)
    publish(anywhere, second)
    assert anywhere.main.call(Machine.base).manifest == dumps(second)
    require_running(anywhere)


def test_one_that_was_given_up_is_no_base(started: Site, name: str, other: str) -> None:
    publish(started, first := save(started, name))
    save(started, other, first)
    give_up(started, other)
    assert started.main.call(Machine.base).manifest == dumps(first)
    publish(started, second := save(started, a_name(), first))
    assert second.pages >= first.pages


def test_upon_what_is_not_there_nothing_is_prepared(started: Site, name: str, other: str) -> None:
    gone = save(started, name)
    give_up(started, name)
    for port in started.ports:
        refused(
            BaseUnusable, partial(port.call, Saving.prepare, other, DEFAULT_FORMAT, dumps(gone))
        )
    give_up(started, other)
    require_running(started)


def test_many_segments_are_merged_and_nothing_waits_for_it(anywhere: Site, name: str) -> None:
    """Until then all goes on as ever; the order may come again, and what it is about stays."""
    publish(anywhere, last := save(anywhere, name))
    while not all(part.segments and part.segments[0].merged for part in last.hosts):
        assert last.most_segments < MOST_SEGMENTS
        for port in anywhere.ports:
            port.call(Saving.compact, dumps(last))
            port.call(Saving.compact, dumps(last))
        publish(anywhere, last := save(anywhere, a_name(), last))
    require_running(anywhere)


# An actor that is started again


def test_a_new_actor_knows_what_the_one_before_has_left(anywhere: Site, name: str) -> None:
    stop(anywhere, name)
    anywhere.restart(0)
    main = anywhere.main.call(Presence.describe)
    assert (main.checkpoint, main.running) == (name, True)
    assert anywhere.main.call(Machine.status)["held"]
    refused(Conflict, *late(anywhere.main, name))
    give_up(anywhere, name)
    require_running(anywhere)
    assert not anywhere.exists(name)
    manifest = save(anywhere, a_name())
    anywhere.restart(0)
    hosts = tuple(part.host for part in manifest.hosts)
    anywhere.main.call(Machine.publish, dumps(manifest), hosts)
    require_running(anywhere)


def test_what_was_discarded_is_not_published_by_a_new_actor(started: Site, name: str) -> None:
    text = dumps(save(started, name))
    give_up(started, name)
    started.restart(0)
    refused(NotFound, lambda: started.main.call(Machine.publish, text, ()))
    assert not started.main.call(Machine.published, name)
    assert not started.exists(name)


# Its parts, and its end


def test_parts_are_served_until_the_end_which_is_final(started: Site, name: str) -> None:
    """The last test: nothing of the VM is there after it."""
    manifest = save(started, name)
    text, main = dumps(manifest), started.main
    hosts = tuple(part.host for part in manifest.hosts)
    assert main.call(Parts.parts_here, dumps(renamed(manifest, a_name()))) == ()
    main.call(Machine.publish, text, hosts)
    capacities = tuple(pages_of(share) for share in started.spec.layout.shares)
    holds = ((True, True, True),) * 3
    planned = main.call(Parts.plan, PlanOrder(text, capacities, holds, masks=True))
    assert sum(map(sum, planned.flow)) == manifest.pages
    assert all(mask for mask in planned.masks.values())
    main.call(Parts.read_main_part, text)
    order = PartsOrder(main.call(Machine.incarnation), text, hosts)
    assert main.call(Parts.serve_parts, order).port
    assert main.call(Parts.parts_trouble) == ""
    for _ in range(2):
        main.call(Parts.end_serving_parts)
    refused(Conflict, lambda: main.call(Parts.serve_parts, order))
    require_running(started)
    for port in started.ports:
        port.call(Presence.destroy)
        assert not port.call(Presence.describe).present
    refused(NotFound, lambda: main.call(Machine.status), lambda: main.call(Machine.go))
    assert main.call(Machine.published, name), "what is published stays"
