"""The commands about checkpoints; `dcres.cli.commands` has the others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dcres.api.defaults import (
    DEFAULT_DOWNTIME_S,
    DEFAULT_FORMAT,
    DEFAULT_MAX_ROUNDS,
    DEFAULT_MODE,
    DEFAULT_RATE,
    require_kind,
)
from dcres.cli.clusters import app
from dcres.cli.commands import (
    DryRunOption,
    TakeOverOption,
    VmArgument,
    open_catalogue,
    open_cluster,
)
from dcres.cli.frame import CHECKPOINTS, Answer, Options, YesOption, add_command, confirm

CheckpointArgument = Annotated[
    str, typer.Argument(metavar="CKPT", help="The checkpoint's id; see `dcres checkpoints`.")
]
FromOption = Annotated[
    str | None,
    typer.Option("--from", metavar="URL", help="Where copies are; see `dcres copy`."),
]
CHECKPOINTS_PANEL = "Checkpoints"


@add_command(app, "checkpoint", panel=CHECKPOINTS_PANEL)
def checkpoint(
    options: Options,
    vm: VmArgument,
    mode: Annotated[
        str,
        typer.Option(
            metavar="MODE",
            help="live: the VM runs while it is saved. stop: it is paused for all of it.",
        ),
    ] = DEFAULT_MODE,
    format: Annotated[
        str,
        typer.Option(
            metavar="FORMAT",
            help="Of memory files. segmented: increments. packed: all pages, close together. "
            "sparse: each at its place.",
        ),
    ] = DEFAULT_FORMAT,
    full: Annotated[
        bool, typer.Option("--full", help="Save all pages, not only what has changed.")
    ] = False,
    downtime: Annotated[
        float, typer.Option(metavar="MS", help="live: milliseconds that the VM may be paused.")
    ] = DEFAULT_DOWNTIME_S * 1000,
    max_rounds: Annotated[
        int, typer.Option(metavar="N", help="live: pause the VM after N rounds at the latest.")
    ] = DEFAULT_MAX_ROUNDS,
) -> Answer:
    """Save a VM, all hosts in parallel what has changed there; Ctrl-C cancels."""
    from dcres.cli.tables import checkpoint_view

    require_kind(mode, format)
    with open_cluster(options) as cluster:
        taken = cluster.vm(vm).checkpoint(
            mode, format=format, downtime_s=downtime / 1000, max_rounds=max_rounds, full=full
        )
        facts = taken.facts
    return Answer(facts, checkpoint_view(facts))


@add_command(app, "cancel", panel=CHECKPOINTS_PANEL)
def cancel(options: Options, vm: VmArgument) -> Answer:
    """Cancel what is being done to a VM: a checkpoint, start, restore or change of shares."""
    with open_cluster(options) as cluster:
        done = cluster.vm(vm).cancel()
    text = f"cancelled: what was being done to {vm}" if done else f"nothing is being done to {vm}"
    return Answer({"vm": vm, "cancelled": done}, text)


@add_command(app, "checkpoints", panel=CHECKPOINTS_PANEL, shared=CHECKPOINTS)
def checkpoints(
    options: Options,
    vm: Annotated[str | None, typer.Argument(metavar="VM", help="Only those of this VM.")] = None,
    source: FromOption = None,
) -> Answer:
    """List all checkpoints, oldest first; with --from those that have a copy there."""
    from dcres.api.catalogue import listed_facts
    from dcres.cli.tables import checkpoints_view

    if source is not None:
        from dcres.api.copying import list_copies

        listing = list_copies(source, vm)
    else:
        with open_catalogue(options) as catalogue:
            listing = catalogue.list(vm)
    values = {"checkpoints": [listed_facts(entry) for entry in listing]}
    return Answer(values, checkpoints_view(listing))


@add_command(app, "inspect", panel=CHECKPOINTS_PANEL, shared=CHECKPOINTS)
def inspect(options: Options, ckpt: CheckpointArgument) -> Answer:
    """Show what a checkpoint holds: its manifest."""
    from dcres.cli.tables import inspect_view

    with open_catalogue(options) as catalogue:
        values = catalogue.get(ckpt).model_dump(mode="json")
    return Answer(values, inspect_view(values))


@add_command(app, "verify", panel=CHECKPOINTS_PANEL, shared=CHECKPOINTS)
def verify(options: Options, ckpt: CheckpointArgument) -> Answer:
    """Read every byte of a checkpoint and compare it with its checksums."""
    from dcres.api import catalogue as catalogues
    from dcres.cli.tables import verify_view

    with open_catalogue(options) as catalogue:
        report = catalogues.verify(catalogue, ckpt)
    files = [file.to_dict() for file in report.files]
    values = {"checkpoint": ckpt, "ok": report.ok, "pages": report.pages, "files": files}
    return Answer(values, verify_view(report), 0 if report.ok else 1)


@add_command(app, "scrub", panel=CHECKPOINTS_PANEL, shared=CHECKPOINTS)
def scrub(
    options: Options,
    rate: Annotated[
        str, typer.Option(metavar="100MB/s", help="The most that is read on each host, or none.")
    ] = DEFAULT_RATE,
    vm: Annotated[
        str | None, typer.Option("--vm", metavar="VM", help="Only checkpoints of this VM.")
    ] = None,
    older: Annotated[
        str | None,
        typer.Option(metavar="7d", help="Only what was not read for so long; default: all."),
    ] = None,
) -> Answer:
    """Read everything in the stores, each file once, and find damage; Ctrl-C, and it goes on."""
    from dcres.api import scrubbing
    from dcres.cli.scrub_tables import scrub_view

    with open_catalogue(options) as catalogue:
        limit = None if rate == "none" else rate
        found = scrubbing.scrub(catalogue, vm, limit, older)
    return Answer(found.to_dict(), scrub_view(found), 0 if found.ok else 1)


@add_command(app, "restore", panel=CHECKPOINTS_PANEL, shared=CHECKPOINTS)
def restore(
    options: Options,
    ckpt: CheckpointArgument,
    layout: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Shares: YAML with main and subs, as in a VM file."),
    ] = None,
    single: Annotated[
        bool, typer.Option("--single", help="On one host with room for everything.")
    ] = False,
    hosts: Annotated[
        str | None,
        typer.Option(metavar="N|H1,H2,…", help="How many hosts, or their names, main host first."),
    ] = None,
    lazy: Annotated[
        bool, typer.Option("--lazy", help="The guest runs at once; its memory follows.")
    ] = False,
    source: FromOption = None,
    dry_run: DryRunOption = False,
    take_over: TakeOverOption = False,
) -> Answer:
    """Restore a VM from a checkpoint, on hosts that you name or that dcres finds.

    With --from URL the hosts first bring what their stores lack of it from a copy.
    """
    from dcres.cli.tables import plan_view, restore_view
    from dcres.config import load_layout
    from dcres.errors import ConfigError

    if source is not None and dry_run:
        raise ConfigError(
            "--dry-run changes nothing, and --from brings the checkpoint into stores; leave one "
            "out: `dcres copies CKPT --from URL` says whether the copy is whole"
        )
    wanted = None if layout is None else load_layout(layout)
    # isdigit by itself is true of ², which is no number to int().
    where = int(hosts) if hosts and hosts.isascii() and hosts.isdigit() else hosts
    with open_cluster(options) as cluster:
        if source is None:
            found = cluster.checkpoint(ckpt)
        else:
            found = cluster.bring(ckpt, source, hosts=where)
        if dry_run:
            plan = found.plan(wanted, single=single, hosts=where, lazy=lazy, take_over=take_over)
            return Answer(plan.to_dict(), plan_view(plan), 0 if plan.possible else 1)
        vm = found.restore(wanted, single=single, hosts=where, lazy=lazy, take_over=take_over)
        facts = vm.facts
    return Answer(facts, restore_view(facts))


@add_command(app, "delete", panel=CHECKPOINTS_PANEL, shared=CHECKPOINTS)
def delete(
    options: Options,
    ckpt: CheckpointArgument,
    yes: YesOption = False,
) -> Answer:
    """Remove a checkpoint for good."""
    confirm(options, f"deleting {ckpt}", f"remove checkpoint {ckpt} for good?", yes=yes)
    with open_catalogue(options) as catalogue:
        catalogue.delete(ckpt)
    return Answer({"checkpoint": ckpt, "deleted": True}, f"deleted: {ckpt}")


@add_command(app, "prune", panel=CHECKPOINTS_PANEL, shared=CHECKPOINTS)
def prune(
    options: Options,
    vm: VmArgument,
    keep: Annotated[
        str | None,
        typer.Option(
            metavar="RULES",
            help="Such as last=3,hourly=24,daily=7; without it the VM file's protect.keep.",
        ),
    ] = None,
    dry_run: DryRunOption = False,
    yes: YesOption = False,
) -> Answer:
    """Remove a VM's checkpoints but the newest, and those of so many hours, days or weeks."""
    from dcres.api import pruning
    from dcres.cli.tables import pruning_view

    with open_catalogue(options) as catalogue:
        planned = pruning.plan_pruning(catalogue, vm, keep)
        if dry_run:
            return Answer(planned.to_dict(), pruning_view(planned, dry_run=True))
        if count := len(planned.going):
            question = f"remove {count} of {len(planned.fates)} checkpoints of {vm} for good?"
            confirm(options, f"pruning {vm}", question, yes=yes)
        done = pruning.prune(catalogue, planned)
    return Answer(done.to_dict(), pruning_view(done), 1 if done.problems else 0)
