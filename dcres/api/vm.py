"""VMs and their checkpoints, as objects to call; the work is done by the VM's coordinator."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from dcres.actors import _ray
from dcres.actors.coordinator import checkpoint_facts
from dcres.actors.fleet import RayFleet
from dcres.api.catalogue import Catalogue
from dcres.api.defaults import (
    DEFAULT_DOWNTIME_S,
    DEFAULT_FORMAT,
    DEFAULT_MAX_ROUNDS,
    DEFAULT_MODE,
    require_kind,
)
from dcres.api.interrupt import uninterrupted
from dcres.api.operation import (
    HostProgress,
    OperationProgress,
    ProgressOption,
    attend,
    shown_progress,
)
from dcres.api.plan import RestorePlan, plan_restore, wanted_layout
from dcres.api.session import Session
from dcres.api.status import VmStatus, status_of
from dcres.config import Layout, VmSpec, format_size, parse_size
from dcres.errors import ActorGone, ConfigError, DcresError, NotFound, VmLost
from dcres.model.pages import PAGE_SIZE
from dcres.storage.checks import VerifyReport
from dcres.storage.manifest import Manifest, dumps
from dcres.storage.store import Listed

_STOP_TIMEOUT_S = 300.0


class Vm:
    """A VM of the cluster. `facts` is what its start or restore told, where this object did it."""

    def __init__(self, session: Session, name: str, facts: dict[str, Any] | None = None) -> None:
        self._session = session
        self.name = name
        self.facts = facts or {}

    def __repr__(self) -> str:
        try:
            return repr(self.status()).replace("<VmStatus", "<Vm", 1)
        except DcresError as error:
            return f"<Vm {self.name}: {error}>"

    def status(self, over_s: float = 0.0) -> VmStatus:
        """The VM as its hosts see it now, with paging rates measured over `over_s` seconds.

        Raises NotFound when there is no such VM.
        """
        first = self._status()
        if over_s <= 0 or not first.hosts:
            return first
        began = time.monotonic()
        time.sleep(over_s)
        second = self._status()
        return _with_rates(first, second, time.monotonic() - began)

    def _status(self) -> VmStatus:
        return status_of(self._session.existing(self.name).call("status"))

    def checkpoint(
        self,
        mode: str = DEFAULT_MODE,
        *,
        format: str = DEFAULT_FORMAT,
        downtime_s: float = DEFAULT_DOWNTIME_S,
        max_rounds: int = DEFAULT_MAX_ROUNDS,
        progress: ProgressOption = None,
    ) -> Checkpoint:
        """Save the VM on all its hosts at once.

        ``live``: it runs meanwhile, and stands still only for what is left when that fits
        `downtime_s`, or after `max_rounds` rounds. ``stop``: it stands still until all is
        written. `progress` is called with an `OperationProgress` four times a second.

        Ctrl-C cancels it. Raises OperationFailed when it was given up (the VM goes on, earlier
        checkpoints are as they were), ConfigError for a mode or format that there is not.
        """
        require_kind(mode, format)
        if not (downtime_s > 0 and max_rounds >= 1):
            raise ConfigError(
                f"a downtime of {downtime_s} s in {max_rounds} rounds cannot be aimed at; "
                "give more than 0 s and at least 1 round"
            )
        facts = attend(
            self._session.existing(self.name),
            "checkpoint",
            mode,
            None,
            downtime_s,
            max_rounds,
            title=f"checkpoint of {self.name}",
            progress=progress,
        )
        return Checkpoint(self._session, self._session.catalogue.get(facts["checkpoint"]), facts)

    def cancel(self) -> bool:
        """Give up the checkpoint, start or restore under way; False when there is none."""
        return bool(self._session.existing(self.name).call("cancel"))

    def resize(self, main: int | str) -> VmStatus:
        """Change how much the main host keeps; pages move out or in while the VM runs.

        Raises ConfigError when the layout would be too small, NoRoom.
        """
        try:
            main_bytes = parse_size(main)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        return status_of(self._session.existing(self.name).call("resize", main_bytes))

    def stop(self) -> None:
        """End the VM and give back all it used; a checkpoint under way is given up first."""
        self._session.existing(self.name).call("stop", timeout_s=_STOP_TIMEOUT_S)
        self._session.retire(self.name)

    def kill(self) -> None:
        """End the VM like a power failure, whatever is under way; its checkpoints stay."""
        coordinator = self._session.existing(self.name)
        coordinator.call("cancel")
        for port in RayFleet().find(self.name):
            with suppress(ActorGone):
                port.submit("destroy")
        coordinator.call("stop", timeout_s=_STOP_TIMEOUT_S)
        self._session.retire(self.name)

    def console(self) -> str:
        """All that the guest has written to its serial console since it was started here."""
        return self.console_from(0).decode(errors="replace")

    def console_from(self, offset_bytes: int) -> bytes:
        """The console from an offset on. Raises NotFound or VmLost when the VM does not run."""
        status = self.status()
        if not status.hosts:
            lost = status.phase == "lost"
            raise (VmLost if lost else NotFound)(
                f"VM {self.name} is {status.phase}{': ' if status.why else ''}{status.why}"
            )
        host, path = status.hosts[0].host, Path(status.console)
        if self._session.local is not None:
            return read_from(path, offset_bytes)
        return _ray.run_on(host, read_from, path, offset_bytes)

    def checkpoints(self) -> list[Checkpoint]:
        """The VM's readable checkpoints, oldest first."""
        listing = self._session.catalogue.list(self.name)
        return [
            Checkpoint(self._session, entry.manifest)
            for entry in listing
            if entry.manifest is not None
        ]


