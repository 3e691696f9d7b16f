"""What a restore would do, worked out without doing anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dcres.actors.coordinator import spec_for
from dcres.actors.room import HostInfo, require_room
from dcres.config import Layout, VmSpec, format_size
from dcres.errors import ConfigError, InputError, NoRoom
from dcres.model.pages import PAGE_SIZE, pages_of
from dcres.storage.manifest import HostSlice, Manifest


@dataclass(frozen=True, slots=True)
class PlannedHost:
    """One host of a restore: its share, and what it would read from the store."""

    host: str
    role: str
    memory_bytes: int
    pages: int
    read_bytes: int


@dataclass(frozen=True, slots=True)
class RestorePlan:
    """Where a checkpoint would be restored; `problems` are sentences that say why it cannot be.

    Unless hosts were named, Ray chooses among those with room when the time comes, and the
    names here are a forecast.
    """

    vm: str
    checkpoint: str
    hosts: tuple[PlannedHost, ...]
    problems: tuple[str, ...]

    @property
    def possible(self) -> bool:
        """Whether the restore would be tried."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as ``dcres restore --dry-run --json`` prints them."""
        return {
            "vm": self.vm,
            "checkpoint": self.checkpoint,
            "dry_run": True,
            "possible": self.possible,
            "problems": list(self.problems),
            "layout": [asdict(host) for host in self.hosts],
        }

    def __repr__(self) -> str:
        places = ", ".join(f"{each.host} {format_size(each.memory_bytes)}" for each in self.hosts)
        return f"<RestorePlan {self.checkpoint} onto {places}: {'; '.join(self.problems) or 'ok'}>"


def wanted_layout(
    manifest: Manifest,
    layout: Layout | None,
    single: bool,
    hosts: int | Sequence[str] | None,
) -> tuple[Layout | None, list[str] | None]:
    """The layout (None: the checkpoint's own) and host names that a caller asks for.

    Raises ConfigError for wishes that contradict each other.
    """
    memory = manifest.memory_bytes
    names = None if hosts is None or isinstance(hosts, int) else list(hosts)
    count = hosts if isinstance(hosts, int) else None
    if single:
        if layout is not None or (count or 1) != 1 or len(names or "1") != 1:
            raise ConfigError("a restore on a single host takes no layout and no second host")
        return Layout(main=memory), names
    if layout is not None:
        if count not in (None, len(layout.shares)):
            raise ConfigError(
                f"the layout has {len(layout.shares)} hosts and {count} are asked for; "
                "give one of the two"
            )
        return layout, names
    number = count if names is None else len(names)
    if number is None or number == len(manifest.hosts):
        return None, names
    if number < 1:
        raise ConfigError(f"a restore needs at least one host, not {number}")
    share = -(-pages_of(memory) // number) * PAGE_SIZE
    return Layout(main=share, subs=(share,) * (number - 1)), names


def plan_restore(
    manifest: Manifest,
    layout: Layout | None,
    names: Sequence[str] | None,
    hosts: Sequence[HostInfo],
    runs: bool = False,
) -> RestorePlan:
    """The plan for `layout` (None: the checkpoint's own) on `names`, or on any of `hosts`."""
    problems = []
    if runs:
        problems.append(f"VM {manifest.vm} runs; stop it first with `dcres stop {manifest.vm}`")
    try:
        spec = spec_for(manifest, layout)
    except InputError as error:
        return RestorePlan(manifest.vm, manifest.checkpoint, (), (*problems, str(error)))
    shares = spec.layout.shares
    try:
        require_room(shares, names, hosts)
    except (InputError, NoRoom) as error:
        problems.append(str(error))
    places = list(names) if names is not None else _forecast(shares, hosts)
    planned = tuple(
        PlannedHost(
            host=place,
            role="sub" if index else "main",
            memory_bytes=share,
            pages=sum(part.pages for part in parts),
            read_bytes=sum(_stored_bytes(part) for part in parts),
        )
        for index, (place, share, parts) in enumerate(
            zip(places, shares, _parts_by_host(manifest, spec), strict=False)
        )
    )
    return RestorePlan(manifest.vm, manifest.checkpoint, planned, tuple(problems))


def _parts_by_host(manifest: Manifest, spec: VmSpec) -> list[tuple[HostSlice, ...]]:
    if len(spec.layout.shares) == 1:
        return [manifest.hosts]
    return [(part,) for part in manifest.hosts]


def _stored_bytes(part: HostSlice) -> int:
    return part.pages * PAGE_SIZE + sum(file.length_bytes for file in part.files)


def _forecast(shares: Sequence[int], hosts: Sequence[HostInfo]) -> list[str]:
    """Largest share to the emptiest host, in the order of the shares; "?" where none is left."""
    alive = sorted((h for h in hosts if h.alive), key=lambda h: -h.memory_free_bytes)
    names = [host.name for host in alive]
    names += ["?"] * (len(shares) - len(names))
    by_size = sorted(range(len(shares)), key=lambda index: -shares[index])
    place = dict(zip(by_size, names, strict=False))
    return [place[index] for index in range(len(shares))]
