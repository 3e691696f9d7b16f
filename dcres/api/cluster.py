"""Clusters: the one that runs already, or one for the length of a ``with`` block."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from dcres.actors.control.coordinator import Coordinator
from dcres.actors.ray import gateway
from dcres.actors.ray.coordinators import Coordinators
from dcres.actors.ray.local_cluster import LocalCluster, purge
from dcres.api import bringing_copies
from dcres.api.copying import list_copies
from dcres.api.defaults import DEFAULT_RATE
from dcres.api.operation import ProgressOption
from dcres.api.pruning import Pruning, plan_pruning, prune
from dcres.api.scrubbing import Scrubbing, scrub
from dcres.api.session import Session, catalogue_of, open_session
from dcres.api.status import Host, VmStatus, status_of
from dcres.api.vm import Checkpoint, Vm, start_vm
from dcres.config import Layout, VmSpec, listed, load_vm_spec, named_folder, parse_size, vm_spec
from dcres.errors import ConfigError, Conflict
from dcres.linux.interrupt import Terminated, ended_by_sigterm, uninterrupted
from dcres.linux.removal import remove_if_empty
from dcres.model.retention import Keep
from dcres.storage.store.protocols import Listing

_STATUS_TIMEOUT_S = 60.0


class Cluster:
    """A Ray cluster with hosts for split-memory VMs, and this process connected to it."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def __repr__(self) -> str:
        alive = [host for host in self.hosts() if host.alive]
        return f"<Cluster {self.address}: {len(alive)} hosts, VMs: {self._session.vms() or 'none'}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the cluster; it goes on, and so do its VMs.

        A connection that this process had before, as in a Ray job or actor or after
        ``ray.init()``, stays.
        """
        self._session.close()

    @property
    def address(self) -> str:
        """``host:port`` of Ray's head node."""
        return self._session.address

    @property
    def local(self) -> LocalCluster | None:
        """The cluster's processes, when it runs on this machine alone."""
        return self._session.local

    def hosts(self) -> list[Host]:
        """All hosts that Ray knows, dead ones too."""
        return [
            Host(
                name=info.name,
                address=info.address,
                memory_bytes=info.memory_total_bytes,
                free_bytes=info.memory_free_bytes if info.alive else 0,
                alive=info.alive,
            )
            for info in gateway.hosts()
        ]

    def start(
        self,
        spec: str | Path | Mapping[str, Any] | VmSpec,
        hosts: str | Sequence[str] | None = None,
        *,
        take_over: bool = False,
        progress: ProgressOption = None,
    ) -> Vm:
        """Boot a VM over the hosts of its layout: those named, the main host first, or any.

        `spec` is a VM file's path, its values, or a `VmSpec`; file names in it are the main
        host's. `hosts` is ``["h1", "h2"]`` or ``"h1,h2"``. A VM's name in a store is one cluster's:
        `take_over` it from one whose end cannot be seen from here, when you know that it has ended.
        Ctrl-C takes down what was brought up. Raises ConfigError, Conflict when the VM runs or its
        name is another cluster's, NoRoom, QemuFailed; then nothing of the VM is left running.
        """
        return start_vm(self._session, _spec_of(spec), hosts, progress, take_over=take_over)

    def vm(self, name: str) -> Vm:
        """The VM of that name. Raises NotFound unless it runs, is lost or is being worked on."""
        self._session.require(name)
        return Vm(self._session, name)

    def vms(self) -> list[Vm]:
        """All VMs that run, are lost or are being worked on."""
        return [Vm(self._session, status.vm) for status in self.statuses()]

    def statuses(self) -> list[VmStatus]:
        """What all VMs do; one whose coordinator does not answer has the phase ``unknown``."""
        port = Coordinators().port
        pending = {vm: port(vm).submit(Coordinator.status) for vm in self._session.vms()}
        answers, failures = gateway.gather(pending, _STATUS_TIMEOUT_S)
        found = [status_of(answer) for answer in answers.values() if answer["phase"] != "absent"]
        unknown = [VmStatus(vm, "unknown", str(why)) for vm, why in failures.items()]
        return sorted([*found, *unknown], key=lambda status: status.vm)

    def listing(self, vm: str | None = None, *, source: str | None = None) -> Listing:
        """Published checkpoints of one VM or all, oldest first, unreadable ones too.

        With `source` those that have a copy at that URL. Raises ConfigError, StorageError for it.
        """
        if source is not None:
            return list_copies(source, vm)
        return self._session.catalogue.list(vm)

    def checkpoints(self, vm: str | None = None) -> list[Checkpoint]:
        """The readable checkpoints of one VM or all, oldest first."""
        return [
            Checkpoint(self._session, entry.manifest)
            for entry in self.listing(vm)
            if entry.manifest is not None
        ]

    def checkpoint(self, checkpoint: str) -> Checkpoint:
        """The checkpoint with that id. Raises NotFound, CheckpointCorrupt."""
        return Checkpoint(self._session, self._session.catalogue.get(checkpoint))

    def bring(
        self,
        checkpoint: str,
        source: str,
        *,
        hosts: int | str | Sequence[str] | None = None,
        progress: ProgressOption = None,
    ) -> Checkpoint:
        """Bring what the hosts' stores lack of a checkpoint from its copy at a URL.

        Every byte is verified before it counts, that of parts which are there, too; what is damaged
        there is replaced. Where `hosts` names some, as for a restore, what comes goes to these.
        Repeatable. Raises ConfigError for a wrong URL, NotFound if it has no copy, Conflict,
        and OperationFailed, which says what failed on which host.
        """
        named = () if hosts is None or isinstance(hosts, int) else listed(hosts)
        manifest, _ = bringing_copies.bring(checkpoint, source, named, progress)
        return Checkpoint(self._session, manifest)

    def delete(self, checkpoint: str) -> None:
        """Remove a checkpoint for good, readable or not. Raises as `Checkpoint.delete` does."""
        self._session.catalogue.delete(checkpoint)

    def prune(self, vm: str, keep: Keep | str | None = None, *, dry_run: bool = False) -> Pruning:
        """Remove a VM's checkpoints that its rules do not keep; what became of each.

        `keep` is such as ``"last=3,hourly=24"``; without it the VM file's ``protect.keep`` counts.
        What is being read stays, and is among the problems. With `dry_run` nothing is removed.
        Raises NotFound for a VM without checkpoints, ConfigError without rules.
        """
        planned = plan_pruning(self._session.catalogue, vm, keep)
        return planned if dry_run else prune(self._session.catalogue, planned)

    def scrub(
        self,
        vm: str | None = None,
        *,
        rate: str | float | None = DEFAULT_RATE,
        older: str | float | None = None,
        progress: ProgressOption = None,
    ) -> Scrubbing:
        """Read everything in the stores, each host its own and each file once; what was damaged.

        At most `rate` on each host (None: as fast as it goes), and what was not read for longest
        first; with `older`, such as ``"7d"``, what was read since then is left out. When it is
        interrupted, what was read until then is remembered. Raises NotFound for a VM without
        checkpoints, ConfigError, OperationFailed.
        """
        return scrub(self._session.catalogue, vm, rate, older, progress)

    def restore(
        self,
        checkpoint: str,
        layout: Layout | None = None,
        *,
        single: bool = False,
        hosts: int | str | Sequence[str] | None = None,
        lazy: bool = False,
        take_over: bool = False,
        source: str | None = None,
        progress: ProgressOption = None,
    ) -> Vm:
        """`Checkpoint.restore` by id; with `source` what is missing is brought from there first."""
        if source is None:
            found = self.checkpoint(checkpoint)
        else:
            found = self.bring(checkpoint, source, hosts=hosts, progress=progress)
        return found.restore(
            layout, single=single, hosts=hosts, lazy=lazy, take_over=take_over, progress=progress
        )


