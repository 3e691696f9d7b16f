"""The gateway on a real Ray: placement, calls, errors, and what survives which death."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest
import ray

from dcres.actors.ray import gateway
from dcres.actors.ray.gateway import ActorPort, Pending, looking
from dcres.actors.ray.local_cluster import LocalCluster
from dcres.errors import ActorGone, ClusterError, Conflict, DcresError, NoRoom, NotFound
from tests.support.actors import (
    Probe,
    counting,
    for_ever,
    host_and_pid,
    host_of_task,
    task_that_fails,
)
from tests.support.cli import Cli, ended
from tests.support.errors import ALL_ERRORS, example
from tests.support.speed import patience
from tests.support.wait import until

pytestmark = pytest.mark.cluster
MIB = 1 << 20
READY_S = patience(20)


def start(name: str, *args: object, bundle: int | None = None) -> ActorPort:
    """A `Probe` that answers: on a bundle of the reservation that its name begins with."""
    place = None if bundle is None else gateway.reservation(name.partition(":")[0])
    port = gateway.spawn(Probe, name, args, reservation=place, bundle=bundle or 0)
    port.wait_ready(READY_S)
    return port


@pytest.fixture
def probe(unique: str) -> ActorPort:
    return start(f"{unique}:probe", 3)


@pytest.fixture(scope="module")
def raiser(cluster: LocalCluster) -> Iterator[ActorPort]:
    """One actor for the many tests that only want an error from it."""
    yield start("test-raiser")
    gateway.kill("test-raiser")


LIST = ("-c", "import sys; from dcres.cli import main; sys.exit(main())", "list", "--address")


class TestConnecting:
    """A cluster that cannot be joined from here is refused with one sentence and no stack."""

    @pytest.mark.parametrize("token", ["a wrong token", None])
    def test_a_token_that_is_not_the_clusters(
        self, token: str | None, cluster: LocalCluster, tmp_path: Path
    ) -> None:
        path = tmp_path / "token"
        path.write_text(token or "")
        mode = "disabled" if token is None else "token"
        cli = Cli.at(tmp_path, RAY_AUTH_MODE=mode, RAY_AUTH_TOKEN_PATH=str(path))
        ran = cli.run("list", "--address", cluster.address)
        words = f"the Ray cluster at {cluster.address} does not accept our token; set RAY_AUTH_MODE"
        assert (ran.status, ran.out) == (1, "")
        assert ran.err.startswith(f"error: {words}")
        assert ran.err.count("\n") == 1

    @pytest.mark.parametrize("place", ["elsewhere", "in another container"])
    def test_from_where_no_node_can_be_reached(
        self, place: str, cluster: LocalCluster, tmp_path: Path
    ) -> None:
        """Its processes are not to be seen, as on another machine; or its files are not."""
        temp = f"/tmp/dcres-{cluster.id}"
        if place == "elsewhere":
            begin = ["unshare", "--pid", "--fork", "--mount-proc"]
            words = "no node of the Ray cluster at {} runs on this machine"
        else:
            hide = 'mount -t tmpfs none "$0" && exec "$@"'
            begin = ["unshare", "--mount", "sh", "-c", hide, temp]
            words = (
                f"the node of the Ray cluster at {{}} on this machine cannot be reached at {temp}/"
            )
        environ = {"DCRES_HOME": str(tmp_path), "RAY_AUTH_TOKEN_PATH": str(cluster.token_path)}
        ran = subprocess.run(
            [*begin, sys.executable, *LIST, cluster.address],
            env={**os.environ, **environ, "RAY_AUTH_MODE": "token"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert (ran.returncode, ran.stdout) == (1, "")
        assert ran.stderr.startswith(f"error: {words.format(cluster.address)}")
        host = cluster.address.partition(":")[0]
        assert f"run it on a node, `ssh {host} dcres --address {cluster.address} …`" in ran.stderr
        assert ran.stderr.count("\n") == 1

    def test_with_another_ray(self, cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
        looking.require_joinable(cluster.address)
        theirs = ray.__version__
        monkeypatch.setattr(ray, "__version__", "2.0.0")
        words = f"runs Ray {theirs} on Python .*, and this is Ray 2.0.0 on Python .*; install dcres"
        with pytest.raises(ClusterError, match=words):
            looking.require_joinable(cluster.address)

    def test_again_is_harmless(self, cluster: LocalCluster) -> None:
        gateway.connect(cluster.address, cluster.token_path)
        assert gateway.hosts()

    def test_raylet_messages_stay_off_standard_output(
        self, unique: str, capfd: pytest.CaptureFixture[str]
    ) -> None:
        port = start(f"{unique}:a")
        os.kill(port.pid(), signal.SIGKILL)
        with pytest.raises(ActorGone):
            port.within(patience(20)).call(Probe.hold, patience(30))
        port.wait_ready(READY_S)
        assert capfd.readouterr().out == ""


class TestDrivers:
    def test_one_that_is_killed_is_gone(self, cluster: LocalCluster, tmp_path: Path) -> None:
        """And one that is there is not, as this process is."""
        program = (
            "import os, sys; from dcres.actors.ray import gateway; gateway.connect(sys.argv[1])\n"
            "print(gateway.own_driver(), flush=True); os.kill(os.getpid(), 9)"
        )
        token = str(cluster.token_path)
        cli = Cli.at(tmp_path, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=token)
        driver = ended(cli.start_python(program, cluster.address)).out.strip()
        until(lambda: gateway.driver_is_gone(driver), 30, "Ray knows that it is gone")
        assert (ours := gateway.own_driver()) is not None
        assert not gateway.driver_is_gone(ours)

    def test_a_worker_is_none(self, cluster: LocalCluster) -> None:
        assert gateway.run_on(cluster.hosts[0], gateway.own_driver) is None
        assert gateway.run_apart(cluster.hosts[0], gateway.own_driver, timeout_s=60) is None


class TestHosts:
    def test_they_are_those_of_the_cluster(self, cluster: LocalCluster) -> None:
        found = {host.name: host for host in gateway.hosts() if host.alive}
        assert set(found) == set(cluster.hosts)
        for name, host in found.items():
            assert host.memory_total_bytes == cluster.memory_per_host
            assert host.memory_free_bytes == host.memory_total_bytes
            assert host.address == cluster.settings(name).address

    def test_a_function_runs_where_it_should(self, cluster: LocalCluster) -> None:
        for name in cluster.hosts:
            assert gateway.run_on(name, host_of_task) == name

    def test_the_cluster_has_one_name_everywhere(self, cluster: LocalCluster) -> None:
        """Other than that of any other cluster: what says whose a VM is (`Fleet.cluster`)."""
        here = gateway.cluster_id()
        assert len(here) == 56
        assert {gateway.run_on(name, gateway.cluster_id) for name in cluster.hosts} == {here}

    def test_one_process_of_a_host_answers_all_and_is_replaced(self, cluster: LocalCluster) -> None:
        name = cluster.hosts[1]
        runner = gateway.run_on(name, os.getpid)
        assert gateway.run_on(name, os.getpid) == runner
        os.kill(runner, signal.SIGKILL)
        until(lambda: gone(name), 30, "Ray knows that it is gone")
        assert gateway.run_on(name, os.getpid) != runner

    def test_what_takes_long_is_a_process_of_its_own(self, cluster: LocalCluster) -> None:
        name = cluster.hosts[1]
        apart = gateway.run_apart(name, host_and_pid, timeout_s=patience(30))
        assert apart[0] == name
        assert apart[1] != gateway.run_on(name, os.getpid)

    def test_a_generator_is_heard_as_it_goes_on(self, cluster: LocalCluster) -> None:
        name = cluster.hosts[1]
        stream = gateway.stream_apart(name, counting, 3, NoRoom, timeout_s=patience(30))
        assert [next(stream) for _ in range(3)] == [(name, number) for number in range(3)]
        with pytest.raises(NoRoom):
            next(stream)
        whole = gateway.stream_apart(name, counting, 2, None, timeout_s=patience(30))
        assert list(whole) == [(name, 0), (name, 1)]

    @pytest.mark.alone
    def test_a_generator_is_interrupted(self, cluster: LocalCluster, tmp_path: Path) -> None:
        """Though it yields nothing, and while another thread waits for it.

        By itself: where many other tests had run before, Ray's cancel has had no effect.
        """
        started, over = tmp_path / "started", tmp_path / "over"
        stream = gateway.stream_apart(
            cluster.hosts[0], for_ever, started, over, timeout_s=patience(60)
        )
        assert next(stream) == 1
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(next, stream)
            for _ in range(10):  # one that comes between two values is lost
                stream.cancel()
                if wait([waiting], timeout=patience(3)).done:
                    break
            assert over.exists()
            assert isinstance(waiting.exception(patience(30)), ClusterError)

    def test_a_functions_error_comes_back(self, cluster: LocalCluster) -> None:
        with pytest.raises(NoRoom):
            gateway.run_on(cluster.hosts[0], task_that_fails, NoRoom)

    def test_an_unknown_host(self, cluster: LocalCluster) -> None:
        with pytest.raises(NotFound, match=f"no host h99 .*{cluster.hosts[0]}"):
            gateway.run_on("h99", host_of_task)


def gone(host: str) -> bool:
    """Whether the host's runner is."""
    node_id = next(each.node_id for each in gateway.hosts() if each.name == host)
    return gateway.find(f"dcres-runner/{node_id}") is None


