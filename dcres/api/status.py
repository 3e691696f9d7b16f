"""Clusters and VMs as they are at one moment: plain values that print well."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from dcres.config import format_size
from dcres.model.pages import PAGE_SIZE
from dcres.model.phase import HostState, VmPhase
from dcres.model.run_state import RunState, advice, is_trouble


@dataclass(frozen=True, slots=True)
class Host:
    """A host of the cluster and how much memory VMs may use on it."""

    name: str
    address: str
    memory_bytes: int
    free_bytes: int
    alive: bool

    def __repr__(self) -> str:
        free = f"{format_size(self.free_bytes)} of {format_size(self.memory_bytes)} free"
        return f"<Host {self.name}: {free if self.alive else 'dead'}>"


@dataclass(frozen=True, slots=True)
class HostStatus:
    """One host's part of a running VM.

    `pages_in` and `pages_out` count since the VM started here; the rates are 0 unless they
    were measured (`Vm.status` with `over_s`). Latencies are the main host's.
    """

    host: str
    role: str
    pages: int
    share_pages: int
    pages_in: int
    pages_out: int
    page_in_median_us: float | None = None
    page_in_p99_us: float | None = None
    pages_in_per_s: float = 0.0
    pages_out_per_s: float = 0.0
    restarts: int = 0  # of its pager or memory server, since the host's actor was started
    state: str = HostState.ANSWERS  # what came of asking it; the numbers are the last it gave
    why: str = ""  # that it does not answer, or has lost what it had
    silent_since: str | None = None

    @property
    def answers(self) -> bool:
        """Whether the numbers are those of now."""
        return self.state in (HostState.ANSWERS, HostState.OFF)

    @property
    def fill(self) -> float:
        """The part of its share that is used, 0 to 1; more while pages are on their way out."""
        return self.pages / self.share_pages if self.share_pages else 0.0


@dataclass(frozen=True, slots=True)
class VmStatus:
    """A VM as its hosts see it; `hosts` are all that are known, the main host first.

    `run_state` is the guest's, where the main host answers, and `advice` what to do about it: a VM
    whose phase is ``running`` may be paused, or wait for a disk that failed.
    `operation` is what is being done to it, `last_operation` what was done last.
    While `bringing_in` a lazy restore is under way, and `pages_to_bring` pages are still in the
    checkpoint alone.
    """

    vm: str
    phase: str
    why: str = ""
    accel: str = ""
    run_state: str = ""
    console: str = ""
    hosts: tuple[HostStatus, ...] = ()
    bringing_in: bool = False
    pages_to_bring: int = 0
    generation: int | None = None
    advice: str = ""
    failed_disks: tuple[str, ...] = ()
    # What was done to it, step by step: `dcres.actors.control.journal` has the form.
    operation: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)
    last_operation: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)

    @property
    def doing(self) -> str:
        """The phase, or what the guest is in where the phase only says that it is up."""
        if self.phase == VmPhase.RUNNING and self.run_state:
            return self.run_state
        return self.phase

    @property
    def words(self) -> str:
        """Why it is not well and what to do, as far as there is something to say."""
        return "; ".join(filter(None, [self.why, ", ".join(self.failed_disks), self.advice]))

    @property
    def is_bad(self) -> bool:
        """Whether the VM needs help."""
        troubled = bool(self.run_state) and is_trouble(RunState(self.run_state))
        return troubled or self.phase in (VmPhase.LOST, VmPhase.UNKNOWN)

    @property
    def answers(self) -> bool:
        """Whether all hosts answer, so that there is a placement to be seen."""
        return bool(self.hosts) and all(host.answers for host in self.hosts)

    @property
    def pages(self) -> int:
        """Pages that exist, on all hosts; a page the guest never touched is nowhere."""
        return sum(host.pages for host in self.hosts)

    @property
    def bringing(self) -> str:
        """How far a lazy restore is, for people."""
        return f"bringing in: {format_size(self.pages_to_bring * PAGE_SIZE)} left"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as ``dcres status --json`` prints them."""
        return asdict(self)

    def __repr__(self) -> str:
        parts = ", ".join(
            f"{host.host} {format_size(host.pages * PAGE_SIZE)}"
            f"/{format_size(host.share_pages * PAGE_SIZE)}"
            for host in self.hosts
        )
        words = self.words if self.advice or not self.answers else ""
        tail = "; ".join(filter(None, [parts, words, self.bringing if self.bringing_in else ""]))
        return f"<VmStatus {self.vm} {self.doing}{': ' if tail else ''}{tail}>"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{host.host}</td><td>{host.role}</td><td>{host.pages}</td>"
            f"<td>{host.share_pages}</td><td>{host.pages_in}</td><td>{host.pages_out}</td></tr>"
            for host in self.hosts
        )
        head = "".join(
            f"<th>{name}</th>" for name in ("host", "role", "pages", "share", "in", "out")
        )
        bringing = f", {self.bringing}" if self.bringing_in else ""
        words = f"<br>{html.escape(self.words)}" if self.words else ""
        title = f"<b>{self.vm}</b>: {self.doing}{bringing}{words}"
        return f"{title}<table><tr>{head}</tr>{rows}</table>"


