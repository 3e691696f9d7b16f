"""``dcres bench NAME``: runs one benchmark with its progress on the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.status import Status
from rich.table import Table
from rich.text import Text

from dcres import bench
from dcres.bench.result import Result, Spread, spreads


def bench_command(
    name: str, *, quick: bool = False, folder: Path | None = None
) -> tuple[dict[str, Any], RenderableType]:
    """Run the benchmark `name`: what ``--json`` prints, and the same for people.

    Progress goes to standard error. Raises what `bench.run` raises.
    """
    console = Console(stderr=True, highlight=False)
    with Status(f"bench {name}", console=console) as status:

        def say(text: str) -> None:
            if console.is_terminal:
                status.update(f"bench {name}: {text}")
            else:
                console.print(f"bench {name}: {text}", soft_wrap=True)

        result = bench.run(name, quick=quick, folder=folder, say=say)
    return result.to_dict(), view(result)


def view(result: Result) -> RenderableType:
    """Medians with their spread, ratios, and the aims that were missed."""
    units = {row.what: row.unit for row in result.rows}
    parts: list[RenderableType] = [_table(bench.about(result.bench), spreads(result.rows), units)]
    parts.append(_table("side by side", result.ratios, {}))
    parts += [Text(f"not reached: {sentence}", style="yellow") for sentence in result.not_reached]
    return Group(*parts)


def _table(title: str, found: dict[str, Spread], units: dict[str, str]) -> Table:
    table = Table("", title=title, title_justify="left")
    for heading in ("median", "min", "max"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for what, spread in found.items():
        values = (f"{each:.4g}" for each in (spread.median, spread.min, spread.max))
        table.add_row(what, *values, units.get(what, ""))
    return table
