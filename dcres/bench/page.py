"""docs/measurements.md, made of the results that benchmarks left beside its figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dcres import bench
from dcres.bench.result import Aim, Figure, Result, Spread, spreads

_HEAD = """\
# Measurements

Written by `scripts/bench`, which runs every benchmark and makes this page and its figures anew.
Each benchmark goes in rounds; a round measures everything once, one thing after the other, so
that the two values of a ratio are seconds apart. Shown are the median over the rounds, the least
and the greatest value. What is measured, exactly, stands at the head of the module named. What is
known of why an aim is missed: [decisions/missed-aims.md](decisions/missed-aims.md).
"""


def save(result: Result, figures: Path) -> None:
    """Keep a result as ``FIGURES/NAME.json``."""
    figures.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result.to_dict(), indent=1, ensure_ascii=False)
    (figures / f"{result.bench}.json").write_text(text + "\n")


def load(figures: Path) -> list[Result]:
    """The results that are kept, in the order of `bench.NAMES`."""
    found = []
    for name in bench.NAMES:
        path = figures / f"{name}.json"
        if path.exists():
            found.append(Result.from_dict(json.loads(path.read_text())))
    return found


def write(page: Path, figures: Path) -> None:
    """Make `page` of all results in `figures`; plots that are not there are left out."""
    sections = [_HEAD, *(_section(result, figures, page) for result in load(figures))]
    page.write_text("\n".join(sections))


def _section(result: Result, figures: Path, page: Path) -> str:
    lines = [
        f"## {result.bench}: {bench.about(result.bench)}",
        "",
        f"Module: `dcres/bench/{result.bench}.py`. To repeat:",
        "",
        *(f"    {command}" for command in result.commands),
        "",
        *_machine(result),
        "",
        *_table(spreads(result.rows), {row.what: row.unit for row in result.rows}, "measured"),
        "",
        *_table(result.ratios, {}, "ratio, side by side"),
        "",
        *_aims(result),
        "",
        *_plot(result, figures, page),
    ]
    return "\n".join(lines)


def _machine(result: Result) -> list[str]:
    machine = result.machine
    gib = machine["memory_bytes"] / (1 << 30)
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    return [
        f"Machine: {machine['processor']}, {machine['cpus']} CPUs, {gib:.0f} GiB; "
        f"{machine['file_system']} on {machine['disk']}; load before the run "
        f"{machine['load_before']}. Versions: {versions}."
    ]


def _table(found: dict[str, Spread], units: dict[str, str], heading: str) -> list[str]:
    lines = [f"| {heading} | median | min | max | unit |", "|---|---:|---:|---:|---|"]
    for what, spread in found.items():
        values = " | ".join(_number(each) for each in (spread.median, spread.min, spread.max))
        lines.append(f"| `{what}` | {values} | {units.get(what, '')} |")
    return lines


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _aims(result: Result) -> list[str]:
    medians = {**spreads(result.rows), **result.ratios}
    reached = [aim for aim in bench.aims(result.bench) if _reached(aim, medians)]
    lines = [f"- reached: {aim.sentence(medians[aim.what].median)}" for aim in reached]
    return lines + [f"- **not reached**: {sentence}" for sentence in result.not_reached]


def _reached(aim: Aim, medians: dict[str, Spread]) -> bool:
    return aim.what in medians and aim.reached(medians[aim.what].median)


def _plot(result: Result, figures: Path, page: Path) -> list[str]:
    image = figures / f"{result.bench}.png"
    if not image.exists():
        return []
    return [f"![{result.bench}]({image.relative_to(page.parent)})", ""]


def plot(result: Result, panels: Sequence[Figure], figures: Path) -> bool:
    """Draw ``FIGURES/NAME.png``; False when matplotlib is not installed (``dcres[bench]``)."""
    try:
        from matplotlib.figure import Figure as Canvas
    except ImportError:
        return False
    found = spreads(result.rows)
    panels = [panel for panel in panels if any(what in found for what in panel.whats)]
    canvas = Canvas(figsize=(6 * len(panels), 4), layout="constrained")
    for place, panel in enumerate(panels, start=1):
        axes = canvas.add_subplot(1, len(panels), place)
        (_curve if panel.labels else _bars)(axes, panel, found)
        axes.set_title(panel.title)
    canvas.savefig(figures / f"{result.bench}.png", dpi=100)
    return True


_WHISKERS = "(median; whiskers: least and greatest)"


def _measured(panel: Figure, found: dict[str, Spread]) -> list[tuple[str, Spread]]:
    """Label and spread of what the panel shows; --quick leaves some out."""
    pairs = zip(panel.labels or panel.whats, panel.whats, strict=True)
    return [(label, found[what]) for label, what in pairs if what in found]


def _whiskers(bars: list[tuple[str, Spread]]) -> list[list[float]]:
    below = [bar.median - bar.min for _, bar in bars]
    above = [bar.max - bar.median for _, bar in bars]
    return [below, above]


def _bars(axes: Any, panel: Figure, found: dict[str, Spread]) -> None:
    bars = _measured(panel, found)
    medians = [bar.median for _, bar in bars]
    axes.barh(range(len(bars)), medians, xerr=_whiskers(bars), capsize=3, color=panel.color)
    axes.set_yticks(range(len(bars)), [label for label, _ in bars])
    axes.invert_yaxis()
    axes.set_xlabel(f"{panel.unit} {_WHISKERS}")


def _curve(axes: Any, panel: Figure, found: dict[str, Spread]) -> None:
    points = _measured(panel, found)
    medians = [point.median for _, point in points]
    axes.errorbar(
        range(len(points)), medians, _whiskers(points), marker="o", capsize=3, color=panel.color
    )
    axes.set_xticks(range(len(points)), [label for label, _ in points])
    axes.set_ylim(bottom=0)
    axes.set_xlabel(panel.along)
    axes.set_ylabel(f"{panel.unit} {_WHISKERS}")
