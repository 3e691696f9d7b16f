"""Tables of a checkpoint as Arrow IPC files, one record batch each.

Schemas and metadata keys are in docs/format.md. Reading takes nothing on trust: lengths, types
and values are checked, and with the manifest's checksum every byte is. What a table must look like
goes by the version that it names, which is looked at first.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dcres.model.pages import PAGE_SIZE, Mask, Pages
from dcres.storage.atomic import replaced
from dcres.storage.damage import corrupt, newer
from dcres.storage.digest import FileSum, SummedFile, Sums, read_checked
from dcres.storage.engine.expected import SUM_OF_ZEROS
from dcres.storage.format.runs import Runs

Placement = npt.NDArray[np.uint8]
Ticks = npt.NDArray[np.uint32]

NOWHERE = 0xFF
ZEROS, GONE = 0xFFFFFFFF, 0xFFFFFFFE  # in place of a place in a segment
Columns = dict[str, npt.NDArray[Any]]

# For each version of the tables the columns of each of its kinds; as with the manifest's, what has
# been written in a version stays as it is.
_VERSIONS: dict[int, dict[str, dict[str, Any]]] = {
    1: {
        "placement": {"host": pa.uint8()},
        "existence": {"here": pa.bool_()},
        "sums": {"page": pa.uint64(), "xxh3_64": pa.uint64()},
        "index": {"page": pa.uint32()},
        "history": {"last_access": pa.uint32()},
    },
    2: {
        "segment": {"page": pa.uint64(), "place": pa.uint32(), "xxh3_64": pa.uint64()},
        "placement_runs": {"first": pa.uint64(), "stop": pa.uint64(), "host": pa.uint8()},
        "history_runs": {"first": pa.uint64(), "stop": pa.uint64(), "last_access": pa.uint32()},
    },
}
_WRITTEN = {kind: version for version, kinds in _VERSIONS.items() for kind in kinds}


@dataclass(frozen=True, slots=True, eq=False)
class SegmentRows:
    """What a segment says of some ascending `pages`: the place of each, or `ZEROS` or `GONE`."""

    pages: Pages
    places: npt.NDArray[np.uint32]
    sums: Sums

    @property
    def placed(self) -> int:
        """How many places there are."""
        return int(np.count_nonzero(self.places < GONE))

    @property
    def gone(self) -> int:
        """How many pages the host no longer has."""
        return int(np.count_nonzero(self.places == GONE))


def write_placement(path: Path, placement: Placement, hosts: tuple[str, ...]) -> FileSum:
    """Write a page placement file: for every page an index in `hosts`, or `NOWHERE`.

    Durable on return, as with the other writers; an existing file is replaced. Raises StoreFull.
    """
    more = {"hosts": json.dumps(hosts)}
    return _write(path, "placement", len(placement), [placement.astype(np.uint8)], more)


def read_placement(
    path: Path, page_count: int, expected: FileSum | None = None
) -> tuple[Placement, tuple[str, ...]]:
    """Read a page placement file: host index per page, and the hosts' names.

    As with the other readers: arrays may be read-only; raises CheckpointCorrupt, which names
    the file, if it is not what `expected` says or not such a table of `page_count` pages.
    """
    columns, metadata = _read(path, "placement", page_count, expected)
    _require_length(path, columns["host"], page_count)
    return columns["host"], _hosts(path, columns["host"], metadata)


def write_existence(path: Path, here: Mask) -> FileSum:
    """Write a page existence file: for every page whether it is on this host."""
    return _write(path, "existence", len(here), [here.astype(np.bool_)])


def read_existence(path: Path, page_count: int, expected: FileSum | None = None) -> Mask:
    """Read a page existence file as a mask."""
    columns, _ = _read(path, "existence", page_count, expected)
    here = columns["here"]
    _require_length(path, here, page_count)
    return here


def write_sums(path: Path, mask: Mask, sums: Sums) -> FileSum:
    """Write the checksums of the pages in `mask`; `sums` has one entry per page of the VM."""
    return _write(path, "sums", len(mask), [np.flatnonzero(mask).view(np.uint64), sums[mask]])


def read_sums(path: Path, page_count: int, expected: FileSum | None = None) -> tuple[Mask, Sums]:
    """Read checksums back as mask and `sums`, zero where the mask is false."""
    columns, _ = _read(path, "sums", page_count, expected)
    pages, values = columns["page"], columns["xxh3_64"]
    _require_ascending(path, pages, page_count)
    places = pages.astype(np.int64)
    mask: Mask = np.zeros(page_count, dtype=np.bool_)
    sums: Sums = np.zeros(page_count, dtype=np.uint64)
    mask[places] = True
    sums[places] = values
    return mask, sums


def write_index(path: Path, order: Pages, page_count: int) -> FileSum:
    """Write the index of a packed memory file: for every place the page that lies there."""
    return _write(path, "index", page_count, [order.astype(np.uint32)])


def read_index(path: Path, page_count: int, expected: FileSum | None = None) -> Pages:
    """Read an index back; no page is in it twice."""
    columns, _ = _read(path, "index", page_count, expected)
    pages = columns["page"]
    if pages.size and int(pages.max()) >= page_count:
        raise corrupt(path, f"it names page {pages.max()}, which the VM does not have")
    twice = np.flatnonzero(np.bincount(pages, minlength=page_count) > 1)
    if twice.size:
        raise corrupt(path, f"it has page {twice[0]} twice")
    order: Pages = pages.astype(np.int64)
    return order


def count_index(path: Path) -> int:
    """How many rows an index has, by its headers alone. Raises CheckpointCorrupt."""
    try:
        with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as file:
            return sum(file.get_batch(at).num_rows for at in range(file.num_record_batches))
    except (pa.ArrowException, OSError) as error:
        raise corrupt(path, f"it is not an Arrow file ({error})") from None


def write_history(path: Path, last_access: Ticks, tick: int) -> FileSum:
    """Write the access history: for every page the tick of its last access, 0 for never."""
    more = {"tick": str(tick)}
    return _write(path, "history", len(last_access), [last_access.astype(np.uint32)], more)


def read_history(path: Path, page_count: int, expected: FileSum | None = None) -> tuple[Ticks, int]:
    """Read the access history and the tick at which it was saved."""
    columns, metadata = _read(path, "history", page_count, expected)
    last_access = columns["last_access"]
    _require_length(path, last_access, page_count)
    return last_access, _tick(path, metadata)


def write_segment(path: Path, rows: SegmentRows, page_count: int) -> FileSum:
    """Write what one host saved in one checkpoint, and what it no longer has."""
    columns = [rows.pages.view(np.uint64), rows.places.astype(np.uint32), rows.sums]
    return _write(path, "segment", page_count, columns)


def read_segment(path: Path, page_count: int, expected: FileSum | None = None) -> SegmentRows:
    """Read a segment's table; its places are all there, each once, and what has none is zeros."""
    columns, _ = _read(path, "segment", page_count, expected)
    pages, places, sums = columns["page"], columns["place"], columns["xxh3_64"]
    _require_ascending(path, pages, page_count)
    placed = places[places < GONE]
    found = np.zeros(len(placed), dtype=np.bool_)
    found[placed[placed < len(placed)]] = True
    if not found.all():
        raise corrupt(path, f"its {len(placed)} places are not each there, and once")
    for code, wanted in ((ZEROS, SUM_OF_ZEROS), (GONE, np.uint64(0))):
        wrong = pages[(places == code) & (sums != wanted)]
        if wrong.size:
            raise corrupt(path, f"page {wrong[0]} has no place and another checksum than that has")
    return SegmentRows(pages.view(np.int64), places, sums)


