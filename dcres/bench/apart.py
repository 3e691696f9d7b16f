"""Hosts of this machine that share no store, so that what a restore needs has to be moved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dcres.actors.control.coordinator import Coordinator
from dcres.actors.ports import Port
from dcres.actors.ray import gateway
from dcres.actors.ray.coordinator import RayCoordinator
from dcres.actors.ray.fleet import coordinator_name
from dcres.actors.ray.local_cluster import LocalCluster
from dcres.actors.ray.local_home import HOST_FIELD
from dcres.actors.ray.local_node import Places
from dcres.bench.rig import wait_for
from dcres.errors import VmError
from dcres.storage.format.manifest import Manifest
from dcres.storage.store.store import Store

FILL_TIMEOUT_S = 600.0
_READY_TIMEOUT_S = 60.0


@contextmanager
def apart(
    folder: Path, hosts: int, memory_per_host: int, places: Places | None = None
) -> Iterator[LocalCluster]:
    """Such a cluster, and this process connected to it."""
    store = folder / "stores" / HOST_FIELD
    with LocalCluster.start(folder, hosts, memory_per_host, store, places=places) as cluster:
        gateway.connect(cluster.address, cluster.token_path)
        try:
            yield cluster
        finally:
            gateway.disconnect()


def store_of(cluster: LocalCluster, host: str) -> Store:
    """What `host` has."""
    return Store(cluster.settings(host).store)


def folder_of(cluster: LocalCluster, manifest: Manifest, host: str) -> Path:
    """The files that `host` saved, in its own store."""
    return store_of(cluster, host).root / manifest.vm / manifest.checkpoint / host


def delete(cluster: LocalCluster, manifest: Manifest) -> None:
    """Remove a checkpoint from all stores."""
    for part in manifest.hosts[1:]:
        store_of(cluster, part.host).discard(manifest.vm, manifest.checkpoint)
    store_of(cluster, manifest.main.host).delete(manifest.checkpoint)


@contextmanager
def coordinator(vm: str) -> Iterator[Port]:
    """The coordinator of a VM that does not run yet; the VM ends with it."""
    port: Port = gateway.spawn(RayCoordinator, coordinator_name(vm), (vm,))
    try:
        port.wait_ready(_READY_TIMEOUT_S)
        yield port
        port.call(Coordinator.stop)
    finally:
        gateway.kill(coordinator_name(vm))


def await_word(console: Path, word: str) -> None:
    """Wait until the guest of `filler.c` says `word`. Raises VmError when it cannot go on."""

    def said() -> bool:
        text = console.read_text(errors="replace") if console.exists() else ""
        if "FILL FAILED" in text or "panic" in text:
            raise VmError(f"the guest could not fill its memory: {text.strip()[-200:]}")
        return word in text

    wait_for(said, FILL_TIMEOUT_S, f"the guest says {word}")
