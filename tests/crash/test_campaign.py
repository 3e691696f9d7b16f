"""`kill -9` of every process in turn, at random moments: nothing half-done, and the VM goes on.

One VM is shared by all kills that it survives. The moments are drawn from a seed (DCRES_SEED
repeats a run, DCRES_ROUNDS makes it longer) and spread evenly over the length of an undisturbed
checkpoint, so that every phase is hit.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dcres.actors.control.coordinator import Coordinator
from dcres.actors.ray import gateway, local_node
from dcres.actors.ray.coordinator import RayCoordinator
from dcres.actors.ray.fleet import coordinator_name, host_actor_name
from dcres.actors.ray.gateway import ActorPort, Pending
from dcres.actors.ray.local_cluster import LocalCluster
from dcres.actors.ray.local_node import CLUSTER_MARK, HOST_MARK
from dcres.errors import ActorGone, DcresError
from dcres.linux.process import ProcessId, find_marked
from dcres.storage.format.manifest import Manifest, dumps
from dcres.storage.store.store import Store
from dcres.vm import witness
from tests.support.speed import patience
from tests.support.vm import await_checks, spec_of, stays
from tests.support.wait import until

pytestmark = [pytest.mark.crash, pytest.mark.cluster, pytest.mark.vm]

SEED = int(os.environ.get("DCRES_SEED", "7"))
ROUNDS = int(os.environ.get("DCRES_ROUNDS", "2"))
FILES = 72  # of the witness, 1 MiB each; it checks one a tick
VM = "crash"
TAKEN = "taken"
SPEC: dict[str, Any] = {
    "name": VM,
    "memory": "192MiB",
    "main": "72MiB",
    "subs": ["72MiB", "72MiB"],
    "fill": FILES,
    "pause_s": 0,  # its last test waits for every file
}


def retrying(call: Callable[[], Any], timeout_s: float = 40.0) -> Any:
    """The result of `call`, through restarts of the actor that answers."""
    answers: list[Any] = []

    def answered() -> bool:
        with suppress(ActorGone):
            answers.append(call())
        return bool(answers)

    until(answered, timeout_s, "an answer")
    return answers[0]


@dataclass
class Campaign:
    """The VM under attack."""

    cluster: LocalCluster
    store: Store
    random: random.Random
    checkpoint_s: float = 1.0

    @property
    def coordinator(self) -> ActorPort:
        return ActorPort(coordinator_name(VM))

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = retrying(lambda: self.coordinator.call(Coordinator.status))
        return status

    def hosts(self) -> list[dict[str, Any]]:
        until(lambda: len(self.status()["hosts"]) == 3, 40, "all three hosts answer")
        found: list[dict[str, Any]] = self.status()["hosts"]
        return found

    @property
    def console(self) -> Path:
        """The guest's, once its main host answers: the list has only the hosts that do."""
        found: list[str] = []

        def answers() -> bool:
            found.extend(each["console"] for each in self.status()["hosts"] if "console" in each)
            return bool(found)

        until(answers, 40, "the main host answers")
        return Path(found[0])

    def start(self) -> None:
        values = spec_of(**SPEC)
        self.coordinator.within(patience(100)).call(Coordinator.start, values)

    def newest(self) -> Manifest | None:
        """The newest checkpoint, after a look that nothing half-done is listed."""
        listed = self.store.list(VM)
        assert [each.error for each in listed if each.error] == []
        return listed[-1].manifest if listed else None

    def victim(self, name: str) -> int:
        """The process id of one of the VM's processes, as it is now."""
        match name:
            case "coordinator":
                return self.coordinator.pid()
            case "main actor":
                return ActorPort(host_actor_name(VM, 0)).pid()
            case "sub actor":
                return ActorPort(host_actor_name(VM, 1)).pid()
            case "pager":
                return int(self.hosts()[0]["pid"])
            case "memory server":
                return int(self.hosts()[2]["pid"])
            case "qemu":
                return int(self.hosts()[0]["qemu_pid"])
        raise AssertionError(name)

    def take(self, mode: str) -> dict[str, Any]:
        return self.coordinator.within(patience(100)).call(Coordinator.checkpoint, mode)

    def begin_checkpoint(self, mode: str) -> Pending[dict[str, Any]]:
        return self.coordinator.submit(Coordinator.checkpoint, mode)

    def settle(self, pending: Pending[dict[str, Any]]) -> str:
        """Wait until the checkpoint is over, and say how it went."""
        try:
            pending.result(patience(100))
        except DcresError as error:
            how = f"{type(error).__name__}: {error}"
        else:
            how = TAKEN
        until(lambda: self.status()["phase"] in ("running", "lost"), 60, "the VM is at rest")
        return how

    def parts(self) -> list[str]:
        """Folders of checkpoints in the store, published or not."""
        folder = self.store.root / VM
        return sorted(path.name for path in folder.iterdir() if path.is_dir())

    def require_goes_on(self, ticks: int = 1) -> None:
        """Still the same life of the guest, its checks without a failure, and paging at work."""
        await_checks(self.console, ticks, 60)
        assert self.status()["phase"] == "running"

    def leftovers(self) -> list[str]:
        """What is still there of the VM on any host: processes, memory, sockets."""
        left = []
        for host in self.cluster.hosts:
            settings = self.cluster.settings(host)
            left += [str(each) for each in find_marked("DCRES_VM_RUN", str(settings.run / VM))]
            left += [str(path) for path in (settings.ram / VM).rglob("*")]
            left += [str(path) for path in (settings.run / VM).glob("*") if not stays(path)]
        return left

    def clean(self) -> None:
        retrying(lambda: self.coordinator.within(patience(60)).call(Coordinator.stop))
        until(lambda: self.leftovers() == [], 30, f"nothing is left: {self.leftovers()}")
        assert gateway.list_actors(f"dcres-host/{VM}/") == []
        assert gateway.reservation(f"dcres/{VM}") is None


