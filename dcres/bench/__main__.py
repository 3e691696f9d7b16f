"""``python -m dcres.bench``: what scripts/bench runs; see ``--help``."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path

from rich.console import Console

from dcres import bench
from dcres.bench import page
from dcres.bench.command import ALL, view
from dcres.errors import DcresError


def main(arguments: list[str]) -> int:
    """Run benchmarks, keep their results, draw their figures, write the page."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description=main.__doc__)
    known = ", ".join(bench.NAMES)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {known}; none, or {ALL}: all")
    parser.add_argument("--quick", action="store_true", help="less data, fewer rounds")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: /tmp")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="where the page goes")
    given = parser.parse_args(arguments)
    console = Console(stderr=True, highlight=False)
    logging.basicConfig(level=logging.WARNING)
    try:
        for name in bench.NAMES if given.names in ([], [ALL]) else given.names:
            _run(name, given.quick, given.folder, given.docs, console)
    except DcresError as error:
        console.print(f"error: {error}", markup=False)
        return 1
    return 0


def _run(name: str, quick: bool, folder: Path | None, docs: Path, console: Console) -> None:
    figures = docs / "figures"
    began = time.monotonic()
    result = bench.run(
        name,
        quick=quick,
        folder=folder,
        say=lambda text: console.print(f"{name}: {text}", markup=False),
    )
    console.print(view(result))
    console.print(f"{name}: done in {time.monotonic() - began:.0f} s")
    page.save(result, figures)
    if not page.plot(result, bench.figures(name), figures):
        console.print("no plots without matplotlib; pip install 'dcres[bench]'", markup=False)
    page.write(docs / "measurements.md", figures)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
