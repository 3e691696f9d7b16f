"""Starting, finding, shrinking and ending local clusters: nothing of theirs is left."""

from __future__ import annotations

import signal
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from dcres.actors.ray import awaiting_nodes, gateway, local_node
from dcres.actors.ray.local_cluster import LocalCluster
from dcres.actors.ray.local_node import CLUSTER_MARK, HOST_MARK
from dcres.errors import ClusterError, Conflict, NoRoom, NotFound
from dcres.linux.marks import HOME_MARK
from dcres.linux.process import ProcessId, find_marked, spawn_detached
from tests.support.actors import settings_of_task
from tests.support.cluster import run_folders
from tests.support.wait import until

pytestmark = pytest.mark.cluster


def marks(cluster: LocalCluster, host: str) -> dict[str, str]:
    return {CLUSTER_MARK: cluster.id, HOST_MARK: host}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """A cluster of one host that these tests may treat badly, beside the shared one."""
    with LocalCluster.start(tmp_path_factory.mktemp("small"), 1, 64 << 20) as running:
        yield running


class TestRunning:
    def test_it_is_found_by_its_home(self, cluster: LocalCluster) -> None:
        again = LocalCluster.load(cluster.home)
        assert (again.id, again.address, again.hosts) == (
            cluster.id,
            cluster.address,
            cluster.hosts,
        )

    def test_a_second_one_in_the_same_home(self, cluster: LocalCluster) -> None:
        with pytest.raises(Conflict, match="`dcres down` ends it"):
            LocalCluster.start(cluster.home, 1)

    def test_its_secrets_are_private(self, cluster: LocalCluster) -> None:
        for file in (cluster.token_path, cluster.home / "cluster.json"):
            assert stat.S_IMODE(file.stat().st_mode) == 0o600
        for folder in run_folders(cluster):
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700

    def test_every_host_has_settings_and_folders_of_its_own(self, cluster: LocalCluster) -> None:
        all_settings = [cluster.settings(name) for name in (*cluster.hosts, "head")]
        for field in ("name", "run", "ram", "address"):
            assert len({getattr(settings, field) for settings in all_settings}) == 4
        assert len({settings.store for settings in all_settings}) == 1
        for settings in all_settings:
            assert settings.run.is_dir()
            assert stat.S_IMODE(settings.ram.stat().st_mode) == 0o700

    def test_what_runs_on_a_host_finds_its_settings(self, cluster: LocalCluster) -> None:
        for name in cluster.hosts:
            assert gateway.run_on(name, settings_of_task) == cluster.settings(name)

    def test_an_unknown_host(self, cluster: LocalCluster) -> None:
        with pytest.raises(NotFound, match="no host h99 in this cluster"):
            cluster.kill_host("h99")


class TestLosing:
    def test_a_lost_host_leaves_nothing_and_disturbs_nobody(
        self, small: LocalCluster, cluster: LocalCluster, tmp_path: Path
    ) -> None:
        (lost,) = small.hosts
        settings = small.settings(lost)
        (settings.ram / "guest").write_bytes(bytes(4096))
        environ = {"PATH": "/usr/bin:/bin", **marks(small, lost)}
        vm_process = spawn_detached(["sleep", "600"], log=tmp_path / "log", env=environ)
        others = local_node.marked(marks(cluster, "h0")) | local_node.marked(marks(small, "head"))
        small.kill_host(lost)
        assert not vm_process.alive
        assert not local_node.marked(marks(small, lost))
        assert not settings.ram.exists()
        assert not settings.run.exists()
        assert all(process.alive for process in others)
        added = small.add_host()
        assert added != lost, "a name is never used twice"
        assert LocalCluster.load(small.home).hosts == (added,)
        assert small.settings(added).ram.is_dir()

    def test_rays_processes_go_with_their_host(self, small: LocalCluster) -> None:
        name = small.add_host()
        (leader,) = (p for p in local_node.marked(marks(small, name)) if _leads_a_session(p))
        members = local_node._in_sessions({leader.pid})
        assert len(members) > 3, "ray start, raylet and agents"
        small.kill_host(name)
        assert not any(process.alive for process in members)

    def test_stopping_leaves_only_the_store(self, tmp_path: Path) -> None:
        running = LocalCluster.start(tmp_path / "home", 0, store=tmp_path / "store")
        (tmp_path / "store" / "checkpoint").touch()
        assert len(run_folders(running)) == 2
        running.stop()
        running.stop()
        assert not find_marked(CLUSTER_MARK, running.id)
        assert run_folders(running) == []
        assert [path.name for path in (tmp_path / "home").iterdir()] == [HOME_MARK]
        assert (tmp_path / "store" / "checkpoint").exists()
        with pytest.raises(NotFound, match="start one with `dcres up`"):
            LocalCluster.load(tmp_path / "home")