def status_of(answer: Mapping[str, Any]) -> VmStatus:
    """A `VmStatus` from a coordinator's answer."""
    parts: Sequence[Mapping[str, Any]] = answer["hosts"]
    main: Mapping[str, Any] = parts[0] if parts else {}
    bringing_in = bool(main.get("bringing_in"))
    reached = main.get("host_state", HostState.ANSWERS) in (HostState.ANSWERS, HostState.OFF)
    run_state = str(main.get("run_state", "")) if reached else ""
    return VmStatus(
        vm=answer["vm"],
        phase=answer["phase"],
        why=answer["why"] or _links_down(main) or _not_in_store(main),
        accel=str(main.get("accel", "")),
        run_state=run_state,
        console=str(main.get("console", "")),
        hosts=tuple(_host_status(part, index == 0) for index, part in enumerate(parts)),
        bringing_in=bringing_in,
        pages_to_bring=int(main["pages_to_move"]) if bringing_in else 0,
        generation=answer.get("generation"),
        advice=_advice(answer, run_state),
        failed_disks=tuple(main.get("failed_disks", ())),
        operation=answer.get("operation"),
        last_operation=answer.get("last_operation"),
    )


def _advice(answer: Mapping[str, Any], run_state: str) -> str:
    """What to do about a guest that is not running, where nothing else is done to its VM."""
    if answer["phase"] != VmPhase.RUNNING or not run_state:
        return ""
    return advice(answer["vm"], RunState(run_state))


def _links_down(main: Mapping[str, Any]) -> str:
    """Which hosts the pager has lost the connection to, and why; the guest may wait for them."""
    links: Mapping[str, Mapping[str, str]] = main.get("links", {})
    return "; ".join(
        f"{host} is not connected ({link['trouble']})"
        for host, link in links.items()
        if link["state"] != "ready" and link["trouble"]
    )


def _not_in_store(main: Mapping[str, Any]) -> str:
    """What its store does not know of it, and why."""
    return "; ".join(filter(None, (main.get("unrecorded", ""), main.get("unclaimed", ""))))


def _host_status(part: Mapping[str, Any], is_main: bool) -> HostStatus:
    """A host as it is now, or as it was when it last answered; zeros where it never has."""
    pages = part.get("pages", [0])[0] if is_main else part.get("held_pages", 0)
    return HostStatus(
        host=part["host"],
        role="main" if is_main else "sub",
        pages=int(pages),
        share_pages=int(part.get("limit_pages" if is_main else "capacity_pages", 0)),
        # What the main host pages in leaves a sub host.
        pages_in=int(part.get("pages_in", 0)),
        pages_out=int(part.get("pages_out", 0)),
        page_in_median_us=_number(part.get("page_in_median_us")),
        page_in_p99_us=_number(part.get("page_in_p99_us")),
        restarts=int(part.get("restarts", 0)),
        state=part.get("host_state", HostState.ANSWERS),
        why=part.get("host_why", ""),
        silent_since=part.get("silent_since"),
    )


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def with_rates(first: VmStatus, second: VmStatus, seconds: float) -> VmStatus:
    """The second of two statuses, with paging rates over the time between them."""
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
