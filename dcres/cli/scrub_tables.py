"""What `dcres scrub` prints for people."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dcres.api.scrubbing import Scrubbing
from dcres.config import format_size


def scrub_view(found: Scrubbing) -> RenderableType:
    """What was read in each store, and every damaged file with its checkpoints."""
    read = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("store", "vm"):
        read.add_column(column)
    for column in ("files", "read", "skipped", "damaged"):
        read.add_column(column, justify="right")
    read.add_column("oldest reading (UTC)")
    lines = list[RenderableType]()
    for store, scrubbed in found.stores.items():
        for each in scrubbed.vms:
            oldest = "never" if each.oldest is None else f"{each.oldest:%Y-%m-%d %H:%M:%S}"
            counts = (str(each.files), format_size(each.read_bytes), str(each.skipped))
            read.add_row(store, each.vm, *counts, str(each.damaged), oldest)
            if each.trouble:
                what = f"what was read of {each.vm} cannot be remembered: {each.trouble}"
                lines.append(Text(what, "yellow"))
    lines += [
        Text(f"{each} was deleted meanwhile, so nothing is said of it", "yellow")
        for each in found.changed
    ]
    if not read.row_count:
        lines.insert(0, "there are no checkpoints")
    if found.ok:
        return Group(read, *lines, Text("no damage was found", "green"))
    return Group(read, *lines, "", _damaged(found))


def _damaged(found: Scrubbing) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("host", "file", "is", "problem", "checkpoints"):
        table.add_column(column)
    for each in found.damaged:
        problem = Text(each.problem, "red")
        ids = "\n".join(each.checkpoints)
        table.add_row(each.host, each.name, str(each.state), problem, ids)
    return table
