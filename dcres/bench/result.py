"""What a benchmark found: every run, and what follows from the runs side by side.

A benchmark goes in *rounds*. Each round measures everything once, one thing after the other, so
that a ratio is made of two values that were taken seconds apart; the noise of a machine that
others use then hits both. Ratios and medians are taken over the rounds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from dcres.errors import NotFound

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Row:
    """One measured value; `details` say what else was seen in that run."""

    what: str
    round: int
    value: float
    unit: str
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As one flat JSON object."""
        return {
            "what": self.what,
            "round": self.round,
            "value": self.value,
            "unit": self.unit,
            **self.details,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Row:
        """Read `to_dict` back."""
        own = {key: values[key] for key in ("what", "round", "value", "unit")}
        return cls(**own, details={k: v for k, v in values.items() if k not in own})


@dataclass(frozen=True, slots=True)
class Spread:
    """A value over the rounds."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True, slots=True)
class Ratio:
    """`over` divided by `under`, both measured in the same round."""

    over: str
    under: str


class Direction(StrEnum):
    """Which side of an aim is good."""

    AT_MOST = "at most"
    AT_LEAST = "at least"


@dataclass(frozen=True, slots=True)
class Aim:
    """What a measured value or a ratio should be; its median counts."""

    what: str
    direction: Direction
    value: float
    unit: str = ""

    def sentence(self, found: float) -> str:
        """What was found against what was wanted."""
        unit = f" {self.unit}" if self.unit else ""
        return f"{self.what} is {found:.4g}{unit}; the aim is {self.direction} {self.value:g}{unit}"

    def reached(self, found: float) -> bool:
        """Whether `found` is good enough."""
        if self.direction is Direction.AT_MOST:
            return found <= self.value
        return found >= self.value


@dataclass(frozen=True, slots=True)
class Result:
    """All of one benchmark, as ``dcres bench NAME --json`` prints it."""

    bench: str
    machine: dict[str, Any]
    versions: dict[str, str]
    commands: tuple[str, ...]
    rows: tuple[Row, ...]
    ratios: dict[str, Spread]
    not_reached: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The JSON object."""
        return {
            "bench": self.bench,
            "machine": self.machine,
            "versions": self.versions,
            "commands": list(self.commands),
            "rows": [row.to_dict() for row in self.rows],
            "ratios": {name: asdict(spread) for name, spread in self.ratios.items()},
            "not_reached": list(self.not_reached),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Result:
        """Read `to_dict` back."""
        return cls(
            bench=values["bench"],
            machine=values["machine"],
            versions=values["versions"],
            commands=tuple(values["commands"]),
            rows=tuple(Row.from_dict(row) for row in values["rows"]),
            ratios={name: Spread(**spread) for name, spread in values["ratios"].items()},
            not_reached=tuple(values["not_reached"]),
        )


@dataclass(frozen=True, slots=True)
class Setup:
    """How a benchmark is run: short or in full, where it may write, and whom it tells."""

    quick: bool
    folder: Path  # on the disk that is measured
    say: Say


@dataclass(frozen=True, slots=True)
class Figure:
    """One panel of a benchmark's plot: bars of measured things that share a unit."""

    title: str
    unit: str
    whats: tuple[str, ...]
    color: str = "tab:blue"


@dataclass(frozen=True, slots=True)
class Bench:
    """One named measurement. Ratios that are `optional` need what not every machine has."""

    name: str
    about: str
    measure: Callable[[Setup], list[Row]]
    ratios: Mapping[str, Ratio]
    aims: tuple[Aim, ...]
    figures: tuple[Figure, ...]
    optional: frozenset[str] = frozenset()


def spreads(rows: Sequence[Row]) -> dict[str, Spread]:
    """Every measured thing over its rounds, in the order of first appearance."""
    values: dict[str, list[float]] = {}
    for row in rows:
        values.setdefault(row.what, []).append(row.value)
    return {what: Spread.of(each) for what, each in values.items()}


def ratio_spreads(rows: Sequence[Row], ratios: Mapping[str, Ratio]) -> dict[str, Spread]:
    """Every ratio over the rounds. Raises NotFound for one whose values were not measured."""
    values = {(row.what, row.round): row.value for row in rows}
    found = {}
    for name, ratio in ratios.items():
        each = [
            values[ratio.over, at] / values[ratio.under, at]
            for at in sorted({row.round for row in rows})
            if (ratio.over, at) in values and (ratio.under, at) in values
        ]
        if not each:
            raise NotFound(f"{name} needs {ratio.over} and {ratio.under}, measured side by side")
        found[name] = Spread.of(each)
    return found


def missed_aims(medians: Mapping[str, Spread], aims: Sequence[Aim]) -> list[str]:
    """A sentence for every aim that was missed, or that nothing was measured for."""
    sentences = []
    for aim in aims:
        spread = medians.get(aim.what)
        if spread is None:
            sentences.append(f"{aim.what} was not measured")
        elif not aim.reached(spread.median):
            sentences.append(aim.sentence(spread.median))
    return sentences
