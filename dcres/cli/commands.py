"""The commands: each calls the API and says what came of it, as values and for people."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dcres.cli.clusters import app
from dcres.cli.frame import (
    CHECKPOINTS,
    HERE,
    Answer,
    Options,
    add_command,
)

if TYPE_CHECKING:
    from dcres.api.catalogue import Catalogue
    from dcres.api.cluster import Cluster
    from dcres.api.vm import Vm

VmArgument = Annotated[str, typer.Argument(metavar="VM", help="The VM's name.")]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Show what would happen, and change nothing.")
]
TakeOverOption = Annotated[
    bool,
    typer.Option(
        "--take-over",
        help="Take over the VM's name in the store from another cluster that you know has ended.",
    ),
]
_CLUSTER = "Cluster"
_VMS = "VMs"
_CONSOLE_POLL_S = 0.5


@contextmanager
def open_cluster(options: Options) -> Iterator[Cluster]:
    """The cluster that the options name. Ray is loaded here, and not before."""
    from dcres.api.cluster import connect

    with connect(options.address, store=options.store) as cluster:
        yield cluster


@contextmanager
def open_catalogue(options: Options) -> Iterator[Catalogue]:
    """The checkpoints; a cluster is joined only if they are not to be found here."""
    from dcres.actors.ray.gateway import disconnect
    from dcres.api import session

    catalogue, joined = session.open_catalogue(options.address, options.store)
    try:
        yield catalogue
    finally:
        if joined:
            disconnect()


@add_command(app, "start", panel=_VMS)
def start(
    options: Options,
    file: Annotated[Path, typer.Argument(metavar="VM.yaml", help="The VM file.")],
    hosts: Annotated[
        str | None,
        typer.Option(metavar="H1,H2,…", help="Hosts by name, the main host first; default: any."),
    ] = None,
    take_over: TakeOverOption = False,
) -> Answer:
    """Boot a VM over the hosts of its layout."""
    from dcres.api.status import VmStatus
    from dcres.cli.tables import status_view
    from dcres.config import load_vm_spec

    spec = load_vm_spec(file)
    with open_cluster(options) as cluster:
        vm = cluster.start(spec, hosts, take_over=take_over)
        status: VmStatus = vm.status()
    return Answer(vm.facts, status_view(status))


@add_command(app, "list", panel=_VMS)
def list_vms(options: Options) -> Answer:
    """List all VMs with phase and hosts, and what clusters that have ended left here."""
    from dcres.cli.orphans import found, told, values_of, with_orphans
    from dcres.cli.tables import vms_view
    from dcres.errors import ClusterError, NotFound

    left = found()
    try:
        with open_cluster(options) as cluster:
            statuses = cluster.statuses()
    except NotFound as error:
        raise NotFound(f"{error}{told(left)}") from None
    except ClusterError as error:
        raise ClusterError(f"{error}{told(left)}") from None
    values = {"vms": [status.to_dict() for status in statuses], "orphans": values_of(left)}
    return Answer(values, with_orphans(vms_view(statuses), left))


@add_command(app, "status", panel=_VMS, shared=CHECKPOINTS)
def status(
    options: Options,
    vm: VmArgument,
    over: Annotated[
        float,
        typer.Option(
            metavar="S", min=0.0, max=60.0, help="Seconds to measure paging rates for; at most 60."
        ),
    ] = 1.0,
    picture: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png|.svg", help="Also draw where memory is, into this file."),
    ] = None,
) -> Answer:
    """Show what a VM does, where its pages are, how hot they are, and how they move."""
    from dcres.api.placement import require_drawable
    from dcres.cli.tables import status_view
    from dcres.errors import NotFound

    if picture is not None:
        require_drawable(picture)
    with open_cluster(options) as cluster:
        machine = cluster.vm(vm)
        found = machine.status(over)
        placement = machine.placement() if found.answers and found.run_state else None
        listing = cluster.listing(vm)
    if picture is not None:
        if placement is None:
            raise NotFound(f"VM {vm} is {found.phase}, so there is no placement to draw")
        placement.save(picture)
    checkpoints = [entry.checkpoint for entry in listing]
    values = {
        **found.to_dict(),
        "checkpoints": checkpoints,
        "placement": None if placement is None else placement.to_dict(),
    }
    shown = status_view(found, checkpoints, placement)
    return Answer(values, shown, 1 if found.is_bad else 0)


@add_command(app, "resize", panel=_VMS)
def resize(
    options: Options,
    vm: VmArgument,
    main: Annotated[
        str | None, typer.Option(metavar="SIZE", help="What the main host may keep.")
    ] = None,
    subs: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE,SIZE,…",
            help="What the sub hosts may keep; with more sizes hosts join, with fewer some leave.",
        ),
    ] = None,
    dry_run: DryRunOption = False,
) -> Answer:
    """Change how much the hosts keep, while the VM runs; Ctrl-C cancels."""
    from dcres.cli.tables import resize_view, status_view

    with open_cluster(options) as cluster:
        machine = cluster.vm(vm)
        if dry_run:
            plan = machine.plan_resize(main, subs)
            return Answer(plan.to_dict(), resize_view(plan), 0 if plan.possible else 1)
        found = machine.resize(main, subs)
    return Answer(found.to_dict(), status_view(found))


@add_command(app, "drain", panel=_VMS)
def drain(
    options: Options,
    vm: VmArgument,
    host: Annotated[str, typer.Argument(metavar="HOST", help="One of the VM's sub hosts.")],
    dry_run: DryRunOption = False,
) -> Answer:
    """Empty a sub host while the VM runs, then leave it; Ctrl-C cancels."""
    from dcres.cli.tables import drain_view, status_view

    with open_cluster(options) as cluster:
        machine = cluster.vm(vm)
        if dry_run:
            plan = machine.plan_drain(host)
            return Answer(plan.to_dict(), drain_view(plan), 0 if plan.possible else 1)
        found = machine.drain(host)
    return Answer(found.to_dict(), status_view(found))


@add_command(app, "pause", panel=_VMS)
def pause(options: Options, vm: VmArgument) -> Answer:
    """Pause a VM's guest until `dcres resume`; checkpoints leave it paused."""
    from dcres.cli.tables import status_view

    with open_cluster(options) as cluster:
        found = cluster.vm(vm).pause()
    return Answer(found.to_dict(), status_view(found))


