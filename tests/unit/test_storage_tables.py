"""Tables: round trips, and nothing malformed is read."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from dcres.errors import CheckpointCorrupt
from dcres.storage.digest import FileSum, file_sum
from dcres.storage.engine.expected import SUM_OF_ZEROS
from dcres.storage.format import tables
from dcres.storage.format.runs import Runs

COUNT = 50
MASK = np.arange(COUNT) % 3 == 1
SUMS = np.arange(COUNT, dtype=np.uint64) * np.uint64(2**58) * MASK
PLACEMENT = np.where(MASK, 0, np.where(np.arange(COUNT) % 2, 1, tables.NOWHERE)).astype(np.uint8)
HISTORY = np.arange(COUNT, dtype=np.uint32)[::-1] * 80_000_000

ORDER = np.flatnonzero(MASK)[::-1]
SEGMENT = tables.SegmentRows(
    np.array([2, 3, 7, 49]),
    np.array([1, tables.GONE, 0, tables.ZEROS], dtype=np.uint32),
    np.array([2**64 - 1, 0, 5, SUM_OF_ZEROS], dtype=np.uint64),
)
RUNS = Runs(np.array([[0, 2], [2, 3], [40, COUNT]]), np.array([1, 0, tables.NOWHERE]))

Write = Callable[[Path], FileSum]
Read = Callable[..., Any]


KINDS: dict[str, tuple[Write, Read]] = {
    "placement": (
        lambda path: tables.write_placement(path, PLACEMENT, ("h0", "h1")),
        tables.read_placement,
    ),
    "existence": (lambda path: tables.write_existence(path, MASK), tables.read_existence),
    "sums": (lambda path: tables.write_sums(path, MASK, SUMS), tables.read_sums),
    "index": (lambda path: tables.write_index(path, ORDER, COUNT), tables.read_index),
    "history": (lambda path: tables.write_history(path, HISTORY, 9), tables.read_history),
    "segment": (lambda path: tables.write_segment(path, SEGMENT, COUNT), tables.read_segment),
    "placement_runs": (
        lambda path: tables.write_placement_runs(path, RUNS, ("h0", "h1"), COUNT),
        tables.read_placement_runs,
    ),
    "history_runs": (
        lambda path: tables.write_history_runs(path, RUNS, 9, COUNT),
        tables.read_history_runs,
    ),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def test_round_trips(tmp_path: Path) -> None:
    files = {}
    for kind, (write, _) in KINDS.items():
        files[kind] = tmp_path / f"{kind}.arrow"
        assert write(files[kind]) == file_sum(files[kind])
    placement, hosts = tables.read_placement(files["placement"], COUNT)
    assert placement.tolist() == PLACEMENT.tolist()
    assert hosts == ("h0", "h1")
    here = tables.read_existence(files["existence"], COUNT)
    assert here.dtype == np.bool_
    assert here.tolist() == MASK.tolist()
    mask, sums = tables.read_sums(files["sums"], COUNT)
    assert mask.tolist() == MASK.tolist()
    assert sums.tolist() == SUMS.tolist()
    assert tables.read_index(files["index"], COUNT).tolist() == ORDER.tolist()
    history, tick = tables.read_history(files["history"], COUNT)
    assert history.tolist() == HISTORY.tolist()
    assert tick == 9
    rows = tables.read_segment(files["segment"], COUNT)
    for name in ("pages", "places", "sums"):
        assert getattr(rows, name).tolist() == getattr(SEGMENT, name).tolist()
    assert (rows.placed, rows.gone) == (2, 1)
    placed, hosts = tables.read_placement_runs(files["placement_runs"], COUNT)
    accessed, tick = tables.read_history_runs(files["history_runs"], COUNT)
    assert (hosts, tick) == (("h0", "h1"), 9)
    for runs in (placed, accessed):
        assert runs.extents.tolist() == RUNS.extents.tolist()
        assert runs.values.tolist() == RUNS.values.tolist()


def test_a_vm_without_a_page_here(tmp_path: Path) -> None:
    nothing = np.zeros(COUNT, dtype=np.bool_)
    tables.write_sums(tmp_path / "s", nothing, np.zeros(COUNT, dtype=np.uint64))
    assert not tables.read_sums(tmp_path / "s", COUNT)[0].any()


@kinds
def test_every_flipped_byte_is_found(tmp_path: Path, kind: str) -> None:
    write, read = KINDS[kind]
    path = tmp_path / "t.arrow"
    expected = write(path)
    data = path.read_bytes()
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ (1 << place % 8)]) + data[place + 1 :])
        with pytest.raises(CheckpointCorrupt, match=r"t\.arrow"):
            read(path, COUNT, expected)


@kinds
@pytest.mark.parametrize("known", [True, False])
def test_every_truncation_is_found(tmp_path: Path, kind: str, known: bool) -> None:
    write, read = KINDS[kind]
    path = tmp_path / "t.arrow"
    expected = write(path) if known else (write(path), None)[1]
    data = path.read_bytes()
    for length in range(0, len(data), 1 if known else 7):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointCorrupt, match=r"t\.arrow"):
            read(path, COUNT, expected)


@kinds
def test_a_table_of_another_vm_kind_or_nothing(tmp_path: Path, kind: str) -> None:
    write, read = KINDS[kind]
    path = tmp_path / "t.arrow"
    with pytest.raises(CheckpointCorrupt, match="it is missing"):
        read(path, COUNT)
    write(path)
    with pytest.raises(CheckpointCorrupt, match="page_count is 50, not 51"):
        read(path, COUNT + 1)
    other = next(name for name in KINDS if name != kind)
    KINDS[other][0](path)
    with pytest.raises(CheckpointCorrupt, match=f"kind is {other}, not {kind}"):
        read(path, COUNT)


def forge(path: Path, kind: str, columns: dict[str, Any], **more: str) -> None:
    metadata = {
        "kind": kind,
        "format_version": "1",
        "page_size": "4096",
        "page_count": str(COUNT),
        **more,
    }
    batch = pa.record_batch(columns)
    schema = pa.schema(
        [field.with_nullable(False) for field in batch.schema],
        metadata={f"dcres.{key}": value for key, value in metadata.items()},
    )
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch(batch.columns, schema=schema))


def u64(*values: int) -> Any:
    return pa.array(values, pa.uint64())


SECOND = {"format_version": "2"}


def segment(pages: tuple[int, ...], places: tuple[int, ...], *sums: int) -> dict[str, Any]:
    more = {"place": pa.array(places, pa.uint32()), "xxh3_64": u64(*sums)}
    return {"page": u64(*pages), **more}


def runs(first: tuple[int, ...], stop: tuple[int, ...], kind: Any = None) -> dict[str, Any]:
    name, values = ("last_access", pa.uint32()) if kind is None else ("host", kind)
    return {"first": u64(*first), "stop": u64(*stop), name: pa.array([1] * len(first), values)}


@pytest.mark.parametrize(
    ("kind", "columns", "more", "message"),
    [
        ("sums", {"page": u64(2, 1), "xxh3_64": u64(0, 0)}, {}, "do not ascend"),
        ("sums", {"page": u64(1, 1), "xxh3_64": u64(0, 0)}, {}, "do not ascend"),
        ("sums", {"page": u64(COUNT), "xxh3_64": u64(0)}, {}, "leave the VM's memory"),
        ("sums", {"page": u64(1), "sum": u64(0)}, {}, "other names or types"),
        ("sums", {"page": pa.array([1]), "xxh3_64": u64(0)}, {}, "other names or types"),
        ("index", {"page": pa.array([3, 9, 3], pa.uint32())}, {}, "it has page 3 twice"),
        ("index", {"page": pa.array([COUNT], pa.uint32())}, {}, "page 50, which the VM does not"),
        ("index", {"page": u64(1)}, {}, "other names or types"),
        ("existence", {"here": pa.array([True])}, {}, "1 rows instead of 50"),
        ("history", {"last_access": pa.array([1], pa.uint32())}, {"tick": "1"}, "1 rows"),
        ("history", {"last_access": pa.array(HISTORY)}, {"tick": "-1"}, "not a number"),
        ("history", {"last_access": pa.array(HISTORY)}, {}, "not a number"),
        ("placement", {"host": pa.array(PLACEMENT)}, {"hosts": '["h0"]'}, "host 1 of 1"),
        ("placement", {"host": pa.array(PLACEMENT)}, {"hosts": "{}"}, "list of hosts"),
        ("placement", {"host": pa.array(PLACEMENT)}, {}, "list of hosts"),
        (
            "placement",
            {"host": pa.array(PLACEMENT)},
            {"format_version": "3"},
            "a newer dcres wrote",
        ),
        ("index", {"page": u64(1)}, {"format_version": "3"}, "use a dcres that reads version 3"),
        (
            "index",
            {"page": u64(1)},
            {"format_version": "2"},
            "version 2 of the tables has no kind index",
        ),
        ("segment", segment((2, 1), (0, 1), 0, 0), SECOND, "do not ascend"),
        ("segment", segment((1, 1), (0, 1), 0, 0), SECOND, "do not ascend"),
        ("segment", segment((COUNT,), (0,), 0), SECOND, "leave the VM's memory"),
        ("segment", segment((1, 2), (0, 0), 0, 0), SECOND, "2 places are not each there"),
        ("segment", segment((1, 2), (0, 2), 0, 0), SECOND, "2 places are not each there"),
        ("segment", segment((1, 2), (0, tables.ZEROS), 0, 1), SECOND, "page 2 has no place"),
        ("segment", segment((1, 2), (0, tables.GONE), 0, 1), SECOND, "page 2 has no place"),
        ("segment", segment((1,), (0,), 0), {}, "version 1 of the tables has no kind segment"),
        ("segment", {"page": u64(1)}, SECOND, "other names or types"),
        ("history_runs", runs((3,), (3,)), {**SECOND, "tick": "1"}, "runs do not ascend"),
        ("history_runs", runs((3, 5), (6, 7)), {**SECOND, "tick": "1"}, "runs do not ascend"),
        ("history_runs", runs((5, 3), (6, 4)), {**SECOND, "tick": "1"}, "runs do not ascend"),
        ("history_runs", runs((5,), (COUNT + 1,)), {**SECOND, "tick": "1"}, "leave the VM's"),
        ("history_runs", runs((5,), (2**64 - 1,)), {**SECOND, "tick": "1"}, "leave the VM's"),
        ("history_runs", runs((3,), (4,)), SECOND, "not a number"),
        (
            "placement_runs",
            runs((3,), (4,), pa.uint8()),
            {**SECOND, "hosts": '["h0"]'},
            "names host 1 of 1",
        ),
        ("placement_runs", runs((3,), (4,), pa.uint8()), SECOND, "list of hosts"),
        ("index", {"page": u64(1)}, {"format_version": "0"}, "'0', which no dcres wrote"),
        ("index", {"page": u64(1)}, {"format_version": "1.5"}, "'1.5', which no dcres wrote"),
    ],
)
def test_a_well_formed_table_with_wrong_content(
    tmp_path: Path, kind: str, columns: dict[str, Any], more: dict[str, str], message: str
) -> None:
    path = tmp_path / "t.arrow"
    forge(path, kind, columns, **more)
    with pytest.raises(CheckpointCorrupt, match=message) as caught:
        KINDS[kind][1](path, COUNT)
    assert str(path) in str(caught.value)


@kinds
def test_flips_without_a_checksum_never_crash(tmp_path: Path, kind: str) -> None:
    write, read = KINDS[kind]
    path = tmp_path / "t.arrow"
    write(path)
    data = path.read_bytes()
    for place in range(0, len(data), 3):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x80]) + data[place + 1 :])
        with contextlib.suppress(CheckpointCorrupt):
            read(path, COUNT)


def test_a_later_version_may_have_more_columns_and_the_first_may_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {"page": pa.array([3, 9], pa.uint32()), "epoch": pa.array([1, 2], pa.uint32())}
    later = {**tables._VERSIONS[1], "index": {"page": pa.uint32(), "epoch": pa.uint32()}}
    monkeypatch.setitem(tables._VERSIONS, 99, later)
    path = tmp_path / "t.arrow"
    forge(path, "index", more, format_version="99")
    assert tables.read_index(path, COUNT).tolist() == [3, 9]
    tables.write_index(path, ORDER, COUNT)
    assert tables.read_index(path, COUNT).tolist() == ORDER.tolist()
    for columns, version in ((more, "1"), ({"page": more["page"]}, "99")):
        forge(path, "index", columns, format_version=version)
        with pytest.raises(CheckpointCorrupt, match="other names or types"):
            tables.read_index(path, COUNT)
