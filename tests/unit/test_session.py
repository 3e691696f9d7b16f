"""Joining and leaving a cluster, and finding its VMs, without Ray."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import ray.util
from ray._private import services

import dcres
from dcres.actors.ray import gateway
from dcres.actors.ray.coordinators import Coordinators
from dcres.actors.ray.gateway import connection
from dcres.actors.ray.local_cluster import LocalCluster
from dcres.api.catalogue import StoresOfHosts
from dcres.api.cluster import Cluster
from dcres.api.session import Session, open_catalogue
from dcres.errors import ActorGone, ClusterError, ConfigError, Conflict, NotFound
from tests.support.ports import ScriptedPort

A_SESSION = Session("nowhere", StoresOfHosts(), None)


@dataclass
class FakeRay:
    """This process and Ray: which cluster it is connected to, and how often dcres left one."""

    connected: str | None = None
    left: int = 0

    def connect(self, address: str, token_path: Path | None = None) -> bool:
        before, self.connected = self.connected, address
        return before is None

    def disconnect(self) -> None:
        self.connected = None
        self.left += 1


@pytest.fixture
def fake_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    """A process that is not connected, where nothing names a cluster."""
    fake = FakeRay()
    for name in ("RAY_ADDRESS", "DCRES_STORE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DCRES_HOME", str(tmp_path))
    monkeypatch.setattr(gateway, "connected_address", lambda: fake.connected)
    monkeypatch.setattr(gateway, "connect", fake.connect)
    monkeypatch.setattr(gateway, "disconnect", fake.disconnect)
    return fake


class TestConnections:
    def test_the_one_that_dcres_made_is_left(self, fake_ray: FakeRay) -> None:
        with dcres.connect("a:1") as cluster:
            assert cluster.address == fake_ray.connected == "a:1"
            with dcres.connect():
                pass
            assert fake_ray.left == 0, "the outer block goes on"
        assert fake_ray.left == 1

    def test_one_that_was_there_before_stays(self, fake_ray: FakeRay) -> None:
        fake_ray.connected = "a:1"
        with dcres.connect() as cluster:
            assert cluster.address == "a:1"
        assert open_catalogue("a:1", None)[1] is False
        assert fake_ray.left == 0

    def test_for_the_catalogue(self, fake_ray: FakeRay) -> None:
        assert open_catalogue("a:1", None)[1] is True

    def test_none_is_made_when_the_store_cannot_be(self, fake_ray: FakeRay) -> None:
        with pytest.raises(ConfigError, match="many stores"):
            dcres.connect("a:1", store="/x/{host}")
        assert fake_ray.connected is None

    def test_an_empty_ray_address_names_none(
        self, fake_ray: FakeRay, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("RAY_ADDRESS", "")
        with pytest.raises(NotFound, match="dcres up"):
            dcres.connect()

    @pytest.mark.parametrize("named", ["argument", "environment"])
    def test_auto_is_what_ray_means_by_it(
        self, named: str, fake_ray: FakeRay, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if named == "environment":
            monkeypatch.setenv("RAY_ADDRESS", "auto")
        monkeypatch.setattr(services, "find_gcs_addresses", lambda: {"127.1.2.3:4"})
        monkeypatch.setattr(services, "find_bootstrap_address", lambda folder: None)
        auto = "auto" if named == "argument" else None
        with dcres.connect(auto) as cluster:
            assert cluster.address == fake_ray.connected == "127.1.2.3:4"
            fake_ray.connected = "a:1"
            assert dcres.connect(auto).address == "a:1", "it is connected already"
            fake_ray.connected = None
        monkeypatch.setattr(services, "find_gcs_addresses", set)
        with pytest.raises(ClusterError, match="no Ray cluster has a node on this machine"):
            dcres.connect(auto)

    @pytest.mark.parametrize("named_by", ["RAY_ADDRESS", "the address"])
    @pytest.mark.parametrize(
        ("address", "words"),
        [
            (
                "http://h:8265",
                "where Ray jobs are submitted; .* h:6379, .*"
                "`ray job submit --address http://h:8265 -- dcres …`",
            ),
            ("https://[fd00::1]/", r"where Ray jobs are submitted; .* \[fd00::1\]:6379"),
            ("HTTP://", "where Ray jobs are submitted; .* HEAD:6379"),
            ("http://[", "where Ray jobs are submitted; .* HEAD:6379"),
            ("ray://h:10001", "an address of Ray Client, which dcres does not support; .* h:6379"),
            ("local", "by which Ray means a new cluster .* `dcres up`"),
            *(
                (each, "which is not the address of a Ray cluster; write host:port")
                for each in (
                    "localhost",
                    "tcp://h:1",
                    "h:²",
                    "h:65536",
                    "h:0",
                    "h:1/",
                    "h:1 ",
                    ":1",
                    "::1:6379",
                    "[::1]",
                    " ",
                    "HEAD",
                )
            ),
        ],
    )
    def test_what_is_no_address(
        self,
        address: str,
        words: str,
        named_by: str,
        fake_ray: FakeRay,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Whoever wrote it, the sentence names that, what it is, and the remedy."""
        given = None if named_by == "RAY_ADDRESS" else address
        if given is None:
            monkeypatch.setenv("RAY_ADDRESS", address)
        sentence = f"^{named_by} is {re.escape(address)}, {words}"
        for find in (dcres.connect, lambda given: open_catalogue(given, None)):
            with pytest.raises(ConfigError, match=sentence):
                find(given)
        assert fake_ray.connected is None
        if given is None:
            with pytest.raises(ConfigError, match=sentence):
                dcres.connect("auto")

    def test_an_empty_one_is_not_the_default(self, fake_ray: FakeRay) -> None:
        """Of `--address "$HEAD"`, say, with no such variable."""
        for connected in (None, "a:1"):
            fake_ray.connected = connected
            with pytest.raises(ConfigError, match="the address is empty; write host:port, or"):
                dcres.connect("")

    @pytest.mark.parametrize("address", ["h:1", "127.1.2.3:6379", "[::1]:65535", "localhost:1"])
    def test_what_is_an_address(self, address: str, fake_ray: FakeRay) -> None:
        with dcres.connect(address) as cluster:
            assert cluster.address == address

    def test_no_local_cluster_beside_it(
        self, fake_ray: FakeRay, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        started: list[object] = []
        monkeypatch.setattr(LocalCluster, "start", lambda *values, **_: started.append(values))
        fake_ray.connected = "a:1"
        with (
            pytest.raises(Conflict, match=r"connected to the cluster at a:1 .* ray\.shutdown\(\)"),
            dcres.local_cluster(),
        ):
            pass
        assert started == []
        assert fake_ray.left == 0

    def test_to_another_cluster(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(connection, "connected_address", lambda: "127.1.2.3:4")
        assert connection.connect("127.1.2.3:4") is False
        for other in ("127.1.2.3:5", "nix"):
            with pytest.raises(Conflict, match=f"close that connection before using {other}"):
                connection.connect(other)

    def test_to_this_machine_by_its_other_name(self, monkeypatch: pytest.MonkeyPatch) -> None:
        here = f"{ray.util.get_node_ip_address()}:4"
        monkeypatch.setattr(connection, "connected_address", lambda: here)
        assert connection.connect("localhost:4") is False


@dataclass
class VmsOnly:
    """A cluster with a coordinator for each of these VMs, which answers with a phase or fails."""

    phases: dict[str, str | Exception]
    asked: list[str] = field(default_factory=list)

    def list_actors(self, prefix: str = "") -> list[str]:
        return [f"dcres/{vm}" for vm in self.phases]

    def find(self, actor: str) -> VmCoordinator | None:
        vm = actor.removeprefix("dcres/")
        return VmCoordinator(self, vm) if vm in self.phases else None


@dataclass
class VmCoordinator(ScriptedPort):
    cluster: VmsOnly
    vm: str

    def answer(self, order: str, *args: Any) -> dict[str, Any]:
        self.cluster.asked.append(self.vm)
        phase = self.cluster.phases[self.vm]
        if isinstance(phase, Exception):
            raise phase
        return {"phase": phase}


class TestFindingVms:
    def vms(self, monkeypatch: pytest.MonkeyPatch, **phases: str | Exception) -> VmsOnly:
        found = VmsOnly(phases)
        monkeypatch.setattr(gateway, "find", found.find)
        monkeypatch.setattr(gateway, "list_actors", found.list_actors)
        return found

    @pytest.mark.parametrize(
        "phase", ["running", "lost", "starting", ClusterError("no answer"), ActorGone("it died")]
    )
    def test_only_its_own_coordinator_is_asked(
        self, phase: str | Exception, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found = self.vms(monkeypatch, box=phase, silent=ClusterError("no answer in 60 s"))
        assert Cluster(A_SESSION).vm("box").name == "box"
        assert found.asked == ["box"]

    @pytest.mark.parametrize(
        ("name", "hint"),
        [
            ("nix", "it has box, cat, gone; see `dcres list`"),
            ("bix", "did you mean box? see `dcres list`"),
            ("gone", "it has box, cat; see `dcres list`"),
        ],
    )
    def test_others_are_named_for_one_that_is_not_there(
        self, name: str, hint: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found = self.vms(monkeypatch, box="running", cat="lost", gone="absent")
        with pytest.raises(NotFound) as caught:
            Cluster(A_SESSION).vm(name)
        assert str(caught.value) == f"there is no VM {name} in the cluster; {hint}"
        assert found.asked == [name] * (name == "gone")

    def test_in_an_empty_cluster(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.vms(monkeypatch)
        for find in (A_SESSION.existing, A_SESSION.require):
            with pytest.raises(NotFound, match="no VM box in the cluster; it has none; see"):
                find("box")


class TestBringingUp:
    """What starts or restores a VM has its coordinator meanwhile; none is left if that fails."""

    @pytest.fixture
    def retired(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        retired: list[str] = []
        monkeypatch.setattr(gateway, "find", lambda name: None)
        monkeypatch.setattr(gateway, "kill", retired.append)
        monkeypatch.setattr(gateway, "ActorPort", lambda name: Retiring(name == "dcres/box"))
        return retired

    def test_one_that_another_caller_spawned_meanwhile(
        self, retired: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def spawn(*args: Any) -> Any:
            raise Conflict("the name is taken")

        monkeypatch.setattr(gateway, "spawn", spawn)
        with Coordinators().bringing_up("box") as port:
            assert isinstance(port, Retiring)
        assert retired == [], "there is a VM now"

    @pytest.mark.parametrize(("vm", "ends"), [("box", ["dcres/box"]), ("busy", [])])
    def test_none_is_left_of_one_that_failed(
        self, vm: str, ends: list[str], retired: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Unless it has something to coordinate after all."""
        monkeypatch.setattr(gateway, "spawn", lambda *_: Retiring(True))
        with pytest.raises(KeyboardInterrupt), Coordinators().bringing_up(vm):
            raise KeyboardInterrupt
        assert retired == ends


@dataclass
class Retiring(ScriptedPort):
    idle: bool

    def answer(self, order: str, *args: Any) -> bool:
        assert order == "retire"
        return self.idle