@pytest.fixture(scope="module")
def campaign(cluster: LocalCluster) -> Iterator[Campaign]:
    gateway.spawn(RayCoordinator, coordinator_name(VM), (VM,)).wait_ready(patience(60))
    store = Store(cluster.settings(cluster.hosts[0]).store)
    made = Campaign(cluster, store, random.Random(SEED))
    try:
        yield made
        made.clean()
    finally:
        retrying(lambda: made.coordinator.within(patience(60)).call(Coordinator.stop))
        gateway.kill(coordinator_name(VM))
        for each in store.list(VM):
            store.delete(each.checkpoint)


@pytest.fixture
def running(campaign: Campaign) -> Campaign:
    """The VM runs, has a checkpoint, and it is known how long one takes."""
    if campaign.status()["phase"] != "running":
        newest = campaign.newest()
        if newest is None:
            campaign.start()
        else:
            campaign.coordinator.within(patience(100)).call(Coordinator.restore, dumps(newest))
        await_checks(campaign.console, 2)
    if campaign.newest() is None:
        began = time.monotonic()
        campaign.coordinator.within(patience(100)).call(Coordinator.checkpoint, "stop")
        campaign.checkpoint_s = time.monotonic() - began
        print(f"\na checkpoint takes {campaign.checkpoint_s:.2f} s; seed {SEED}")
    return campaign


def processes_of_host(cluster: LocalCluster, host: str) -> set[ProcessId]:
    """All that runs there, workers of Ray's too, whose marks are gone."""
    found = local_node.marked({CLUSTER_MARK: cluster.id, HOST_MARK: host})
    return found | local_node._in_sessions(local_node._sessions_led_by(found))


