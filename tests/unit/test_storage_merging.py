"""Segments that are merged: every checkpoint stays what it was, whenever the merging ends."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dcres.errors import CheckpointCorrupt, Conflict, NotFound, StoreFull
from dcres.linux.files import opened
from dcres.linux.removal import CheckpointFolder
from dcres.model.pages import PAGE_SIZE, Pages, extents_of_mask
from dcres.storage import layout
from dcres.storage.digest import Sums
from dcres.storage.engine.expected import MemoryFile, require_sums
from dcres.storage.engine.memory_file import load
from dcres.storage.engine.page_reader import PageReader
from dcres.storage.format.host_part import Linked
from dcres.storage.format.manifest import Manifest, Segment
from dcres.storage.format.merged import Merged, find_merged, is_to_be_merged
from dcres.storage.store.store import Store
from tests.support.chains import Chain, Change

PAGES = 64
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # fsync costs nothing there
FIRST, SECOND, THIRD, FOURTH = (f"vm-20260301-120000-{number:04x}" for number in range(4))


class Known:
    """What every checkpoint of a chain must be, for as long as it is there."""

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        self._ram: dict[str, bytes] = {}
        self._ticks: dict[str, list[int]] = {}
        self._masks: dict[tuple[str, str], list[bool]] = {}

    def take(self) -> Manifest:
        """Take one, and remember it."""
        manifest = self.chain.take()
        self._ram[manifest.checkpoint] = self.chain.ram.tobytes()
        self._ticks[manifest.checkpoint] = self.chain.ticks.tolist()
        for part in manifest.hosts:
            mask = self.chain.placed(part.host).tolist()
            self._masks[manifest.checkpoint, part.host] = mask
        return manifest

    def require_whole(self, store: Store, *checkpoints: str) -> None:
        """These, or all that are in `store`, byte for byte."""
        for name in checkpoints or [entry.checkpoint for entry in store.list("vm")]:
            self._require_whole(store, store.get(name))

    def _require_whole(self, store: Store, manifest: Manifest) -> None:
        name, target = manifest.checkpoint, store.root.with_name("target")
        main = store.read_main_tables(manifest)
        with opened(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC) as fd:
            os.ftruncate(fd, manifest.memory_bytes)
            for index, part in enumerate(manifest.hosts):
                memory = store.read_part(manifest, part.host).memory
                assert load(memory, fd) == part.pages
                assert memory.mask.tolist() == self._masks[name, part.host]
                assert (main.placement == index).tolist() == self._masks[name, part.host]
        assert target.read_bytes() == self._ram[name]
        assert main.history.tolist() == self._ticks[name]
        report = store.verify(name)
        assert (report.ok, report.pages) == (True, manifest.pages), report


@pytest.fixture
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        yield Path(folder)


@pytest.fixture
def known(place: Path) -> Known:
    """Three checkpoints: everything, then pages that were written, moved, zeroed and discarded."""
    made = Known(Chain(place))
    for host in range(3):
        made.chain.change(Change("write", 20 * host, 20 * host + 20, host))
    made.take()
    for change in (
        Change("write", 3, 6),
        Change("move", 10, 30, 2),
        Change("write", 12, 15),
        Change("zero", 50, 52),
        Change("discard", 55, 57),
    ):
        made.chain.change(change)
    made.take()
    made.chain.change(Change("write", 4, 5))
    made.take()
    return made


@pytest.fixture
def chain(known: Known) -> Chain:
    return known.chain


def merge(chain: Chain, manifest: Manifest, *hosts: str) -> list[Merged]:
    names = hosts or tuple(part.host for part in manifest.hosts)
    return [chain.store.continuing.merge_part(manifest, host, 1) for host in names]


def files_of(store: Store) -> list[Path]:
    return sorted(path for path in (store.root / "vm").rglob("*") if path.is_file())


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


CHANGES = st.builds(
    lambda kind, first, length, host: Change(kind, first, min(first + length, PAGES), host),
    st.sampled_from(["write", "write", "zero", "move", "move", "discard", "leave", "join"]),
    st.integers(0, PAGES - 1),
    st.sampled_from([1, 1, 3, 20]),
    st.integers(0, 4),
)
# What changes; how far back a checkpoint is merged, by which hosts; which checkpoints are deleted.
STEPS = st.tuples(
    st.lists(CHANGES, max_size=4),
    st.one_of(st.none(), st.tuples(st.integers(0, 3), st.sets(st.integers(0, 2)))),
    st.integers(0, 12),
)
LONG = [
    ([Change("write", n, n + 9, n), Change("move", 2 * n, 3 * n, 1)], (n % 3, {0, 1, 2}), 9)
    for n in range(10)
]


@settings(max_examples=15, deadline=None)
@given(st.lists(STEPS, min_size=2, max_size=10))
@example(LONG)
def test_each_checkpoint_is_whole_whatever_is_merged(
    steps: list[tuple[list[Change], tuple[int, set[int]] | None, int]],
) -> None:
    """Whichever is merged, by some hosts or all, and whichever are deleted before and after."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        known = Known(Chain(Path(folder), PAGES))
        chain, there = known.chain, list[Manifest]()
        for changes, merging, deleted in steps:
            for change in changes:
                chain.change(change)
            there.append(known.take())
            if merging is not None and merging[0] < len(there):
                manifest = there[-1 - merging[0]]
                hosts = [part.host for part in manifest.hosts]
                merge(chain, manifest, *(hosts[at] for at in merging[1] if at < len(hosts)))
            if deleted < len(there) - 1:
                chain.store.delete(there.pop(deleted).checkpoint)
            known.require_whole(chain.store, there[-1].checkpoint)
        known.require_whole(chain.store)
        for manifest in there:
            chain.store.delete(manifest.checkpoint)
        assert files_of(chain.store) == []


