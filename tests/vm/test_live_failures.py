"""What goes wrong while a live checkpoint copies: the VM goes on, and the next one is taken.

On real hosts, held in the middle of a round: pages are tracked then, and memory files half
written.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from dcres.actors.control import checkpointing
from dcres.actors.host.agent import HostAgent
from dcres.actors.host.part_saver import PartSaver
from dcres.actors.host.roles import MainRole, PartsRole
from dcres.errors import OperationFailed
from tests.support.speed import patience
from tests.support.vm import Rig, await_checks, rig, spec_of
from tests.support.wait import until

pytestmark = pytest.mark.vm


class Held:
    """A host that is paused in the middle of a round of copying, until it is let go.

    When its work is cancelled it goes on by itself, as one that is busy with the disk would.
    """

    def __init__(self, agent: HostAgent, round_: int = 1) -> None:
        self.reached = threading.Event()
        self.let_go = threading.Event()
        host = agent.composed
        assert not isinstance(host, PartsRole)
        self._saving, self._saver, self._meter = host.saving, host.saver, agent.site.meter
        self._round = round_
        self._rounds = 0
        self._copy, self._done = host.saving.copy, self._meter.done
        self._saving.copy = self._counted  # type: ignore[method-assign]
        self._meter.done = self._hold  # type: ignore[method-assign]

    def _counted(self, checkpoint: str, changed: bytes = b"") -> Any:
        self._rounds += 1
        done = self._copy(checkpoint, changed)
        if self._rounds < self._round:
            # A round may be shorter than it takes until a page comes or changes here.
            until(self._has_work, 60, "there are pages for another round")
        elif self._rounds == self._round and not self.reached.is_set():
            # All that changed had left the host again: nothing to copy, so it is paused here.
            self._stand_still()
        return done

    def _has_work(self) -> bool:
        saver = self._saver._saver
        return saver is None or saver._changes.count() >= 64

    def _hold(self, pages: int) -> None:
        if self._rounds == self._round and self._meter.progress.what == "copy":
            self._stand_still()
        self._done(pages)

    def _stand_still(self) -> None:
        cancelled = self._meter._cancelled
        self.reached.set()
        until(lambda: self.let_go.is_set() or cancelled.is_set(), 60, "it may go on")

    def end(self) -> None:
        self.let_go.set()
        for patched, name in ((self._saving, "copy"), (self._meter, "done")):
            patched.__dict__.pop(name)


@pytest.fixture(scope="module")
def vm() -> Iterator[Rig]:
    """One VM that pages, for all failures: it survives them."""
    with rig() as made:
        made.boot(spec_of(main="72MiB", subs=["64MiB", "64MiB"], fill=72), 2)
        yield made


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as made:
        yield made


@pytest.fixture(autouse=True)
def goes_on(vm: Rig) -> Iterator[None]:
    """Afterwards nothing is tracked or listed, the guest runs, and a checkpoint is taken."""
    yield
    until(lambda: tracking(vm) == [False] * 3, 30, "nobody tracks changes any more")
    assert vm.listed() == []
    assert [path for path in (vm.store.root / "vm").iterdir() if path.is_dir()] == []
    assert list(vm.ram.rglob("changes")) == []
    await_checks(vm.console, 2)
    assert vm.coordinator.status()["phase"] == "running"
    taken = vm.coordinator.checkpoint("live")
    assert taken["rounds"] > 0
    assert vm.store.verify(taken["checkpoint"]).ok
    assert tracking(vm) == [False] * 3
    vm.store.delete(taken["checkpoint"])


def tracking(vm: Rig) -> list[bool]:
    """Which hosts mark changes for a checkpoint, as their paging processes say."""
    return [host["tracking"] for host in vm.coordinator.status()["hosts"]]


def begin(vm: Rig, pool: ThreadPoolExecutor, held: Held) -> Future[dict[str, Any]]:
    """A live checkpoint that has come as far as `held`; there is always a second round."""
    pending = pool.submit(vm.coordinator.checkpoint, "live", downtime_s=0.001)
    until(lambda: held.reached.is_set() or pending.done(), 60, "it copies")
    assert not pending.done()
    assert tracking(vm) == [True] * 3
    return pending


@pytest.mark.parametrize("round_", [1, 2])
@pytest.mark.parametrize("index", [0, 1], ids=["main", "sub"])
def test_a_cancel_in_the_middle_of_a_round(
    vm: Rig, pool: ThreadPoolExecutor, index: int, round_: int
) -> None:
    held = Held(vm.agent(index), round_)
    pending = begin(vm, pool, held)
    assert vm.coordinator.cancel()
    with pytest.raises(OperationFailed, match="the VM goes on") as caught:
        pending.result(patience(60))
    assert caught.value.failures == {"cancelled": "cancelled by the user"}
    held.end()


def test_the_vm_does_not_wait_for_a_disk_that_hangs(
    vm: Rig, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The main host's disk answers nothing while the VM is paused for it."""
    main = vm.main()
    hangs, answers, stage = threading.Event(), threading.Event(), PartSaver.stage

    def hanging(saver: PartSaver, most_pages: int, changed: Any = None) -> None:
        if saver is main.saver._saver:
            hangs.set()
            until(answers.is_set, 60, "the disk answers")
        stage(saver, most_pages, changed)

    monkeypatch.setattr(PartSaver, "stage", hanging)
    monkeypatch.setattr(checkpointing, "HALT_TIMEOUT_S", 0.5)
    pending = pool.submit(vm.coordinator.checkpoint, "stop")
    until(hangs.is_set, 60, "the VM is paused")
    assert vm.coordinator.cancel()
    await_checks(vm.console, 2)
    assert not pending.done()
    answers.set()
    with pytest.raises(OperationFailed, match="the VM goes on"):
        pending.result(patience(60))


