"""The commands: each calls the API and says what came of it, as values and for people."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dcres.api.defaults import (
    DEFAULT_DOWNTIME_S,
    DEFAULT_FORMAT,
    DEFAULT_MAX_ROUNDS,
    DEFAULT_MODE,
    require_kind,
)
from dcres.cli.frame import Answer, Options, add_command

if TYPE_CHECKING:
    from dcres.api.catalogue import Catalogue
    from dcres.api.cluster import Cluster

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Virtual machines that span hosts: started, checkpointed in parallel, restored.",
)

VmArgument = Annotated[str, typer.Argument(metavar="VM", help="The VM's name.")]
CheckpointArgument = Annotated[
    str, typer.Argument(metavar="CKPT", help="The checkpoint's id; see `dcres checkpoints`.")
]
_HERE = ("json", "debug")  # for commands that join no cluster
_CLUSTER = "Cluster"
_VMS = "VMs"
_CHECKPOINTS = "Checkpoints"


@contextmanager
def _cluster(options: Options) -> Iterator[Cluster]:
    """The cluster that the options name. Ray is loaded here, and not before."""
    from dcres.api.cluster import connect

    with connect(options.address, store=options.store) as cluster:
        yield cluster


@contextmanager
def _catalogue(options: Options) -> Iterator[Catalogue]:
    """The checkpoints; a cluster is joined only if they are not to be found here."""
    from dcres.actors._ray import disconnect
    from dcres.api.session import open_catalogue

    catalogue, joined = open_catalogue(options.address, options.store)
    try:
        yield catalogue
    finally:
        if joined:
            disconnect()


@add_command(app, "doctor", panel=_CLUSTER, shared=_HERE)
def doctor(options: Options) -> Answer:
    """What this host can do for dcres, found out by doing it, and the remedy for what it cannot."""
    from dcres import doctor
    from dcres.cli.tables import checks_view
    from dcres.config import HostSettings

    checks = doctor.examine(HostSettings.from_environ(os.environ))
    values = doctor.as_json(checks)
    return Answer(values, checks_view(checks), 0 if values["ok"] else 1)


@add_command(app, "demo", panel=_CLUSTER, shared=_HERE)
def demo(
    options: Options,
    memory: Annotated[str, typer.Option(metavar="SIZE", help="The guest's memory.")] = "512MiB",
    keep: Annotated[
        bool, typer.Option("--keep", help="Leave the cluster and the VM running.")
    ] = False,
) -> Answer:
    """The main job, end to end, on a cluster of its own: checkpoint, lose two hosts, restore."""
    from dcres.api.cluster import memory_size
    from dcres.cli.stage import ConsoleStage
    from dcres.cli.tables import story_view
    from dcres.demo import run

    with ConsoleStage() as stage:
        story = run(stage, memory_size(memory), keep)
    return Answer(story.to_dict(), story_view(story), 0 if story.good else 1)


@add_command(app, "up", panel=_CLUSTER, shared=_HERE)
def up(
    options: Options,
    hosts: Annotated[int, typer.Option(min=1, max=200, help="How many hosts.")] = 3,
    memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="For VMs, on each host; default: a part of what is free"),
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(metavar="DIR", envvar="DCRES_STORE", help="Where checkpoints go."),
    ] = None,
    dashboard: Annotated[
        bool, typer.Option("--dashboard", help="With Ray's dashboard, for Ray jobs.")
    ] = False,
) -> Answer:
    """Start a local cluster of Ray nodes on this machine."""
    from dcres.actors.local_cluster import HEAD, LocalCluster
    from dcres.api.cluster import connect, memory_size
    from dcres.api.show import working
    from dcres.cli.tables import hosts_view
    from dcres.config import default_home

    size = None if memory is None else memory_size(memory)
    with working(f"starting {hosts} hosts"):
        local = LocalCluster.start(default_home(), hosts, size, store, dashboard=dashboard)
        with connect(local.address) as cluster:
            found = cluster.hosts()
    values = {
        "address": local.address,
        "hosts": [asdict(host) for host in found],
        "store": str(local.settings(HEAD).store),
        "token_path": str(local.token_path),
        "dashboard": local.dashboard_url,
    }
    return Answer(values, hosts_view(found, local.address))


@add_command(app, "down", panel=_CLUSTER, shared=_HERE)
def down(
    options: Options,
    purge: Annotated[
        bool, typer.Option("--purge", help="Remove the home with all its checkpoints, too.")
    ] = False,
) -> Answer:
    """End the local cluster and its VMs; checkpoints stay."""
    from dcres.actors.local_cluster import LocalCluster
    from dcres.api.interrupt import uninterrupted
    from dcres.api.show import working
    from dcres.config import default_home

    local = LocalCluster.load(default_home())
    with working("ending the cluster"), uninterrupted():
        local.stop()
        if purge:
            shutil.rmtree(local.home, ignore_errors=True)
    values = {"stopped": True, "hosts": list(local.hosts)}
    return Answer(values, f"ended the cluster in {local.home} ({len(local.hosts)} hosts)")


@add_command(app, "start", panel=_VMS)
def start(
    options: Options,
    file: Annotated[Path, typer.Argument(metavar="VM.yaml", help="The VM file.")],
    hosts: Annotated[
        str | None,
        typer.Option(metavar="H1,H2,…", help="Hosts by name, the main host first; default: any."),
    ] = None,
) -> Answer:
    """Boot a VM over the hosts of its layout."""
    from dcres.api.status import VmStatus
    from dcres.cli.tables import status_view
    from dcres.config import load_vm_spec

    spec = load_vm_spec(file)
    with _cluster(options) as cluster:
        vm = cluster.start(spec, None if hosts is None else hosts.split(","))
        status: VmStatus = vm.status()
    return Answer(vm.facts, status_view(status))


@add_command(app, "list", panel=_VMS)
def list_vms(options: Options) -> Answer:
    """All VMs with their phase and hosts."""
    from dcres.cli.tables import vms_view

    with _cluster(options) as cluster:
        statuses = cluster.statuses()
    values = {"vms": [status.to_dict() for status in statuses]}
    return Answer(values, vms_view(statuses))


@add_command(app, "status", panel=_VMS)
def status(
    options: Options,
    vm: VmArgument,
    over: Annotated[
        float, typer.Option(min=0.0, max=60.0, help="Seconds to measure paging rates for.")
    ] = 1.0,
) -> Answer:
    """Where a VM's pages are, and how they move."""
    from dcres.cli.tables import status_view

    with _cluster(options) as cluster:
        found = cluster.vm(vm).status(over)
        listing = cluster.listing(vm)
    checkpoints = [entry.checkpoint for entry in listing]
    values = {**found.to_dict(), "checkpoints": checkpoints}
    return Answer(values, status_view(found, checkpoints), 1 if found.phase == "lost" else 0)


