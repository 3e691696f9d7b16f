"""The commands about a machine and its local cluster; see `dcres.cli.commands` for VMs."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dcres.cli.frame import HERE, Answer, Options, YesOption, add_command, confirm, folder

if TYPE_CHECKING:
    from dcres.actors.ray.local_cluster import LocalCluster

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Virtual machines larger than one host: checkpointed in parallel, restored on any hosts.",
)

_CLUSTER = "Cluster"


@add_command(app, "doctor", panel=_CLUSTER, shared=HERE)
def doctor(options: Options) -> Answer:
    """Try what this host can do for dcres, and name the remedy for what it cannot."""
    from dcres import doctor
    from dcres.cli.tables import checks_view
    from dcres.config import HostSettings

    checks = doctor.examine(HostSettings.from_environ(os.environ))
    values = doctor.as_json(checks)
    return Answer(values, checks_view(checks), 0 if values["ok"] else 1)


@add_command(app, "demo", panel=_CLUSTER, shared=HERE)
def demo(
    options: Options,
    memory: Annotated[str, typer.Option(metavar="SIZE", help="The guest's memory.")] = "512MiB",
    keep: Annotated[
        bool, typer.Option("--keep", help="Leave the cluster and the VM running.")
    ] = False,
) -> Answer:
    """Show the main job on a cluster of its own: checkpoint, lose two hosts, restore."""
    from dcres.api.cluster import memory_size
    from dcres.cli.stage import ConsoleStage
    from dcres.cli.tables import story_view
    from dcres.demo import run

    with ConsoleStage() as stage:
        story = run(stage, memory_size(memory), keep)
    return Answer(story.to_dict(), story_view(story), 0 if story.good else 1)


@add_command(app, "up", panel=_CLUSTER, shared=HERE)
def up(
    options: Options,
    hosts: Annotated[int, typer.Option(min=1, max=200, help="How many hosts.")] = 3,
    memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="For VMs, on each host; default: a part of what is free"),
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            parser=folder,
            help="Where checkpoints go; with {host} in it every host has a store of its own. "
            "Default: DCRES_STORE, or `store` in the home.",
        ),
    ] = None,
    dashboard: Annotated[
        bool, typer.Option("--dashboard", help="Also start Ray's dashboard, which takes Ray jobs.")
    ] = False,
) -> Answer:
    """Start a local cluster of Ray nodes on this machine."""
    from dcres.actors.ray.local_cluster import LocalCluster
    from dcres.api.cluster import connect, memory_size
    from dcres.api.show import working
    from dcres.cli.tables import hosts_view
    from dcres.config import default_home, store_of_environ

    size = None if memory is None else memory_size(memory)
    with working(f"starting {hosts} hosts") as tell:
        place = store or store_of_environ()
        local = LocalCluster.start(
            default_home(), hosts, size, place, dashboard=dashboard, tell=tell
        )
        with connect(local.address) as cluster:
            found = cluster.hosts()
    values = {
        "address": local.address,
        "hosts": [asdict(host) for host in found],
        "store": local.store,
        "token_path": str(local.token_path),
        "dashboard": local.dashboard_url,
    }
    return Answer(values, hosts_view(found, local.address))


@add_command(app, "down", panel=_CLUSTER, shared=HERE)
def down(
    options: Options,
    purge: Annotated[
        bool,
        typer.Option(
            "--purge",
            help="Also remove what clusters made in the home, with all checkpoints in its store. "
            "Asks first; works without a running cluster.",
        ),
    ] = False,
    orphans: Annotated[
        bool,
        typer.Option(
            "--orphans",
            help="Instead, end VMs and free memory that clusters whose Ray is gone left on this "
            "machine. Asks first.",
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With --orphans: show what there is, and end nothing.")
    ] = False,
    yes: YesOption = False,
) -> Answer:
    """End the local cluster and its VMs; checkpoints stay."""
    from dcres.cli.orphans import end_orphans
    from dcres.errors import ConfigError

    if orphans and purge:
        raise ConfigError("--orphans and --purge are about different clusters; give one of them")
    if orphans:
        return end_orphans(options, yes=yes, dry_run=dry_run)
    if dry_run:
        raise ConfigError("--dry-run needs --orphans")
    return _end_cluster(options, purge=purge, yes=yes)


def _end_cluster(options: Options, *, purge: bool, yes: bool) -> Answer:
    from dcres.actors.ray.local_cluster import LocalCluster
    from dcres.actors.ray.local_home import Home
    from dcres.api.show import working
    from dcres.config import default_home
    from dcres.errors import NotFound
    from dcres.linux.interrupt import uninterrupted

    home = default_home()
    local = _running(home)
    if purge:
        _confirm_purge(options, home, local, yes)
    values: dict[str, Any] = {"stopped": local is not None, "hosts": []}
    told: list[str] = []
    if local is not None:
        with working("ending the cluster"), uninterrupted():
            local.stop()
        values["hosts"] = list(local.hosts)
        told.append(f"ended the cluster in {home} ({len(local.hosts)} hosts)")
    elif not purge and LocalCluster.clear_dead(home):
        told.append(f"removed what a cluster that ended by itself had left in {home}")
    elif not purge:
        raise NotFound(Home(home).none_runs)
    if purge:
        removed, left = _purge(home)
        values |= {"removed": removed, "left": left}
        told += [f"removed {path}" for path in removed] + [f"left {path}" for path in left]
    return Answer(values, "\n".join(told))


def _running(home: Path) -> LocalCluster | None:
    """The cluster to end, if one runs. Raises Conflict for one that may run elsewhere."""
    from dcres.actors.ray.local_cluster import LocalCluster
    from dcres.actors.ray.local_home import Home
    from dcres.errors import NotFound

    try:
        local = LocalCluster.load(home)
    except NotFound:
        Home(home).require_none_lives()
        return None
    local.require_here()
    return local


def _confirm_purge(options: Options, home: Path, local: LocalCluster | None, yes: bool) -> None:
    from dcres.actors.ray.local_home import Home
    from dcres.errors import NotFound

    place = Home(home)
    if not home.is_dir():
        raise NotFound(place.none_runs)
    own, _ = place.remains()
    if not own and not place.is_marked:
        raise NotFound(f"no local cluster runs in {home}, and none has left anything there")
    what = f"{', '.join(path.name for path in own)} in {home}" if own else str(home)
    end = "" if local is None else f"end the cluster in {home} and "
    question = f"{end}remove {what} for good, with all checkpoints there?"
    confirm(options, f"removing {what}", question, yes=yes)


def _purge(home: Path) -> tuple[list[str], list[str]]:
    from dcres.actors.ray.local_cluster import purge
    from dcres.api.show import working

    with working(f"removing what clusters made in {home}"):
        removed, left = purge(home)
    return [str(path) for path in removed], [str(path) for path in left]
