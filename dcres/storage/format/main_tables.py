"""What the main host alone says of each page, and only where a checkpoint differs from its base.

The tables of a segmented checkpoint's chain, one upon the other from the oldest on, are what one
table has for all pages in a whole checkpoint. The history is approximate: an access may count for
neighbours as well, and a tick never gets smaller.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dcres.errors import StorageError
from dcres.model.history import Ticks
from dcres.model.pages import Mask
from dcres.storage import layout
from dcres.storage.damage import corrupt
from dcres.storage.digest import FileSum
from dcres.storage.format import tables
from dcres.storage.format.manifest import Manifest, Segment, listed
from dcres.storage.format.runs import Runs, history_runs, runs_of, without_later
from dcres.storage.format.tables import NOWHERE, Placement

# A run of the history takes 20 bytes, a page in a segment as many.
_SAVED_PAGES_A_RUN, _FEWEST_RUNS = 4, 4096
_NAMES = layout.HISTORY, layout.PAGES
_STRANGE = 0x100


@dataclass(frozen=True, slots=True, eq=False)
class MainTables:
    """For each page which of `hosts` has its bytes, or `NOWHERE`, and the tick of its last access.

    The first host is the main host.
    """

    placement: Placement
    hosts: tuple[str, ...]
    history: Ticks


def write_changes(
    folder: Path, checkpoint: str, now: MainTables, tick: int, saved: int, base: MainTables | None
) -> tuple[FileSum, ...]:
    """Write where `now` differs from `base`, or from nothing at all: durable on return.

    The history gets coarser the fewer pages were `saved`, on all hosts: it is at most a quarter as
    many runs, or 4096. Raises StorageError if the main host is not the base's, StoreFull.
    """
    if base is not None and base.hosts[0] != now.hosts[0]:
        raise StorageError(
            f"the tables of checkpoint {checkpoint} would continue those of {base.hosts[0]}, and "
            f"{now.hosts[0]} is the main host now; take a full checkpoint"
        )
    page_count = len(now.placement)
    before = np.zeros(page_count, dtype=np.uint32) if base is None else base.history
    most = max(_FEWEST_RUNS, saved // _SAVED_PAGES_A_RUN)
    history = history_runs(now.history, tick, before, most)
    placement = _changed_placement(now, base)
    paths = [folder / layout.by_origin(checkpoint, name) for name in _NAMES]
    return (
        tables.write_history_runs(paths[0], history, tick, page_count),
        tables.write_placement_runs(paths[1], placement, now.hosts, page_count),
    )


def write_merged(folder: Path, segment: Segment, now: MainTables, tick: int) -> tuple[FileSum, ...]:
    """Write all of `now`, exactly, as the tables of a merged `segment`: durable on return.

    Raises StoreFull.
    """
    page_count = len(now.placement)
    history = runs_of(now.history, lambda pages: now.history[pages] > 0)
    placement = _changed_placement(now, None)
    paths = [folder / segment.file(name) for name in _NAMES]
    return (
        tables.write_history_runs(paths[0], history, tick, page_count),
        tables.write_placement_runs(paths[1], placement, now.hosts, page_count),
    )


def _changed_placement(now: MainTables, base: MainTables | None) -> Runs:
    """Runs of pages that the base has with another host; hosts are known by their names."""
    if base is None:
        return runs_of(now.placement, lambda pages: now.placement[pages] != NOWHERE)
    before, codes = base.placement, _codes(base.hosts, now.hosts)
    return runs_of(now.placement, lambda pages: now.placement[pages] != codes[before[pages]])


def _codes(names: tuple[str, ...], hosts: tuple[str, ...]) -> npt.NDArray[np.uint16]:
    """For each index in `names` that in `hosts`, or `_STRANGE`."""
    codes = np.full(256, NOWHERE, dtype=np.uint16)
    codes[: len(names)] = [hosts.index(name) if name in hosts else _STRANGE for name in names]
    return codes


def read_placement(folder: Path, manifest: Manifest) -> Placement:
    """For each page an index in the manifest's hosts. Raises CheckpointCorrupt."""
    hosts = tuple(part.host for part in manifest.hosts)
    placement: Placement = np.full(manifest.page_count, NOWHERE, dtype=np.uint8)
    strange: Mask = np.zeros(0, dtype=np.bool_)  # pages of hosts that it does not have
    for path, expected in _tables(folder, manifest, layout.PAGES):
        runs, names = tables.read_placement_runs(path, manifest.page_count, expected)
        codes = _codes(names, hosts)[runs.values]
        Runs(runs.extents, codes.astype(np.uint8)).lay(placement)
        if not strange.size and (codes == _STRANGE).any():
            strange = np.zeros(manifest.page_count, dtype=np.bool_)
        if strange.size:
            Runs(runs.extents, codes == _STRANGE).lay(strange)
    for page in np.flatnonzero(strange)[:1].tolist():
        path = folder / layout.by_origin(manifest.checkpoint, layout.PAGES)
        raise corrupt(path, f"page {page} is left with a host that the manifest does not have")
    return placement


def read_history(folder: Path, manifest: Manifest) -> Ticks:
    """For each page the tick of its last access. Raises CheckpointCorrupt."""
    history: Ticks = np.zeros(manifest.page_count, dtype=np.uint32)
    for path, expected in _tables(folder, manifest, layout.HISTORY):
        runs, tick = tables.read_history_runs(path, manifest.page_count, expected)
        if history.max(initial=0) > tick:
            history = without_later(history, tick)
        runs.lift(history)
    return history


def _tables(folder: Path, manifest: Manifest, name: str) -> Iterator[tuple[Path, FileSum]]:
    for segment in manifest.main.segments or ():
        file = listed(manifest, manifest.main, segment.file(name))
        yield folder / file.name, file
