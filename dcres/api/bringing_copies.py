"""A copy of a checkpoint, brought from its URL into the stores of a cluster's hosts."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path

from dcres.actors.ray import gateway
from dcres.api.beside import Beside, Work
from dcres.api.operation import ProgressOption
from dcres.config import HostSettings
from dcres.errors import ClusterError
from dcres.storage.format.manifest import Manifest
from dcres.storage.store import copy_url
from dcres.storage.store.copy_url import CopyUrl
from dcres.storage.store.pieces import PartCopied
from dcres.storage.store.store import Store

_LOOK_TIMEOUT_S = 60.0
_BRING_TIMEOUT_S = 24 * 3600.0
_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Stored:
    """What a host's store has of a checkpoint; hosts with the same `identity` share one."""

    identity: str
    parts: tuple[str, ...]


def bring(
    checkpoint: str,
    source: str,
    hosts: Sequence[str] = (),
    progress: ProgressOption = None,
) -> tuple[Manifest, tuple[PartCopied, ...]]:
    """Have all parts of a checkpoint in the hosts' stores, and published; see `Cluster.bring`."""
    url = copy_url.parse(source)
    alive = [host.name for host in gateway.hosts() if host.alive]
    if not alive:
        raise ClusterError("no host of the cluster is alive; look at `ray status`")
    manifest = gateway.run_on(alive[0], _get_copy, url, checkpoint, timeout_s=_LOOK_TIMEOUT_S)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        found = list(pool.map(lambda host: _look(host, manifest), alive))
    wanted = [host for host in alive if host in hosts] or alive
    targets = targets_of(manifest, dict(zip(alive, found, strict=True)), wanted)
    title = f"copy of {checkpoint} from {url.shown}"
    brought = Beside[PartCopied](title, manifest.vm, "bringing").run(
        {
            name: partial(_stream, host, manifest, part, url)
            for name, (host, part) in targets.items()
        },
        progress,
    )
    main = manifest.main.host
    publisher = next(host for host, part in targets.values() if part == main)
    gateway.run_on(publisher, _publish, manifest, timeout_s=_LOOK_TIMEOUT_S)
    return manifest, tuple(brought.values())


def targets_of(
    manifest: Manifest, stored: Mapping[str, Stored], wanted: Sequence[str]
) -> dict[str, tuple[str, str]]:
    """By a name for people, where which part is to be: a host, and whose part.

    A part that a store has stays there, and what it lacks or has wrong is brought; if several
    have it, each is made whole, since a restore may read any. Another comes to the host that saved
    it, if that is `wanted`, else to each of those in turn.
    """
    others = cycle(wanted)
    targets = {}
    for part in (each.host for each in manifest.hosts):
        holders = _one_of_each_store(part, stored)
        if not holders:
            holders = [part if part in wanted else next(others)]
        for host in holders:
            targets[part if host == part else f"{part} on {host}"] = (host, part)
    return targets


def _one_of_each_store(part: str, stored: Mapping[str, Stored]) -> list[str]:
    found: dict[str, str] = {}
    for host, store in stored.items():
        if part in store.parts and (host == part or store.identity not in found):
            found[store.identity] = host
    return list(found.values())


def _look(host: str, manifest: Manifest) -> Stored:
    return gateway.run_on(host, _stored, manifest, timeout_s=_LOOK_TIMEOUT_S)


def _stream(host: str, manifest: Manifest, part: str, url: CopyUrl) -> Work[PartCopied]:
    return gateway.stream_apart(
        host, _receive_part, manifest, part, url, timeout_s=_BRING_TIMEOUT_S
    )


# What follows runs on a host. pyarrow's file systems are loaded there, and not before.


def _root() -> Path:
    return HostSettings.from_environ(os.environ).store


def _get_copy(url: CopyUrl, checkpoint: str) -> Manifest:
    from dcres.storage.store import copy_list

    return copy_list.get_copy(url, checkpoint)


def _stored(manifest: Manifest) -> Stored:
    store = Store(_root())
    return Stored(store.identity(), store.parts_here(manifest))


def _receive_part(manifest: Manifest, part: str, url: CopyUrl) -> Iterator[PartCopied]:
    from dcres.storage.store import download

    yield from download.receive_part(_root(), manifest, part, url)


def _publish(manifest: Manifest) -> None:
    """In the store that has the main host's part; with it may be others, or all."""
    store = Store(_root())
    store.publish(manifest, store.parts_here(manifest))
