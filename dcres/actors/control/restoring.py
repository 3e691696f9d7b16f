"""One restore, worked out over the hosts: who has which part, and who loads which pages.

The coordinator asks the VM's hosts, and others only for parts that none of these has. A host
that has the main host's part makes the plan. Pages then go from the memory files to the hosts
that the plan names; a lazy restore leaves that to the pager, and so hosts need not wait for
the plan before they start what they run.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from dcres.actors.messages import (
    Incarnation,
    LoadOrder,
    MainPart,
    PartsOrder,
    Planned,
    PlanOrder,
    Reading,
    Resumption,
)
from dcres.actors.ports import Fleet, Pending, Port
from dcres.actors.protocol import Parts
from dcres.config import Layout, VmSpec
from dcres.errors import CheckpointCorrupt, DcresError, NotFound
from dcres.model.pages import PAGE_SIZE, pages_of
from dcres.paging.pager.share import headroom_pages
from dcres.paging.settings import SubAddress
from dcres.storage.format.manifest import Manifest, dumps

log = logging.getLogger("dcres.coordinator")

Names = tuple[str, ...]  # hosts of the checkpoint, as names of their parts


def spec_for(manifest: Manifest, layout: Layout | None) -> VmSpec:
    """The VM file of a checkpoint with another layout. Raises ConfigError if it cannot hold it."""
    spec = VmSpec.model_validate(manifest.vm_spec)
    layout = layout or spec.layout
    layout.require_room_for(spec.memory)
    return spec.model_copy(update={"layout": layout})


def capacities_of(shares_bytes: Sequence[int], pages: int) -> tuple[int, ...]:
    """How many pages the plan may put on each host.

    The main host is not filled to the brim, or it would begin by sending pages away again;
    where that room is needed, it is given.
    """
    shares = [pages_of(share) for share in shares_bytes]
    spare = headroom_pages(shares[0]) if len(shares) > 1 else 0
    if sum(shares) - spare >= pages:
        shares[0] -= spare
    return tuple(shares)


@dataclass(frozen=True, slots=True)
class Where:
    """Which hosts have which parts, as far as was asked; the VM's hosts come first."""

    parts: Names
    targets: tuple[str, ...]
    here: Mapping[str, Names]

    @property
    def missing(self) -> Names:
        """Names that no host has."""
        found = {part for parts in self.here.values() for part in parts}
        return tuple(part for part in self.parts if part not in found)

    def completed(self, holders: Mapping[str, Names], checkpoint: str) -> Where:
        """With hosts outside the VM for what its own lack, no more of them than it takes.

        Raises NotFound for a part that no host has.
        """
        here, left = dict(self.here), set(self.missing)
        for host, parts in holders.items():
            if host not in here and left & set(parts):
                here[host] = parts
                left -= set(parts)
        if left:
            raise NotFound(
                f"the part that {', '.join(sorted(left))} saved of checkpoint {checkpoint} "
                "is on no host that answers; bring that host back"
            )
        return replace(self, here=here)

    @property
    def holds(self) -> tuple[tuple[bool, ...], ...]:
        """Per part: which target hosts have it."""
        return tuple(tuple(part in self.here[host] for host in self.targets) for part in self.parts)

    def holder(self, part: str) -> str:
        """A host that has `part`: the main host if it does, else another of the VM's, else any."""
        return next(host for host, parts in self.here.items() if part in parts)