def write_placement_runs(
    path: Path, runs: Runs, hosts: tuple[str, ...], page_count: int
) -> FileSum:
    """Write where some pages are: in each run an index in `hosts`, or `NOWHERE`."""
    columns = [*runs.columns(), runs.values.astype(np.uint8)]
    return _write(path, "placement_runs", page_count, columns, {"hosts": json.dumps(hosts)})


def read_placement_runs(
    path: Path, page_count: int, expected: FileSum | None = None
) -> tuple[Runs, tuple[str, ...]]:
    """Read the placement of some pages, and the names of its hosts."""
    columns, metadata = _read(path, "placement_runs", page_count, expected)
    runs = _runs(path, columns, "host", page_count)
    return runs, _hosts(path, runs.values, metadata)


def write_history_runs(path: Path, runs: Runs, tick: int, page_count: int) -> FileSum:
    """Write the ticks of the last accesses to some pages."""
    columns = [*runs.columns(), runs.values.astype(np.uint32)]
    return _write(path, "history_runs", page_count, columns, {"tick": str(tick)})


def read_history_runs(
    path: Path, page_count: int, expected: FileSum | None = None
) -> tuple[Runs, int]:
    """Read the history of some pages and the tick at which it was saved."""
    columns, metadata = _read(path, "history_runs", page_count, expected)
    return _runs(path, columns, "last_access", page_count), _tick(path, metadata)


