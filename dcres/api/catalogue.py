"""Where checkpoints are read, verified and deleted: on this machine, or on the cluster's hosts."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

from dcres.actors.control.publishing import checkpoint_facts
from dcres.actors.ray import gateway
from dcres.api.beside import Work, WorkHere
from dcres.api.operation import HostProgress, OperationProgress, ProgressOption, shown_progress
from dcres.config import HostSettings
from dcres.errors import CheckpointCorrupt, ClusterError, DcresError, NotFound, OperationFailed
from dcres.model.pages import PAGE_SIZE
from dcres.storage.format.checks import VerifiedPart, VerifyReport
from dcres.storage.format.manifest import Manifest
from dcres.storage.layout import stamp_of, vm_of
from dcres.storage.store.protocols import CheckpointStore, Listed, Listing, Names
from dcres.storage.store.store import Store

_T = TypeVar("_T")
_LOOK_TIMEOUT_S = 60.0
_READ_ALL_TIMEOUT_S = 24 * 3600.0
_AT_ONCE = 16
_LEFT = "it does not answer; when it is back, remove {vm}/{name} from its store"


class Catalogue(Protocol):
    """Checkpoints, wherever they lie."""

    def list(self, vm: str | None = None) -> Listing:
        """Published checkpoints of one VM or all, oldest first."""

    def get(self, checkpoint: str) -> Manifest:
        """A checkpoint's manifest. Raises NotFound, CheckpointCorrupt."""

    def lacking(self, manifest: Manifest) -> Names:
        """The hosts whose parts of a checkpoint are not to be found: it cannot be restored now."""

    def verify(self, checkpoint: str, done: Callable[[int], None] | None = None) -> VerifyReport:
        """Read every byte and compare; `done` gets pages done since its last call."""

    def delete(self, checkpoint: str) -> None:
        """Remove a checkpoint. Raises NotFound, and Conflict while its pages are read.

        OperationFailed says which hosts keep files of one that is deleted.
        """

    def places(self) -> Names:
        """Where there are stores, each of them once: the name of a host, or nothing for here."""

    def find(self, checkpoint: str) -> tuple[str, Manifest]:
        """A checkpoint's manifest, and in which place that is. Raises as `get` does."""

    def holders(self, manifest: Manifest) -> dict[str, str]:
        """For each host of a checkpoint the place that has its part. Raises NotFound."""

    def run(self, place: str, function: Callable[..., _T], *args: object) -> _T:
        """The result of ``function(store, *args)`` in a place, however long that takes."""

    def stream(self, place: str, function: Callable[..., Iterator[_T]], *args: object) -> Work[_T]:
        """The same for a generator function: what it yields, as it comes."""


class StoreHere:
    """A store that this machine reaches."""

    def __init__(self, root: Path) -> None:
        self._store = Store(root)

    def list(self, vm: str | None = None) -> Listing:
        """See `Catalogue`."""
        return self._store.list(vm)

    def get(self, checkpoint: str) -> Manifest:
        """See `Catalogue`."""
        return self._store.get(checkpoint)

    def lacking(self, manifest: Manifest) -> Names:
        """See `Catalogue`."""
        return _without(manifest, self._store.parts_here(manifest))

    def verify(self, checkpoint: str, done: Callable[[int], None] | None = None) -> VerifyReport:
        """See `Catalogue`."""
        return self._store.verify(checkpoint, done)

    def delete(self, checkpoint: str) -> None:
        """See `Catalogue`."""
        self._store.delete(checkpoint)

    def places(self) -> Names:
        """See `Catalogue`; the only place is this machine."""
        return [""]

    def find(self, checkpoint: str) -> tuple[str, Manifest]:
        """See `Catalogue`; the only place is this machine."""
        return "", self.get(checkpoint)

    def holders(self, manifest: Manifest) -> dict[str, str]:
        """See `Catalogue`."""
        _require_parts(manifest, self.lacking(manifest))
        return dict.fromkeys((part.host for part in manifest.hosts), "")

    def run(self, place: str, function: Callable[..., _T], *args: object) -> _T:
        """See `Catalogue`; in this process."""
        return function(self._store, *args)

    def stream(self, place: str, function: Callable[..., Iterator[_T]], *args: object) -> Work[_T]:
        """See `Catalogue`; in this process."""
        return WorkHere(function(self._store, *args))


