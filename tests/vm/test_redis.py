"""A Redis in the guest, under load from this host, checkpointed live and restored.

What must hold: a checkpoint is the database as it was at the stop, no write more or less, with
the digest that Redis itself reported for that write; and the clients of the VM that goes on see
nothing but one answer that comes later, by the reported downtime.
"""

from __future__ import annotations

import itertools
import os
import random
import re
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import pytest

from dcres.actors.control.coordinator import Coordinator
from dcres.actors.ray import gateway
from dcres.actors.ray.coordinator import RayCoordinator
from dcres.actors.ray.fleet import coordinator_name
from dcres.actors.ray.local_cluster import LocalCluster
from dcres.actors.ray.local_node import CLUSTER_MARK, free_port
from dcres.config import default_home
from dcres.linux.process import find_marked
from dcres.storage.format.manifest import dumps
from dcres.storage.store.store import Store
from tests.support.redis_guest import (
    Redis,
    answers,
    fetch,
    forward_args,
    redis_here,
    redis_image,
)
from tests.support.redis_load import (
    Client,
    Command,
    State,
    Trip,
    Write,
    chain_of,
    commands_of,
    loading,
    prepare,
    state_of,
    token,
    values_after,
    work,
    write_all,
)
from tests.support.speed import patience
from tests.support.wait import until
from tests.support.waits import Waits, watching

# About 80 s with two idle cores, and several times that with busy ones.
pytestmark = [
    *(pytest.mark.vm, pytest.mark.cluster, pytest.mark.slow, pytest.mark.alone),
    pytest.mark.timeout(patience(900)),
]

VM = "redis"
CLIENTS = 2
KEYS_OF_A_CLIENT = 5000  # of 8000 bytes each: 78 MiB in all, and the main host has 80
CHECKPOINTS = 4
RESTORED = 3
MAY_BE_HELD_UP = 1  # of the checkpoints: a virtual machine stops at times, disks as well
ON_THE_WAY = re.compile(r"qemu-system|dcres\.paging\.")
REQUESTS_BETWEEN = 1500  # of every client: about 2 s


def spec_of(port: int) -> dict[str, Any]:
    image = redis_image(default_home() / "guest")
    return {
        "name": VM,
        "memory": "192MiB",
        "kernel": str(image.kernel),
        "initrd": str(image.initrd),
        "append": "console=ttyS0 quiet panic=-1",
        "accel": "tcg",
        "layout": {"main": "80MiB", "subs": ["64MiB", "48MiB"]},
        "extra_args": forward_args(port),
    }


@dataclass(frozen=True, slots=True)
class Taken:
    """A checkpoint's facts, and when it was asked for and done by the clients' clock."""

    facts: dict[str, Any]
    began_s: float
    ended_s: float

    @property
    def downtime_s(self) -> float:
        return float(self.facts["downtime_seconds"])


class Subject:
    """The VM, whichever of its lives: it always answers at the same address."""

    def __init__(self, cluster: LocalCluster) -> None:
        self.address = ("127.0.0.1", free_port())
        self.keys = [
            [f"key-{client}-{number}" for number in range(KEYS_OF_A_CLIENT)]
            for client in range(CLIENTS)
        ]
        self._store = Store(cluster.settings(cluster.hosts[0]).store)
        self._coordinator = gateway.spawn(RayCoordinator, coordinator_name(VM), (VM,))
        self._cluster = cluster

    def start(self) -> None:
        self._coordinator.wait_ready(patience(30))
        self._coordinator.within(patience(100)).call(Coordinator.start, spec_of(self.address[1]))
        until(lambda: answers(self.address), 90, "Redis in the guest answers")

    def checkpoint(self) -> Taken:
        began = time.monotonic()
        facts = self._coordinator.within(patience(100)).call(Coordinator.checkpoint, "live")
        return Taken(facts, began, time.monotonic())

    def restore(self, taken: Taken) -> None:
        """In place of the VM that runs: the port is in the VM file, which is the checkpoint's."""
        self._coordinator.within(patience(60)).call(Coordinator.stop)
        assert not answers(self.address)
        manifest = self._store.get(taken.facts["checkpoint"])
        self._coordinator.within(patience(100)).call(Coordinator.restore, dumps(manifest))
        until(lambda: answers(self.address), 30, "Redis in the restored guest answers")

    def main_host(self) -> dict[str, Any]:
        return dict(self._coordinator.call(Coordinator.status)["hosts"][0])

    def on_the_way(self) -> list[int]:
        """The processes that a request may have to wait for: QEMU, pager, memory servers."""
        found = find_marked(CLUSTER_MARK, self._cluster.id)
        return [each.pid for each in found if ON_THE_WAY.search(" ".join(each.argv[:3]))]

    def load(self, values: dict[str, str], seed: int) -> AbstractContextManager[list[Client]]:
        return loading(self.address, self.keys, values, seed)

    def close(self) -> None:
        self._coordinator.within(patience(60)).call(Coordinator.stop)
        gateway.kill(coordinator_name(VM))


