"""Measurements with names: `run` one of `NAMES`; docs/measurements.md shows what came out."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from dcres.bench import (
    checkpoint,
    figure7,
    figure9,
    figure10,
    live,
    paging,
    plan,
    policy,
    restore,
)
from dcres.bench.machine import machine, versions
from dcres.bench.result import (
    Aim,
    Bench,
    Figure,
    Ratio,
    Result,
    Row,
    Say,
    Setup,
    missed_aims,
    ratio_spreads,
    spreads,
)
from dcres.errors import ConfigError, UnsupportedHost

__all__ = ["NAMES", "Result", "about", "aims", "figures", "run"]

_BENCHES: dict[str, Bench] = {
    each.name: each
    for each in (
        paging.BENCH,
        policy.BENCH,
        checkpoint.BENCH,
        live.BENCH,
        plan.BENCH,
        restore.BENCH,
        figure7.BENCH,
        figure9.BENCH,
        figure10.BENCH,
    )
}

NAMES: tuple[str, ...] = tuple(_BENCHES)


def about(name: str) -> str:
    """What `name` measures, in a line. Raises ConfigError."""
    return _bench(name).about


def aims(name: str) -> tuple[Aim, ...]:
    """What the figures of `name` should be. Raises ConfigError."""
    return _bench(name).aims


def figures(name: str) -> tuple[Figure, ...]:
    """The panels of its plot. Raises ConfigError."""
    return _bench(name).figures


def _bench(name: str) -> Bench:
    if name not in _BENCHES:
        raise ConfigError(f"no benchmark is called {name}; there are {', '.join(NAMES)}")
    return _BENCHES[name]


def _measured(bench: Bench, rows: list[Row]) -> dict[str, Ratio]:
    """The ratios of what a quick run measures; the aims for the others are missed."""
    whats = {row.what for row in rows}
    return {
        name: ratio for name, ratio in bench.ratios.items() if {ratio.over, ratio.under} <= whats
    }


def _quiet(_: str) -> None:
    pass


def run(name: str, *, quick: bool = False, folder: Path | None = None, say: Say = _quiet) -> Result:
    """Run one benchmark; `quick` with less data and fewer rounds. `folder` is on the disk to use.

    `say` hears what is being done. Raises ConfigError for a name that is not known,
    UnsupportedHost without root, and whatever the measured parts raise.
    """
    bench = _bench(name)
    if os.geteuid() != 0:
        raise UnsupportedHost("benchmarks use userfaultfd and ptrace; run them as root")
    with tempfile.TemporaryDirectory(prefix="dcres-bench-", dir=folder) as disk:
        described = machine(Path(disk))
        rows = bench.measure(Setup(quick, Path(disk), say))
    ratios = ratio_spreads(rows, _measured(bench, rows) if quick else bench.ratios)
    return Result(
        bench=name,
        machine=described,
        versions=versions(),
        commands=(f"dcres bench {name}{' --quick' if quick else ''} --json",),
        rows=tuple(rows),
        ratios=ratios,
        not_reached=tuple(missed_aims({**spreads(rows), **ratios}, bench.aims)),
    )