def kill_during_checkpoint(campaign: Campaign, name: str, round_: int, mode: str) -> str:
    """Kill the victim at a random moment of this round's part of a checkpoint's length."""
    pid = campaign.victim(name)
    part = (round_ + campaign.random.random()) / ROUNDS
    moment_s = 1.15 * part * campaign.checkpoint_s
    pending = campaign.begin_checkpoint(mode)
    begun = time.monotonic()
    until(lambda: time.monotonic() - begun >= moment_s, 60, "the moment")
    os.kill(pid, signal.SIGKILL)
    how = campaign.settle(pending)
    return f"{name} killed after {moment_s:.2f} s of a checkpoint ({mode}): {how}"


def require_old_or_new(campaign: Campaign, before: Manifest | None, said: str) -> str:
    """Either the old checkpoint is the newest, or a new one is; and it verifies.

    One that was reported taken is there: durability comes before the announcement.
    """
    newest = campaign.newest()
    assert newest is not None
    assert before is not None
    assert campaign.store.verify(newest.checkpoint).ok
    if newest.checkpoint == before.checkpoint:
        assert not said.endswith(TAKEN), "it was reported taken and is not there"
        return "old"
    assert newest.generation >= before.generation
    assert newest.created >= before.created
    return "new"


@pytest.mark.parametrize("mode", ["stop", "live"])
@pytest.mark.parametrize(
    "name", ["pager", "memory server", "coordinator", "main actor", "sub actor"]
)
def test_a_kill_during_a_checkpoint(running: Campaign, name: str, mode: str) -> None:
    for round_ in range(ROUNDS):
        before = running.newest()
        said = kill_during_checkpoint(running, name, round_, mode)
        print(f"  {said}; the {require_old_or_new(running, before, said)} one is the newest")
        running.require_goes_on()
    again = retrying(lambda: running.take(mode))
    assert running.store.verify(again["checkpoint"]).ok
    assert running.parts() == [each.checkpoint for each in running.store.list(VM)]
    for each in running.store.list(VM)[:-2]:
        running.store.delete(each.checkpoint)


@pytest.mark.parametrize("name", ["pager", "memory server", "main actor", "sub actor"])
def test_a_kill_without_a_checkpoint(running: Campaign, name: str) -> None:
    old = running.victim(name)
    daemons = [host["pid"] for host in running.hosts()] + [running.hosts()[0]["qemu_pid"]]
    os.kill(old, signal.SIGKILL)
    until(lambda: retrying(partial(running.victim, name)) != old, 40, f"another {name}")
    running.require_goes_on(2)
    now = [host["pid"] for host in running.hosts()] + [running.hosts()[0]["qemu_pid"]]
    changed = [before for before, after in zip(daemons, now, strict=True) if before != after]
    assert changed == ([old] if old in daemons else [])  # a new actor adopts, it starts nothing
    taken = retrying(lambda: running.take("stop"))
    assert running.store.verify(taken["checkpoint"]).ok


def test_a_kill_of_the_coordinator_without_a_checkpoint(running: Campaign) -> None:
    before = running.hosts()
    os.kill(running.victim("coordinator"), signal.SIGKILL)
    running.require_goes_on(2)
    after = running.hosts()
    assert [host["pid"] for host in after] == [host["pid"] for host in before]
    taken = running.coordinator.within(patience(100)).call(Coordinator.checkpoint, "stop")
    assert running.store.verify(taken["checkpoint"]).ok


@pytest.mark.parametrize("round_", range(ROUNDS))
def test_a_kill_of_qemu_during_a_checkpoint(running: Campaign, round_: int) -> None:
    before = running.newest()
    said = kill_during_checkpoint(running, "qemu", round_, "live")
    which = require_old_or_new(running, before, said)
    print(f"\n  {said}; the {which} one is the newest")
    until(lambda: running.status()["phase"] == "lost", 30, "the VM is reported lost")
    assert "has ended" in running.status()["why"]
    newest = running.newest()
    assert newest is not None
    running.coordinator.within(patience(100)).call(Coordinator.restore, dumps(newest))
    running.require_goes_on()
    assert running.parts() == [each.checkpoint for each in running.store.list(VM)]