@add_command(app, "resize", panel=_VMS)
def resize(
    options: Options,
    vm: VmArgument,
    main: Annotated[str, typer.Option(metavar="SIZE", help="What the main host may keep.")],
) -> Answer:
    """Change how much the main host keeps, while the VM runs."""
    from dcres.cli.tables import status_view

    with _cluster(options) as cluster:
        found = cluster.vm(vm).resize(main)
    return Answer(found.to_dict(), status_view(found))


@add_command(app, "stop", panel=_VMS)
def stop(options: Options, vm: VmArgument) -> Answer:
    """End a VM; its checkpoints stay."""
    with _cluster(options) as cluster:
        cluster.vm(vm).stop()
    return Answer({"vm": vm, "stopped": True}, f"{vm} has ended; its checkpoints are kept")


@add_command(app, "console", panel=_VMS)
def console(
    options: Options,
    vm: VmArgument,
    follow: Annotated[
        bool, typer.Option("-f", "--follow", help="Go on until Ctrl-C or the VM's end.")
    ] = False,
) -> Answer:
    """What a VM has written to its serial console."""
    from dcres.errors import ConfigError

    if options.json and follow:
        raise ConfigError("--json prints one object, so it does not go with --follow")
    with _cluster(options) as cluster:
        machine = cluster.vm(vm)
        if options.json:
            return Answer({"vm": vm, "console": machine.console()})
        offset = 0
        while True:
            text = machine.console_from(offset)
            offset += len(text)
            sys.stdout.buffer.write(text)
            sys.stdout.flush()
            if not follow:
                return Answer({})
            time.sleep(0.5)


@add_command(app, "checkpoint", panel=_CHECKPOINTS)
def checkpoint(
    options: Options,
    vm: VmArgument,
    mode: Annotated[
        str,
        typer.Option(
            metavar="MODE",
            help="live: the VM runs while it is saved. stop: it stands still meanwhile.",
        ),
    ] = DEFAULT_MODE,
    format: Annotated[
        str, typer.Option(metavar="FORMAT", help="Of memory files: sparse.")
    ] = DEFAULT_FORMAT,
    downtime: Annotated[
        float, typer.Option(metavar="MS", help="live: how long the VM may stand still.")
    ] = DEFAULT_DOWNTIME_S * 1000,
    max_rounds: Annotated[
        int, typer.Option(metavar="N", help="live: stop the VM after so many rounds at the latest.")
    ] = DEFAULT_MAX_ROUNDS,
) -> Answer:
    """Save a VM, every host its own pages at the same time; Ctrl-C gives it up."""
    from dcres.cli.tables import checkpoint_view

    require_kind(mode, format)
    with _cluster(options) as cluster:
        taken = cluster.vm(vm).checkpoint(
            mode, format=format, downtime_s=downtime / 1000, max_rounds=max_rounds
        )
        facts = taken.facts
    return Answer(facts, checkpoint_view(facts))


