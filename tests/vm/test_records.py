"""What is to run, on record in the store, through a start, a restore and a stop of a real VM."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import pytest

from dcres.actors.control import coordinator as control
from dcres.actors.control.coordinator import Coordinator
from dcres.actors.control.journal import Journal
from dcres.actors.control.vm_handle import VmHandle
from dcres.model.record import Record
from tests.support.vm import Rig, await_checks, rig, spec_of

pytestmark = pytest.mark.vm

SPEC = spec_of(memory="96MiB", main="64MiB", subs=("32MiB",), fill=8)


class Killed(BaseException):
    """The coordinator's process has ended."""


@pytest.fixture
def vm() -> Iterator[Rig]:
    with rig(hosts=2) as made:
        yield made


def recorded(vm: Rig) -> Record:
    found = vm.store.lives("vm").records.read()
    assert found is not None
    return found


def said(vm: Rig) -> tuple[int, str, int]:
    record = recorded(vm)
    return record.version, str(record.desired), record.generation


def killed(vm: Rig, monkeypatch: pytest.MonkeyPatch, name: str, order: Callable[[], Any]) -> None:
    """The coordinator dies when it gets to `name`; another one comes after it."""

    def die(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(control, name, die)
        patch.setattr(VmHandle, "take_down", lambda self, journal: None)  # nobody is there to do it
        with pytest.raises(Killed):
            order()
    vm.coordinator = Coordinator("vm", vm.fleet)


def end_by_kill(journal: Journal) -> NoReturn:
    raise Killed


def test_through_a_life(vm: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where its coordinator is killed between an act and its record, and the reverse."""
    killed(vm, monkeypatch, "record_running", lambda: vm.coordinator.start(SPEC))
    await_checks(vm.console)
    first = vm.coordinator.status()["generation"]
    assert said(vm) == (1, "running", first)
    assert recorded(vm).spec["name"] == "vm"
    assert recorded(vm).cluster == vm.fleet.cluster()

    manifest = vm.checkpoint()
    with monkeypatch.context() as patch:
        patch.setattr(vm.coordinator._vm, "take_down", end_by_kill)
        with pytest.raises(Killed):
            vm.coordinator.stop("bob")
    vm.coordinator = Coordinator("vm", vm.fleet)
    assert vm.coordinator.status()["phase"] == "running"
    assert said(vm) == (2, "stopped", first)
    assert recorded(vm).by == "bob"

    vm.coordinator.stop()
    assert said(vm) == (2, "stopped", first)
    killed(vm, monkeypatch, "record_running", lambda: vm.restore(manifest))
    second = vm.coordinator.status()["generation"]
    assert second > first
    assert said(vm) == (3, "running", second)
    await_checks(vm.console)
    vm.coordinator.stop()
    assert said(vm) == (4, "stopped", second)
