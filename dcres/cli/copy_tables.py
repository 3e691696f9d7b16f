"""What the commands about copies print for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dcres.api.copying import Copied, KnownCopy
from dcres.config import format_size


def copied_view(done: Copied) -> RenderableType:
    """A copy that was made, host by host."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("host")
    for column in ("files", "sent", "was there", "seconds"):
        table.add_column(column, justify="right")
    for part in done.parts:
        sizes = (format_size(part.sent_bytes), format_size(part.there_bytes))
        table.add_row(part.host, str(part.files), *sizes, f"{part.seconds:.2f}")
    head = Text.assemble((done.checkpoint, "bold"), f"  at {done.place}, in {done.seconds:.2f} s")
    tail = "every byte there was read back"
    return Group(head, table, Text(tail, "dim"))


def copies_view(checkpoint: str, found: Sequence[KnownCopy]) -> RenderableType:
    """Where copies of a checkpoint are, and whether they are whole."""
    if not found:
        return f"no copy of {checkpoint} is on record; `dcres copy {checkpoint} --to URL` makes one"
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("url", "since (UTC)", "state", ""):
        table.add_column(column)
    for each in found:
        since = (each.since or "").replace("T", " ").removesuffix("Z")
        style = "green" if each.state == "whole" else "bold red"
        table.add_row(each.url, since, Text(each.state, style), each.why)
    return table
