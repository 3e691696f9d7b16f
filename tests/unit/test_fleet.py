"""The fleet on Ray, as far as Ray need not be there for it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dcres.actors.control.room import MIB, HostInfo
from dcres.actors.host import room
from dcres.actors.host.agent import HostAgent
from dcres.actors.messages import Role
from dcres.actors.ray import gateway
from dcres.actors.ray.fleet import RayFleet, end_what_is_left, require_ram_here
from dcres.errors import ActorGone, ClusterError, NoRoom
from tests.support.ports import ScriptedPort


def test_what_a_silent_helper_leaves_is_swept(monkeypatch: pytest.MonkeyPatch) -> None:
    """h1 is dead, h2 did not answer in time, h3 ended all."""
    errors = {"h1": ActorGone("it died"), "h2": ClusterError("it did not answer"), "h3": None}
    killed: list[str] = []
    swept: list[tuple[Any, ...]] = []

    class Port(ScriptedPort):
        def __init__(self, name: str) -> None:
            self._error = errors[name.rpartition("/")[2]]

        def answer(self, order: str, *args: Any) -> None:
            assert order == "destroy"
            if self._error is not None:
                raise self._error

    monkeypatch.setattr(gateway, "list_actors", lambda prefix: [prefix + host for host in errors])
    monkeypatch.setattr(gateway, "ActorPort", Port)
    monkeypatch.setattr(gateway, "kill", killed.append)
    monkeypatch.setattr(gateway, "run_on", lambda *call, timeout_s: swept.append(call))
    monkeypatch.setattr(RayFleet, "alive", lambda fleet, host: host != "h1")
    monkeypatch.setattr(RayFleet, "cluster", lambda fleet: "ours")
    RayFleet().leave("box")
    assert killed == [f"dcres-parts/box/{host}" for host in errors]
    assert swept == [("h2", end_what_is_left, "box.parts", "ours")]


@pytest.mark.parametrize(
    ("roles", "expected"),
    [((), [Role.MAIN, Role.SUB]), ((Role.SUB, Role.MAIN), [Role.SUB, Role.MAIN])],
    ids=["by default", "as told"],
)
def test_an_agent_is_told_its_role(
    monkeypatch: pytest.MonkeyPatch, roles: tuple[Role, ...], expected: list[Role]
) -> None:
    spawned: list[tuple[Any, ...]] = []
    released: list[str] = []

    def spawn(cls: type[Any], name: str, args: tuple[Any, ...], **_: object) -> ScriptedPort:
        spawned.append((cls, name, *args))
        return ScriptedPort()

    monkeypatch.setattr(gateway, "spawn", spawn)
    monkeypatch.setattr(gateway, "reserve", lambda *_: SimpleNamespace(hosts=["h0", "h1"]))
    monkeypatch.setattr(gateway, "release", released.append)
    monkeypatch.setattr(gateway, "hosts", lambda: [info(host) for host in ("h0", "h1", "h2")])
    monkeypatch.setattr(gateway, "list_actors", lambda prefix: [f"{prefix}0", f"{prefix}1"])
    monkeypatch.setattr(RayFleet, "cluster", lambda fleet: "ours")
    assert RayFleet().reserve("box", [MIB, MIB], None, roles) == ["h0", "h1"]
    RayFleet().add("box", MIB, "h2")
    assert released == ["dcres-more/box/2"]
    RayFleet().visit("box", "h2")
    names = ["dcres-host/box/0", "dcres-host/box/1", "dcres-host/box/2", "dcres-parts/box/h2"]
    assert spawned == [
        (HostAgent, name, "box", role, f"at {host}", "ours")
        for name, role, host in zip(
            names, [*expected, Role.SUB, Role.PARTS], ("h0", "h1", "h2", "h2"), strict=True
        )
    ]


def info(host: str) -> HostInfo:
    return HostInfo(host, host, f"at {host}", MIB, MIB, True)


class FakeReservation:
    """h0 and h1 are the VM's; on h1 more has been set aside since."""

    def __init__(self, extra: bool) -> None:
        self.length_bytes = 3 * MIB if extra else 32 * MIB

        self.held = {"h1": 3 * MIB} if extra else {"h0": 20 * MIB, "h1": 12 * MIB}

    def host_of(self, bundle: int) -> str:
        return f"h{bundle}"


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A cluster that may be looked at, and no more; what was run on hosts."""
    free = {"h0": 1, "h1": 1, "h2": 8, "h3": 16}
    hosts = [HostInfo(name, name, "", 64 * MIB, mib * MIB, True) for name, mib in free.items()]
    ran: list[tuple[Any, ...]] = []

    def reservation(name: str) -> FakeReservation | None:
        kinds = {"dcres-extra/box/1": True, "dcres/box": False}
        return FakeReservation(kinds[name]) if name in kinds else None

    monkeypatch.setattr(gateway, "hosts", lambda: hosts)
    monkeypatch.setattr(RayFleet, "cluster", lambda fleet: "ours")
    monkeypatch.setattr(gateway, "reservation", reservation)
    extra = ["dcres-extra/box/1"]
    monkeypatch.setattr(
        gateway, "list_reservations", lambda prefix: extra if "extra" in prefix else []
    )
    monkeypatch.setattr(gateway, "list_actors", lambda prefix: [f"{prefix}0", f"{prefix}1"])
    monkeypatch.setattr(gateway, "run_on", lambda *call, timeout_s: ran.append(call))
    for changing in ("reserve", "release", "spawn"):
        monkeypatch.setattr(gateway, changing, None)
    return ran


def test_room_is_looked_for_and_not_taken(looked: list[tuple[Any, ...]]) -> None:
    assert RayFleet().room_for("box", {0: MIB}, [MIB, 9 * MIB]) == ["h2", "h3"]
    assert looked == [("h2", require_ram_here, MIB), ("h3", require_ram_here, 9 * MIB)]
    with pytest.raises(NoRoom, match="a share of 2 MiB does not fit host h0: h0 has 1 MiB, h1 has"):
        RayFleet().room_for("box", {0: 2 * MIB}, [])
    with pytest.raises(NoRoom, match=r"not the VM's already has 16\.5 MiB free"):
        RayFleet().room_for("box", {}, [MIB, 33 * MIB // 2])


def test_what_was_set_aside_in_addition_counts_as_free_for_more(
    looked: list[tuple[Any, ...]],
) -> None:
    """It is given back when more is set aside in its place."""
    assert RayFleet().room_for("box", {1: 4 * MIB}, []) == []
    with pytest.raises(NoRoom, match=r"a share of 5 MiB does not fit host h1: .* h1 has 4 MiB"):
        RayFleet().room_for("box", {1: 5 * MIB}, [])
    assert RayFleet().room_for("box", {0: 0, 1: 0}, []) == []


def test_what_a_vm_holds_counts_as_free_for_its_next_life(looked: list[tuple[Any, ...]]) -> None:
    fleet = RayFleet()
    assert fleet.held("box") == {"h0": 20 * MIB, "h1": 15 * MIB}
    fleet.require_room("box", [21 * MIB, 16 * MIB, 8 * MIB], None)
    assert looked == []
    fleet.require_room("box", [16 * MIB], ["h1"])
    assert looked == [("h1", require_ram_here, 16 * MIB, "box", "ours")]
    with pytest.raises(NoRoom, match="a share of 17 MiB does not fit host h1"):
        fleet.require_room("box", [17 * MIB], ["h1"])
    with pytest.raises(NoRoom, match="a share of 22 MiB fits no host that is left"):
        fleet.require_room("box", [22 * MIB], None)


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder where guest memory may lie."""
    with tempfile.TemporaryDirectory(prefix="dcres-t-", dir="/dev/shm") as folder:
        yield Path(folder)


def test_the_tmpfs_has_room_once_the_vm_gives_back_what_it_has_there(
    memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DCRES_RAM", str(memory))
    monkeypatch.setattr(room, "free_in", lambda folder: MIB)
    (memory / "box" / "deeper").mkdir(parents=True)
    for name in ("guest.ram", "deeper/store.ram"):
        (memory / "box" / name).write_bytes(bytes(MIB))
    with (memory / "box" / "hole").open("wb") as file:
        file.truncate(64 * MIB)
    require_ram_here(MIB)
    with pytest.raises(NoRoom):
        require_ram_here(2 * MIB)
    require_ram_here(3 * MIB, "box")
    require_ram_here(MIB, "another")
    with pytest.raises(NoRoom):
        require_ram_here(4 * MIB, "box")