class StoresOfHosts:
    """The hosts' own stores, asked through Ray: the first host that has a checkpoint counts.

    They may be one store that all hosts reach, or one each with that host's part in it.
    """

    def list(self, vm: str | None = None) -> Listing:
        """See `Catalogue`."""
        found: dict[str, Listed] = {}
        for listing in _on_all(_list, vm):
            for entry in listing:
                if entry.manifest is not None or entry.checkpoint not in found:
                    found[entry.checkpoint] = entry
        return sorted(found.values(), key=lambda entry: stamp_of(entry.checkpoint))

    def get(self, checkpoint: str) -> Manifest:
        """See `Catalogue`."""
        return self._find(checkpoint)[1]

    def lacking(self, manifest: Manifest) -> Names:
        """See `Catalogue`."""
        return _without(manifest, _parts_anywhere(manifest))

    def verify(self, checkpoint: str, done: Callable[[int], None] | None = None) -> VerifyReport:
        """See `Catalogue`; the hosts read at the same time, and `done` is called at the end."""
        host, manifest = self._find(checkpoint)
        if gateway.run_on(host, _has_all_parts, manifest):
            report = gateway.run_apart(host, _verify, checkpoint, timeout_s=_READ_ALL_TIMEOUT_S)
        else:
            report = self._verify_apart(manifest)
        if done is not None:
            done(report.pages)
        return report

    def delete(self, checkpoint: str) -> None:
        """See `Catalogue`; nothing is removed anywhere if it is pinned on one host.

        One host after the other, since they may share a store, and first the one that has the
        manifest: whatever fails then, no checkpoint is listed that lacks a part. Raises
        OperationFailed for files that are left, on hosts that do not answer, too.
        """
        first = self._publisher(checkpoint)
        out_of_reach = self._out_of_reach(first, checkpoint)
        others = [host for host in _alive() if host != first]
        for host in (first, *others):
            gateway.run_on(host, _require_unpinned, checkpoint, timeout_s=_LOOK_TIMEOUT_S)
        gateway.run_on(first, _delete, checkpoint, timeout_s=_LOOK_TIMEOUT_S)
        left = _LEFT.format(vm=vm_of(checkpoint), name=checkpoint)
        failures: dict[str, str] = dict.fromkeys(out_of_reach, left)
        types: dict[str, str] = {}
        for host in others:
            try:
                gateway.run_on(host, _delete, checkpoint, timeout_s=_LOOK_TIMEOUT_S)
            except DcresError as error:
                failures[host], types[host] = str(error), type(error).__name__
        if failures:
            why = f"{checkpoint} is deleted, but not all of its files"
            raise OperationFailed(why, failures, types)

    def places(self) -> Names:
        """See `Catalogue`; of hosts that share a store it is the first."""
        alive = _alive()
        found: dict[str, str] = {}
        for host, identity in zip(alive, _on_all(_identity, hosts=alive), strict=True):
            if identity:  # else nothing was ever written to it
                found.setdefault(identity, host)
        return list(found.values())

    def find(self, checkpoint: str) -> tuple[str, Manifest]:
        """See `Catalogue`; a place is a host."""
        return self._find(checkpoint)

    def holders(self, manifest: Manifest) -> dict[str, str]:
        """See `Catalogue`; each host has its own, if it has it, and else any."""
        found = _holders(manifest)
        _require_parts(manifest, _without(manifest, found))
        return found

    def run(self, place: str, function: Callable[..., _T], *args: object) -> _T:
        """See `Catalogue`; in a process of its own on the host."""
        answer: _T = gateway.run_apart(
            place, _with_store, function, *args, timeout_s=_READ_ALL_TIMEOUT_S
        )
        return answer

    def stream(self, place: str, function: Callable[..., Iterator[_T]], *args: object) -> Work[_T]:
        """See `Catalogue`; in a process of its own on the host."""
        return gateway.stream_apart(
            place, _each_with_store, function, *args, timeout_s=_READ_ALL_TIMEOUT_S
        )

    def _out_of_reach(self, first: str, checkpoint: str) -> Names:
        """Hosts of a checkpoint that do not answer, if no other host has their part either.

        None if the manifest does not tell.
        """
        with suppress(CheckpointCorrupt):
            manifest = gateway.run_on(first, _get, checkpoint, timeout_s=_LOOK_TIMEOUT_S)
            return _without(manifest, _parts_anywhere(manifest).union(_alive()))
        return []

    def _publisher(self, checkpoint: str) -> str:
        """A host whose store has the manifest, readable or not. Raises NotFound."""
        for host in _alive():
            if gateway.run_on(host, _is_published, checkpoint, timeout_s=_LOOK_TIMEOUT_S):
                return host
        return self._find(checkpoint)[0]  # it is nowhere, and this says what is

    def _find(self, checkpoint: str) -> tuple[str, Manifest]:
        missing: NotFound | None = None
        for host in _alive():
            try:
                return host, gateway.run_on(host, _get, checkpoint, timeout_s=_LOOK_TIMEOUT_S)
            except NotFound as error:
                missing = error
        raise missing or ClusterError("no host of the cluster is alive; look at `ray status`")

    def _verify_apart(self, manifest: Manifest) -> VerifyReport:
        holders = _holders(manifest)  # its own host says best what it does not have

        def part(host: str) -> VerifiedPart:
            return gateway.run_apart(
                holders.get(host, host), _verify_part, manifest, host, timeout_s=_READ_ALL_TIMEOUT_S
            )

        parts = _at_once(part, [each.host for each in manifest.hosts])
        main = holders.get(manifest.main.host, manifest.main.host)
        return gateway.run_on(main, _verify_together, manifest, parts, timeout_s=_LOOK_TIMEOUT_S)