class TestReservations:
    def test_every_share_has_a_host_of_its_own(self, cluster: LocalCluster, unique: str) -> None:
        shares = [64 * MIB, 32 * MIB, 4096]
        reservation = gateway.reserve(unique, shares)
        assert len(set(reservation.hosts)) == 3
        free = {host.name: host.memory_free_bytes for host in gateway.hosts()}
        for share, host in zip([64 * MIB, 32 * MIB, MIB], reservation.hosts, strict=True):
            assert free[host] == cluster.memory_per_host - share

    def test_prescribed_hosts(self, cluster: LocalCluster, unique: str) -> None:
        wanted = list(reversed(cluster.hosts))
        assert gateway.reserve(unique, [MIB] * len(wanted), wanted).hosts == tuple(wanted)

    def test_it_is_found_again_and_released(self, unique: str) -> None:
        reservation = gateway.reserve(unique, [MIB])
        assert gateway.reservation(unique) == reservation
        assert pickle.loads(pickle.dumps(reservation)) == reservation
        gateway.release(unique)
        assert gateway.reservation(unique) is None
        gateway.release(unique)

    def test_the_name_is_taken(self, unique: str) -> None:
        gateway.reserve(unique, [MIB])
        with pytest.raises(Conflict, match=unique):
            gateway.reserve(unique, [MIB])

    def test_no_room_for_a_share(self, cluster: LocalCluster, unique: str) -> None:
        with pytest.raises(NoRoom, match=r"a share of 1 TiB fits no host .*h0 has"):
            gateway.reserve(unique, [MIB, 1 << 40])
        with pytest.raises(NoRoom, match="does not fit host h0: h0 has"):
            gateway.reserve(unique, [1 << 40], ["h0"])
        assert gateway.reservation(unique) is None

    def test_too_few_hosts(self, cluster: LocalCluster, unique: str) -> None:
        count = len(cluster.hosts) + 1
        with pytest.raises(NoRoom, match=f"{count} hosts are needed"):
            gateway.reserve(unique, [MIB] * count)

    def test_a_released_reservation_takes_its_actors_along(self, unique: str) -> None:
        gateway.reserve(unique, [MIB, MIB])
        ports = [start(f"{unique}:{bundle}", bundle=bundle) for bundle in (0, 1)]
        gateway.release(unique)
        assert gateway.list_actors(unique) == []
        with pytest.raises(ActorGone):
            ports[0].call(Probe.get)