class Checkpoint:
    """A published checkpoint. `facts` is what ``dcres checkpoint --json`` prints of it."""

    def __init__(
        self, session: Session, manifest: Manifest, facts: dict[str, Any] | None = None
    ) -> None:
        self._session = session
        self.manifest = manifest
        self.facts = facts or checkpoint_facts(manifest)

    @property
    def id(self) -> str:
        """Its name, for the command line and for `Cluster.checkpoint`."""
        return self.manifest.checkpoint

    @property
    def vm(self) -> str:
        """The name of the VM that was saved."""
        return self.manifest.vm

    @property
    def created(self) -> datetime:
        """When it was begun, UTC."""
        return datetime.fromisoformat(self.manifest.created)

    def __repr__(self) -> str:
        saved = ", ".join(
            f"{part.host} {format_size(part.pages * PAGE_SIZE)}" for part in self.manifest.hosts
        )
        return f"<Checkpoint {self.id} ({self.manifest.mode}): {saved}>"

    def inspect(self) -> dict[str, Any]:
        """The manifest as plain values: hosts, files with checksums, VM file, times."""
        return self.manifest.model_dump(mode="json")

    def verify(self, progress: ProgressOption = None) -> VerifyReport:
        """Read every byte and compare. Raises NotFound, CheckpointCorrupt for the manifest."""
        return verify(self._session.catalogue, self.id, progress)

    def delete(self) -> None:
        """Remove it from the store for good. Raises NotFound."""
        self._session.catalogue.delete(self.id)

    def plan(
        self,
        layout: Layout | None = None,
        *,
        single: bool = False,
        hosts: int | Sequence[str] | None = None,
    ) -> RestorePlan:
        """What `restore` with the same arguments would do; changes nothing."""
        wanted, names = wanted_layout(self.manifest, layout, single, hosts)
        runs = False
        with suppress(NotFound):
            phase = status_of(self._session.existing(self.vm).call("status")).phase
            runs = phase not in ("absent", "lost")
        return plan_restore(self.manifest, wanted, names, _ray.hosts(), runs)

    def restore(
        self,
        layout: Layout | None = None,
        *,
        single: bool = False,
        hosts: int | Sequence[str] | None = None,
        progress: ProgressOption = None,
    ) -> Vm:
        """Bring the VM back: over `layout` (default: as it was), or `single`, as an ordinary VM.

        `hosts` names the hosts, the main host first, or says how many. Every byte is verified
        before the guest runs. Ctrl-C takes down what was brought up. Raises Conflict when the
        VM runs or is being restored, ConfigError, NoRoom, CheckpointCorrupt; then nothing of
        the VM is left running, and the checkpoint is as it was.
        """
        wanted, names = wanted_layout(self.manifest, layout, single, hosts)
        facts = _bring_up(
            self._session,
            self.vm,
            ("restore", dumps(self.manifest), wanted, names),
            f"restore of {self.vm}",
            progress,
        )
        return Vm(self._session, self.vm, facts)