def connect(address: str | None = None, *, store: str | Path | None = None) -> Cluster:
    """The cluster at `address` (``host:port``, or ``auto``, as Ray finds it).

    By default: the one that this process is connected to (inside a Ray job or actor), the one
    that RAY_ADDRESS names, or the one that ``dcres up`` started on this machine. `store` is where
    this machine reads checkpoints; else DCRES_STORE, else a local cluster's store, and else the
    hosts are asked. Raises NotFound, ClusterError, and Conflict if this process is connected to
    another cluster.
    """
    return Cluster(open_session(address, None if store is None else named_folder(store)))


@contextmanager
def local_cluster(
    hosts: int = 3,
    *,
    memory: int | str | None = None,
    store: str | Path | None = None,
    home: str | Path | None = None,
    dashboard: bool = False,
    keep: bool = False,
) -> Iterator[Cluster]:
    """A cluster of Ray nodes on this machine, ended with its VMs when the block ends.

    `memory` is what VMs may use on each host. Checkpoints are removed at the end as well,
    unless `store` names a folder for them (or `home` one for everything); with ``{host}`` in
    its path every host has a store of its own, as machines with disks of their own do. With
    `keep` it is left running, unless the block is interrupted by Ctrl-C or SIGTERM: ``dcres down``
    with DCRES_HOME set to its home ends it. Raises NoRoom, ClusterError, and Conflict if this
    process is connected to a cluster already.
    """
    _require_unconnected()
    memory_bytes = None if memory is None else memory_size(memory)
    # Not /tmp: that may be a tmpfs, which is memory again and may not know O_DIRECT.
    folder = named_folder(
        tempfile.mkdtemp(prefix="dcres-", dir="/var/tmp") if home is None else home, "the home"
    )
    local: LocalCluster | None = None
    with ended_by_sigterm():
        try:
            store_folder = None if store is None else named_folder(store, "the store")
            local = LocalCluster.start(
                folder, hosts, memory_bytes, store_folder, dashboard=dashboard
            )
            joined = gateway.connect(local.address, local.token_path)
            yield Cluster(Session(local.address, catalogue_of(None, local), local, joined=joined))
        except (KeyboardInterrupt, Terminated):
            keep = False
            raise
        finally:
            with uninterrupted():
                gateway.disconnect()  # there was no connection before, so it is ours
                if local is not None and not keep:
                    local.stop()
                if home is None and not (keep and local):
                    purge(folder)
                    remove_if_empty(folder)


def _require_unconnected() -> None:
    connected = gateway.connected_address()
    if connected is not None:
        raise Conflict(
            f"this process is connected to the cluster at {connected} already; "
            "use that one with dcres.connect(), or leave it first: "
            "close what dcres.connect() returned, or call ray.shutdown()"
        )


def memory_size(text: int | str) -> int:
    """A size that a caller wrote, in bytes. Raises ConfigError."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _spec_of(spec: str | Path | Mapping[str, Any] | VmSpec) -> VmSpec:
    match spec:
        case VmSpec():
            return spec
        case str() | Path():
            return load_vm_spec(Path(spec))
        case _:
            return vm_spec(spec, source="the VM's values")
