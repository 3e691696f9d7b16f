"""Checkpoints that continue one another: each is whole, whatever became of those before."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dcres.errors import CheckpointCorrupt, NotFound, StorageError, StoreFull
from dcres.linux.files import opened
from dcres.model.pages import PAGE_SIZE, extents_of_mask
from dcres.storage import layout
from dcres.storage.engine.expected import SUM_OF_ZEROS, MemoryFile
from dcres.storage.engine.memory_file import SavedMemory, load, verify
from dcres.storage.engine.page_reader import PageReader
from dcres.storage.format import main_tables, tables
from dcres.storage.format.host_part import (
    link_base,
    read_main_tables,
    write_main_changes,
    write_segment,
)
from dcres.storage.format.main_tables import MainTables
from dcres.storage.format.manifest import Manifest, dumps, loads
from dcres.storage.format.runs import Runs, coarser, history_runs, runs_of
from dcres.storage.format.tables import NOWHERE
from tests.support.chains import Chain, Change
from tests.support.stored import memory, take

PAGES = 64
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # fsync costs nothing there
FIRST, SECOND, THIRD = (f"vm-20260301-120000-{number:04x}" for number in range(3))


@pytest.fixture
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        yield Path(folder)


@pytest.fixture
def chain(place: Path) -> Chain:
    """Three checkpoints: everything, then pages that were written, moved, zeroed and discarded."""
    made = Chain(place)
    for host in range(3):
        made.change(Change("write", 20 * host, 20 * host + 20, host))
    made.take()
    for change in (
        Change("write", 3, 6),
        Change("move", 10, 30, 2),
        Change("write", 12, 15),
        Change("zero", 50, 52),
        Change("discard", 55, 57),
    ):
        made.change(change)
    made.take()
    made.change(Change("write", 4, 5))
    made.take()
    return made


def require_whole(chain: Chain, manifest: Manifest) -> None:
    """Every page is in one host's part, with its bytes, however it is read."""
    target = chain.store.root.with_name("target")
    with opened(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC) as fd:
        os.ftruncate(fd, chain.pages * PAGE_SIZE)
        for part in manifest.hosts:
            found = chain.store.read_part(manifest, part.host).memory
            assert found.mask.tolist() == chain.placed(part.host).tolist()
            assert load(found, fd) == verify(found) == part.pages
            with PageReader(chain.store.memory_part(manifest, part.host).read()) as reader:
                for first, stop in extents_of_mask(reader.mask).tolist():
                    assert reader.read(first, stop) == chain.ram[first:stop].tobytes()
    assert target.read_bytes() == chain.ram.tobytes()
    placement = chain.store.read_main_tables(manifest).placement
    for index, part in enumerate(manifest.hosts):
        assert (placement == index).tolist() == chain.placed(part.host).tolist()
    assert chain.store.read_main_tables(manifest).history.tolist() == chain.ticks.tolist()
    report = chain.store.verify(manifest.checkpoint)
    assert (report.ok, report.pages) == (True, manifest.pages), report
    text = dumps(manifest)
    assert loads(text, Path("manifest.json")) == manifest


def files_of(chain: Chain) -> list[Path]:
    return sorted(path for path in (chain.store.root / "vm").rglob("*") if path.is_file())


CHANGES = st.builds(
    lambda kind, first, length, host: Change(kind, first, min(first + length, PAGES), host),
    st.sampled_from(["write", "write", "zero", "move", "move", "discard", "leave", "join"]),
    st.integers(0, PAGES - 1),
    st.sampled_from([1, 1, 3, 20]),
    st.integers(0, 4),
)
STEPS = st.tuples(st.lists(CHANGES, max_size=5), st.integers(0, 20))
LONGEST = [([Change("write", n, n + 9, n), Change("move", 2 * n, 3 * n, 1)], 9) for n in range(16)]


