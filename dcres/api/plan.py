"""What a restore would do, worked out without doing anything.

The pages are planned as in a restore, by a host that has the main host's part. The time is an
estimate from the rates below; nothing is measured for it.
"""

from __future__ import annotations

import html
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from dcres.actors.control.restoring import Where, capacities_of
from dcres.actors.host.loading import make_plan
from dcres.actors.messages import PlanOrder
from dcres.actors.ray import gateway
from dcres.api.choosing import Choice, Seen, Wish, decide, require_name
from dcres.config import HostSettings, format_size
from dcres.errors import DcresError
from dcres.model.pages import PAGE_SIZE
from dcres.storage.format.manifest import Manifest, dumps
from dcres.storage.store.store import Store

STORE_BYTES_PER_S = 1000e6  # `load_1` to `load_3` in docs/measurements.md
NETWORK_BYTES_PER_S = 110e6  # what 1 Gbit/s leaves for pages
START_S = 1.0  # reserving memory, QEMU's start and the VM core
ASSUMPTION = (
    f"assumed: {STORE_BYTES_PER_S / 1e6:.0f} MB/s from each host's store, "
    f"{NETWORK_BYTES_PER_S / 1e6:.0f} MB/s in and out of each host, "
    f"{START_S:.0f} s to start QEMU"
)
_PLAN_TIMEOUT_S = 600.0

Flow = tuple[tuple[int, ...], ...]  # pages per part and target host
FlowOf = Callable[[str, PlanOrder], Flow]  # worked out on that host


@dataclass(frozen=True, slots=True)
class PlannedHost:
    """One host of a restore. `role` is main or sub, or parts: it only has parts of the checkpoint.

    All that a host reads is verified there: `read_bytes` for itself, small files included, and
    `served_bytes` of pages for others.
    """

    host: str
    role: str
    memory_bytes: int
    pages: int
    read_bytes: int = 0  # from its own store, for itself
    moved_from: Mapping[str, int] = field(default_factory=dict)  # host → bytes over the network
    served_bytes: int = 0  # from its own store, for other hosts

    @property
    def moved_bytes(self) -> int:
        """What comes over the network."""
        return sum(self.moved_from.values())

    @property
    def verify_bytes(self) -> int:
        """What is compared with checksums here."""
        return self.read_bytes + self.served_bytes

    @property
    def seconds(self) -> float:
        """The estimated time for all this; see `ASSUMPTION`."""
        crossing = max(self.moved_bytes, self.served_bytes)
        return max(self.verify_bytes / STORE_BYTES_PER_S, crossing / NETWORK_BYTES_PER_S)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            **asdict(self),
            "moved_bytes": self.moved_bytes,
            "verify_bytes": self.verify_bytes,
            "seconds": round(self.seconds, 3),
        }


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


def flow_on(host: str, order: PlanOrder) -> Flow:
    """The plan's numbers, from a host that has the main host's part."""
    return gateway.run_on(host, flow_here, order, timeout_s=_PLAN_TIMEOUT_S)


def flow_here(order: PlanOrder) -> Flow:
    """Runs on a host, or wherever the store is."""
    return make_plan(Store(HostSettings.from_environ(os.environ).store), order).flow


def plan_restore(
    manifest: Manifest,
    wish: Wish,
    seen: Sequence[Seen],
    *,
    lazy: bool = False,
    problems: Iterable[str] = (),
    flow_of: FlowOf = flow_on,
) -> RestorePlan:
    """The plan of a restore onto the hosts that would be chosen among those `seen`."""
    found = list(problems)
    hosts: tuple[PlannedHost, ...] = ()
    chosen = ""
    try:
        choice = decide(manifest, wish, seen)
        require_name(choice, seen)
        chosen = choice.why
        where = _where(manifest, choice, seen)
        shares = choice.layout.shares
        order = PlanOrder(dumps(manifest), capacities_of(shares, manifest.pages), where.holds)
        flow = flow_of(where.holder(manifest.main.host), order)
        hosts = _planned_hosts(manifest, choice, where, flow, lazy)
    except DcresError as error:
        found.append(str(error))
    return RestorePlan(manifest.vm, manifest.checkpoint, hosts, tuple(found), lazy, chosen)


def _where(manifest: Manifest, choice: Choice, seen: Sequence[Seen]) -> Where:
    """Which host has which part, as in a restore: others are asked for what the VM's hosts lack."""
    has = {each.info.name: each.parts for each in seen}
    parts = tuple(part.host for part in manifest.hosts)
    here = {host: has[host] for host in choice.hosts}
    return Where(parts, choice.hosts, here).completed(has, manifest.checkpoint)


def _planned_hosts(
    manifest: Manifest, choice: Choice, where: Where, flow: Flow, lazy: bool
) -> tuple[PlannedHost, ...]:
    read: Counter[str] = Counter()
    served: Counter[str] = Counter()
    moved: dict[str, Counter[str]] = {host: Counter() for host in where.here}
    for source, target, length in _transfers(manifest, where, flow, lazy):
        if source == target:
            read[target] += length
        else:
            served[source] += length
            moved[target][source] += length
    roles = {host: "sub" if index else "main" for index, host in enumerate(choice.hosts)}
    shares = dict(zip(choice.hosts, choice.layout.shares, strict=True))
    pages = dict(zip(choice.hosts, map(sum, zip(*flow, strict=True)), strict=True))
    return tuple(
        PlannedHost(
            host=host,
            role=roles.get(host, "parts"),
            memory_bytes=shares.get(host, 0),
            pages=pages.get(host, 0),
            read_bytes=read[host],
            moved_from=dict(moved[host]),
            served_bytes=served[host],
        )
        for host in where.here
    )


def _transfers(
    manifest: Manifest, where: Where, flow: Flow, lazy: bool
) -> Iterable[tuple[str, str, int]]:
    """From which host to which, and bytes: pages, and the small files of a part where it is read.

    A lazy restore has one part server for each part, which serves those that have the part, too.
    """
    for part, row, held in zip(manifest.hosts, flow, where.holds, strict=True):
        holder, readers = where.holder(part.host), set[str]()
        for target, pages, here in zip(where.targets, row, held, strict=True):
            source = target if here and not lazy else holder
            if pages:
                yield source, target, pages * PAGE_SIZE
                readers.add(source)
        small = sum(file.length_bytes for file in part.files)
        if part is manifest.main:  # placement, history and VM core are read in any case
            readers.add(where.targets[0] if held[0] else holder)
        for reader in readers:
            yield reader, reader, small