@dataclass
class Run:
    """All that was seen of the VM that was checkpointed."""

    writes: list[Write] = field(default_factory=list)
    trips: list[Trip] = field(default_factory=list)
    checkpoints: list[Taken] = field(default_factory=list)
    frozen: tuple[float, float] = (0.0, 0.0)
    waits: Waits = field(default_factory=lambda: Waits([], []))
    pages_in: int = 0
    pages_out: int = 0

    def waited_s(self, trip: Trip) -> float:
        """For how long those who had to do with it stood ready without a processor, together.

        All hosts of these tests share this machine's two, and so does whatever else it runs.
        """
        return sum(self.waits.between(trip.sent_s, trip.acked_s).values())

    def pause_s(self, began_s: float, ended_s: float) -> float:
        """The longest time that a client waited for an answer, and not for processors."""
        return max(
            trip.seconds - self.waited_s(trip)
            for trip in self.trips
            if trip.touches(began_s, ended_s)
        )

    def during(self, taken: Taken) -> list[float]:
        """Round trips that were under way in a checkpoint, ascending."""
        return sorted(
            trip.seconds for trip in self.trips if trip.touches(taken.began_s, taken.ended_s)
        )

    def undisturbed(self) -> list[float]:
        """Round trips under the same load while the VM was left alone, ascending."""
        disturbed = [(each.began_s, each.ended_s) for each in self.checkpoints]
        disturbed.append(self.frozen)
        return sorted(
            trip.seconds
            for trip in self.trips
            if not any(trip.touches(*interval) for interval in disturbed)
        )

    @property
    def round_trip_s(self) -> float:
        """One round trip: the longest that the same load knows without checkpoints.

        Not the usual one: a request that is under way at the stop may be one that has pages to
        fetch from a sub host, and hosts that share this machine's cores take them from the
        guest at any time. Thousands of requests know how long that makes one of them.
        """
        return self.undisturbed()[-1]


def first_commands(keys: Sequence[Sequence[str]]) -> list[Command]:
    rng = random.Random(1)
    return [Command("set", key, token(rng)) for key in itertools.chain(*keys)]


def freeze(pid: int, seconds: float) -> tuple[float, float]:
    """Stop QEMU behind everybody's back, as no checkpoint may; when that began and ended."""
    began = time.monotonic()
    os.kill(pid, signal.SIGSTOP)
    try:
        until(lambda: time.monotonic() > began + seconds, seconds + 10, "it was frozen")
    finally:
        os.kill(pid, signal.SIGCONT)
    return began, time.monotonic()


def observe(subject: Subject) -> Run:
    """Fill the database, then take checkpoints while clients are at work."""
    run = Run()
    with Redis(subject.address) as redis:
        prepare(redis)
        run.writes = write_all(redis, first_commands(subject.keys))
    with (
        subject.load(values_after(commands_of(run.writes)), seed=0) as clients,
        watching(subject.on_the_way(), [client.thread for client in clients]) as run.waits,
    ):
        for _ in range(CHECKPOINTS):
            work(clients, REQUESTS_BETWEEN)
            run.checkpoints.append(subject.checkpoint())
        work(clients, REQUESTS_BETWEEN)
        collect(run, clients)
        main = subject.main_host()
        run.frozen = freeze(main["qemu_pid"], 2 * run.round_trip_s + 0.3)
        work(clients, 100)
    run.pages_in, run.pages_out = main["pages_in"], main["pages_out"]
    collect(run, clients)
    assert [client.failure for client in clients] == [""] * CLIENTS
    return run


def collect(run: Run, clients: Sequence[Client]) -> None:
    """Take over what the clients have seen so far."""
    filled = run.writes[: CLIENTS * KEYS_OF_A_CLIENT]
    since = sorted(
        itertools.chain(*(client.writes for client in clients)), key=lambda write: write.number
    )
    run.writes = filled + since
    run.trips = list(itertools.chain(*(client.trips for client in clients)))


@pytest.fixture(scope="module")
def subject(cluster: LocalCluster) -> Iterator[Subject]:
    made = Subject(cluster)
    try:
        made.start()
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def run(subject: Subject) -> Run:
    return observe(subject)


def test_the_load_is_one_that_pages(run: Run) -> None:
    assert run.pages_in > 0
    assert run.pages_out > 0
    during = [taken.facts["paging_during"] for taken in run.checkpoints]
    assert sum(each["pages_in"] for each in during) > 0
    assert sum(each["pages_out"] for each in during) > 0
    assert all(taken.facts["rounds"] > 0 for taken in run.checkpoints)


def test_clients_saw_every_write_once_and_in_order(run: Run) -> None:
    """The clients themselves compared every value that they read, and saw no error."""
    assert [write.number for write in run.writes] == list(range(1, len(run.writes) + 1))
    assert chain_of(commands_of(run.writes)) == run.writes[-1].chain


