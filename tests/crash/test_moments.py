"""The moments that a random kill seldom hits, one by one, on hosts of this process."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import ClassVar

import pytest

from dcres.actors.host.checkpoint_stop import CheckpointStop
from dcres.actors.host.launch import Launch
from dcres.actors.host.main_saver import MainSaver
from dcres.actors.messages import Finished, RunOrder
from dcres.errors import Conflict, DcresError, OperationFailed
from dcres.model.formats import MemoryFormat
from tests.support.speed import patience
from tests.support.vm import Rig, await_checks, rig, spec_of
from tests.support.wait import until

pytestmark = [pytest.mark.crash, pytest.mark.vm]


class Attack:
    """A main host's pager is killed, and is back, at the moment that a test names."""

    moment: ClassVar[str] = ""
    resuming: ClassVar[list[threading.Thread]] = []

    @classmethod
    def at(cls, moment: str, vm: Rig) -> None:
        if cls.moment != moment:
            return
        cls.moment = ""
        pager = vm.main().pager
        pid = pager.control.status()["pid"]
        os.kill(pid, signal.SIGKILL)
        if moment != "thaw":  # there `resume` itself has to wait for the next pager
            until(lambda: pager.patient.status()["pid"] != pid, 30, "the next pager")


@contextmanager
def attacked(vm: Rig) -> Iterator[None]:
    finish, stage = CheckpointStop._finish, MainSaver.stage
    require_frozen, resume = CheckpointStop.require_frozen, CheckpointStop.resume

    def finishing(stop: CheckpointStop, checkpoint: str) -> Finished:
        if Attack.moment == "stopping":  # the next coordinator resumes what the last one stops
            Attack.moment = ""
            Attack.resuming.append(threading.Thread(target=stop.resume, args=(checkpoint,)))
            Attack.resuming[-1].start()
        return finish(stop, checkpoint)

    def staging(saver: MainSaver, checkpoint: str, most_pages: int, changed: bytes = b"") -> None:
        Attack.at("frozen", vm)
        stage(saver, checkpoint, most_pages, changed)
        Attack.at("staged", vm)

    def requiring_frozen(stop: CheckpointStop) -> None:
        Attack.at("read", vm)
        require_frozen(stop)

    def resuming(stop: CheckpointStop, checkpoint: str) -> float:
        Attack.at("thaw", vm)
        return resume(stop, checkpoint)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointStop, "_finish", finishing)
        patch.setattr(MainSaver, "stage", staging)
        patch.setattr(CheckpointStop, "require_frozen", requiring_frozen)
        patch.setattr(CheckpointStop, "resume", resuming)
        yield


@pytest.fixture(scope="module")
def vm() -> Iterator[Rig]:
    """One VM for all moments that it survives, which are all."""
    with rig() as made, attacked(made):
        made.boot(spec_of(main="64MiB", fill=24), 2)
        yield made


@pytest.fixture(autouse=True)
def unharmed(request: pytest.FixtureRequest) -> Iterator[None]:
    """Afterwards the guest goes on, and a checkpoint of it can be taken."""
    Attack.moment = ""
    yield
    if "vm" in request.fixturenames:
        vm: Rig = request.getfixturevalue("vm")
        await_checks(vm.console, 2)
        assert vm.coordinator.status()["phase"] == "running"
        assert vm.store.verify(vm.checkpoint().checkpoint).ok


@pytest.mark.parametrize("moment", ["frozen", "read"])
def test_pages_may_have_moved_when_another_pager_came_before_all_was_read(
    vm: Rig, moment: str
) -> None:
    before = vm.listed()
    Attack.moment = moment
    with pytest.raises(OperationFailed, match="the VM goes on"):
        vm.coordinator.checkpoint("stop")
    assert not Attack.moment, "it never came"
    assert vm.listed() == before


@pytest.mark.parametrize("moment", ["staged", "thaw"])
def test_the_vm_goes_on_when_its_pager_dies_while_it_is_paused(vm: Rig, moment: str) -> None:
    before = vm.listed()
    Attack.moment = moment
    with suppress(OperationFailed):
        vm.coordinator.checkpoint("stop")
    assert not Attack.moment, "it never came"
    for checkpoint in set(vm.listed()) - set(before):
        assert vm.store.verify(checkpoint).ok


def test_a_resume_that_meets_a_stop_under_way_comes_after_it(vm: Rig) -> None:
    main, checkpoint, before = vm.main(), "vm-20260101-000000-0000", vm.listed()
    Attack.moment = "stopping"
    main.saving.prepare(checkpoint, MemoryFormat.SPARSE)
    main.machine.finish(checkpoint)
    Attack.resuming[-1].join(patience(20))
    assert main.machine.status()["run_state"] == "running"
    assert main.machine.status()["state"] == "running"  # the pager's
    main.saving.abandon(checkpoint)
    assert vm.listed() == before


@pytest.mark.parametrize("moment", ["begin", "pager", "links"])
def test_an_end_that_meets_a_start_under_way_leaves_nothing(
    moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next coordinator ends the VM while the old one's order starts it."""
    made: Rig
    ending: list[threading.Thread] = []
    boot, start_pager = Launch._boot, Launch._start_pager

    def end(at: str) -> None:
        if at == moment and not ending:
            main = made.main()
            ending.append(threading.Thread(target=main.presence.destroy))
            ending[-1].start()
            until(lambda: made.agent(0).site.life._over, 30, "the end has come")

    def booting(launch: Launch, order: RunOrder) -> None:
        end("begin")
        boot(launch, order)

    def starting_pager(launch: Launch, order: RunOrder) -> None:
        end("pager")
        start_pager(launch, order)
        end("links")

    monkeypatch.setattr(Launch, "_boot", booting)
    monkeypatch.setattr(Launch, "_start_pager", starting_pager)
    with rig() as made:
        with pytest.raises(DcresError):
            made.coordinator.start(spec_of(main="64MiB", fill=48))
        ending[-1].join(patience(20))
        made.require_nothing_left()
        assert made.coordinator.start(spec_of(main="64MiB", fill=8))["phase"] == "running"


def test_what_was_ended_does_not_start() -> None:
    with rig() as vm:
        vm.coordinator.start(spec_of(fill=8))
        agent = vm.agent(0)
        for _ in range(2):
            vm.main().presence.destroy()
        with pytest.raises(Conflict, match="ended before its start"), agent.site.life.beginning():
            raise AssertionError("not reached")