def start_vm(
    session: Session,
    spec: VmSpec,
    hosts: Sequence[str] | None = None,
    progress: ProgressOption = None,
) -> Vm:
    """Boot a VM; see `Cluster.start`."""
    if session.local is not None:
        spec.require_files()  # at once, rather than when the hosts are reserved
    began = time.monotonic()
    values = spec.model_dump(mode="json", by_alias=True)
    names = None if hosts is None else list(hosts)
    call = ("start", values, names)
    answer = _bring_up(session, spec.name, call, f"start of {spec.name}", progress)
    seconds = time.monotonic() - began
    return Vm(session, spec.name, {**status_of(answer).to_dict(), "seconds": seconds})


def _bring_up(
    session: Session, vm: str, call: tuple[Any, ...], title: str, progress: ProgressOption
) -> Any:
    """Have the VM's coordinator start or restore it; when that fails, no coordinator is left."""
    try:
        return attend(session.coordinator(vm), *call, title=title, progress=progress)
    except BaseException:
        with uninterrupted():
            session.retire(vm)
        raise


def verify(catalogue: Catalogue, checkpoint: str, progress: ProgressOption = None) -> VerifyReport:
    """Read every byte of a checkpoint and compare; see `Checkpoint.verify`."""
    with _verifying(catalogue.get(checkpoint), progress) as done:
        return catalogue.verify(checkpoint, done)


def listed_facts(entry: Listed) -> dict[str, Any]:
    """One checkpoint as ``dcres checkpoints --json`` lists it; `error` when it is damaged."""
    manifest = entry.manifest
    if manifest is None:
        return {"checkpoint": entry.checkpoint, "vm": entry.vm, "error": entry.error}
    return {
        **checkpoint_facts(manifest),
        "created": manifest.created,
        "memory_bytes": manifest.memory_bytes,
    }


def read_from(path: Path, offset_bytes: int) -> bytes:
    """A file's bytes from an offset on; runs where the file is."""
    with path.open("rb") as file:
        file.seek(offset_bytes)
        return file.read()


def _with_rates(first: VmStatus, second: VmStatus, seconds: float) -> VmStatus:
    before = {host.host: host for host in first.hosts}
    hosts = tuple(
        replace(
            host,
            pages_in_per_s=max(host.pages_in - before[host.host].pages_in, 0) / seconds,
            pages_out_per_s=max(host.pages_out - before[host.host].pages_out, 0) / seconds,
        )
        if host.host in before
        else host
        for host in second.hosts
    )
    return replace(second, hosts=hosts)


@contextmanager
def _verifying(
    manifest: Manifest, progress: ProgressOption
) -> Iterator[Callable[[int], None] | None]:
    """A callback for pages done that feeds a bar or the caller's own callback."""
    with shown_progress(progress, f"verify {manifest.checkpoint}") as show:
        if show is None:
            yield None
            return
        total, pages_done = manifest.pages * PAGE_SIZE, 0

        def done(pages: int) -> None:
            nonlocal pages_done
            pages_done += pages
            host = HostProgress("store", "verify", pages_done * PAGE_SIZE, total)
            show(OperationProgress(manifest.vm, "verifying", (host,)))

        yield done
