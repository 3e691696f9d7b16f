"""Hosts of this machine that share no store, so that what a restore needs has to be moved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dcres.actors import _ray
from dcres.actors.coordinator import Coordinator
from dcres.actors.fleet import coordinator_name
from dcres.actors.local_cluster import HOST_FIELD, LocalCluster
from dcres.actors.ports import Port
from dcres.bench.rig import wait_for
from dcres.errors import VmError
from dcres.storage.manifest import Manifest
from dcres.storage.store import Store

FILL_TIMEOUT_S = 600.0
_READY_TIMEOUT_S = 60.0


class ApartCluster(LocalCluster):
    """A local cluster in which every host has a store of its own, and how to look at them."""

    def store_of(self, host: str) -> Store:
        """What `host` has."""
        return Store(self.settings(host).store)

    def delete(self, manifest: Manifest) -> None:
        """Remove a checkpoint from all stores."""
        for part in manifest.hosts[1:]:
            self.store_of(part.host).discard(manifest.vm, manifest.checkpoint)
        self.store_of(manifest.main.host).delete(manifest.checkpoint)

    def memory_file(self, manifest: Manifest, host: str) -> Path:
        """What `host` saved, in its own store."""
        part = next(each for each in manifest.hosts if each.host == host)
        return (
            self.store_of(host).root / manifest.vm / manifest.checkpoint / host / part.memory_file
        )


@contextmanager
def apart(folder: Path, hosts: int, memory_per_host: int) -> Iterator[ApartCluster]:
    """Such a cluster, and this process connected to it."""
    stores = folder / "stores" / HOST_FIELD
    with ApartCluster.start(folder, hosts, memory_per_host, stores) as cluster:
        _ray.connect(cluster.address, cluster.token_path)
        try:
            yield cluster
        finally:
            _ray.disconnect()


@contextmanager
def coordinator(vm: str) -> Iterator[Port]:
    """The coordinator of a VM that does not run yet; the VM ends with it."""
    port: Port = _ray.spawn(Coordinator, coordinator_name(vm), (vm,))
    try:
        port.wait_ready(_READY_TIMEOUT_S)
        yield port
        port.call("stop")
    finally:
        _ray.kill(coordinator_name(vm))


def await_word(console: Path, word: str) -> None:
    """Wait until the guest of `filler.c` says `word`. Raises VmError when it cannot go on."""

    def said() -> bool:
        text = console.read_text(errors="replace") if console.exists() else ""
        if "FILL FAILED" in text or "panic" in text:
            raise VmError(f"the guest could not fill its memory: {text.strip()[-200:]}")
        return word in text

    wait_for(said, FILL_TIMEOUT_S, f"the guest says {word}")
