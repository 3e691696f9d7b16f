"""Tables of a checkpoint as Arrow IPC files, one record batch each.

Schemas and metadata keys are in docs/format.md. Reading takes nothing on trust: lengths, types
and values are checked, and with the manifest's checksum every byte is. What a table must look like
goes by the version that it names, which is looked at first.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dcres.model.pages import PAGE_SIZE, Mask, Pages
from dcres.storage.atomic import replaced
from dcres.storage.damage import corrupt, newer
from dcres.storage.digest import FileSum, SummedFile, Sums, read_checked

Placement = npt.NDArray[np.uint8]
Ticks = npt.NDArray[np.uint32]

NOWHERE = 0xFF
Columns = dict[str, npt.NDArray[Any]]

# For each version of the tables the columns of each kind; as with the manifest's, what has been
# written in a version stays as it is.
_VERSIONS: dict[int, dict[str, dict[str, Any]]] = {
    1: {
        "placement": {"host": pa.uint8()},
        "existence": {"here": pa.bool_()},
        "sums": {"page": pa.uint64(), "xxh3_64": pa.uint64()},
        "index": {"page": pa.uint32()},
        "history": {"last_access": pa.uint32()},
    }
}
_WRITTEN = 1


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
    placement = columns["host"]
    try:
        hosts = json.loads(metadata.get("hosts", ""))
    except ValueError:
        hosts = None
    if not isinstance(hosts, list) or not all(isinstance(host, str) for host in hosts):
        raise corrupt(path, "its list of hosts is not one")
    known = placement[placement != NOWHERE]
    _require_length(path, placement, page_count)
    if known.size and int(known.max()) >= len(hosts):
        raise corrupt(path, f"it names host {known.max()} of {len(hosts)}")
    return placement, tuple(hosts)


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
    if pages.size and (int(pages[-1]) >= page_count or np.any(pages[1:] <= pages[:-1])):
        raise corrupt(path, "its page numbers do not ascend, or leave the VM's memory")
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
    tick = metadata.get("tick", "")
    if not (tick.isascii() and tick.isdigit()):
        raise corrupt(path, "its tick is not a number")
    return last_access, int(tick)


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
    schema = _schema(_WRITTEN, kind, page_count, more or {})
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
    wanted = _schema(_version(path, metadata.get("format_version", "")), kind, page_count, {})
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


def _require_length(path: Path, column: npt.NDArray[Any], page_count: int) -> None:
    if len(column) != page_count:
        raise corrupt(path, f"it has {len(column)} rows instead of {page_count}")