@dataclass
class Restoring:
    """A restore from when its parts are found; `vm_ports` begin with the main host's."""

    manifest: Manifest
    vm_ports: Mapping[str, Port]
    fleet: Fleet
    incarnation: Incarnation
    lazy: bool
    where: Where
    helpers: Mapping[str, Port]  # hosts that only have parts
    planning: Pending[Planned]
    reading: Pending[MainPart] | None  # the main host's part, if another host has it
    starting: dict[str, tuple[Names, Pending[SubAddress]]] = field(
        default_factory=dict
    )  # servers, by host
    sources: dict[str, SubAddress] = field(default_factory=dict)  # by part
    servers: list[str] = field(default_factory=list)

    @cached_property
    def planned(self) -> Planned:
        """Which pages go where; waits until that is known. Raises NoRoom, CheckpointCorrupt."""
        return self.planning.result()

    @cached_property
    def main_part(self) -> MainPart | None:
        """The main host's part if another host has it; waits for it. Raises CheckpointCorrupt."""
        return None if self.reading is None else self.reading.result()

    @property
    def moved_pages(self) -> int:
        """Pages that cross the network."""
        return sum(
            pages
            for flow, held in zip(self.planned.flow, self.where.holds, strict=True)
            for pages, here in zip(flow, held, strict=True)
            if not here
        )

    def _port(self, host: str) -> Port:
        return self.vm_ports[host] if host in self.vm_ports else self.helpers[host]

    def serve(self) -> None:
        """Begin to start slice servers for the parts that somebody has to read from one.

        They are up when `await_servers` returns: QEMU starts meanwhile.
        """
        served: dict[str, list[str]] = {}
        for part in self._saved_parts() if self.lazy else self._parts_from_afar():
            served.setdefault(self.where.holder(part), []).append(part)
        for host, parts in served.items():
            self.servers.append(host)
            order = PartsOrder(self.incarnation, dumps(self.manifest), tuple(parts))
            self.starting[host] = tuple(parts), self._port(host).submit(Parts.serve_parts, order)

    def _saved_parts(self) -> list[str]:
        return [part.host for part in self.manifest.hosts if part.pages]

    def _parts_from_afar(self) -> list[str]:
        return [
            part
            for part, flow, held in zip(
                self.where.parts, self.planned.flow, self.where.holds, strict=True
            )
            if any(pages and not here for pages, here in zip(flow, held, strict=True))
        ]

    def await_servers(self) -> None:
        """Learn where the slice servers listen. Repeatable; raises what starting them raises."""
        while self.starting:
            host, (parts, pending) = next(iter(self.starting.items()))
            self.sources.update(dict.fromkeys(parts, pending.result()))
            del self.starting[host]

    def load_order(self, host: str) -> LoadOrder | None:
        """What a host loads before anything runs; no page with a lazy restore."""
        if self.lazy:
            return LoadOrder(dumps(self.manifest), ()) if host == self.where.targets[0] else None
        target = self.where.targets.index(host)
        readings = tuple(
            Reading(self.where.parts[part], pages, self._afar(self.where.parts[part], host))
            for (part, to), pages in self.planned.masks.items()
            if to == target
        )
        return LoadOrder(dumps(self.manifest), readings)

    def _afar(self, part: str, host: str) -> SubAddress | None:
        if part in self.where.here[host]:
            return None
        self.await_servers()
        return self.sources[part]

    @property
    def resumption(self) -> Resumption:
        """What the main host goes on from."""
        targets, main_part = self.planned.targets, self.main_part
        self.await_servers()
        if self.lazy:
            self._require_served()
        sources = dict(self.sources) if self.lazy else {}
        return Resumption(dumps(self.manifest), targets, main_part, sources)

    def _require_served(self) -> None:
        """CheckpointCorrupt for pages that nobody serves: the guest would read zeros."""
        for part, flow in zip(self.where.parts, self.planned.flow, strict=True):
            if any(flow) and part not in self.sources:
                raise CheckpointCorrupt(
                    f"page placement gives {part} pages that it did not save according to the "
                    f"manifest of {self.manifest.checkpoint}"
                )

    @property
    def server_ports(self) -> dict[str, Port]:
        """The hosts that serve parts."""
        return {host: self._port(host) for host in self.servers}

    def facts(self, shares_bytes: Sequence[int]) -> dict[str, Any]:
        """Where the pages went and how many moved, as `dcres restore --json` prints it."""
        moved = self.moved_pages
        layout = [
            {
                "host": host,
                "role": "main" if index == 0 else "sub",
                "memory_bytes": share,
                "pages": sum(flow[index] for flow in self.planned.flow),
            }
            for index, (host, share) in enumerate(zip(self.vm_ports, shares_bytes, strict=True))
        ]
        return {"layout": layout, "pages_moved": moved, "bytes_moved": moved * PAGE_SIZE}

    def end(self) -> None:
        """End the slice servers and unpin; the pages are where they belong. Repeatable."""
        for host in self.where.here:
            try:
                self._port(host).call(Parts.end_serving_parts)
            except DcresError as error:
                log.warning("%s keeps the checkpoint or its slice server: %s", host, error)
        self.servers.clear()
        self.fleet.leave(self.manifest.vm)


def prepare(
    manifest: Manifest,
    shares_bytes: Sequence[int],
    ports: Mapping[str, Port],
    fleet: Fleet,
    incarnation: Incarnation,
    lazy: bool,
) -> Restoring:
    """Find the parts, begin to plan, and start what serves parts.

    Raises NotFound for a part that no host has; for an eager restore, whose plan has been made
    when this returns, NoRoom and CheckpointCorrupt. Helpers may be left for `Fleet.leave`.
    """
    text = dumps(manifest)
    parts = tuple(part.host for part in manifest.hosts)
    asked = {host: port.submit(Parts.parts_here, text) for host, port in ports.items()}
    here: dict[str, Names] = {host: each.result() for host, each in asked.items()}
    where = Where(parts, tuple(ports), here)
    if where.missing:
        where = where.completed(fleet.holders(text), manifest.checkpoint)
    helpers = {host: fleet.visit(manifest.vm, host) for host in where.here if host not in ports}
    keeping = [helper.submit(Parts.parts_here, text) for helper in helpers.values()]
    planner = {**ports, **helpers}[where.holder(parts[0])]
    capacities = capacities_of(shares_bytes, manifest.pages)
    order = PlanOrder(text, capacities, where.holds, masks=not lazy)
    planning = planner.submit(Parts.plan, order)
    reading = None if where.holds[0][0] else planner.submit(Parts.read_main_part, text)
    made = Restoring(manifest, ports, fleet, incarnation, lazy, where, helpers, planning, reading)
    if not lazy:
        _ = made.main_part  # nothing is loaded from a checkpoint that cannot be resumed
        for each in keeping:  # who serves parts for a lazy restore keeps them from its start
            each.result()
    made.serve()
    return made
