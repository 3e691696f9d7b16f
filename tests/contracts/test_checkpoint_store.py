"""What dcres relies on in a store of checkpoints, whatever it is made of.

To put another one under it, give `place` one more parameter and a `Place` that makes such stores.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import numpy as np
import pytest

from dcres.errors import CheckpointCorrupt, Conflict, NotFound, StorageError
from dcres.linux.files import opened
from dcres.model.formats import MemoryFormat
from dcres.model.ownership import Claimant
from dcres.model.pages import PAGE_SIZE
from dcres.storage import layout
from dcres.storage.engine import memory_file
from dcres.storage.format import tables
from dcres.storage.format.manifest import Manifest
from dcres.storage.store.pins import Hold
from dcres.storage.store.protocols import CheckpointStore
from dcres.storage.store.store import Store
from tests.support.stored import HOSTS, NOW, PAGE_COUNT, memory, placement, take

ME = Claimant("here", "h0", "machine", "boot")
OTHER = Claimant("there", "h9", "another", "another")
UNKNOWN = "demo-20260101-000000-ffff"


class Place(Protocol):
    """Where stores are; each has a name."""

    def store(self, name: str = "one") -> CheckpointStore:
        """A handle on the store of that name, as another process has one."""


class Folder:
    """Stores in folders."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def store(self, name: str = "one") -> CheckpointStore:
        return Store(self._path / name)


