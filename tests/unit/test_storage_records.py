"""The record of what is to run: replaced whole, by who has read the one before, and never back."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dcres.errors import CheckpointCorrupt, Conflict, NotFound
from dcres.model.record import Desired, Record
from dcres.storage import layout
from dcres.storage.store import emptying
from dcres.storage.store.records import Records
from dcres.storage.store.store import Store

SPEC = {"name": "demo", "memory": 4096, "layout": {"main": 4096, "subs": []}}
NOW = "2026-01-01T00:00:00Z"
FIRST = Record(1, 3, "mine", Desired.RUNNING, SPEC, NOW, "ann@h0")


@pytest.fixture
def records(tmp_path: Path) -> Records:
    return Records(tmp_path / "store", "demo")


def path_of(records: Records) -> Path:
    return records._root / "demo" / "record.json"


def test_what_was_written_is_read(records: Records) -> None:
    assert records.read() is None
    records.write(FIRST)
    assert records.read() == FIRST
    stopped = FIRST.stopped("later", "bob@h1")
    records.write(stopped)
    assert records.read() == stopped
    assert (stopped.version, stopped.desired, stopped.spec) == (2, Desired.STOPPED, SPEC)
    assert (stopped.since, stopped.by) == ("later", "bob@h1")


def test_as_another_program_reads_it(records: Records) -> None:
    records.write(FIRST)
    text = path_of(records).read_text()
    assert text == json.dumps(json.loads(text), sort_keys=True) + "\n"
    assert json.loads(text) == {
        "format_version": 1,
        "version": 1,
        "generation": 3,
        "cluster": "mine",
        "desired": "running",
        "spec": SPEC,
        "since": NOW,
        "by": "ann@h0",
    }
    assert path_of(records).stat().st_mode & 0o777 == 0o600
    assert [each.name for each in path_of(records).parent.glob("*.tmp")] == []


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (FIRST, r"has version 2, and version 1 was to replace the one before"),
        (replace(FIRST, version=2), "changed meanwhile"),
        (replace(FIRST, version=4), "changed meanwhile"),
        (replace(FIRST, version=3, generation=2), "about generation 3, and generation 2 is over"),
    ],
)
def test_who_was_overtaken_is_refused(records: Records, record: Record, words: str) -> None:
    records.write(FIRST)
    stopped = FIRST.stopped("later", "")
    records.write(stopped)
    with pytest.raises(Conflict, match=words):
        records.write(record)
    assert records.read() == stopped
    records.write(replace(stopped, version=3, generation=4, desired=Desired.RUNNING))


def test_the_first_has_version_1(records: Records) -> None:
    with pytest.raises(Conflict, match="has version 0"):
        records.write(replace(FIRST, version=2))
    assert records.read() is None


def test_of_several_at_the_same_time_one_wins(tmp_path: Path) -> None:
    outcomes: list[str] = []
    begin = threading.Barrier(8)

    def write(number: int) -> None:
        begin.wait()
        try:
            Records(tmp_path / "store", "demo").write(replace(FIRST, by=str(number)))
            outcomes.append(str(number))
        except Conflict:
            outcomes.append("")

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = filter(None, outcomes)
    assert len(outcomes) == 8
    found = Records(tmp_path / "store", "demo").read()
    assert found is not None
    assert found.by == winner


def altered(change: Callable[[dict[str, Any]], object]) -> bytes:
    values = {
        "format_version": 1,
        "version": 1,
        "generation": 3,
        "cluster": "mine",
        "desired": "running",
        "spec": SPEC,
        "since": NOW,
        "by": "",
    }
    change(values)
    return json.dumps(values).encode()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "it is damaged; remove it"),
        (b"[]", "it is damaged"),
        (b"\xff", "it is damaged"),
        (altered(lambda values: values.update(desired="asleep")), "it is damaged"),
        (altered(lambda values: values.update(version="1")), "it is damaged"),
        (altered(lambda values: values.update(spec="x")), "it is damaged"),
        (altered(lambda values: values.update(by=7)), "it is damaged"),
        (altered(lambda values: values.update(more=7)), "it is damaged"),
        (altered(lambda values: values.pop("since")), "it is damaged"),
        (altered(lambda values: values.update(format_version=2)), "a later dcres wrote it"),
        (altered(lambda values: values.update(format_version=[])), "it is damaged"),
    ],
)
def test_one_that_says_nothing_is_not_replaced(records: Records, data: bytes, words: str) -> None:
    records.write(FIRST)
    path_of(records).write_bytes(data)
    with pytest.raises(CheckpointCorrupt, match=words):
        records.read()
    with pytest.raises(CheckpointCorrupt):
        records.write(FIRST.stopped(NOW, ""))
    assert path_of(records).read_bytes() == data


def test_a_name_that_leads_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        Records(tmp_path, "../x")


def test_a_life_after_it_is_a_later_one(tmp_path: Path) -> None:
    """Also where the counter of lives was lost: else its record would be refused."""
    store = Store(tmp_path / "store")
    store.lives("demo").records.write(replace(FIRST, generation=41))
    assert store.latest_generation("demo") == 41


def test_it_goes_with_its_store(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    store.lives("demo").records.write(FIRST)
    assert (store.root / "demo" / layout.RECORD).exists()
    assert store.sweep("demo") == []
    assert store.list() == []
    assert emptying.empty(store.root)
    assert not store.root.exists()
