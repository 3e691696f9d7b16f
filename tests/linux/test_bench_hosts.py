"""Hosts with links and disks of their own: as slow as they should be, and gone afterwards."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from dcres.actors.ray.local_cluster import LocalCluster
from dcres.actors.ray.local_node import CLUSTER_MARK, HOST_MARK, marked
from dcres.bench.hosts import Hosts, slow_hosts
from dcres.errors import UnsupportedHost
from dcres.linux.cgroup import ROOT, disk_under
from tests.support.speed import patience
from tests.support.wait import until

pytestmark = pytest.mark.linux

SLOW_MB_PER_S = 60

if shutil.which("tc") is None:
    pytest.skip("needs iproute2", allow_module_level=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    try:
        disk_under(tmp_path)
    except UnsupportedHost as error:
        pytest.skip(str(error))
    return tmp_path


@pytest.fixture
def hosts(folder: Path) -> Iterator[Hosts]:
    with slow_hosts(folder, 2) as made:
        yield made
    assert traces(made) == []


def traces(hosts: Hosts) -> list[str]:
    """What is left of it on this machine."""
    links = [name for _, name in socket.if_nameindex()]
    namespaces = [path.name for path in Path("/run/netns").glob("*")]
    groups = [path.name for path in ROOT.glob("**/dcres-*")]
    return [name for name in (*links, *namespaces, *groups) if hosts.token in name]


def sleeper(hosts: Hosts, host: str) -> subprocess.Popen[bytes]:
    """A process on `host`."""
    process = subprocess.Popen(hosts.argv(host, "sleep", "1000"))
    inside = hosts.groups[host].entrance
    until(lambda: str(process.pid) in inside.read_text().split(), what="it is there")
    return process


def test_disks_and_links_are_as_slow_as_they_should_be(hosts: Hosts) -> None:
    hosts.limit(SLOW_MB_PER_S)
    disk, link = hosts.rates(0)
    assert (disk.what, link.what) == ("disk_of_a_host", "link")
    # The kernel lets the first slices pass.
    assert 0 < disk.value < SLOW_MB_PER_S * 1.15
    assert 0 < link.value < 126
    hosts.limit(None)
    assert hosts.rates(0)[0].value > disk.value * 1.3


def test_all_of_it_is_gone_after_an_error(folder: Path) -> None:
    seen: list[tuple[Hosts, subprocess.Popen[bytes]]] = []
    with pytest.raises(KeyboardInterrupt):
        interrupted(folder, seen)
    (hosts, left) = seen[0]
    assert traces(hosts) == []
    assert left.wait(patience(10)) == -signal.SIGKILL


def interrupted(folder: Path, seen: list[tuple[Hosts, subprocess.Popen[bytes]]]) -> None:
    with slow_hosts(folder, 2) as hosts:
        assert len(traces(hosts)) >= 6, "two groups, three namespaces, a link"
        seen.append((hosts, sleeper(hosts, "h1")))
        raise KeyboardInterrupt


def test_a_program_runs_on_its_host(hosts: Hosts) -> None:
    said = subprocess.check_output([hosts.program("h1", "ip"), "-br", "address"], text=True)
    assert f"{hosts.place('h1').address}/24" in said


@pytest.mark.cluster
def test_a_cluster_on_it(hosts: Hosts, folder: Path) -> None:
    """Every process of a host is in the host's namespace and group, and the head in neither."""
    with LocalCluster.start(folder / "c", 0, 64 << 20, places=hosts.places) as cluster:
        # Added by whoever finds the cluster: its places are in its state.
        assert LocalCluster.load(cluster.home).add_host() == "h0"
        cluster = LocalCluster.load(cluster.home)
        assert cluster.settings("h0").address == hosts.place("h0").address
        inside = {process.pid for process in marked(marks(cluster, "h0"))}
        assert len(inside) >= 2, "ray start and the raylet"
        assert inside <= set(map(int, hosts.groups["h0"].entrance.read_text().split()))
        assert network_of("self") not in {network_of(str(pid)) for pid in inside}
        for process in marked(marks(cluster, "head")):
            assert network_of(str(process.pid)) == network_of("self")
    until(lambda: not hosts.groups["h0"].entrance.read_text(), 30, "what was killed is gone")


def marks(cluster: LocalCluster, host: str) -> dict[str, str]:
    return {CLUSTER_MARK: cluster.id, HOST_MARK: host}


def network_of(pid: str) -> str:
    return str(Path(f"/proc/{pid}/ns/net").readlink())