@pytest.fixture(params=["folder"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return {"folder": Folder}[request.param](tmp_path / "stores")


@pytest.fixture
def store(place: Place) -> CheckpointStore:
    return place.store()


@pytest.fixture
def ram(tmp_path: Path) -> Path:
    return memory(tmp_path / "ram", placement() != tables.NOWHERE)


@pytest.fixture(params=list(MemoryFormat))
def taken(store: CheckpointStore, ram: Path, request: pytest.FixtureRequest) -> Manifest:
    """All files are there, nothing is published or pinned."""
    return take(store, ram, memory_format=request.param)


@pytest.fixture
def published(store: CheckpointStore, taken: Manifest) -> Manifest:
    store.publish(taken)
    return taken


@pytest.fixture
def hold() -> Iterator[Hold]:
    made = Hold()
    yield made
    made.release()


def begun(store: CheckpointStore, hold: Hold, token: str = "0001", vm: str = "demo") -> str:
    checkpoint = layout.checkpoint_id(vm, NOW, token)
    store.begin(vm, checkpoint, hold)
    return checkpoint


def alter(store: CheckpointStore, manifest: Manifest, host: str) -> None:
    """Change a byte that `host` saved of a page."""
    part = store.memory_part(manifest, host)
    sparse = manifest.memory_format is MemoryFormat.SPARSE
    page = int(np.flatnonzero(part.read_sums()[0])[0]) if sparse else 0
    with opened(part.folder / part.memory_file, os.O_RDWR) as fd:
        old = os.pread(fd, 1, page * PAGE_SIZE)
        os.pwrite(fd, bytes([old[0] ^ 1]), page * PAGE_SIZE)


def test_an_empty_store_has_nothing(store: CheckpointStore) -> None:
    assert store.list() == store.list("demo") == []
    assert store.sweep("demo") == []
    assert store.identity() == ""
    assert store.latest_generation("demo") == 0
    assert not store.is_published(UNKNOWN)
    assert not store.confirm(UNKNOWN)
    for attempt in (store.get, store.verify, store.delete):
        with pytest.raises(NotFound):
            attempt(UNKNOWN)
    with pytest.raises(NotFound), store.pin(UNKNOWN):
        pass
    store.discard("demo", UNKNOWN)
    store.require_unpinned(UNKNOWN)


def test_it_exists_from_the_moment_that_it_is_published(
    place: Place, store: CheckpointStore, taken: Manifest
) -> None:
    checkpoint = taken.checkpoint
    assert store.list() == []
    assert not store.is_published(checkpoint)
    store.publish(taken)
    for each in (store, place.store()):
        assert each.is_published(checkpoint)
        assert each.confirm(checkpoint)
        assert each.get(checkpoint) == taken
        assert [entry.manifest for entry in each.list()] == [taken]
        assert each.list("other") == []
        assert each.parts_here(taken) == HOSTS
    assert not place.store("two").is_published(checkpoint)


def test_what_was_saved_is_read_back(
    place: Place, published: Manifest, ram: Path, tmp_path: Path
) -> None:
    store, target = place.store(), tmp_path / "target"
    with opened(target, os.O_RDWR | os.O_CREAT) as fd:
        os.ftruncate(fd, PAGE_COUNT * PAGE_SIZE)
        for index, host in enumerate(HOSTS):
            part = store.read_part(published, host)
            assert part.memory.mask.tolist() == (placement() == index).tolist()
            assert store.memory_part(published, host).pages == part.memory.mask.sum()
            memory_file.load(part.memory, fd)
    assert target.read_bytes() == ram.read_bytes()
    tables = store.read_main_tables(published)
    assert tables.placement.tolist() == placement().tolist()
    assert tables.history.tolist() == list(range(PAGE_COUNT))
    assert store.vmcore(published).stat().st_size == published.vmcore.length_bytes
    for read in (store.read_part, store.memory_part):
        with pytest.raises(NotFound, match="h9"):
            read(published, "h9")


def test_a_changed_byte_is_found(store: CheckpointStore, published: Manifest) -> None:
    checkpoint, done = published.checkpoint, list[int]()
    report = store.verify(checkpoint, done.append)
    assert (report.ok, report.pages, sum(done)) == (True, published.pages, published.pages)
    alter(store, published, "h1")
    bad = [(file.host, file.name) for file in store.verify(checkpoint).files if not file.ok]
    assert bad == [("h1", published.hosts[1].memory_file)]
    with pytest.raises(CheckpointCorrupt):
        store.verify(checkpoint, strict=True)
    parts = [store.verify_part(published, host) for host in HOSTS]
    assert [part.report.ok for part in parts] == [True, False, True]
    assert not store.verify_together(published, parts).ok
    assert store.verify_together(published, [parts[0], parts[2]]).ok


def test_publishing_is_repeatable_and_final(
    place: Place, store: CheckpointStore, published: Manifest, hold: Hold
) -> None:
    place.store().publish(published)
    with pytest.raises(Conflict, match="other content"):
        store.publish(published.model_copy(update={"tick": published.tick + 1}))
    assert store.get(published.checkpoint) == published
    for attempt in (
        lambda: store.begin("demo", published.checkpoint, hold),
        lambda: store.host_folder("demo", published.checkpoint, "h0"),
        lambda: store.discard("demo", published.checkpoint),
    ):
        with pytest.raises(Conflict):
            attempt()
    assert store.sweep("demo") == []
    assert store.verify(published.checkpoint).ok


def test_a_part_that_is_not_whole_is_not_published(store: CheckpointStore, taken: Manifest) -> None:
    memory_part = store.memory_part(taken, "h1")
    path = memory_part.folder / memory_part.memory_file
    os.truncate(path, path.stat().st_size - PAGE_SIZE)
    with pytest.raises(StorageError):
        store.publish(taken)
    assert not store.is_published(taken.checkpoint)
    store.publish(taken, here=("h0", "h2"))
    assert store.is_published(taken.checkpoint), "it is in its host's store"


def test_what_was_discarded_is_neither_filled_nor_published(
    store: CheckpointStore, taken: Manifest
) -> None:
    for _ in range(2):
        store.discard("demo", taken.checkpoint)
    for attempt in (
        lambda: store.host_folder("demo", taken.checkpoint, "h0"),
        lambda: store.publish(taken),
    ):
        with pytest.raises(NotFound, match="discarded"):
            attempt()
    assert store.parts_here(taken) == ()


def test_what_is_held_stays(place: Place, store: CheckpointStore, hold: Hold) -> None:
    checkpoint = begun(store, hold)
    store.begin("demo", checkpoint, hold)
    other = place.store()
    assert other.sweep("demo") == []
    with pytest.raises(Conflict):
        other.discard("demo", checkpoint)
    with pytest.raises(Conflict):
        other.require_unpinned(checkpoint)
    hold.drop()
    other.require_unpinned(checkpoint)
    assert other.sweep("demo") == [checkpoint]
    assert other.sweep("demo") == []


def test_sweeping_spares_what_it_is_told_and_other_vms(store: CheckpointStore) -> None:
    first, second, third = (Hold() for _ in range(3))
    kept, left = begun(store, first, "0001"), begun(store, second, "0002")
    elsewhere = begun(store, third, "0001", vm="other")
    for each in (first, second, third):
        each.release()
    assert store.sweep("demo", frozenset({kept})) == [left]
    assert store.sweep("demo") == [kept]
    assert store.sweep("other") == [elsewhere]


def test_sweeping_where_others_may_have_published(store: CheckpointStore, taken: Manifest) -> None:
    assert store.sweep("demo", whole_parts=False) == [], "it has parts that are whole"
    assert store.parts_here(taken) == HOSTS
    assert store.sweep("demo") == [taken.checkpoint]
    assert store.parts_here(taken) == ()


def test_a_pinned_checkpoint_is_not_deleted(
    place: Place, store: CheckpointStore, published: Manifest
) -> None:
    other = place.store()
    with ExitStack() as pins:
        for each in (store, other):
            pins.enter_context(each.pin(published.checkpoint))
        for attempt in (other.delete, other.require_unpinned):
            with pytest.raises(Conflict):
                attempt(published.checkpoint)
        assert store.verify(published.checkpoint).ok
    other.delete(published.checkpoint)
    assert not store.is_published(published.checkpoint)
    assert store.list() == []
    with pytest.raises(NotFound):
        store.delete(published.checkpoint)


def test_checkpoints_are_listed_by_age(store: CheckpointStore, ram: Path) -> None:
    for generation, token in ((3, "0001"), (1, "0002"), (2, "0003")):
        store.publish(take(store, ram, generation=generation, token=token))
    store.publish(take(store, ram, vm="other"))
    generations = [entry.manifest.generation for entry in store.list("demo") if entry.manifest]
    assert generations == [1, 2, 3]
    assert {entry.vm for entry in store.list()} == {"demo", "other"}
    assert store.latest_generation("demo") == 3


def test_stores_are_told_apart(place: Place, hold: Hold) -> None:
    begun(place.store(), hold)
    begun(place.store("two"), hold)
    one, two = place.store().identity(), place.store("two").identity()
    assert one != two
    assert one == place.store().identity() != ""


def test_one_life_at_a_time_has_a_name(place: Place, store: CheckpointStore) -> None:
    claimed = store.lives("demo").claim(ME, 4, "2026-01-01T00:00:00Z")
    try:
        assert (claimed.generation, place.store().latest_generation("demo")) == (5, 5)
        with pytest.raises(Conflict):
            place.store().lives("demo").claim(OTHER, 0, "2026-01-01T00:00:01Z")
        assert place.store().latest_generation("other") == 0
    finally:
        os.close(claimed.lock)
    place.store().lives("demo").release(ME, claimed.generation)
    after = place.store().lives("demo").claim(OTHER, 0, "2026-01-01T00:00:02Z")
    os.close(after.lock)
    assert after.generation == 6


@pytest.mark.parametrize("name", ["../x", "", "A", "a/b", "a-", ".", "a\n"])
def test_names_that_cannot_be(store: CheckpointStore, hold: Hold, name: str) -> None:
    for attempt in (
        lambda: store.begin(name, UNKNOWN, hold),
        lambda: store.begin("demo", name, hold),
        lambda: store.host_folder("demo", UNKNOWN, f"{name}/"),
        lambda: store.discard("demo", name),
        lambda: store.discard("other", UNKNOWN),
        lambda: store.lives(name),
        lambda: store.list(name),
        lambda: store.sweep(name),
        lambda: store.get(name),
        lambda: store.delete(name),
    ):
        with pytest.raises(NotFound):
            attempt()
