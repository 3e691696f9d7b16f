"""What is left of clusters that have ended: how commands tell of it and end it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType

from dcres.cli.frame import Answer, Options, confirm
from dcres.cli.tables import orphans_table

if TYPE_CHECKING:
    from dcres.actors.host.orphans import Orphans

REMEDY = "no cluster can adopt them any more: `dcres down --orphans` ends them, checkpoints stay"


def found() -> list[Orphans]:
    """All that is left on this host."""
    import os

    from dcres.actors.host import orphans
    from dcres.config import HostSettings

    return orphans.find(HostSettings.from_environ(os.environ).ram)


def values_of(orphans: list[Orphans]) -> list[dict[str, Any]]:
    """As `--json` prints them."""
    return [each.to_dict() for each in orphans]


def told(orphans: list[Orphans]) -> str:
    """The end of a sentence about clusters; empty if nothing is left of any."""
    if not orphans:
        return ""
    names = ", ".join(each.name for each in orphans)
    return f"; clusters that have ended left {names} on this machine, see `dcres down --orphans`"


def with_orphans(shown: RenderableType, orphans: list[Orphans]) -> RenderableType:
    """What a command shows, and below it what is left of other clusters, if anything is."""
    if not orphans:
        return shown
    return Group(shown, "", orphans_table(values_of(orphans)), REMEDY)


def end_orphans(options: Options, *, yes: bool, dry_run: bool) -> Answer:
    """``dcres down --orphans``."""
    import os

    from dcres.actors.host import orphans
    from dcres.api.show import working
    from dcres.config import HostSettings
    from dcres.linux.interrupt import uninterrupted

    ram = HostSettings.from_environ(os.environ).ram
    left = orphans.find(ram)
    if not left or dry_run:
        shown = orphans_table(values_of(left)) if left else "no cluster has left anything here"
        return Answer({"orphans": values_of(left), "ended": False}, shown)
    names = [each.name for each in left]
    what = f"what is left of {', '.join(names)}"
    processes = sum(len(each.processes) for each in left)
    memory = sum(len(each.folders) for each in left)
    question = f"end {what} ({processes} processes, {memory} folders of guest memory) for good?"
    confirm(options, f"ending {what}", question, yes=yes)
    values = {each.cluster: each.to_dict() for each in left}
    words = {each.cluster: f"ended {each}" for each in left}
    with working("ending what is left"), uninterrupted():
        ended = [each for each in left if orphans.end(each, ram)]
    told = [words[each.cluster] for each in ended]
    return Answer(
        {"orphans": [values[each.cluster] for each in ended], "ended": True}, "\n".join(told)
    )
