"""``python -m dcres.bench``: what scripts/bench runs; see ``--help``."""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

from dcres import bench
from dcres.bench import page
from dcres.bench.command import ALL, view
from dcres.errors import ConfigError, DcresError

_DOCS, _PAGE = Path("docs"), "measurements.md"


def main(arguments: list[str]) -> int:
    """Run benchmarks, keep their results, draw their figures, write the page."""
    given = _parser().parse_args(arguments)
    names = bench.NAMES if given.names in ([], [ALL]) else given.names
    console = Console(stderr=True, highlight=False)
    logging.basicConfig(level=logging.WARNING)
    try:
        for name in names:
            bench.about(name)
    except ConfigError as error:
        console.print(f"error: {error}", markup=False)
        return 2
    docs = given.docs or _docs(given.quick)
    failed: dict[str, str] = {}
    for name in names:
        try:
            _run(name, given.quick, given.folder, docs, console)
        except DcresError as error:
            failed[name] = str(error)
            console.print(f"{name}: failed: {error}", markup=False)
    if len(failed) < len(names):
        console.print(f"the page is {docs / _PAGE}", markup=False, soft_wrap=True)
    for name, why in failed.items():
        console.print(f"error: {name} failed: {why}", markup=False, soft_wrap=True)
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    # scripts/bench looks for --quick, too: it must not be shortened.
    parser = argparse.ArgumentParser(
        prog="scripts/bench", description=main.__doc__, allow_abbrev=False
    )
    known = ", ".join(bench.NAMES)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {known}; none, or {ALL}: all")
    parser.add_argument("--quick", action="store_true", help="less data, fewer rounds")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: /tmp")
    parser.add_argument(
        "--docs",
        type=Path,
        help=f"where the page goes; default: {_DOCS}, with --quick a new folder in /tmp",
    )
    return parser


def _docs(quick: bool) -> Path:
    """Where the page goes: what a short run measures is nothing to publish."""
    return Path(tempfile.mkdtemp(prefix="dcres-bench-quick-")) if quick else _DOCS


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
        console.print("no plots without matplotlib; pip install matplotlib", markup=False)
    page.write(docs / _PAGE, figures)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