def killed(campaign: Campaign, pending: Pending[dict[str, Any]], name: str, delay_s: float) -> str:
    """Kill what `name` says while a start or restore is under way; the error that comes."""
    until(lambda: find_victims(campaign, name), 30, f"there is a {name}")
    there = time.monotonic()
    until(lambda: time.monotonic() - there >= delay_s, 60, "the moment")
    for pid in find_victims(campaign, name):
        os.kill(pid, signal.SIGKILL)
    try:
        pending.result(patience(100))
    except DcresError as error:
        return f"{type(error).__name__}: {error}"
    return "done"


def find_victims(campaign: Campaign, name: str) -> list[int]:
    """Processes of a VM that is not there yet, by their marks and command lines."""
    if name == "coordinator":
        return [campaign.coordinator.pid()]
    if name in ("main actor", "sub actor"):
        index = 0 if name == "main actor" else 1
        try:
            return [ActorPort(host_actor_name(VM, index)).pid()]
        except ActorGone:
            return []
    words = {"qemu": "qemu-system", "pager": "paging.pager", "memory server": "paging.server"}
    found = []
    for host in campaign.cluster.hosts:
        run = campaign.cluster.settings(host).run / VM
        for process in find_marked("DCRES_VM_RUN", str(run)):
            if words[name] in " ".join(process.argv):  # empty for one that has ended since
                found.append(process.pid)
    return found


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("coordinator", "start"),
        ("coordinator", "restore"),
        ("main actor", "start"),
        ("main actor", "restore"),
        ("sub actor", "restore"),
        ("qemu", "start"),
        ("qemu", "restore"),
        ("pager", "restore"),
        ("memory server", "start"),
    ],
)
def test_a_kill_during_start_or_restore(running: Campaign, name: str, what: str) -> None:
    newest = running.newest()
    assert newest is not None
    values = spec_of(**SPEC)
    running.clean()
    delay_s = running.random.uniform(0.0, 0.4)
    if what == "start":
        pending = running.coordinator.submit(Coordinator.start, values)
    else:
        pending = running.coordinator.submit(Coordinator.restore, dumps(newest))
    how = killed(running, pending, name, delay_s)
    print(f"\n  {name} killed {delay_s:.2f} s after it was there in a {what}: {how}")
    until(lambda: running.status()["phase"] in ("absent", "running", "lost"), 40, "it is at rest")
    status = running.status()
    assert (status["phase"] == "running") <= (how == "done")
    if status["phase"] == "absent":
        until(lambda: running.leftovers() == [], 30, f"nothing is left: {running.leftovers()}")
    if status["phase"] != "running" or what == "start":
        running.coordinator.within(patience(60)).call(Coordinator.stop)
        running.coordinator.within(patience(100)).call(Coordinator.restore, dumps(newest))
    running.require_goes_on()


@pytest.fixture
def replaced(campaign: Campaign) -> Iterator[None]:
    """Afterwards there is another host for every one that was lost."""
    before = len(campaign.cluster.hosts)
    yield
    while len(campaign.cluster.hosts) < before:
        campaign.cluster.add_host()