def test_what_is_merged_takes_the_place_of_all_before(known: Known, chain: Chain) -> None:
    third = chain.taken[-1]
    before = {path: path.read_bytes() for path in files_of(chain.store)}
    merge(chain, third)
    assert before == {path: path.read_bytes() for path in before}, "nothing else has changed"
    chain.change(Change("write", 7, 9))
    fourth = known.take()
    for part in fourth.hosts:
        assert part.segments is not None
        assert [(each.checkpoint, each.merged) for each in part.segments] == [
            (THIRD, True),
            (FOURTH, False),
        ]
        assert part.segments[0].pages == chain.taken[2].hosts[0].pages or part.host != "h0"
        names = names_in(chain.folder(fourth, part.host))
        assert names == sorted({file.name for file in part.files} | set(packs_of(part.segments)))
    assert (fourth.base, fourth.chain, fourth.most_segments) == (THIRD, (THIRD, FOURTH), 2)
    for name in (FIRST, SECOND, THIRD):
        chain.store.delete(name)
    known.require_whole(chain.store)
    assert {path.stat().st_nlink for path in files_of(chain.store)} == {1}
    places = sum(segment.places for part in fourth.hosts for segment in part.segments or ())
    assert places == 60 - 2 - 2 + 2, "none of zeros or gone, and two that were written once more"


def packs_of(segments: tuple[Segment, ...]) -> list[str]:
    return [segment.pack for segment in segments]


def test_segments_that_came_meanwhile_come_after_it(known: Known, chain: Chain) -> None:
    """Merging takes longer than the next checkpoint does; and not all hosts have ended it."""
    second = chain.taken[1]
    merge(chain, second, "h0", "h2")
    chain.change(Change("write", 30, 33))
    fourth = known.take()
    kinds = {
        part.host: [(each.checkpoint[-1], each.merged) for each in part.segments or ()]
        for part in fourth.hosts
    }
    assert kinds["h0"] == kinds["h2"] == [("1", True), ("2", False), ("3", False)]
    assert kinds["h1"] == [("0", False), ("1", False), ("2", False), ("3", False)]
    assert fourth.chain == (FIRST, SECOND, THIRD, FOURTH)
    known.require_whole(chain.store)


def test_the_newest_counts_and_the_older_ones_go(known: Known, chain: Chain) -> None:
    first, second, third = chain.taken
    (older,) = merge(chain, second, "h1")
    assert chain.store.continuing.merged_part(third, "h1") == older
    (newer,) = merge(chain, third, "h1")
    assert chain.store.continuing.merged_part(third, "h1") == newer
    assert chain.store.continuing.merged_part(second, "h1") is None, "it is not needed any more"
    assert not [name for name in names_in(chain.folder(second, "h1")) if "merged" in name]
    chain.change(Change("write", 30, 33))
    fourth = known.take()
    assert chain.store.continuing.merged_part(fourth, "h1") is None, (
        "it is the first of its segments"
    )
    assert chain.store.continuing.merged_part(first, "h1") is None
    known.require_whole(chain.store)


def test_who_has_begun_to_read_goes_on(known: Known, chain: Chain) -> None:
    """While segments are merged, and when the checkpoint that has them is deleted after that."""
    third = chain.taken[-1]
    with PageReader(chain.store.memory_part(third, "h1").read()) as reader:
        before = [reader.read(*extent) for extent in extents_of_mask(reader.mask).tolist()]
        merge(chain, third)
        chain.change(Change("write", 20, 40))
        known.take()
        for name in (FIRST, SECOND, THIRD):
            chain.store.delete(name)
        again = [reader.read(*extent) for extent in extents_of_mask(reader.mask).tolist()]
        assert before == again
    with chain.store.pin(FOURTH):
        merge(chain, chain.taken[-1])
    known.require_whole(chain.store)