def meddle_with(
    program: str, monkeypatch: pytest.MonkeyPatch, meddle: Callable[[ProcessId], object]
) -> None:
    """Call `meddle` with that program of every node that is launched, as soon as it runs."""
    launch = local_node.LocalNode.launch

    def launched(node: local_node.LocalNode, locks: Sequence[int]) -> ProcessId:
        leader = launch(node, locks)

        def found() -> list[ProcessId]:
            members = local_node._in_sessions({leader.pid})
            return [
                each for each in members if program in [Path(word).name for word in each.argv[:3]]
            ]

        def look() -> None:
            until(found, what=program)
            meddle(found()[0])

        threading.Thread(target=look).start()
        return leader

    monkeypatch.setattr(local_node.LocalNode, "launch", launched)


class TestWaiting:
    def test_a_node_that_takes_long_is_waited_for_aloud(
        self,
        small: LocalCluster,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        monkeypatch.setattr(awaiting_nodes, "_TELL_S", 1.0)
        name = f"h{small._nodes.state.next_host}"

        def hold_up(raylet: ProcessId) -> None:
            raylet.kill(signal.SIGSTOP)
            try:
                until(lambda: f"waiting for Ray's node {name}, " in caplog.text, what="a word")
            finally:
                raylet.kill(signal.SIGCONT)

        meddle_with("raylet", monkeypatch, hold_up)
        assert small.add_host() == name

    def test_a_node_does_not_wait_for_its_agent(
        self, small: LocalCluster, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its raylet would end after 30 s without a word of it."""
        agents: list[ProcessId] = []

        def hold_up(agent: ProcessId) -> None:
            assert agent.kill(signal.SIGSTOP)
            agents.append(agent)

        meddle_with("agent.py", monkeypatch, hold_up)
        try:
            name = small.add_host()
        finally:
            for agent in agents:
                agent.kill(signal.SIGCONT)
        assert len(agents) == 1
        small.kill_host(name)


class TestFailing:
    def test_a_node_that_does_not_start_says_why_and_leaves_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(local_node, "_OBJECT_STORE_BYTES", -1)
        ids = []
        launch = local_node.LocalNode.launch

        def remembered(node: local_node.LocalNode, locks: Sequence[int]) -> ProcessId:
            ids.append(node.cluster)
            return launch(node, locks)

        monkeypatch.setattr(local_node.LocalNode, "launch", remembered)
        with pytest.raises(
            ClusterError, match="node head ended while it was starting: ValueError: "
        ):
            LocalCluster.start(tmp_path, 1)
        assert not find_marked(CLUSTER_MARK, ids[0])
        assert {path.name for path in tmp_path.iterdir()} == {HOME_MARK, "store"}

    def test_hosts_that_do_not_start_are_none(
        self, small: LocalCluster, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before, first = small.hosts, small._nodes.state.next_host
        monkeypatch.setattr(local_node, "_OBJECT_STORE_BYTES", -1)
        with pytest.raises(ClusterError, match="ended while it was starting: ValueError: "):
            small.add_hosts(2)
        assert small.hosts == before
        for number in (first, first + 1):
            assert not local_node.marked(marks(small, f"h{number}"))
            assert not list(small.home.glob(f"hosts/h{number}/run"))

    def test_a_raylet_that_dies_at_once(
        self, small: LocalCluster, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of which `ray start` takes no notice before the node is ready."""
        before = small.hosts
        meddle_with("raylet", monkeypatch, lambda raylet: raylet.kill())
        with pytest.raises(ClusterError, match=r"node h\d+ ended while it was starting: "):
            small.add_host()
        assert small.hosts == before

    def test_hosts_larger_than_the_machine(self, tmp_path: Path) -> None:
        with pytest.raises(NoRoom, match="3 hosts of 1 TiB do not fit into /dev/shm"):
            LocalCluster.start(tmp_path, 3, 1 << 40)
        assert list(tmp_path.iterdir()) == []


def _leads_a_session(process: ProcessId) -> bool:
    return local_node._session(process.pid) == process.pid