@pytest.mark.usefixtures("replaced")
@pytest.mark.parametrize(("index", "spare"), [(0, False), (1, True)], ids=["main", "sub"])
def test_a_host_that_is_lost_during_a_live_checkpoint(
    running: Campaign, index: int, spare: bool
) -> None:
    """With a `spare` host Ray moves the lost one's actor there, where nothing of the VM is."""
    before = running.newest()
    where = [str(host["host"]) for host in running.hosts()]
    doomed = processes_of_host(running.cluster, where[index])  # to look for them takes a while
    # A downtime that no stop can keep: it copies for as long as it may.
    pending = running.coordinator.submit(Coordinator.checkpoint, "live", None, 0.001)

    def phase() -> str:
        return str(running.coordinator.call(Coordinator.progress)["phase"])

    until(lambda: phase() == "copying", 30, "it copies")
    began = time.monotonic()
    for process in doomed:
        process.kill()
    running.cluster.kill_host(where[index])
    if spare:
        running.cluster.add_host()
    gone = f"host {where[index]} of VM {VM} is gone"
    until(lambda: gone in running.status()["why"], 60, "it is told that the host is gone")
    told_s = time.monotonic() - began
    how = running.settle(pending)
    over_s = time.monotonic() - began
    print(f"\n  told after {told_s:.1f} s, over after {over_s:.1f} s: {how}")
    # Ray notices after 5 s, and an actor that is only started again has 10 s to be back.
    assert told_s < patience(30)
    assert over_s < patience(60)
    assert spare or f"{where[index]} of its hosts does not answer, and the VM may be lost" in how
    assert require_old_or_new(running, before, how) == "old"
    if not spare:
        running.cluster.add_host()
    newest = running.newest()
    assert newest is not None
    running.coordinator.within(patience(100)).call(Coordinator.restore, dumps(newest))
    running.require_goes_on(2)
    assert where[index] not in [host["host"] for host in running.hosts()]
    assert running.parts() == [each.checkpoint for each in running.store.list(VM)]


@pytest.mark.usefixtures("replaced")
def test_a_host_that_is_lost_in_the_middle_of_a_restore(running: Campaign) -> None:
    newest = running.newest()
    assert newest is not None
    name = str(running.hosts()[1]["host"])
    running.clean()
    chosen = [name, *(host for host in running.cluster.hosts if host != name)]
    pending = running.coordinator.submit(
        Coordinator.restore, dumps(newest), None, chosen[1:] + chosen[:1]
    )
    ram = running.cluster.settings(name).ram / VM
    until(lambda: (ram / "store.ram").exists(), 30, f"{name} loads its part")
    began = time.monotonic()
    running.cluster.kill_host(name)
    with pytest.raises(DcresError) as caught:
        pending.result(patience(100))
    print(f"\n  {name} lost: {time.monotonic() - began:.1f} s until {caught.value}")
    assert running.status()["phase"] == "absent"
    until(lambda: running.leftovers() == [], 30, f"nothing is left: {running.leftovers()}")
    assert running.store.verify(newest.checkpoint).ok
    running.cluster.add_host()
    running.coordinator.within(patience(100)).call(Coordinator.restore, dumps(newest))
    running.require_goes_on(2)


def test_checkpoints_leave_no_descriptor_open(running: Campaign) -> None:
    def count() -> dict[str, int]:
        names = ("coordinator", "main actor", "sub actor", "pager", "memory server", "qemu")
        return {name: len(os.listdir(f"/proc/{running.victim(name)}/fd")) for name in names}

    for mode in ("stop", "live"):
        running.coordinator.within(patience(100)).call(Coordinator.checkpoint, mode)
    before = count()
    for mode in ("stop", "live") * 3:
        running.coordinator.within(patience(100)).call(Coordinator.checkpoint, mode)

    def left() -> dict[str, int]:
        # One that lasts for a call only may be open at the moment of the count; one that every
        # checkpoint leaves, or every live one, is there six or three times.
        more = {name: number - before[name] for name, number in count().items()}
        return {name: number for name, number in more.items() if number > 1}

    # Segments are merged in the background, and are open for as long.
    with suppress(AssertionError):
        until(lambda: not left(), 30, "files are closed")
    assert left() == {}


def test_in_the_end_every_page_is_as_the_guest_left_it(running: Campaign) -> None:
    taken = running.coordinator.within(patience(100)).call(Coordinator.checkpoint, "live")
    running.coordinator.within(patience(60)).call(Coordinator.stop)
    running.coordinator.call(Coordinator.restore, dumps(running.store.get(taken["checkpoint"])))
    running.require_goes_on(FILES * 5 // 4)  # every fourth tick checks twice
    print(f"\n  {witness.read(running.console)}")