def test_it_is_the_same_however_often_it_is_made(
    known: Known, chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several checkpoints may have files of that name, and copies know a file by its name."""

    def hold_up(memory: MemoryFile, pages: Pages, sums: Sums) -> None:
        time.sleep(0.02 if pages[0] % 4 else 0)  # so that others overtake it
        require_sums(memory, pages, sums)

    monkeypatch.setattr("dcres.storage.engine.transfer.BATCH_PAGES", 2)
    monkeypatch.setattr("dcres.storage.engine.memory_file.require_sums", hold_up)
    third = chain.taken[-1]
    order = chain.store.read_part(third, "h1").memory.order
    assert order is not None
    found = []
    for threads in (8, 1, 8, 8):
        merged = chain.store.continuing.merge_part(third, "h1", threads)
        pack = merged.folder / merged.segment.pack
        assert pack.read_bytes() == chain.ram[order[order >= 0]].tobytes()
        found.append(merged)
    assert found == [merged] * 4


def test_it_is_pinned_meanwhile(chain: Chain) -> None:
    third, refused = chain.taken[-1], list[str]()

    def try_to_delete(pages: int) -> None:
        with pytest.raises(Conflict):
            chain.store.delete(THIRD)
        refused.append(THIRD)

    chain.store.continuing.merge_part(third, "h0", 1, try_to_delete)
    assert refused
    chain.store.delete(THIRD)
    with pytest.raises(NotFound):
        chain.store.continuing.merge_part(third, "h0", 1)


# Failures


def nothing_is_left(chain: Chain, host: str = "h0") -> bool:
    folder = chain.folder(chain.taken[-1], host)
    assert chain.store.continuing.merged_part(chain.taken[-1], host) is None
    return not [name for name in names_in(folder) if "merged" in name]


@pytest.mark.parametrize("host", ["h0", "h1"])
def test_a_damaged_page_is_not_merged(chain: Chain, host: str) -> None:
    """It would get a checksum by which it is right."""
    third = chain.taken[-1]
    name = layout.by_origin(FIRST, layout.SEGMENT_PACK)
    path = chain.folder(third, host) / name
    with opened(path, os.O_RDWR) as fd:
        for place in range(20):
            byte = os.pread(fd, 1, place * PAGE_SIZE)
            os.pwrite(fd, bytes([byte[0] ^ 1]), place * PAGE_SIZE)
    with pytest.raises(CheckpointCorrupt, match=f"{path}: page .* was altered"):
        merge(chain, third, host)
    assert nothing_is_left(chain, host)


def test_what_is_cancelled_leaves_nothing(chain: Chain) -> None:
    def cancelled(pages: int) -> None:
        raise Conflict("cancelled")

    with pytest.raises(Conflict, match="cancelled"):
        chain.store.continuing.merge_part(chain.taken[-1], "h1", 2, cancelled)
    assert nothing_is_left(chain, "h1")


CALLS = ("rename", "fsync", "link", "unlink", "ftruncate")


@contextmanager
def watched(patch: pytest.MonkeyPatch, look: Callable[[str], None]) -> Iterator[None]:
    """Whatever is done to files inside the block, `look` is called before."""
    with patch.context() as inner:
        for name in CALLS:
            honest = getattr(os, name)

            def watching(
                *args: Any, name: str = name, honest: Callable[..., Any] = honest, **more: Any
            ) -> object:
                look(name)
                return honest(*args, **more)

            inner.setattr(os, name, watching)
        yield


def test_a_failure_at_any_step_leaves_nothing(
    known: Known, chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    third, failed = chain.taken[-1], 0
    while True:
        seen = 0

        def fail(name: str, at: int = failed) -> None:
            nonlocal seen
            seen += 1
            if seen == at + 1 and name != "unlink":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with watched(monkeypatch, fail):
            try:
                merge(chain, third, "h0")
            except (StoreFull, OSError):
                pass
            else:
                if seen <= failed:
                    break
        failed += 1
        known.require_whole(chain.store)
        if chain.store.continuing.merged_part(third, "h0") is None:
            assert nothing_is_left(chain)
    assert failed > 15
    chain.change(Change("write", 7, 9))
    assert len(known.take().hosts[0].segments or ()) == 2
    known.require_whole(chain.store)


def test_a_kill_at_any_step_leaves_every_checkpoint_whole(
    known: Known, chain: Chain, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the next one is right: it has what is merged, or all that was there before."""
    second, third = chain.taken[1:]
    merge(chain, second, "h0")
    stores: list[Store] = []

    def look(name: str) -> None:
        stores.append(Store(place / f"killed{len(stores)}" / "store"))
        shutil.copytree(chain.store.root, stores[-1].root)

    with watched(monkeypatch, look):
        merge(chain, third, "h0")
        link(chain.store, third)
    look("end")
    assert len(stores) > 30
    found = set()
    for store in stores:
        found.add(tuple((each.checkpoint, each.merged) for each in link(store, third).segments))
        store.discard("vm", begun(store))
        merged = store.continuing.merge_part(third, "h0", 1)
        assert store.continuing.merged_part(third, "h0") == merged
        known.require_whole(store)
        mine = [path for path in files_of(store) if path.parent.name == "h0"]
        assert not [path for path in mine if path.name.startswith(".")], "nothing half-made is left"
        assert len([path for path in mine if ".merged." in path.name]) == 5
    assert found == {((SECOND, True), (THIRD, False)), ((THIRD, True),)}


def link(store: Store, base: Manifest) -> Linked:
    folder = store.host_folder("vm", begun(store), "h0")
    return store.continuing.link_part(base, "h0", folder, begun(store))


def begun(store: Store) -> str:
    name = "vm-20260301-120000-ffff"
    (store.root / "vm" / name).mkdir(exist_ok=True)
    return name


# What is not believed in


def alter(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("change", ["missing", "shorter", "altered"])
def test_what_is_not_whole_is_not_linked(known: Known, chain: Chain, change: str) -> None:
    third = chain.taken[-1]
    folder = chain.folder(third, "h0")
    (merged,) = merge(chain, third, "h0")
    paths = [path for path in folder.iterdir() if ".merged." in path.name]
    assert len(paths) == 5
    for path in paths:
        if change == "altered" and path.suffix == ".pack":
            continue
        data = path.read_bytes()
        match change:
            case "missing":
                CheckpointFolder(folder.parent).remove_file(path)
            case "shorter":
                path.write_bytes(data[:-1])
            case _:
                alter(path)
        linked = link(chain.store, third)
        assert linked.segments == third.hosts[0].segments, path
        target = chain.store.host_folder("vm", begun(chain.store), "h0")
        assert names_in(target) == sorted(
            [file.name for file in linked.files] + packs_of(linked.segments)
        )
        chain.store.discard("vm", begun(chain.store))
        path.write_bytes(data)
    assert chain.store.continuing.merged_part(third, "h0") == merged
    chain.change(Change("write", 7, 9))
    assert len(known.take().hosts[0].segments or ()) == 2
    known.require_whole(chain.store)


def test_a_full_store_is_told_when_it_is_linked(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge(chain, chain.taken[-1], "h0")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "link", full)
    with pytest.raises(StoreFull):
        link(chain.store, chain.taken[-1])


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"checksum": ""}', "\xff"])
def test_what_says_nothing_of_a_set_that_is_merged(chain: Chain, text: str) -> None:
    third = chain.taken[-1]
    (merged,) = merge(chain, third, "h0")
    said = merged.folder / f"{layout.by_origin(THIRD, layout.MERGED)}.{layout.MERGED_SET}"
    honest = said.read_text()
    said.write_bytes(text.encode("latin-1"))
    assert find_merged(merged.folder, THIRD) is None
    said.write_text(honest.replace('"merged": true', '"merged": false'))
    assert find_merged(merged.folder, THIRD) is None
    said.write_text(honest)
    assert find_merged(merged.folder, THIRD) == merged
    said.rename(said.with_name(f"{layout.by_origin(SECOND, layout.MERGED)}.json"))
    assert find_merged(merged.folder, SECOND) is None


# When it is worth it


def segments(*places: int, merged: bool = False) -> list[Segment]:
    return [
        Segment(
            checkpoint=f"vm-20260301-120000-{at:04x}",
            pages=count,
            gone=0,
            places=count,
            merged=merged and not at,
        )
        for at, count in enumerate(places)
    ]


def test_when_segments_are_to_be_merged() -> None:
    most = layout.MERGE_SEGMENTS
    assert not is_to_be_merged(100, segments(100), None)
    assert not is_to_be_merged(100, segments(100, *[1] * (most - 2)), None)
    assert is_to_be_merged(100, segments(100, *[1] * (most - 1)), None)
    assert not is_to_be_merged(100, segments(100, 100), None)
    assert is_to_be_merged(100, segments(100, 100, 1), None)
    assert not is_to_be_merged(0, segments(0), None)
    assert not is_to_be_merged(0, segments(9), None), "its own alone cannot get less"
    many = segments(100, *[30] * most)
    assert is_to_be_merged(100, many, None)
    newest = many[4].model_copy(update={"merged": True, "places": 100})
    assert not is_to_be_merged(100 + 10, many[:8], Merged(Path(), newest, ()))
    assert is_to_be_merged(100, many, Merged(Path(), newest, ()))
