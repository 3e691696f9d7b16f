"""The moments that a random kill seldom hits, one by one, on hosts of this process."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import ClassVar

import pytest

from dcres.actors.host.main_host import MainHost
from dcres.actors.messages import Finished, RunOrder
from dcres.errors import Conflict, DcresError, OperationFailed
from dcres.model.formats import MemoryFormat
from tests.support.speed import patience
from tests.support.vm import Rig, await_checks, rig, spec_of
from tests.support.wait import until

pytestmark = [pytest.mark.crash, pytest.mark.vm]


class Attacked(MainHost):
    """A main host whose pager is killed, and is back, at the moment that a test names."""

    moment: ClassVar[str] = ""
    resuming: ClassVar[list[threading.Thread]] = []

    def _attack(self, moment: str) -> None:
        if self.moment != moment:
            return
        Attacked.moment = ""
        pid = self._pager.call("status")["pid"]
        os.kill(pid, signal.SIGKILL)
        if moment != "thaw":  # there `resume` itself has to wait for the next pager
            until(lambda: self._pager.call_patiently("status")["pid"] != pid, 30, "the next pager")

    def _finish(self, checkpoint: str) -> Finished:
        if self.moment == "stopping":  # the next coordinator resumes what the last one stops
            Attacked.moment = ""
            self.resuming.append(threading.Thread(target=self.resume, args=(checkpoint,)))
            self.resuming[-1].start()
        return super()._finish(checkpoint)

    def stage(self, checkpoint: str, most_pages: int) -> None:
        self._attack("frozen")
        super().stage(checkpoint, most_pages)
        self._attack("staged")

    def _require_frozen(self, pager_pid: int) -> None:
        self._attack("read")
        super()._require_frozen(pager_pid)

    def resume(self, checkpoint: str) -> float:
        self._attack("thaw")
        return super().resume(checkpoint)


@pytest.fixture(scope="module")
def vm() -> Iterator[Rig]:
    """One VM for all moments that it survives, which are all."""
    with rig(main=Attacked) as made:
        made.boot(spec_of(main="64MiB", fill=24), 2)
        yield made


@pytest.fixture(autouse=True)
def unharmed(request: pytest.FixtureRequest) -> Iterator[None]:
    """Afterwards the guest goes on, and a checkpoint of it can be taken."""
    Attacked.moment = ""
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
    Attacked.moment = moment
    with pytest.raises(OperationFailed, match="the VM goes on"):
        vm.coordinator.checkpoint("stop")
    assert vm.listed() == before


@pytest.mark.parametrize("moment", ["staged", "thaw"])
def test_the_vm_goes_on_when_its_pager_dies_while_it_stands_still(vm: Rig, moment: str) -> None:
    before = vm.listed()
    Attacked.moment = moment
    with suppress(OperationFailed):
        vm.coordinator.checkpoint("stop")
    for checkpoint in set(vm.listed()) - set(before):
        assert vm.store.verify(checkpoint).ok


def test_a_resume_that_meets_a_stop_under_way_comes_after_it(vm: Rig) -> None:
    main, checkpoint, before = vm.main(), "vm-20260101-000000-0000", vm.listed()
    Attacked.moment = "stopping"
    main.prepare(checkpoint, MemoryFormat.SPARSE)
    main.finish(checkpoint)
    Attacked.resuming[-1].join(patience(20))
    assert main.status()["run_state"] == "running"
    assert main.status()["state"] == "running"  # the pager's
    main.abandon(checkpoint)
    assert vm.listed() == before


class Ended(MainHost):
    """A main host whose next coordinator ends the VM while the old one's order starts it."""

    moment: ClassVar[str] = ""
    ending: ClassVar[list[threading.Thread]] = []

    def _end(self, moment: str) -> None:
        if moment == self.moment:
            thread = threading.Thread(target=self.destroy)
            thread.start()
            self.ending.append(thread)
            until(lambda: self._life._over, 30, "the end has come")

    def _boot(self, order: RunOrder) -> None:
        self._end("begin")
        super()._boot(order)

    def _start_pager(self, order: RunOrder) -> None:
        self._end("pager")
        super()._start_pager(order)
        self._end("links")


@pytest.mark.parametrize("moment", ["begin", "pager", "links"])
def test_an_end_that_meets_a_start_under_way_leaves_nothing(moment: str) -> None:
    with rig(main=Ended) as vm:
        Ended.moment = moment
        with pytest.raises(DcresError):
            vm.coordinator.start(spec_of(main="64MiB", fill=48))
        Ended.ending[-1].join(patience(20))
        vm.require_nothing_left()
        Ended.moment = ""
        assert vm.coordinator.start(spec_of(main="64MiB", fill=8))["phase"] == "running"


def test_what_was_ended_does_not_start() -> None:
    with rig() as vm:
        vm.coordinator.start(spec_of(fill=8))
        main = vm.main()
        main.destroy()
        main.destroy()
        with pytest.raises(Conflict, match="ended before its start"), main._life.beginning():
            raise AssertionError("not reached")
