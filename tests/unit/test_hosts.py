"""Where the hosts of benchmarks are, and how a command gets there."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from dcres.actors.ray.local_home import HOST_FIELD
from dcres.bench.hosts import Hosts
from dcres.linux.cgroup import DiskGroup


@pytest.fixture
def hosts(tmp_path: Path) -> Hosts:
    groups = {name: DiskGroup(tmp_path / f"dcres-abc-{name}", 2, "8:0") for name in ("h0", "h1")}
    return Hosts(tmp_path, "abc", "198.18.7", groups)


def test_a_cluster_finds_every_host_by_its_name(hosts: Hosts) -> None:
    assert hosts.places.network == "198.18.7"
    words = [word for word in hosts.places.launcher if HOST_FIELD in word]
    assert words == [
        f"{hosts.folder}/dcres-abc-{HOST_FIELD}/cgroup.procs",
        f"--net=/run/netns/dcres-abc-{HOST_FIELD}",
    ]


def test_a_command_on_one_host(hosts: Hosts) -> None:
    argv = hosts.argv("h1", "dd", "of=a file")
    assert str(hosts.groups["h1"].entrance) in argv
    assert "--net=/run/netns/dcres-abc-h1" in argv
    assert argv[-2:] == ["dd", "of=a file"]


def test_addresses_are_those_of_the_cluster(hosts: Hosts) -> None:
    place = hosts.place("h1")
    assert (place.address, place.namespace) == ("198.18.7.11", "dcres-abc-h1")


def test_a_limit_is_every_host_s_own(hosts: Hosts) -> None:
    for group in hosts.groups.values():
        group.folder.mkdir()
    hosts.limit(200)
    for group in hosts.groups.values():
        assert (group.folder / "io.max").read_text() == "8:0 rbps=200000000 wbps=200000000"


def test_the_group_is_entered_before_the_command_runs(hosts: Hosts) -> None:
    """The launcher's first step, with a file for the group and no namespace."""
    group = hosts.groups["h0"]
    group.folder.mkdir()
    argv = hosts.argv("h0", "echo", "a  b")
    enter_group = argv[: argv.index("nsenter")]
    said = subprocess.check_output([*enter_group, "echo", "a  b"], text=True)
    assert said == "a  b\n"
    assert group.entrance.read_text() == "0\n", "0 stands for whoever writes it"
