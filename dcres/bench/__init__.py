"""Measurements with names: `run` one of `NAMES`; docs/measurements.md shows what came out."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from dcres.bench import (
    checkpoint,
    figure7,
    figure8,
    figure9,
    figure10,
    incremental,
    live,
    paging,
    peers,
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
        figure7.BENCH,
        figure8.BENCH,
        figure9.BENCH,
        figure10.BENCH,
        peers.BENCH,
        paging.BENCH,
        incremental.BENCH,
        live.BENCH,
        restore.BENCH,
        plan.BENCH,
        policy.BENCH,
        checkpoint.BENCH,
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


def _wanted(bench: Bench, rows: list[Row], quick: bool) -> dict[str, Ratio]:
    """The ratios to make of `rows`.

    A quick run measures less, and what a ratio that is optional needs may not be here; the aims
    for what is left out are missed.
    """
    whats = {row.what for row in rows}
    return {
        name: ratio
        for name, ratio in bench.ratios.items()
        if {ratio.over, ratio.under} <= whats or not (quick or name in bench.optional)
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
    ratios = ratio_spreads(rows, _wanted(bench, rows, quick))
    return Result(
        bench=name,
        machine=described,
        versions=versions(),
        commands=(f"dcres bench {name}{' --quick' if quick else ''} --json",),
        rows=tuple(rows),
        ratios=ratios,
        not_reached=tuple(missed_aims({**spreads(rows), **ratios}, bench.aims)),
    )