@add_command(app, "resume", panel=_VMS)
def resume(options: Options, vm: VmArgument) -> Answer:
    """Let a VM's guest run again, after a pause or a disk error."""
    from dcres.cli.tables import status_view

    with open_cluster(options) as cluster:
        found = cluster.vm(vm).resume()
    return Answer(found.to_dict(), status_view(found), 1 if found.is_bad else 0)


@add_command(app, "stop", panel=_VMS)
def stop(options: Options, vm: VmArgument) -> Answer:
    """End a VM; its checkpoints stay."""
    with open_cluster(options) as cluster:
        cluster.vm(vm).stop()
    return Answer({"vm": vm, "stopped": True}, f"stopped: {vm}; its checkpoints are kept")


@add_command(app, "console", panel=_VMS)
def console(
    options: Options,
    vm: VmArgument,
    follow: Annotated[
        bool, typer.Option("-f", "--follow", help="Follow it until Ctrl-C or the VM's end.")
    ] = False,
) -> Answer:
    """Show what a VM has written to its serial console."""
    from dcres.errors import ConfigError

    if options.json and follow:
        raise ConfigError("give --json or --follow, not both: --json prints one object")
    with open_cluster(options) as cluster:
        machine = cluster.vm(vm)
        if options.json:
            return Answer({"vm": vm, "console": machine.console()})
        offset = _write_console(machine, 0)
        if follow:
            _follow_console(machine, offset)
    return Answer({})


def _write_console(machine: Vm, offset: int) -> int:
    """Write what the VM's console has from `offset` on; returns where that ends."""
    text = machine.console_from(offset)
    sys.stdout.buffer.write(text)
    sys.stdout.flush()
    return offset + len(text)


def _follow_console(machine: Vm, offset: int) -> None:
    """Go on until Ctrl-C or the VM's end, which are no failures: nothing else ends it."""
    from dcres.errors import NotFound, VmLost

    with suppress(KeyboardInterrupt, NotFound, VmLost):
        while True:
            time.sleep(_CONSOLE_POLL_S)
            over = machine.status().phase == "off"  # before the last of it is read
            offset = _write_console(machine, offset)
            if over:
                return


@add_command(app, "bench", panel=_CLUSTER, shared=HERE)
def bench(
    options: Options,
    name: Annotated[str, typer.Argument(metavar="NAME|all", help="See docs/measurements.md.")],
    quick: Annotated[bool, typer.Option("--quick", help="Less data and fewer rounds.")] = False,
    folder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="On the disk to measure; default: /tmp.")
    ] = None,
) -> Answer:
    """Run one measurement, or all of them one after the other."""
    from dcres.bench.command import bench_command

    return Answer(*bench_command(name, quick=quick, folder=folder))