def _runs(path: Path, columns: Columns, values: str, page_count: int) -> Runs:
    first, stop = columns["first"], columns["stop"]
    inside = not first.size or int(stop[-1]) <= page_count
    if not inside or (first >= stop).any() or (stop[:-1] > first[1:]).any():
        raise corrupt(path, "its runs do not ascend, or leave the VM's memory")
    return Runs(np.stack((first, stop), axis=1).view(np.int64), columns[values])


def _hosts(path: Path, indices: npt.NDArray[Any], metadata: dict[str, str]) -> tuple[str, ...]:
    """The table's list of hosts, which has all the `indices`. Raises CheckpointCorrupt."""
    try:
        hosts = json.loads(metadata.get("hosts", ""))
    except ValueError:
        hosts = None
    if not isinstance(hosts, list) or not all(isinstance(host, str) for host in hosts):
        raise corrupt(path, "its list of hosts is not one")
    known = indices[indices != NOWHERE]
    if known.size and int(known.max()) >= len(hosts):
        raise corrupt(path, f"it names host {known.max()} of {len(hosts)}")
    return tuple(hosts)


def _tick(path: Path, metadata: dict[str, str]) -> int:
    tick = metadata.get("tick", "")
    if not (tick.isascii() and tick.isdigit()):
        raise corrupt(path, "its tick is not a number")
    return int(tick)


def _schema(version: int, kind: str, page_count: int, more: dict[str, str]) -> Any:
    metadata = {
        "kind": kind,
        "format_version": str(version),
        "page_size": str(PAGE_SIZE),
        "page_count": str(page_count),
        **more,
    }
    columns = _VERSIONS[version][kind]
    fields = [pa.field(name, type_, nullable=False) for name, type_ in columns.items()]
    return pa.schema(fields, metadata={f"dcres.{key}": metadata[key] for key in metadata})


def _write(
    path: Path,
    kind: str,
    page_count: int,
    columns: list[Any],
    more: dict[str, str] | None = None,
) -> FileSum:
    schema = _schema(_WRITTEN[kind], kind, page_count, more or {})
    batch = pa.record_batch([pa.array(column) for column in columns], schema=schema)
    with replaced(path) as fd:
        file = SummedFile(fd)
        with pa.ipc.new_file(file, schema) as writer:
            writer.write_batch(batch)
    return file.sum(path.name)


def _read(
    path: Path, kind: str, page_count: int, expected: FileSum | None
) -> tuple[Columns, dict[str, str]]:
    """The columns as numpy arrays and the metadata without its prefix."""
    data = read_checked(path, expected)
    try:
        table = pa.ipc.open_file(pa.py_buffer(data)).read_all()
        table.validate(full=True)
        raw = table.schema.metadata or {}
        metadata = {
            key.decode().removeprefix("dcres."): value.decode() for key, value in raw.items()
        }
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise corrupt(path, f"it is not an Arrow file ({error})") from None
    version = _version(path, metadata.get("format_version", ""))
    if metadata.get("kind") != kind:
        raise corrupt(path, f"its kind is {metadata.get('kind')}, not {kind}")
    if kind not in _VERSIONS[version]:
        raise corrupt(path, f"version {version} of the tables has no kind {kind}")
    wanted = _schema(version, kind, page_count, {})
    for key, value in wanted.metadata.items():
        name = key.decode().removeprefix("dcres.")
        if metadata.get(name) != value.decode():
            raise corrupt(path, f"its {name} is {metadata.get(name)}, not {value.decode()}")
    if not table.schema.equals(wanted, check_metadata=False):
        raise corrupt(path, "its columns have other names or types")
    return {name: table.column(name).to_numpy() for name in table.column_names}, metadata


def _version(path: Path, text: str) -> int:
    """Which version a table says it has. Raises CheckpointCorrupt for one that is not known."""
    newest = max(_VERSIONS)
    version = int(text) if re.fullmatch("[1-9][0-9]{0,8}", text) else 0
    if version > newest:
        raise newer(path, version, newest)
    if version not in _VERSIONS:
        raise corrupt(path, f"its format version is {text!r}, which no dcres wrote")
    return version


def _require_ascending(path: Path, pages: npt.NDArray[Any], page_count: int) -> None:
    if pages.size and (int(pages[-1]) >= page_count or np.any(pages[1:] <= pages[:-1])):
        raise corrupt(path, "its page numbers do not ascend, or leave the VM's memory")


def _require_length(path: Path, column: npt.NDArray[Any], page_count: int) -> None:
    if len(column) != page_count:
        raise corrupt(path, f"it has {len(column)} rows instead of {page_count}")
