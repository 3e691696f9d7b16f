"""What is known of one restore over the hosts: its plan, who serves parts, who loads which pages.

The coordinator asks the VM's hosts, and others only for parts that none of these has. A host
that has the main host's part makes the plan. Pages then go from the memory files to the hosts
that the plan names; a lazy restore leaves that to the pager, and so hosts need not wait for
the plan before they start what they run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dcres.actors.messages import (
    LoadOrder,
    MainPart,
    Planned,
    PlanOrder,
    Reading,
    Resumption,
)
from dcres.actors.ports import Port
from dcres.config import Layout, VmSpec
from dcres.model.operations.start import Restore
from dcres.model.pages import PAGE_SIZE, pages_of
from dcres.model.parts import Where
from dcres.paging.pager.share import headroom_pages
from dcres.paging.settings import SubAddress
from dcres.storage.format.manifest import Manifest, dumps


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


@dataclass
class Restoring:
    """What a restore of `manifest` has learned; `ports` are of hosts and helpers."""

    manifest: Manifest
    lazy: bool
    ports: dict[str, Port] = field(default_factory=dict)
    where: Where = field(default_factory=lambda: Where((), (), {}))
    main_part: MainPart | None = None  # the main host's part, if another host has it
    sources: dict[str, SubAddress] = field(default_factory=dict)  # part servers, by part
    _planned: Planned | None = None

    @property
    def text(self) -> str:
        """The manifest as hosts are told it."""
        return dumps(self.manifest)

    @property
    def begin(self) -> Restore:
        """What its machine must know of the checkpoint."""
        hosts = self.manifest.hosts
        parts = tuple(part.host for part in hosts)
        filled = tuple(part.host for part in hosts if part.pages)
        return Restore(self.manifest.checkpoint, parts, filled, self.lazy)

    def plan_order(self, shares_bytes: Sequence[int]) -> PlanOrder:
        """For the host that makes the plan."""
        capacities = capacities_of(shares_bytes, self.manifest.pages)
        return PlanOrder(self.text, capacities, self.where.holds, masks=not self.lazy)

    def learn_plan(self, planned: Planned) -> None:
        """Which pages go where."""
        self._planned = planned

    @property
    def planned(self) -> Planned:
        """The plan, once it was made."""
        assert self._planned is not None, "nothing is loaded before the plan is there"
        return self._planned

    def load_order(self, host: str) -> LoadOrder | None:
        """What a host loads before anything runs; no page with a lazy restore."""
        if self.lazy:
            return LoadOrder(self.text, ()) if host == self.where.targets[0] else None
        target = self.where.targets.index(host)
        readings = tuple(
            Reading(self.where.parts[part], pages, self._afar(self.where.parts[part], host))
            for (part, to), pages in self.planned.masks.items()
            if to == target
        )
        return LoadOrder(self.text, readings)

    def _afar(self, part: str, host: str) -> SubAddress | None:
        return None if part in self.where.here[host] else self.sources[part]

    @property
    def resumption(self) -> Resumption:
        """What the main host goes on from."""
        sources = dict(self.sources) if self.lazy else {}
        return Resumption(self.text, self.planned.targets, self.main_part, sources)

    @property
    def server_ports(self) -> dict[str, Port]:
        """The hosts that serve parts."""
        hosts = dict.fromkeys(self.where.holder(part) for part in self.sources)
        return {host: self.ports[host] for host in hosts}

    def facts(self, main: str, shares_bytes: Mapping[str, int]) -> dict[str, Any]:
        """Where the pages went and how many moved, as `dcres restore --json` prints it."""
        flow = self.planned.flow
        moved = self.where.moved_pages(flow)
        layout = [
            {
                "host": host,
                "role": "main" if host == main else "sub",
                "memory_bytes": share,
                "pages": sum(pages[self.where.targets.index(host)] for pages in flow),
            }
            for host, share in shares_bytes.items()
        ]
        return {"layout": layout, "pages_moved": moved, "bytes_moved": moved * PAGE_SIZE}