@pytest.mark.parametrize("index", [0, 1], ids=["pager", "memory server"])
def test_a_paging_process_that_dies_in_the_middle_of_a_round(
    vm: Rig, pool: ThreadPoolExecutor, index: int
) -> None:
    """Its successor has not marked what changed meanwhile, and says so."""
    held = Held(vm.agent(index))
    pending = begin(vm, pool, held)
    pid = vm.coordinator.status()["hosts"][index]["pid"]
    os.kill(pid, signal.SIGKILL)
    until(lambda: vm.coordinator.status()["hosts"][index]["pid"] != pid, 30, "its successor")
    held.let_go.set()
    with pytest.raises(OperationFailed, match="the VM goes on") as caught:
        pending.result(patience(60))
    assert list(caught.value.failures) == [f"h{index}"]
    assert "was started again" in str(caught.value)
    held.end()


def die(vm: Rig, index: int) -> Callable[[], None]:
    """An actor's process is killed; what ends the rest of it in this process, afterwards."""
    actor = vm.fleet.actor("vm", index)
    host = vm.agent(index).composed
    assert not isinstance(host, PartsRole)
    actor.die()
    daemon = host.pager.daemon if isinstance(host, MainRole) else host.server.daemon
    daemon._wanted = False  # its watching thread is gone with it
    host.saver.kept.drop()  # and so is what it had pinned
    if isinstance(host, MainRole):
        host.qemu.disconnect()
    return host.saver.end


@pytest.mark.parametrize("index", [0, 1], ids=["main", "sub"])
def test_an_actor_that_dies_in_the_middle_of_a_round(
    vm: Rig, pool: ThreadPoolExecutor, index: int
) -> None:
    """The next one knows nothing of the saving, and the paging process goes on tracking."""
    held = Held(vm.agent(index))
    pending = begin(vm, pool, held)
    bury = die(vm, index)
    vm.fleet.actor("vm", index).restart()
    try:
        with pytest.raises(OperationFailed, match="the VM goes on") as caught:
            pending.result(patience(60))
        assert list(caught.value.failures) == [f"h{index}"]
        until(lambda: tracking(vm) == [False] * 3, 30, "nobody tracks changes any more")
        assert list(vm.ram.rglob("changes")) == []
    finally:
        held.end()
        bury()
