"""``dcres bench NAME``: runs one benchmark, or all, with the progress on the terminal."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.status import Status
from rich.table import Table
from rich.text import Text

from dcres import bench
from dcres.bench.result import Result, Say, Spread, spreads
from dcres.errors import DcresError

ALL = "all"


def bench_command(
    name: str, *, quick: bool = False, folder: Path | None = None
) -> tuple[dict[str, Any], RenderableType, int]:
    """Run the benchmark `name`, or ``all``: what ``--json`` prints, the same for people, status.

    Progress goes to standard error. Raises what `bench.run` raises; with ``all`` a benchmark that
    cannot run is told at the end, and the others are run all the same.
    """
    console = Console(stderr=True, highlight=False)
    with Status(f"bench {name}", console=console) as status:
        if name != ALL:
            result = bench.run(name, quick=quick, folder=folder, say=_teller(console, status, name))
            return result.to_dict(), view(result), 0
        return _run_all(console, status, quick, folder)


def _run_all(
    console: Console, status: Status, quick: bool, folder: Path | None
) -> tuple[dict[str, Any], RenderableType, int]:
    results: list[Result] = []
    failed: dict[str, str] = {}
    for number, each in enumerate(bench.NAMES, 1):
        say = _teller(console, status, f"{each} ({number} of {len(bench.NAMES)})")
        try:
            began = time.monotonic()
            results.append(bench.run(each, quick=quick, folder=folder, say=say))
            console.print(f"bench {each}: done in {time.monotonic() - began:.0f} s")
        except DcresError as error:
            failed[each] = str(error)
            say(f"failed: {error}")
    values = {"bench": ALL, "results": [each.to_dict() for each in results], "failed": failed}
    told = [Text(f"{each} failed: {why}", style="red") for each, why in failed.items()]
    return values, Group(*map(view, results), *told), 1 if failed else 0


def _teller(console: Console, status: Status, name: str) -> Say:
    def say(text: str) -> None:
        if console.is_terminal:
            status.update(f"bench {name}: {text}")
        else:
            console.print(f"bench {name}: {text}", soft_wrap=True, markup=False)

    return say


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