class TestActors:
    def test_it_runs_on_the_host_of_its_bundle(self, unique: str) -> None:
        reservation = gateway.reserve(unique, [MIB, MIB])
        for bundle in (0, 1):
            port = start(f"{unique}:{bundle}", bundle=bundle)
            assert port.call(Probe.host) == reservation.host_of(bundle)

    def test_without_a_reservation_it_runs_on_the_head(self, probe: ActorPort) -> None:
        assert probe.call(Probe.host) == "head"

    def test_it_knows_its_name_and_address(self, cluster: LocalCluster, probe: ActorPort) -> None:
        assert probe.call(Probe.where) == (probe.name, cluster.settings("head").address)

    def test_the_name_is_taken(self, probe: ActorPort) -> None:
        with pytest.raises(Conflict, match=probe.name):
            gateway.spawn(Probe, probe.name)

    def test_finding_listing_killing(self, unique: str, probe: ActorPort) -> None:
        assert gateway.find(probe.name) == probe
        assert gateway.list_actors(unique) == [probe.name]
        assert gateway.find(unique) is None
        gateway.kill(probe.name)
        assert gateway.find(probe.name) is None
        gateway.kill(probe.name)
        start(probe.name, 4)
        assert probe.call(Probe.get) == 4

    def test_a_constructors_error_comes_back(self, unique: str) -> None:
        port = gateway.spawn(Probe, f"{unique}:a", (None, "the constructor failed"))
        with pytest.raises(DcresError, match="the constructor failed"):
            port.wait_ready(READY_S)

    def test_actors_call_and_spawn_each_other(self, unique: str, probe: ActorPort) -> None:
        reservation = gateway.reserve(unique, [MIB])
        nested = probe.call(Probe.spawn, f"{unique}:nested", reservation, 0)
        nested.wait_ready(READY_S)
        assert probe.call(Probe.ask, nested, Probe.get) == "nested"
        assert probe.call(Probe.ask, nested, Probe.host) == reservation.host_of(0)

    def test_calls_run_side_by_side(self, probe: ActorPort) -> None:
        under_way = [probe.submit(Probe.hold, 60) for _ in range(8)]
        assert probe.within(patience(5)).call(Probe.get) == 3
        gateway.kill(probe.name)
        with pytest.raises(ActorGone):
            under_way[0].result(patience(10))


