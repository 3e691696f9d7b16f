"""What commands print for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dcres.api.placement import Placement
from dcres.api.plan import RestorePlan, plan_cells, verdict
from dcres.api.pruning import Pruning
from dcres.api.resizing import ChangePlan, DrainPlan, ResizePlan
from dcres.api.status import Host, HostStatus, VmStatus
from dcres.cli.memory_map import MemoryMap
from dcres.config import format_size
from dcres.demo import Step, Story
from dcres.doctor import Check, Status
from dcres.model.pages import PAGE_SIZE
from dcres.model.restore_plan import ASSUMPTION
from dcres.storage.format.checks import VerifyReport
from dcres.storage.store.protocols import Listed

CLOCK = "`hwclock -s` in it sets it, or `chronyc makestep` where chrony runs"
_BAR_WIDTH = 24
_PHASE_STYLES = {
    "running": "green",
    "off": "dim",
    "lost": "bold red",
    "unknown": "red",
    "io-error": "bold red",
    "internal-error": "bold red",
    "guest-panicked": "bold red",
}
_CHECK_STYLES = {Status.OK: "green", Status.WARN: "yellow", Status.FAIL: "bold red"}


def _table(*columns: str, right: Sequence[str] = ()) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", no_wrap=False)
    return table


def _size_of(pages: int) -> str:
    return format_size(pages * PAGE_SIZE)


def bar(fill: float, width: int = _BAR_WIDTH) -> Text:
    """A bar that is full at 1."""
    full = min(max(round(fill * width), 1 if fill > 0 else 0), width)
    style = "green" if fill <= 1 else "yellow"
    return Text("█" * full, style) + Text("░" * (width - full), "dim")


def status_view(
    status: VmStatus, checkpoints: Sequence[str] = (), placement: Placement | None = None
) -> RenderableType:
    """A bar per host, with paging, a map of memory, and the newest checkpoint."""
    phase = Text(status.doing, _PHASE_STYLES.get(status.doing, "yellow"))
    head = Text.assemble((status.vm, "bold"), "  ", phase)
    if status.accel:
        head.append(f"  {status.accel.upper()}, {_size_of(status.pages)} in use", "dim")
    if status.bringing_in:
        head.append(f"  {status.bringing}", "yellow")
    if status.words:
        head.append(f"\n{status.words}")
    tail = [f"newest of {len(checkpoints)} checkpoints: {checkpoints[-1]}"] if checkpoints else []
    if not status.hosts:
        return Group(head, *tail)
    number = ("in use", "share", "pages in", "pages out", "in/s", "out/s", "page-in µs")
    table = _table("host", "role", "", *number, right=number)
    for host in status.hosts:
        table.add_row(*_host_cells(host))
    picture: list[RenderableType] = [] if placement is None else ["", MemoryMap(placement)]
    return Group(head, table, *picture, *tail)


def _host_cells(host: HostStatus) -> list[RenderableType]:
    latency = ""
    if host.page_in_median_us is not None and host.page_in_p99_us is not None:
        latency = f"{host.page_in_median_us:.0f} (p99 {host.page_in_p99_us:.0f})"
    return [
        host.host if host.answers else f"{host.host} ({host.state})",
        host.role,
        bar(host.fill),
        _size_of(host.pages),
        _size_of(host.share_pages),
        str(host.pages_in),
        str(host.pages_out),
        f"{host.pages_in_per_s:.0f}",
        f"{host.pages_out_per_s:.0f}",
        latency,
    ]


def vms_view(statuses: Sequence[VmStatus]) -> RenderableType:
    """One line per VM."""
    if not statuses:
        return "no VM runs; start one with `dcres start VM.yaml`"
    table = _table("vm", "phase", "in use", "hosts", "", right=("in use",))
    for status in statuses:
        style = _PHASE_STYLES.get(status.doing, "yellow")
        hosts = " ".join(host.host for host in status.hosts)
        used = _size_of(status.pages) if status.hosts else ""
        table.add_row(status.vm, Text(status.doing, style), used, hosts, status.words)
    return table


def orphans_table(orphans: Sequence[dict[str, Any]]) -> RenderableType:
    """One line for what each cluster that has ended left here."""
    table = _table("cluster", "VMs", "processes", "memory", right=("memory",))
    for each in orphans:
        pids = " ".join(str(process["pid"]) for process in each["processes"])
        memory = format_size(each["memory_bytes"])
        table.add_row(each["cluster"] or "", " ".join(each["vms"]), pids, memory)
    return Group("left by clusters that have ended:", table)


def hosts_view(hosts: Sequence[Host], address: str) -> RenderableType:
    """One line per host of a cluster."""
    table = _table("host", "address", "for VMs", "free", right=("for VMs", "free"))
    for host in hosts:
        free = format_size(host.free_bytes) if host.alive else "dead"
        table.add_row(host.name, host.address, format_size(host.memory_bytes), free)
    return Group(f"cluster at {address}", table)


def checkpoint_view(facts: dict[str, Any]) -> RenderableType:
    """A checkpoint that was taken, host by host."""
    state = facts.get("run_state", "running")
    stood = f"the VM was paused for {facts['downtime_seconds'] * 1000:.0f} ms"
    if "verdict" in facts:
        stood += f" after {facts['rounds']} rounds: {facts['verdict']}"
    head = Text.assemble(
        (facts["checkpoint"], "bold"),
        f"  {_size_of(facts['pages'])} in {facts['seconds']:.2f} s, ",
        stood if state == "running" else f"the VM is {state}, as it was",
    )
    number = ("pages", "size", "written", "on disk", "seconds")
    table = _table("host", "role", *number, right=number)
    for host in facts["hosts"]:
        table.add_row(
            host["host"],
            host["role"],
            str(host["pages"]),
            _size_of(host["pages"]),
            format_size(host["bytes_written"]),
            format_size(host["file_bytes_allocated"]),
            f"{host['seconds']:.2f}",
        )
    moved = facts["pages_moved_for_checkpoint"]
    return Group(head, _upon(facts), table, f"pages moved between hosts for it: {moved}")


def _upon(facts: dict[str, Any]) -> str:
    """Whether it is an increment, and upon what."""
    saved = f"{_size_of(facts['pages_saved'])} saved"
    if facts["base"] is None:
        why = facts.get("full_because")
        return f"a full checkpoint, {saved}" + (f": {why}" if why else "")
    changed = _size_of(facts["pages_changed"])
    return f"an increment upon {facts['base']}: {changed} changed, {saved}"


def checkpoints_view(listing: Iterable[Listed]) -> RenderableType:
    """One line per checkpoint."""
    number = ("memory", "saved", "seconds")
    table = _table("checkpoint", "vm", "created (UTC)", "mode", *number, "hosts", right=number)
    empty = True
    for entry in listing:
        empty = False
        manifest = entry.manifest
        if manifest is None:
            table.add_row(entry.checkpoint, entry.vm, Text(entry.error or "damaged", "red"))
            continue
        table.add_row(
            entry.checkpoint,
            entry.vm,
            manifest.created.replace("T", " ").removesuffix("Z"),
            str(manifest.mode),
            format_size(manifest.memory_bytes),
            _size_of(manifest.pages),
            f"{manifest.seconds:.2f}",
            " ".join(part.host for part in manifest.hosts),
        )
    return "no checkpoint; take one with `dcres checkpoint VM`" if empty else table


def inspect_view(values: dict[str, Any]) -> RenderableType:
    """A manifest: what was saved, where, from what VM."""
    facts = _table("", "")
    for name in ("checkpoint", "vm", "created", "mode", "accel", "qemu_version", "generation"):
        facts.add_row(Text(name.replace("_", " "), "bold"), str(values[name]))
    facts.add_row(Text("memory", "bold"), format_size(values["memory_bytes"]))
    facts.add_row(Text("seconds", "bold"), f"{values['seconds']:.2f}")
    facts.add_row(Text("VM paused for", "bold"), f"{values['downtime_seconds']:.2f} s")
    for disk in values["disks"]:
        facts.add_row(Text("disk", "bold"), f"{disk['path']} (snapshot {disk['snapshot']})")
    number = ("share", "pages", "saved", "on disk")
    table = _table("host", "role", *number, "files", right=number)
    for host in values["hosts"]:
        files = [host["memory_file"], *(file["name"] for file in host["files"])]
        table.add_row(
            host["host"],
            host["role"],
            format_size(host["share_bytes"]),
            str(host["pages"]),
            _size_of(host["pages"]),
            format_size(host["file_bytes_allocated"]),
            " ".join(files),
        )
    return Group(facts, "", table)


def verify_view(report: VerifyReport) -> RenderableType:
    """Every file with a problem, or that there is none."""
    if report.ok:
        return f"{report.checkpoint} is whole: {len(report.files)} files, {report.pages} pages read"
    table = _table("host", "file", "problem", "also in")
    for file in report.files:
        if file.problem is not None:
            problem = Text(file.problem, "red")
            table.add_row(file.host, file.name, problem, "\n".join(file.also_in))
    return Group(Text(f"{report.checkpoint} is damaged", "bold red"), table)


def restore_view(facts: dict[str, Any]) -> RenderableType:
    """Where a VM was restored, and why there."""
    runs = facts.get("run_state", "running") == "running"
    again = "runs again" if runs else f"is there again, {facts['run_state']} as it was,"
    head = f"{facts['vm']} {again} from {facts['checkpoint']}, after {facts['seconds']:.2f} s"
    pages = "to hold" if facts.get("lazy") else "loaded"
    table = _table("host", "role", "share", pages, right=("share", pages))
    for host in facts["layout"]:
        share, loaded = format_size(host["memory_bytes"]), _size_of(host["pages"])
        table.add_row(host["host"], host["role"], share, loaded)
    tail = f"{facts['chosen']}; {format_size(facts['bytes_moved'])} over the network"
    if facts.get("lazy"):
        tail += f"\nits memory follows: `dcres status {facts['vm']}` tells how much is left"
    behind_s = facts.get("guest_clock_behind_seconds")
    lines = [Text(tail, "dim")]
    if not runs:
        lines.append(Text(f"`dcres resume {facts['vm']}` lets it run", "yellow"))
    if behind_s is not None:
        lines.append(Text(f"the guest's clock is {_span(behind_s)} behind; {CLOCK}", "yellow"))
    return Group(head, table, *lines)


def _span(seconds: float) -> str:
    """A length of time for people, in its largest unit."""
    for unit, length_s in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length_s:
            return f"{seconds / length_s:.0f} {unit}"
    return f"{seconds:.0f} s"


def plan_view(plan: RestorePlan) -> RenderableType:
    """What a restore would do."""
    number = ("share", "pages", "to read", "to verify")
    table = _table(
        "host", "role", "share", "pages", "to read", "over the network", "to verify", right=number
    )
    for host in plan.hosts:
        table.add_row(*plan_cells(host))
    lines: list[RenderableType] = [Text(problem, "red") for problem in plan.problems]
    if not lines:
        lines = [Text(verdict(plan), "green"), Text(ASSUMPTION, "dim")]
    if plan.chosen:
        lines.insert(0, Text(plan.chosen, "dim"))
    head = f"{plan.checkpoint} would be restored as VM {plan.vm}; nothing was changed"
    return Group(head, table, *lines)


def pruning_view(pruning: Pruning, *, dry_run: bool = False) -> RenderableType:
    """Which checkpoints of a VM stay, and why; which go."""
    table = _table("checkpoint", "begun", "size", "", right=("size",))
    gone = "would be removed" if dry_run else "removed"
    for each in pruning.fates:
        stays = each.problem or ", ".join(each.reasons)
        what = Text(stays) if stays else Text(gone, "yellow")
        begun = (each.created or "").replace("T", " ").removesuffix("Z")
        table.add_row(each.checkpoint, begun, format_size(each.size_bytes), what)
    left = [each for each in pruning.going if dry_run or each.removed]
    size = format_size(sum(each.size_bytes for each in left))
    tail = f"{len(left)} of {len(pruning.fates)} {gone}, {size}; kept: {pruning.keep}"
    return Group(table, Text(tail, "dim"), *(["nothing was changed"] if dry_run else []))


def drain_view(plan: DrainPlan) -> RenderableType:
    """What emptying a sub host would move."""
    head = f"{plan.host} of VM {plan.vm} would be emptied; nothing was changed"
    table = _table("to", "pages", "size", right=("pages", "size"))
    for host, pages in plan.moves.items():
        table.add_row(host, str(pages), _size_of(pages))
    return Group(head, table, *_verdict_on(plan))


def resize_view(plan: ResizePlan) -> RenderableType:
    """What other shares would mean: for every host, and for the pages that move."""
    head = f"VM {plan.vm} would be resized; nothing was changed"
    hosts = _table("host", "role", "share", "would be", "", right=("share", "would be"))
    for host in plan.hosts:
        both = (host.before_bytes, host.after_bytes)
        shares = [format_size(share) if share else "" for share in both]
        hosts.add_row(host.host or "?", host.role, *shares, host.change)
    moves = _table("from", "to", "pages", "size", right=("pages", "size"))
    for each in plan.moves:
        moves.add_row(each.source, each.target, str(each.pages), _size_of(each.pages))
    tables = [table for table in (hosts, moves) if table.row_count]
    return Group(head, *tables, *_verdict_on(plan))


def _verdict_on(plan: ChangePlan) -> list[Text]:
    problems = [Text(problem, "red") for problem in plan.problems]
    return problems or [Text(f"{_size_of(plan.pages)} would move", "green")]


def checks_view(checks: Sequence[Check]) -> RenderableType:
    """What this host can do, with remedies."""
    table = _table("", "check", "found")
    for check in checks:
        table.add_row(Text(check.status, _CHECK_STYLES[check.status]), check.name, check.detail)
        if check.remedy:
            table.add_row("", "", Text(f"→ {check.remedy}", _CHECK_STYLES[check.status]))
    return table


def story_view(story: Story) -> RenderableType:
    """The demonstration: a table of its steps and the verdict."""
    number = ("seconds", "pages in/s", "out/s", "page-in µs")
    table = _table("step", *number, "MiB per host (* main)", "checks", right=number)
    for step in story.steps:
        table.add_row(*_step_cells(step))
    total = sum(step.seconds for step in story.steps)
    verdict = (
        Text("the guest lost nothing", "bold green")
        if story.good
        else Text("the guest was harmed", "bold red")
    )
    words = (
        f": {story.checks} checks of its memory, {story.failures} failures, "
        f"{story.ticks_lost} ticks lost; {total:.0f} s in all"
    )
    lines: list[RenderableType] = [table, "", Text.assemble(verdict, words)]
    if story.accel != "kvm":
        lines.append(Text(f"Linux ran under {story.accel_why}", "dim"))
    lines += [Text(problem, "red") for problem in story.problems]
    if story.home is not None:
        lines.append(f"left running: `export DCRES_HOME={story.home}`, then `dcres status demo`;")
        lines.append("`dcres down --purge` ends it and removes all")
    return Group(*lines)


def _step_cells(step: Step) -> list[str]:
    def rate(value: float | None) -> str:
        return "" if value is None else f"{value:.0f}"

    places = [f"{h['host']}{'*' if h['role'] == 'main' else ''} {_mib(h)}" for h in step.hosts]
    guest = ""
    if step.guest is not None and step.guest["tick"]:
        failures = step.guest["failures"]
        guest = f"{failures} FAILED" if failures else f"{step.guest['checks']} ok"
    return [
        step.step,
        f"{step.seconds:.1f}",
        rate(step.pages_in_per_s),
        rate(step.pages_out_per_s),
        rate(step.page_in_median_us),
        " ".join(places),
        guest,
    ]


def _mib(host: dict[str, Any]) -> int:
    return int(host["pages"]) * PAGE_SIZE >> 20