@add_command(app, "cancel", panel=_CHECKPOINTS)
def cancel(options: Options, vm: VmArgument) -> Answer:
    """Give up the checkpoint, start or restore of a VM that is under way."""
    with _cluster(options) as cluster:
        done = cluster.vm(vm).cancel()
    text = f"what was being done to {vm} is given up" if done else f"nothing is being done to {vm}"
    return Answer({"vm": vm, "cancelled": done}, text)


@add_command(app, "checkpoints", panel=_CHECKPOINTS)
def checkpoints(
    options: Options,
    vm: Annotated[str | None, typer.Argument(metavar="[VM]", help="Of this VM alone.")] = None,
) -> Answer:
    """All checkpoints, oldest first."""
    from dcres.api.vm import listed_facts
    from dcres.cli.tables import checkpoints_view

    with _catalogue(options) as catalogue:
        listing = catalogue.list(vm)
    values = {"checkpoints": [listed_facts(entry) for entry in listing]}
    return Answer(values, checkpoints_view(listing))


@add_command(app, "inspect", panel=_CHECKPOINTS)
def inspect(options: Options, ckpt: CheckpointArgument) -> Answer:
    """What a checkpoint holds: its manifest."""
    from dcres.cli.tables import inspect_view

    with _catalogue(options) as catalogue:
        values = catalogue.get(ckpt).model_dump(mode="json")
    return Answer(values, inspect_view(values))


@add_command(app, "verify", panel=_CHECKPOINTS)
def verify(options: Options, ckpt: CheckpointArgument) -> Answer:
    """Read every byte of a checkpoint and compare it with its checksums."""
    from dcres.api import vm
    from dcres.cli.tables import verify_view

    with _catalogue(options) as catalogue:
        report = vm.verify(catalogue, ckpt)
    files = [{**asdict(file), "ok": file.ok} for file in report.files]
    values = {"checkpoint": ckpt, "ok": report.ok, "pages": report.pages, "files": files}
    return Answer(values, verify_view(report), 0 if report.ok else 1)


@add_command(app, "restore", panel=_CHECKPOINTS)
def restore(
    options: Options,
    ckpt: CheckpointArgument,
    layout: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="YAML with main and subs, as in a VM file."),
    ] = None,
    single: Annotated[
        bool, typer.Option("--single", help="On one host with room for everything.")
    ] = False,
    hosts: Annotated[
        str | None,
        typer.Option(metavar="N|H1,H2,…", help="How many hosts, or their names, main first."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would happen, and change nothing.")
    ] = False,
) -> Answer:
    """Bring a VM back from a checkpoint, by default over as many hosts as it had."""
    from dcres.cli.tables import plan_view, restore_view
    from dcres.config import load_layout

    wanted = None if layout is None else load_layout(layout)
    where: int | list[str] | None = None
    if hosts is not None:
        where = int(hosts) if hosts.isdigit() else hosts.split(",")
    with _cluster(options) as cluster:
        found = cluster.checkpoint(ckpt)
        if dry_run:
            plan = found.plan(wanted, single=single, hosts=where)
            return Answer(plan.to_dict(), plan_view(plan), 0 if plan.possible else 1)
        facts = found.restore(wanted, single=single, hosts=where).facts
    return Answer(facts, restore_view(facts))


@add_command(app, "delete", panel=_CHECKPOINTS)
def delete(
    options: Options,
    ckpt: CheckpointArgument,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> Answer:
    """Remove a checkpoint for good."""
    from dcres.errors import ConfigError

    if not yes:
        if options.json or not sys.stdin.isatty():
            raise ConfigError(f"deleting {ckpt} has to be confirmed; say --yes")
        typer.confirm(f"remove checkpoint {ckpt} for good?", abort=True, err=True)
    with _catalogue(options) as catalogue:
        catalogue.delete(ckpt)
    return Answer({"checkpoint": ckpt, "deleted": True}, f"{ckpt} is deleted")