class TestErrors:
    @pytest.mark.parametrize("cls", ALL_ERRORS, ids=lambda cls: cls.__name__)
    def test_an_error_of_dcres_comes_back_as_itself(
        self, raiser: ActorPort, cls: type[DcresError]
    ) -> None:
        with pytest.raises(cls) as raised:
            raiser.call(Probe.fail, cls)
        assert type(raised.value) is cls
        assert raised.value.args == example(cls).args
        assert str(raised.value) == str(example(cls))

    def test_another_exception_keeps_its_traceback(self, raiser: ActorPort) -> None:
        with pytest.raises(
            ClusterError, match=r"test-raiser\.break_down failed: KeyError"
        ) as raised:
            raiser.call(Probe.break_down)
        assert "in break_down" in str(raised.value.__cause__)

    def test_no_answer_in_time(self, raiser: ActorPort) -> None:
        with pytest.raises(ClusterError, match=r"test-raiser\.hold did not answer within 0.1 s"):
            raiser.within(0.1).call(Probe.hold, 1)

    def test_no_such_actor(self, cluster: LocalCluster) -> None:
        with pytest.raises(ActorGone, match="there is no actor test-nobody"):
            ActorPort("test-nobody").call(Probe.get)
        with pytest.raises(ActorGone):
            ActorPort("test-nobody").wait_ready(patience(5))

    def test_gathering_keeps_results_and_failures_apart(self, raiser: ActorPort) -> None:
        pendings: dict[str, Pending[object]] = {
            "good": raiser.submit(Probe.get),
            "bad": raiser.submit(Probe.fail, NoRoom),
            "late": raiser.submit(Probe.hold, 1),
        }
        results, failures = gateway.gather(pendings, timeout_s=0.5)
        assert results == {"good": None}
        assert {name: type(error) for name, error in failures.items()} == {
            "bad": NoRoom,
            "late": ClusterError,
        }


class TestSpares:
    def test_the_next_actor_takes_a_process_that_is_there(self, unique: str) -> None:
        taken = 0
        for at in range(8):
            before = set(os.listdir("/proc"))
            taken += str(start(f"{unique}:{at}").pid()) in before
            if taken == 2:  # Ray may have started one by itself for the cluster's first driver
                return
            time.sleep(1)
        pytest.fail("no actor found a process waiting for it")

    def test_it_has_imported_what_actors_need(self, unique: str) -> None:
        assert start(f"{unique}:a").call(Probe.has_imported, "dcres.actors.host.agent")


class TestDeaths:
    def test_a_killed_worker_is_started_again(self, probe: ActorPort) -> None:
        probe.call(Probe.set, 99)
        before = probe.pid()
        under_way = probe.submit(Probe.hold, 60)
        probe.call(Probe.get)
        os.kill(before, signal.SIGKILL)
        with pytest.raises(ActorGone):
            under_way.result(patience(10))
        probe.wait_ready(READY_S)
        assert probe.pid() != before
        assert probe.call(Probe.get) == 3, "the constructor ran again, with its first arguments"

    def test_a_detached_process_outlives_worker_and_actor(
        self, unique: str, tmp_path: Path
    ) -> None:
        gateway.reserve(unique, [MIB])
        port = start(f"{unique}:a", bundle=0)
        process = port.call(Probe.start_process, tmp_path / "log")
        try:
            os.kill(port.pid(), signal.SIGKILL)
            until(lambda: _answers(port), READY_S, "the actor to answer again")
            assert process.alive
            gateway.kill(port.name)
            gateway.release(unique)
            assert process.alive
        finally:
            process.kill()

    def test_a_lost_host_is_noticed_and_replaced(
        self, cluster: LocalCluster, unique: str, tmp_path: Path
    ) -> None:
        lost = cluster.add_host()
        gateway.reserve(unique, [MIB], [lost])
        port = start(f"{unique}:a", bundle=0)
        process = port.call(Probe.start_process, tmp_path / "log")
        under_way = port.submit(Probe.hold, 60)
        cluster.kill_host(lost)
        assert not process.alive
        with pytest.raises(ActorGone):
            under_way.result(patience(10))
        until(lambda: lost not in _alive(), 10, "Ray to notice the loss of a host")
        with pytest.raises(NotFound, match="no live host has part 0"):
            until(lambda: gateway.Reservation(unique).host_of(0) != lost, 5)
        gateway.release(unique)
        assert gateway.list_actors(unique) == []
        with pytest.raises(NotFound):
            gateway.reserve(unique, [MIB], [lost])


def _answers(port: ActorPort) -> bool:
    try:
        port.within(patience(5)).call(Probe.get)
    except ActorGone:
        return False
    return True


def _alive() -> set[str]:
    return {host.name for host in gateway.hosts() if host.alive}
