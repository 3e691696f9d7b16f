"""What a restore would do, worked out without doing anything, and shown."""

from __future__ import annotations

import html
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dcres.actors.control.choosing import Wish
from dcres.actors.control.coordinator import Coordinator
from dcres.actors.control.placing_restores import foresee
from dcres.actors.ray.fleet import RayFleet
from dcres.api.session import Session
from dcres.config import format_size
from dcres.errors import NotFound
from dcres.model.pages import PAGE_SIZE
from dcres.model.phase import VmPhase
from dcres.model.restore_plan import ASSUMPTION, START_S, PlannedHost
from dcres.storage.format.manifest import Manifest, dumps

log = logging.getLogger("dcres.restore")

_PLAN_TIMEOUT_S = 900.0


@dataclass(frozen=True, slots=True)
class RestorePlan:
    """Where a checkpoint would be restored; `problems` are sentences that say why it cannot be.

    `hosts` begins with the VM's, the main host first; then come those that only have parts.
    """

    vm: str
    checkpoint: str
    hosts: tuple[PlannedHost, ...]
    problems: tuple[str, ...]
    lazy: bool = False
    chosen: str = ""  # why these hosts

    @property
    def possible(self) -> bool:
        """Whether the restore would be tried."""
        return not self.problems

    @property
    def moved_bytes(self) -> int:
        """Bytes over the network, on all hosts."""
        return sum(host.moved_bytes for host in self.hosts)

    @property
    def verify_bytes(self) -> int:
        """Bytes that are read from stores and compared with checksums, on all hosts."""
        return sum(host.verify_bytes for host in self.hosts)

    @property
    def whole_seconds(self) -> float:
        """Estimated until all memory is where it belongs."""
        return START_S + max((host.seconds for host in self.hosts), default=0.0)

    @property
    def seconds(self) -> float:
        """Estimated until the guest runs; with a lazy restore its memory follows."""
        return START_S if self.lazy else self.whole_seconds

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as ``dcres restore --dry-run --json`` prints them."""
        return {
            "vm": self.vm,
            "checkpoint": self.checkpoint,
            "dry_run": True,
            "possible": self.possible,
            "problems": list(self.problems),
            "lazy": self.lazy,
            "chosen": self.chosen,
            "layout": [each.to_dict() for each in self.hosts if each.memory_bytes],
            "servers": [each.to_dict() for each in self.hosts if not each.memory_bytes],
            "pages_moved": self.moved_bytes // PAGE_SIZE,
            "bytes_moved": self.moved_bytes,
            "bytes_verified": self.verify_bytes,
            "seconds": round(self.seconds, 3),
            "whole_seconds": round(self.whole_seconds, 3),
            "assumption": ASSUMPTION,
        }

    def __repr__(self) -> str:
        places = ", ".join(
            f"{each.host} {format_size(each.memory_bytes)}"
            for each in self.hosts
            if each.memory_bytes
        )
        what = "; ".join(self.problems) or (
            f"{format_size(self.verify_bytes)} to read, {format_size(self.moved_bytes)} to move, "
            f"runs after ≈ {self.seconds:.1f} s"
        )
        return f"<RestorePlan {self.checkpoint} onto {places or 'nothing'}: {what}>"

    def _repr_html_(self) -> str:
        names = ("host", "role", "share", "pages", "to read", "over the network", "to verify")
        head = "".join(f"<th>{name}</th>" for name in names)
        rows = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"
            for cells in map(plan_cells, self.hosts)
        )
        words = "".join(f"<br>{html.escape(each)}" for each in self.problems or (verdict(self),))
        title = f"<b>{self.checkpoint}</b> {html.escape(self.chosen)}"
        return f"{title}<table><tr>{head}</tr>{rows}</table>{words}"


def plan_cells(host: PlannedHost) -> list[str]:
    """A host of a plan as people read it: one cell for each column of a table."""
    origins = ", ".join(f"{each} {format_size(n)}" for each, n in host.moved_from.items())
    return [
        host.host,
        host.role,
        format_size(host.memory_bytes) if host.memory_bytes else "",
        str(host.pages) if host.memory_bytes else "",
        format_size(host.read_bytes),
        origins and f"{format_size(host.moved_bytes)} ({origins})",
        format_size(host.verify_bytes),
    ]


def verdict(plan: RestorePlan) -> str:
    """What a plan that is possible comes to, in one line."""
    totals = f"{format_size(plan.verify_bytes)} to read and verify, "
    totals += f"{format_size(plan.moved_bytes)} over the network"
    if plan.lazy:
        when = f"the guest runs after about {plan.seconds:.1f} s, all its memory is there after"
        return f"it fits: {totals}; {when} {plan.whole_seconds:.1f} s"
    return f"it fits: {totals}; the guest runs after about {plan.seconds:.1f} s"


def plan_restore(
    session: Session, manifest: Manifest, wish: Wish, *, lazy: bool = False, take_over: bool = False
) -> RestorePlan:
    """The plan by the VM's coordinator; where there is none, it is made in this process."""
    try:
        coordinator = session.existing(manifest.vm).within(_PLAN_TIMEOUT_S)
    except NotFound:
        found = foresee(RayFleet(), manifest, wish, VmPhase.ABSENT, lazy=lazy, take_over=take_over)
    else:
        order = dumps(manifest), wish, lazy, take_over
        found = coordinator.call(Coordinator.plan_restore, *order)
    warn_of(found.left_out)
    return RestorePlan(
        manifest.vm, manifest.checkpoint, found.hosts, found.problems, lazy, found.chosen
    )


def warn_of(left_out: Iterable[str]) -> None:
    """Say which hosts could not be asked, and so take no part."""
    for sentence in left_out:
        log.warning("%s", sentence)
