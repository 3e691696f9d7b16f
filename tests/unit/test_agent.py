"""A host agent: its role is data, and so is all that outlives it."""

from __future__ import annotations

import json
import os
import stat
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from dcres.actors.host.agent import HostAgent
from dcres.actors.host.daemon import Daemon
from dcres.actors.host.roles import MainRole
from dcres.actors.host.state import BegunRevert, StateFile, VmState, state_in
from dcres.actors.host.vm_folder import VmFolder
from dcres.actors.messages import Role
from dcres.actors.protocol import (
    Machine,
    Paging,
    Parts,
    Presence,
    Saving,
    Serving,
    group_of,
)
from dcres.config import HostSettings, Layout, vm_spec
from dcres.errors import Conflict, NotFound
from dcres.linux.process import ProcessId
from dcres.model.run_state import RunState
from dcres.paging.settings import SubAddress
from dcres.vm.command import VmFiles
from dcres.vm.process import QemuProcess
from dcres.vm.reverting import Reverting
from tests.support.actors import Probe
from tests.support.fleet import LocalActor, LocalPort

GROUPS = {
    Role.MAIN: {Presence, Parts, Saving, Machine, Paging},
    Role.SUB: {Presence, Parts, Saving, Serving},
    Role.PARTS: {Presence, Parts},
}
SPEC = {
    "name": "vm",
    "memory": "64MiB",
    "kernel": "/boot/vmlinuz",
    "layout": {"main": "32MiB", "subs": ["32MiB"]},
}


@pytest.fixture
def settings(tmp_path: Path) -> HostSettings:
    run, ram, store = (tmp_path / name for name in ("run", "ram", "store"))
    return HostSettings(name="h0", run=run, ram=ram, store=store)


def agent(settings: HostSettings, role: Role) -> HostAgent:
    return HostAgent("vm", role, environ=settings.environ())


def earlier_state(settings: HostSettings) -> dict[str, Any]:
    """A main host's file as dcres wrote it before hosts had roles, with a QEMU that runs: us."""
    run, ram = settings.run / "vm", settings.ram / "vm"
    us = ProcessId.of(os.getpid())
    assert us is not None
    qemu = {"pid": us.pid, "start_time": us.start_time, "ram": f"{ram}/guest.ram", "log_start": 7}
    files = {"monitor": "qmp.sock", "console": "console.log", "log": "qemu.log"}
    return {
        "cluster": "ours",
        "unclaimed": "",
        "machine": "pc-q35-7.2",
        "vm": "vm",
        "generation": 3,
        "spec": vm_spec(SPEC).model_dump(mode="json", by_alias=True),
        "hosts": ["h0", "h1"],
        "shares": {"h1": 32 << 20},
        "codes": [2],
        "sources": [{"host": "h2", "address": "::1", "port": 5, "capacity_pages": 0, "code": 3}],
        "qemu": {**qemu, **{key: f"{run}/{name}" for key, name in files.items()}},
        "accel": "tcg",
        "accel_why": "no KVM",
        "qemu_version": "7.2.22",
        "reserved": 32 << 20,
        "running": True,
        "checkpoint": "vm-20260101-000000-0001",
        "found": "paused",
        "stood": "2026-01-01T00:00:00+00:00",
        "devices": {"device /machine": "q35"},
        "paged": True,
        "reverting": None,
    }


def left_by_an_earlier_dcres(settings: HostSettings, values: dict[str, Any]) -> None:
    folder = VmFolder.of(settings, "vm")
    folder.make()
    folder.state.write_text(json.dumps(values))
    folder.release()


