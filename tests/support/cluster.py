"""A local cluster for the tests of a module that need one, and what is left behind by a test."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from dcres.actors.ray import gateway
from dcres.actors.ray.local_cluster import LocalCluster

HOSTS = 3


# Not for the whole session: a cluster that nobody uses costs a tenth of a core, for minutes, and to
# start one nine seconds of one.
@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """Three hosts, and this process connected to them; whoever loses one adds one."""
    with LocalCluster.start(tmp_path_factory.mktemp("cluster"), HOSTS) as running:
        gateway.connect(running.address, running.token_path)
        yield running
        gateway.disconnect()


@pytest.fixture
def unique(cluster: LocalCluster) -> Iterator[str]:
    """A name for the test's reservation, and the beginning of its actors' names."""
    name = f"test-{secrets.token_hex(3)}"
    yield name
    gateway.release(name)
    for actor in gateway.list_actors(name):
        gateway.kill(actor)


def run_folders(cluster: LocalCluster) -> list[Path]:
    """Every folder that a cluster makes outside its home."""
    places = (Path("/tmp"), Path("/dev/shm"))
    return [folder for place in places for folder in place.glob(f"*{cluster.id}*")]