@settings(max_examples=25, deadline=None)
@given(st.lists(STEPS, min_size=1, max_size=layout.MOST_SEGMENTS))
@example(LONGEST)
def test_each_checkpoint_of_a_chain_is_whole(steps: list[tuple[list[Change], int]]) -> None:
    """Whatever happened between two of them, and whichever older ones are deleted."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        chain, there = Chain(Path(folder), PAGES), list[str]()
        for changes, deleted in steps:
            for change in changes:
                chain.change(change)
            manifest = chain.take()
            require_whole(chain, manifest)
            if deleted < len(there):
                chain.store.delete(there.pop(deleted))
                require_whole(chain, manifest)
            there.append(manifest.checkpoint)
        for checkpoint in there[:-1]:
            chain.store.delete(checkpoint)
        require_whole(chain, manifest)
        assert {path.stat().st_nlink for path in files_of(chain)} == {1}
        chain.store.delete(there[-1])
        assert files_of(chain) == []


def test_an_increment_has_what_changed_and_no_more(chain: Chain) -> None:
    first, second, third = chain.taken
    assert [part.segments[-1].pages for part in second.hosts if part.segments] == [3, 0, 5]
    assert [part.segments[-1].places for part in second.hosts if part.segments] == [3, 0, 3]
    assert [part.segments[-1].gone for part in second.hosts if part.segments] == [3, 0, 2]
    assert (third.base, third.chain) == (SECOND, (FIRST, SECOND, THIRD))
    assert [part.pages for part in first.hosts] == [20, 20, 20]
    assert [part.pages for part in third.hosts] == [17, 20, 21]
    pack = chain.folder(third, "h0") / layout.by_origin(THIRD, layout.SEGMENT_PACK)
    assert pack.read_bytes() == chain.ram[4].tobytes()
    linked = chain.folder(third, "h0") / layout.by_origin(FIRST, layout.SEGMENT_PACK)
    assert linked.stat().st_nlink == 3
    assert len(files_of(chain)) == sum(
        len(part.files) + len(part.segments or ()) for each in chain.taken for part in each.hosts
    ) + len(chain.taken)


def test_only_pages_of_one_segment_are_read(chain: Chain) -> None:
    """What is superseded may be damaged: nobody reads it."""
    third = chain.taken[-1]
    path = chain.folder(third, "h0") / layout.by_origin(SECOND, layout.SEGMENT_PACK)
    flip(path, 1 * PAGE_SIZE)  # of page 4, which was saved once more
    require_whole(chain, third)
    assert not chain.store.verify(SECOND).ok


# Damage


def flip(path: Path, offset_bytes: int) -> None:
    with opened(path, os.O_RDWR) as fd:
        byte = os.pread(fd, 1, offset_bytes)
        os.pwrite(fd, bytes([byte[0] ^ 1]), offset_bytes)


def problems(chain: Chain, manifest: Manifest) -> list[tuple[str, str]]:
    report = chain.store.verify(manifest.checkpoint)
    with pytest.raises(CheckpointCorrupt):
        chain.store.verify(manifest.checkpoint, strict=True)
    return [(file.host, file.name) for file in report.files if not file.ok]


def test_every_file_of_an_increment_is_compared(chain: Chain) -> None:
    third = chain.taken[-1]
    for part in third.hosts:
        stored = sorted(path.name for path in chain.folder(third, part.host).iterdir())
        found = chain.store.verify_part(third, part.host).report
        assert sorted(file.name for file in found.files) == stored
        for name in stored:
            path, aside = chain.folder(third, part.host) / name, chain.store.root / "aside"
            if path.stat().st_size:
                flip(path, 0)
                assert problems(chain, third) == [(part.host, name)]
                flip(path, 0)
            path.rename(aside)
            assert problems(chain, third) == [(part.host, name)]
            path.write_bytes(aside.read_bytes() + b"1")
            assert problems(chain, third) == [(part.host, name)]
            with pytest.raises(StorageError, match=name):
                republish(chain, third)
            aside.rename(path)
            republish(chain, third)
    require_whole(chain, third)


def republish(chain: Chain, manifest: Manifest) -> None:
    (chain.folder(manifest, "") / layout.MANIFEST).unlink(missing_ok=True)
    chain.store.publish(manifest)


def test_a_damaged_page_of_an_old_segment_is_named(chain: Chain) -> None:
    third = chain.taken[-1]
    path = chain.folder(third, "h1") / layout.by_origin(FIRST, layout.SEGMENT_PACK)
    flip(path, 7 * PAGE_SIZE)
    message = f"{path}: page 27 was altered"
    found = chain.store.read_part(third, "h1").memory
    for attempt in (
        lambda: verify(found),
        lambda: PageReader(found).read(20, 40),
        lambda: chain.store.verify(THIRD, strict=True),
    ):
        with pytest.raises(CheckpointCorrupt, match=message):
            attempt()
    assert [chain.store.verify(name).ok for name in (FIRST, SECOND, THIRD)] == [False] * 3
    with PageReader(found) as reader:
        os.truncate(path, 5 * PAGE_SIZE)
        with pytest.raises(CheckpointCorrupt, match=f"{path}: it ends at or after page 20"):
            reader.read(20, 40)


def altered(manifest: Manifest, host: int, **changes: object) -> Manifest:
    part = manifest.hosts[host].model_copy(update=changes)
    hosts = tuple(part if at == host else each for at, each in enumerate(manifest.hosts))
    return manifest.model_copy(update={"hosts": hosts})


def with_table(
    chain: Chain, manifest: Manifest, host: int, name: str, write: Callable[[Path], object]
) -> Manifest:
    """`manifest` after a table was replaced, with its right checksum."""
    part = manifest.hosts[host]
    path = chain.folder(manifest, part.host) / name
    path.unlink()
    file = write(path)
    kept = [each for each in part.files if each.name != name]
    return altered(manifest, host, files=(*kept, file))


def test_tables_that_do_not_fit(chain: Chain) -> None:
    third = chain.taken[-1]
    own = layout.by_origin(THIRD, layout.SEGMENT)
    rows = tables.read_segment(chain.folder(third, "h1") / own, PAGES)
    one = tables.SegmentRows(
        np.array([1]), np.array([tables.ZEROS], np.uint32), np.array([SUM_OF_ZEROS], np.uint64)
    )
    forged = with_table(chain, third, 1, own, lambda path: tables.write_segment(path, one, PAGES))
    with pytest.raises(CheckpointCorrupt, match=f"{own}: it has .1, 0, 0. pages, gone ones and"):
        chain.store.read_part(forged, "h1")
    segments = (*(third.hosts[1].segments or ())[:-1],)
    own_one = third.hosts[1].segments[-1].model_copy(update={"pages": 1})  # type: ignore[index]
    forged = altered(forged, 1, segments=(*segments, own_one))
    with pytest.raises(CheckpointCorrupt, match="it lists 21 pages and the manifest 20"):
        chain.store.read_part(forged, "h1")
    forged = altered(forged, 1, pages=21)
    republish(chain, forged)
    (problem,) = (f.problem for f in chain.store.verify(THIRD).files if f.problem)
    assert "page 1 was saved by h1 and does not belong to it" in problem
    with_table(chain, third, 1, own, lambda path: tables.write_segment(path, rows, PAGES))
    placed = placement_of(chain)
    older = layout.by_origin(FIRST, layout.PAGES)
    forged = with_table(
        chain,
        third,
        0,
        older,
        lambda path: tables.write_placement(path, placed, ("h0", "h1", "h2")),
    )
    with pytest.raises(CheckpointCorrupt, match=f"{older}: its kind is placement"):
        chain.store.read_main_tables(forged)
    bare = altered(third, 0, files=(third.vmcore,))
    for attempt in (
        lambda: chain.store.read_main_tables(bare).placement,
        lambda: chain.store.read_main_tables(bare).history,
        lambda: chain.store.memory_part(bare, "h0"),
    ):
        with pytest.raises(CheckpointCorrupt, match="does not list it"):
            attempt()


def placement_of(chain: Chain) -> tables.Placement:
    return chain.store.read_main_tables(chain.taken[-1]).placement


def test_a_page_that_is_left_with_a_stranger(chain: Chain) -> None:
    third = chain.taken[-1]
    own = layout.by_origin(THIRD, layout.PAGES)
    runs = Runs(np.array([[33, 34]]), np.ones(1, np.uint8))
    forged = with_table(
        chain,
        third,
        0,
        own,
        lambda path: tables.write_placement_runs(path, runs, ("h0", "h9"), PAGES),
    )
    with pytest.raises(CheckpointCorrupt, match=f"{own}: page 33 is left with a host that"):
        chain.store.read_main_tables(forged)


# Linking


def new_folder(chain: Chain, host: str = "h0") -> Path:
    return chain.store.host_folder("vm", begun(chain), host)


def begun(chain: Chain) -> str:
    name = "vm-20260301-120000-ffff"
    (chain.store.root / "vm" / name).mkdir(exist_ok=True)
    return name


def linked(chain: Chain, host: str = "h0") -> list[Path]:
    base, folder = chain.taken[-1], new_folder(chain, host)
    link_base(chain.folder(base, host), folder, base, host, begun(chain))
    return sorted(folder.iterdir())


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.EPERM, "there are no hard links between these folders.*take a full checkpoint"),
        (errno.EXDEV, "there are no hard links"),
        (errno.EMLINK, "Too many links.*take a full checkpoint"),
        (errno.EIO, "Input/output error"),
    ],
)
@pytest.mark.parametrize("after", [0, 5])
def test_where_there_are_no_links_nothing_is_left(
    chain: Chain, monkeypatch: pytest.MonkeyPatch, number: int, message: str, after: int
) -> None:
    honest, done = os.link, list[Path]()

    def refused(source: Path, target: Path, **more: bool) -> None:
        if len(done) == after:
            raise OSError(number, os.strerror(number), source)
        done.append(target)
        honest(source, target, **more)

    monkeypatch.setattr(os, "link", refused)
    with pytest.raises(StorageError, match=message):
        linked(chain)
    assert list(new_folder(chain).iterdir()) == []
    monkeypatch.undo()
    assert len(linked(chain)) == 12
    assert len(linked(chain)) == 12, "again"


def test_a_full_store_is_told_as_such(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "link", full)
    with pytest.raises(StoreFull):
        linked(chain)


def test_what_another_try_has_left_is_replaced(chain: Chain) -> None:
    stale = new_folder(chain) / layout.by_origin(FIRST, layout.SEGMENT_PACK)
    stale.write_bytes(b"something else")
    assert stale in linked(chain)
    assert stale.samefile(chain.folder(chain.taken[-1], "h0") / stale.name)


@pytest.mark.parametrize("change", ["missing", "shorter", "altered"])
def test_a_base_that_is_not_whole_is_not_continued(chain: Chain, change: str) -> None:
    base = chain.taken[-1]
    for path in sorted(chain.folder(base, "h0").iterdir()):
        if path.name == layout.VMCORE or (change == "altered" and path.suffix == ".pack"):
            continue
        data = path.read_bytes()
        match change:
            case "missing":
                path.rename(chain.store.root / "aside")
            case "shorter":
                os.truncate(path, len(data) - 1)
            case _:
                flip(path, 9)
        with pytest.raises(StorageError, match=path.name):
            linked(chain)
        assert list(new_folder(chain).iterdir()) == []
        path.write_bytes(data)
    assert len(linked(chain)) == 12


def test_what_cannot_be_continued(chain: Chain, tmp_path: Path) -> None:
    whole = take(chain.store, memory(tmp_path / "ram", np.ones(96, dtype=np.bool_)))
    with pytest.raises(StorageError, match="whose memory files are sparse; take a full one"):
        link_base(tmp_path, new_folder(chain), whole, "h0", begun(chain))
    with pytest.raises(NotFound, match="no host 'h9'"):
        linked(chain, "h9")
    main = chain.folder(chain.taken[-1], "h0")
    before = read_main_tables(main, chain.taken[-1])
    now = MainTables(before.placement, ("h1", "h0", "h2"), before.history)
    with pytest.raises(StorageError, match="those of h0, and h1 is the main host now; take a full"):
        write_main_changes(new_folder(chain), begun(chain), b"", now, 9, 1, before)
    memory_file = chain.store.read_part(chain.taken[0], "h1").memory
    saved = SavedMemory(memory_file, 1, 1, 1, 1.0)
    with pytest.raises(ValueError, match="gone as well"):
        write_segment(new_folder(chain), begun(chain), saved, memory_file.mask, PAGES)


# Who has ended


@pytest.mark.parametrize("renames", range(4))
def test_a_main_host_that_dies_among_its_tables_leaves_nothing_that_passes_for_whole(
    place: Path, renames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain, rename, done = Chain(place, hosts=1), os.rename, list[Path]()
    chain.change(Change("write", 0, 9))
    for number in range(2):  # a full one and an increment

        def die(source: Path, target: Path) -> None:
            if len(done) == renames:
                raise KeyboardInterrupt
            done.append(target)
            rename(source, target)

        monkeypatch.setattr(os, "rename", die)
        with pytest.raises(KeyboardInterrupt):
            chain.take()
        monkeypatch.undo()
        assert len(done) == renames
        swept = f"vm-20260301-120000-{number:04x}"
        assert chain.store.sweep("vm", whole_parts=False) == [swept]
        chain.take()
        done.clear()


def test_parts_that_are_whole_are_swept_by_the_rule(place: Path) -> None:
    chain = Chain(place)
    chain.change(Change("write", 0, 9))
    manifest = chain.take(publish=False)
    assert chain.store.sweep("vm") == [FIRST], "the main host's part is there"
    chain.taken.clear()
    manifest = chain.take(publish=False)
    assert chain.store.sweep("vm", whole_parts=False) == []
    for part in ("h0", "h1"):
        chain.folder(manifest, part).rename(place / part)
    assert chain.store.sweep("vm") == [], "the store of a sub host alone"
    (chain.folder(manifest, "h2") / layout.by_origin(FIRST, layout.SEGMENT)).unlink()
    assert chain.store.sweep("vm", whole_parts=False) == [FIRST]


# Size


def scattered(count: int, share: float, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random(count) < share


@pytest.mark.parametrize("moved", [False, True])
def test_metadata_follows_what_changed(place: Path, moved: bool) -> None:
    """64 GiB, one page in a thousand written and twenty others touched; the table of each host."""
    count = (64 << 30) // PAGE_SIZE
    where = (np.arange(count) >> 14).astype(np.uint8) % 4
    base = MainTables(where, ("h0", "h1", "h2", "h3"), np.zeros(count, np.uint32))
    written, touched = scattered(count, 0.001, 1), scattered(count, 0.02, 2)
    ticks = np.where(written | touched, np.arange(count, dtype=np.uint32) % 7 + 1, 0)
    placed = np.where(written, (where + 1) % 4, where) if moved else where
    now = MainTables(placed.astype(np.uint8), base.hosts, ticks.astype(np.uint32))
    folder = place / "vm" / FIRST
    saved = int(written.sum())
    folder.mkdir(parents=True)
    files = [*write_main_changes(folder, FIRST, b"", now, 7, saved, base)]
    for host in range(4):
        mask = written & (placed == host)
        order = np.flatnonzero(mask)
        sealed = SavedMemory(
            MemoryFile(folder, mask, np.zeros(count, np.uint64), order), len(order), 0, 0, 0.0
        )
        gone = written & (where == host) & (placed != host)
        files.append(write_segment(folder, FIRST, sealed, gone, count))
    size_bytes = sum(file.length_bytes for file in files)
    print(f"{size_bytes} bytes of tables for {saved} pages: {size_bytes / saved:.1f} a page")
    assert saved > 16_000
    assert size_bytes <= 64 * saved + (1 << 20)
    assert size_bytes <= (64 if moved else 28) * saved + (16 << 10)


def test_history_gets_coarser_and_never_older() -> None:
    count, tick = 5000, 50
    before = np.random.default_rng(1).integers(0, 40, count, dtype=np.uint32)
    touched = scattered(count, 0.3, 2)
    now = np.where(touched, tick - np.arange(count) % 7, before // 2).astype(np.uint32)
    exact = np.maximum(now, before)
    lengths = []
    for most in (5000, 1000, 100, 1):
        runs, found = history_runs(now, tick, before, most), before.copy()
        runs.lift(found)
        lengths.append(len(runs))
        assert len(runs) <= most
        assert (found >= exact).all()
        assert most < 5000 or found.tolist() == exact.tolist()
    assert lengths[-1] == 1 < lengths[1]
    assert len(history_runs(before, tick, before, 1)) == 0


def test_history_by_a_clock_that_was_set_back(place: Path) -> None:
    """What it knew of a later time is forgotten: else it would be the newest for ever."""
    chain = Chain(place, hosts=1)
    chain.change(Change("write", 0, 9))
    chain.ticks[:9] = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    chain.take()
    chain.ticks[:9] = [2, 1, 1, 1, 1, 2, 0, 0, 0]
    manifest = chain.take()
    assert manifest.tick == 2
    assert chain.store.read_main_tables(manifest).history[:9].tolist() == [
        2,
        2,
        1,
        1,
        1,
        2,
        0,
        0,
        0,
    ]


def test_coarse_history_makes_no_page_older(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main_tables, "_FEWEST_RUNS", 1)
    chain = Chain(place, hosts=1)
    chain.change(Change("write", 0, 9))
    chain.take()
    chain.ticks[10] = 2
    chain.take()
    chain.ticks[[9, 12]] = 1
    found = chain.store.read_main_tables(chain.take()).history
    assert found[8:17].tolist() == [1, 1, 2, 1, 1, 1, 1, 1, 0]


VALUES = st.lists(st.tuples(st.integers(1, 90), st.integers(0, 3)), max_size=40)


@settings(max_examples=100, deadline=None)
@given(VALUES, st.integers(1, 12), st.sampled_from([1, 7, 64, 1 << 20]))
def test_runs_are_what_they_were_made_of(
    lengths: list[tuple[int, int]], most: int, at_once: int
) -> None:
    """0 is what was known before of all pages."""
    column = np.array([value for length, value in lengths for _ in range(length)], np.uint32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dcres.storage.format.runs._AT_ONCE", at_once)
        runs = runs_of(column, lambda pages: column[pages] != 0)
    found = np.zeros_like(column)
    runs.lay(found)
    assert found.tolist() == column.tolist()
    other = column[::-1].copy()
    runs.lift(other)
    assert other.tolist() == np.maximum(column, column[::-1]).tolist()
    changes = np.flatnonzero(np.diff(np.concatenate(([0], column.astype(np.int64), [0]))))
    values = np.append(column, 0)[changes]
    assert len(runs) == np.count_nonzero(values), "none could be joined with the next"
    few = coarser(runs, most, len(column))
    size = 1
    while True:  # the first size of regions that is coarse enough, the plain way
        heads = range(0, len(column), size)
        expected = np.array([column[head : head + size].max() for head in heads], np.uint32)
        rows = np.count_nonzero(np.diff(expected, prepend=0)[expected != 0])
        if rows <= most:
            break
        size *= 2
    found = np.zeros_like(column)
    few.lay(found)
    assert len(few) <= most
    assert found.tolist() == np.repeat(expected, size)[: len(column)].tolist()


def test_a_host_that_comes_back_under_another_number(place: Path) -> None:
    """Hosts are told by their names, since their numbers are those of each manifest."""
    before = np.array([0, 1, 2, 2, NOWHERE], dtype=np.uint8)
    after = np.array([0, 2, 1, NOWHERE, 1], dtype=np.uint8)
    zeros = np.zeros(5, np.uint32)
    base = MainTables(before, ("h0", "h1", "h2"), zeros)
    now = MainTables(after, ("h0", "h2", "h1"), zeros)
    main_tables.write_changes(place, FIRST, now, 1, 1, base)
    runs, hosts = tables.read_placement_runs(place / layout.by_origin(FIRST, layout.PAGES), 5)
    assert hosts == now.hosts
    assert [*zip(runs.extents.tolist(), runs.values.tolist(), strict=True)] == [
        ([3, 4], NOWHERE),
        ([4, 5], 1),
    ]