def _alive() -> list[str]:
    return [host.name for host in gateway.hosts() if host.alive]


def _parts_anywhere(manifest: Manifest) -> set[str]:
    return {part for here in _on_all(_parts_here, manifest) for part in here}


def _holders(manifest: Manifest) -> dict[str, str]:
    """A host that has each part, its own if that does; none for one that is nowhere."""
    alive, found = _alive(), dict[str, str]()
    for host, parts in zip(alive, _on_all(_parts_here, manifest, hosts=alive), strict=True):
        found.update({part: host for part in parts if part == host or part not in found})
    return found


def _without(manifest: Manifest, there: Collection[str]) -> Names:
    return [part.host for part in manifest.hosts if part.host not in there]


def _at_once(work: Callable[[str], _T], hosts: Sequence[str]) -> list[_T]:
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(work, hosts))


def _on_all(
    function: Callable[..., _T], *args: object, hosts: Sequence[str] | None = None
) -> list[_T]:
    return _at_once(
        lambda host: gateway.run_on(host, function, *args, timeout_s=_LOOK_TIMEOUT_S),
        _alive() if hosts is None else hosts,
    )


def _require_parts(manifest: Manifest, lacking: Names) -> None:
    if lacking:
        raise NotFound(
            f"the part of {manifest.checkpoint} on {', '.join(lacking)} is not to be found; is "
            "that host alive?"
        )


def verify(catalogue: Catalogue, checkpoint: str, progress: ProgressOption = None) -> VerifyReport:
    """Read every byte of a checkpoint and compare; see `Checkpoint.verify`."""
    with _verifying(catalogue.get(checkpoint), progress) as done:
        report = catalogue.verify(checkpoint, done)
    listing = [] if report.ok else catalogue.list(vm_of(checkpoint))
    if not report.ok and all(each.checkpoint != checkpoint for each in listing):
        raise NotFound(f"checkpoint {checkpoint} was deleted while it was read; it is not damaged")
    return report


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


# What follows runs on a host.


def _store() -> CheckpointStore:
    return Store(HostSettings.from_environ(os.environ).store)


def _with_store(function: Callable[..., _T], *args: object) -> _T:
    return function(_store(), *args)


def _each_with_store(function: Callable[..., Iterator[_T]], *args: object) -> Iterator[_T]:
    yield from function(_store(), *args)


def _identity() -> str:
    return _store().identity()


def _list(vm: str | None) -> Listing:
    return _store().list(vm)


def _get(checkpoint: str) -> Manifest:
    return _store().get(checkpoint)


def _is_published(checkpoint: str) -> bool:
    return _store().is_published(checkpoint)


def _verify(checkpoint: str) -> VerifyReport:
    return _store().verify(checkpoint)


def _verify_part(manifest: Manifest, host: str) -> VerifiedPart:
    return _store().verify_part(manifest, host)


def _verify_together(manifest: Manifest, parts: Sequence[VerifiedPart]) -> VerifyReport:
    return _store().verify_together(manifest, parts)


def _has_all_parts(manifest: Manifest) -> bool:
    return len(_parts_here(manifest)) == len(manifest.hosts)


def _parts_here(manifest: Manifest) -> tuple[str, ...]:
    return _store().parts_here(manifest)


def _require_unpinned(checkpoint: str) -> None:
    _store().require_unpinned(checkpoint)


def _delete(checkpoint: str) -> None:
    store = _store()
    try:
        store.delete(checkpoint)
    except NotFound:
        # Only this host's part is here, and without a manifest it is unfinished work.
        store.discard(vm_of(checkpoint), checkpoint)