def test_a_vm_that_an_earlier_dcres_started_is_adopted(
    settings: HostSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    adopted: list[str] = []
    monkeypatch.setattr(Daemon, "adopt", lambda daemon: adopted.append(daemon.name))
    left_by_an_earlier_dcres(settings, earlier_state(settings))
    host = agent(settings, Role.MAIN)
    assert adopted == ["pager"]
    found = host.composed.presence.describe()
    assert (found.role, found.present, found.generation) == (Role.MAIN, True, 3)
    assert found.spec == vm_spec(SPEC)
    assert (found.hosts, found.shares, found.moving) == (("h0", "h1"), {"h1": 32 << 20}, True)
    assert found.checkpoint == "vm-20260101-000000-0001"
    assert isinstance(host.composed, MainRole)
    assert host.composed.qemu.is_running
    assert host.composed.standing.found is RunState.PAUSED
    state = host.site.state.require()
    assert state.stood == datetime(2026, 1, 1, tzinfo=UTC)
    assert state.sources == (SubAddress("h2", "::1", 5, 0, 3),)
    change = found.next_change
    host.composed.paging.begin_reshape(change)
    host.composed.paging.set_layout(change, Layout(main=48 << 20, subs=(16 << 20,)))
    written = json.loads((settings.run / "vm" / "state.json").read_text())
    before = earlier_state(settings)
    layout = {"main": 48 << 20, "subs": [16 << 20]}
    expected = {
        **before,
        "role": "main",
        "unrecorded": "",
        "spec": {**before["spec"], "layout": layout},
        "shares": {"h1": 16 << 20},
        "reshaping": False,
        "change": 1,
    }
    assert written == expected


@pytest.mark.parametrize("lacking", ["devices", "machine", "found", "stood", "sources", "paged"])
def test_what_an_earlier_dcres_did_not_know_has_a_default(
    settings: HostSettings, lacking: str
) -> None:
    values = earlier_state(settings)
    del values[lacking]
    left_by_an_earlier_dcres(settings, {**values, "of_a_later_dcres": 1, "paged": False})
    state = agent(settings, Role.MAIN).site.state.require()
    assert getattr(state, lacking) == getattr(VmState(), lacking)
    assert state.generation == 3


def test_a_sub_host_that_an_earlier_dcres_started_is_adopted(
    settings: HostSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    adopted: list[str] = []
    monkeypatch.setattr(Daemon, "adopt", lambda daemon: adopted.append(daemon.name))
    left_by_an_earlier_dcres(settings, {"generation": 2, "reserved": 4096})
    found = agent(settings, Role.SUB).composed.presence.describe()
    assert adopted == ["server"]
    assert (found.role, found.present) == (Role.SUB, True)
    assert (found.generation, found.reserved) == (2, 4096)


def test_a_state_is_read_as_it_was_written(settings: HostSettings) -> None:
    folder = VmFolder.of(settings, "vm")
    folder.make()
    files = VmFiles.of("vm", settings.run, settings.ram)
    state = VmState(
        role=Role.SUB,
        generation=1,
        spec=vm_spec(SPEC),
        hosts=("h0",),
        qemu=QemuProcess(ProcessId(1, 2), files, 3),
        sources=(SubAddress("h1", "::1", 1),),
        found=RunState.IO_ERROR,
        stood=datetime.now(UTC),
        reverting=BegunRevert(Reverting("vm-1", (Path("/a"), Path("/b"))), "boot"),
    )
    StateFile(folder, Role.SUB).begin(state)
    assert state_in(folder) == state
    assert StateFile(folder, Role.MAIN).now == state
    assert stat.S_IMODE(folder.state.stat().st_mode) == 0o600


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("group", [Presence, Parts, Saving, Machine, Paging, Serving])
def test_a_role_takes_the_orders_of_its_groups_and_no_others(
    settings: HostSettings, role: Role, group: type[Any]
) -> None:
    host = agent(settings, role)
    for name, order in vars(group).items():
        if name.startswith("_"):
            continue
        assert group_of(order) == group.__name__.lower()
        if group in GROUPS[role]:
            assert callable(getattr(getattr(host.composed.duties, group_of(order)), name))
            continue
        with pytest.raises(Conflict) as caught:
            host.perform(group_of(order), name, (), {})
        words = f"h0, {role.words} of VM vm, does not take the order {group_of(order)}.{name}"
        assert str(caught.value) == words


def test_orders_of_other_actors_are_their_methods() -> None:
    assert group_of(Probe.get) == ""
    assert group_of(HostAgent.become) == ""


def test_an_order_is_named_in_errors_and_not_how_it_came_there(settings: HostSettings) -> None:
    actors = {"a": LocalActor("a", lambda: agent(settings, Role.MAIN))}
    port = LocalPort("a", actors)
    assert port.call(Presence.describe).present is False
    with pytest.raises(NotFound, match="host h0 does not run VM vm"):
        port.call(Machine.status)
    actors["a"].die()
    with pytest.raises(Exception, match=r"^a\.copy: the actor has died"):
        port.call(Saving.copy, "vm-1")
    actors["a"].close()


class TestBecoming:
    def test_another_role_takes_other_orders(self, settings: HostSettings) -> None:
        host = agent(settings, Role.SUB)
        host.become(Role.MAIN)
        assert host.role is Role.MAIN
        assert host.composed.presence.describe().role is Role.MAIN
        with pytest.raises(Conflict, match=r"does not take the order serving\.resize"):
            host.perform("serving", "resize", (1,), {})
        host.become(Role.SUB)
        with pytest.raises(Conflict, match=r"h0, a sub host of VM vm, does not take .*machine\.go"):
            host.perform("machine", "go", (), {})

    def test_it_is_kept(self, settings: HostSettings) -> None:
        agent(settings, Role.SUB).become(Role.MAIN)
        again = agent(settings, Role.SUB)
        assert again.role is Role.MAIN
        assert again.composed.presence.describe().present is False

    def test_it_is_the_role_of_the_life_that_begins(self, settings: HostSettings) -> None:
        host = agent(settings, Role.SUB)
        host.become(Role.MAIN)
        host.perform("presence", "clear", (False,), {})
        assert host.role is Role.MAIN
        host.site.folder.make()
        host.site.state.begin(VmState(generation=1))
        assert agent(settings, Role.SUB).role is Role.MAIN

    def test_what_an_earlier_life_was_goes_with_it(self, settings: HostSettings) -> None:
        agent(settings, Role.SUB).become(Role.MAIN)
        host = agent(settings, Role.SUB)
        host.perform("presence", "clear", (False,), {})
        assert host.role is Role.SUB

    def test_not_while_something_is_here(self, settings: HostSettings) -> None:
        host = agent(settings, Role.SUB)
        host.site.folder.make()
        host.site.state.begin(VmState(generation=1))
        with pytest.raises(Conflict, match="h0 is a sub host of VM vm, which is here"):
            host.become(Role.MAIN)
        assert host.role is Role.SUB
        host.become(Role.SUB)

    def test_not_after_the_end(self, settings: HostSettings) -> None:
        host = agent(settings, Role.SUB)
        host.perform("presence", "destroy", (), {})
        with pytest.raises(Conflict, match="was ended"):
            host.become(Role.MAIN)

    @pytest.mark.parametrize(("one", "other"), [(Role.PARTS, Role.SUB), (Role.MAIN, Role.PARTS)])
    def test_not_where_no_memory_is_set_aside(
        self, settings: HostSettings, one: Role, other: Role
    ) -> None:
        with pytest.raises(Conflict, match="have memory set aside"):
            agent(settings, one).become(other)