def test_no_pause_is_longer_than_the_downtime_and_a_round_trip(run: Run) -> None:
    held_up = []
    for taken in run.checkpoints:
        pause_s = run.pause_s(taken.began_s, taken.ended_s)
        allowed_s = taken.downtime_s + run.round_trip_s
        print(f"\nthe longest pause is {pause_s:.4f} s; {allowed_s:.4f} are explained")
        if pause_s > allowed_s:
            held_up.append(taken)
    assert len(held_up) <= MAY_BE_HELD_UP


def test_the_pause_is_the_downtime_and_a_usual_round_trip(run: Run) -> None:
    """The same with twice what 999 of 1000 round trips take in place of all, for most checkpoints.

    In one of them the request that was under way at the stop may have been of the rare kind.
    """
    usual_s = quantiles(run.undisturbed(), n=1000)[-1]
    beyond_s = [
        run.pause_s(each.began_s, each.ended_s) - each.downtime_s for each in run.checkpoints
    ]
    print(f"\n999 of 1000 within {usual_s:.4f} s; longest pauses less the downtime: {beyond_s}")
    assert usual_s < run.round_trip_s
    assert median(beyond_s) <= 2 * usual_s


def test_requests_are_answered_while_the_guest_is_saved(run: Run) -> None:
    """Only the stop holds requests up; how fast they are meanwhile, `dcres bench live` measures."""
    for taken in run.checkpoints:
        others = run.during(taken)[:-CLIENTS]
        print(f"\nmedian of {len(others)}: {median(others):.4f}; {median(run.undisturbed()):.4f}")
        assert len(others) > 10 * CLIENTS


def test_a_stop_that_nobody_reports_is_seen(run: Run) -> None:
    """The allowance above is not so wide that nothing can exceed it."""
    assert run.pause_s(*run.frozen) > run.round_trip_s + max(
        taken.downtime_s for taken in run.checkpoints
    )


def under_way(run: Run, number: int) -> list[Write]:
    """The write of each client that came next after write `number`.

    A client sends one when the one before is answered, so these alone can have lain in the
    guest's sockets, sent and not yet done, when write `number` was the last one.
    """
    first: dict[int, Write] = {}
    for write in run.writes[number : number + 1000]:
        first.setdefault(write.client, write)
    return list(first.values())


def history(run: Run, state: State) -> tuple[int, list[Command]]:
    """What made a restored database: the writes before the stop, and all commands.

    The guest goes on at the stop, with requests in its sockets whose senders are not there any
    more. Redis does them, as it did in the original, but maybe in another order.
    """
    for waiting in range(CLIENTS + 1):
        number = state.number - waiting
        done = run.writes[:number]
        for extra in itertools.permutations(under_way(run, number), waiting):
            if chain_of(commands_of(extra), done[-1].chain, number) == state.chain:
                return number, commands_of([*done, *extra])
    raise AssertionError(f"{state} is not the state after any writes that were sent until then")


def require_the_moment(run: Run, taken: Taken, number: int) -> None:
    """Write `number` is the last one before the VM was stopped for the checkpoint."""
    acked_before = [write.number for write in run.writes if write.acked_s < taken.began_s]
    sent_before = [write.number for write in run.writes if write.sent_s < taken.ended_s]
    assert max(acked_before) <= number <= max(sent_before)
    # What is in was sent before the stop, what is not in was answered after it. Between the two
    # lies all that was done while QEMU certainly stood: it is told to stop before, and goes on
    # before the last part, which the hosts share, has ended.
    last_sent = max(write.sent_s for write in run.writes[:number])
    first_acked = min(write.acked_s for write in run.writes[number:])
    parts = taken.facts["downtime_parts_seconds"]
    stood_s = sum(seconds for part, seconds in parts.items() if part not in ("stop", "hosts"))
    assert first_acked - last_sent > stood_s > 0


def require_clients_go_on(subject: Subject, commands: Sequence[Command], seed: int) -> None:
    """New clients find what `commands` left, and the chain goes on from there."""
    with subject.load(values_after(commands), seed) as clients:
        work(clients, 500)
    assert [client.failure for client in clients] == [""] * CLIENTS
    new = sorted(
        itertools.chain(*(client.writes for client in clients)), key=lambda write: write.number
    )
    everything = [*commands, *commands_of(new)]
    assert (new[-1].number, new[-1].chain) == (len(everything), chain_of(everything))


def digest_here(commands: Sequence[Command], folder: Path) -> str:
    """What a Redis on this host makes of `commands` and nothing else."""
    with redis_here(fetch(default_home() / "guest"), folder) as replica:
        prepare(replica)
        write_all(replica, commands)
        return state_of(replica).digest


@pytest.mark.parametrize("which", range(RESTORED))
def test_a_checkpoint_is_the_database_at_its_stop(
    subject: Subject, run: Run, which: int, tmp_path: Path
) -> None:
    taken = run.checkpoints[which]
    subject.restore(taken)
    with Redis(subject.address) as redis:
        state = state_of(redis)
    number, commands = history(run, state)
    require_the_moment(run, taken, number)
    assert state.digest == digest_here(commands, tmp_path)
    require_clients_go_on(subject, commands, seed=10 * (which + 1))
