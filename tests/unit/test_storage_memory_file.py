"""Memory files: what is saved comes back, nothing damaged gets through."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from dcres.errors import CheckpointCorrupt, Conflict, HostError, NoRoom, StorageError, StoreFull
from dcres.linux import files
from dcres.linux.files import opened
from dcres.model.formats import MemoryFormat
from dcres.model.pages import (
    PAGE_SIZE,
    Mask,
    Pages,
    count_pages,
    extents_of_mask,
    extents_of_pages,
    join,
)
from dcres.storage.engine import buffers, bulk, page_places, sources, transfer
from dcres.storage.engine.buffers import Buffers
from dcres.storage.engine.bulk import stretches, write_fully
from dcres.storage.engine.expected import MemoryFile
from dcres.storage.engine.memory_file import (
    MemoryFileWriter,
    SavedMemory,
    load,
    verify,
)
from dcres.storage.engine.page_reader import PageReader
from dcres.storage.engine.transfer import ANYWHERE, BATCH_PAGES, WIDEST_BATCH, batches
from tests.support.stored import memory, save

PAGES = 40


def random_mask(page_count: int = PAGES, seed: int = 5) -> Mask:
    return np.random.default_rng(seed).random(page_count) < 0.5


SPARSE, PACKED = MemoryFormat.SPARSE, MemoryFormat.PACKED
both = pytest.mark.parametrize("memory_format", list(MemoryFormat))


def load_into(target: Path, saved: SavedMemory) -> bytes:
    with opened(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC) as fd:
        os.ftruncate(fd, len(saved.mask) * PAGE_SIZE)
        load(saved.file, fd)
    return target.read_bytes()


@contextmanager
def writing(
    path: Path, source: Path, page_count: int, memory_format: MemoryFormat
) -> Iterator[tuple[MemoryFileWriter, int]]:
    """A writer of a new memory file at `path`, and a descriptor of what it is to save."""
    with (
        opened(source, os.O_RDONLY) as fd,
        MemoryFileWriter(path, page_count, memory_format=memory_format) as writer,
    ):
        yield writer, fd


@given(
    st.lists(st.tuples(st.booleans(), st.integers(1, 700)), max_size=12),
    st.integers(1, 3),
    st.sampled_from(MemoryFormat),
)
@settings(max_examples=25, deadline=None)
def test_round_trip(
    runs: list[tuple[bool, int]], threads: int, memory_format: MemoryFormat
) -> None:
    mask = np.array([here for here, length in runs for _ in range(length)] or [False])
    with tempfile.TemporaryDirectory() as folder:
        source = memory(Path(folder, "ram"), mask)
        path = Path(folder, "memory.img")
        with writing(path, source, len(mask), memory_format) as (writer, fd):
            writer.save(fd, extents_of_mask(mask), threads)
            saved = writer.seal()
        assert saved.mask.tolist() == mask.tolist()
        assert saved.bytes_written == saved.pages * PAGE_SIZE == mask.sum() * PAGE_SIZE
        assert load_into(Path(folder, "back"), saved) == source.read_bytes()
        assert verify(saved.file, threads=threads) == saved.pages
        with opened(Path(folder, "back"), os.O_RDONLY) as fd:
            assert np.array_equal(files.data_extents(fd, len(mask)), extents_of_mask(mask))


@both
def test_sums_are_xxh3_of_each_page(tmp_path: Path, memory_format: MemoryFormat) -> None:
    mask = random_mask()
    source = memory(tmp_path / "ram", mask)
    saved = save(tmp_path / "m", source, mask, memory_format)
    data = source.read_bytes()
    for page in np.flatnonzero(mask).tolist():
        content = data[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]
        assert int(saved.file.sums[page]) == xxh3_64_intdigest(content)


def test_batches_cover_the_extents_in_order() -> None:
    extents = extents_of_mask(random_mask(10_000))
    found = list(batches(extents))
    assert np.array_equal(join(np.concatenate(found)), extents)
    assert all(each[-1, 1] - each[0, 0] <= WIDEST_BATCH for each in found)
    assert all(count_pages(each) <= BATCH_PAGES for each in found)
    assert len(found) < 8


@given(
    st.lists(
        st.tuples(st.integers(1, 40), st.one_of(st.integers(1, 30), st.integers(900, 5000))),
        max_size=60,
    )
)
def test_batches_are_the_extents_whatever_these_are(parts: list[tuple[int, int]]) -> None:
    at, rows = 0, []
    for gap, length in parts:
        rows.append([at + gap, at + gap + length])
        at += gap + length
    extents = np.array(rows, dtype=np.int64).reshape(-1, 2)
    found = list(batches(extents))
    if rows:
        assert np.array_equal(join(np.concatenate(found)), extents)
    for each in found:
        assert 0 < count_pages(each) <= BATCH_PAGES
        assert each[-1, 1] - each[0, 0] <= WIDEST_BATCH
        assert (each[1:, 0] - each[:-1, 1] <= 16).all()


def test_far_runs_are_not_read_through_the_hole_between() -> None:
    found = [each.tolist() for each in batches(np.array([[0, 1], [500, 501]]))]
    assert found == [[[0, 1]], [[500, 501]]]


def test_where_pages_are_read_one_by_one_a_batch_reaches_anywhere() -> None:
    pages = extents_of_pages(np.arange(3 * BATCH_PAGES) * 1000)
    found = list(batches(pages, ANYWHERE))
    assert [len(each) for each in found] == [BATCH_PAGES] * 3
    assert np.array_equal(np.concatenate(found), pages)


@both
def test_few_pages_far_apart_are_saved_again(tmp_path: Path, memory_format: MemoryFormat) -> None:
    mask = np.ones(20_000, dtype=np.bool_)
    source = memory(tmp_path / "ram", mask)
    some = np.zeros(20_000, dtype=np.bool_)
    some[::97] = some[1::97] = True
    with (
        opened(source, os.O_RDWR) as fd,
        MemoryFileWriter(tmp_path / "m", 20_000, memory_format=memory_format) as writer,
    ):
        writer.save(fd, extents_of_mask(mask))
        for page in np.flatnonzero(some).tolist():
            os.pwrite(fd, page.to_bytes(8, "little") * 512, page * PAGE_SIZE)
        writer.save(fd, extents_of_mask(some))
        saved = writer.seal()
    assert load_into(tmp_path / "back", saved) == source.read_bytes()


def test_holes_take_no_disk_blocks(tmp_path: Path) -> None:
    mask = np.zeros(20_000, dtype=np.bool_)
    mask[::1000] = True
    saved = save(tmp_path / "m", memory(tmp_path / "ram", mask), mask, SPARSE)
    assert saved.pages == 20
    assert saved.allocated_bytes < 100 * PAGE_SIZE
    assert (tmp_path / "m").stat().st_size == 20_000 * PAGE_SIZE


@both
@pytest.mark.parametrize("page_count", [1, 200])
def test_rewriting_does_not_grow_the_file(
    tmp_path: Path, memory_format: MemoryFormat, page_count: int
) -> None:
    mask = np.ones(page_count, dtype=np.bool_)
    old, new = memory(tmp_path / "old", mask, 1), memory(tmp_path / "new", mask, 2)
    with MemoryFileWriter(tmp_path / "m", page_count, memory_format=memory_format) as writer:
        for source in (old, new, old, new):
            with opened(source, os.O_RDONLY) as fd:
                writer.save(fd, extents_of_mask(mask))
        saved = writer.seal()
    assert saved.bytes_written == 4 * page_count * PAGE_SIZE
    assert saved.allocated_bytes <= (page_count + 8) * PAGE_SIZE
    assert load_into(tmp_path / "back", saved) == new.read_bytes()


@both
def test_short_rewrites_over_long_ones_and_back(
    tmp_path: Path, memory_format: MemoryFormat
) -> None:
    """Single pages go through the page cache, long runs past it: the last write must win."""
    whole = np.ones(400, dtype=np.bool_)
    single = np.zeros(400, dtype=np.bool_)
    single[7::20] = True
    one, two, three = (memory(tmp_path / f"ram{seed}", whole, seed) for seed in (1, 2, 3))
    with MemoryFileWriter(tmp_path / "m", 400, memory_format=memory_format) as writer:
        for source, mask in ((one, single), (two, whole), (three, single)):
            with opened(source, os.O_RDONLY) as fd:
                writer.save(fd, extents_of_mask(mask))
        saved = writer.seal()
    pages = [np.frombuffer(path.read_bytes(), np.uint8).reshape(400, -1) for path in (two, three)]
    expected = np.where(single[:, None], pages[1], pages[0]).tobytes()
    assert load_into(tmp_path / "back", saved) == expected


def test_discarded_pages_are_holes(tmp_path: Path) -> None:
    mask = np.ones(PAGES, dtype=np.bool_)
    source = memory(tmp_path / "ram", mask)
    with writing(tmp_path / "m", source, PAGES, SPARSE) as (writer, fd):
        writer.save(fd, extents_of_mask(mask))
        writer.discard(np.array([[3, 9], [20, 21]]))
        writer.save(fd, np.array([[5, 6]]))
        saved = writer.seal()
    gone = {3, 4, 6, 7, 8, 20}
    assert set(np.flatnonzero(~saved.mask).tolist()) == gone
    data = (tmp_path / "m").read_bytes()
    assert all(not any(data[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]) for page in gone)
    assert verify(saved.file) == PAGES - len(gone)


@both
@pytest.mark.parametrize("gone", [[[3, 9], [5, 12]], [[9, 12], [3, 5]], [[4, PAGES + 1]], [[3, 3]]])
def test_pages_that_cannot_be_are_not_discarded(
    tmp_path: Path, memory_format: MemoryFormat, gone: list[list[int]]
) -> None:
    """Nor is any other page: all that was saved is saved."""
    mask = np.ones(PAGES, dtype=np.bool_)
    source = memory(tmp_path / "ram", mask)
    with writing(tmp_path / "m", source, PAGES, memory_format) as (writer, fd):
        writer.save(fd, extents_of_mask(mask))
        with pytest.raises(HostError, match="are not ascending within"):
            writer.discard(np.array(gone))
        saved = writer.seal()
    assert load_into(tmp_path / "back", saved) == source.read_bytes()


@both
def test_pages_of_zeros_are_pages_that_take_no_place(
    tmp_path: Path, memory_format: MemoryFormat
) -> None:
    whole = np.ones(600, dtype=np.bool_)
    source, zeros = memory(tmp_path / "ram", whole), tmp_path / "zeros"
    zeros.write_bytes(bytes(600 * PAGE_SIZE))
    cleared = np.array([[10, 300], [450, 451]])
    with (
        opened(source, os.O_RDONLY) as fd,
        opened(zeros, os.O_RDONLY) as zeros_fd,
        MemoryFileWriter(tmp_path / "m", 600, memory_format=memory_format) as writer,
    ):
        writer.save(fd, extents_of_mask(whole))
        writer.save(zeros_fd, cleared)
        writer.save(zeros_fd, np.array([[590, 600]]))
        writer.save(fd, np.array([[590, 600]]))
        saved = writer.seal()
    assert saved.pages == verify(saved.file) == 600
    assert saved.bytes_written == 610 * PAGE_SIZE
    assert saved.allocated_bytes <= (600 - 291 + 8) * PAGE_SIZE
    expected = bytearray(source.read_bytes())
    for first, stop in cleared.tolist():
        expected[first * PAGE_SIZE : stop * PAGE_SIZE] = bytes((stop - first) * PAGE_SIZE)
    assert load_into(tmp_path / "back", saved) == expected
    with opened(tmp_path / "back", os.O_RDONLY) as fd:
        assert files.data_extents(fd, 600).tolist() == [[0, 600]], "loaded as pages, not as holes"
    with PageReader(saved.file) as reader:
        assert bytes(reader.read(5, 460)) == expected[5 * PAGE_SIZE : 460 * PAGE_SIZE]


def watch_writes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, int]]:
    """Every write to memory files from now on: whether past the page cache, and its pages."""
    seen: list[tuple[bool, int]] = []

    def watched(fd: int, data: memoryview, offset_bytes: int) -> None:
        direct = bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)
        seen.append((direct, len(data) // PAGE_SIZE))
        write_fully(fd, data, offset_bytes)

    write_run_by_run(monkeypatch, watched)
    return seen


def write_run_by_run(
    monkeypatch: pytest.MonkeyPatch, write: Callable[[int, memoryview, int], None]
) -> None:
    """What `write_scattered` does, each of its writes by ``write(fd, data, offset_bytes)``."""

    def scattered(fd: int, data: memoryview, pages: Pages, slots: Pages) -> None:
        for low, high in stretches(pages, slots):
            first, stop = int(slots[low]), int(slots[high - 1]) + 1
            write(fd, data[first * PAGE_SIZE : stop * PAGE_SIZE], int(pages[low]) * PAGE_SIZE)

    monkeypatch.setattr(page_places, "write_scattered", scattered)


@both
def test_direct_and_cached_writes_take_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory_format: MemoryFormat
) -> None:
    """Each kind would wait for the other, on file systems where they agree at all."""
    whole = np.ones(8000, dtype=np.bool_)
    mixed = np.arange(8000) % 2 == 0
    mixed[np.arange(8000) % 1000 < 300] = True
    old, new = memory(tmp_path / "old", whole, 1), memory(tmp_path / "new", whole, 2)
    with MemoryFileWriter(tmp_path / "m", 8000, memory_format=memory_format) as writer:
        with opened(old, os.O_RDONLY) as fd:
            writer.save(fd, extents_of_mask(whole))
        seen = watch_writes(monkeypatch)
        with opened(new, os.O_RDONLY) as fd:
            writer.save(fd, extents_of_mask(mixed))
        saved = writer.seal()
    assert {direct for direct, _ in seen} == {True, False}
    assert seen == sorted(seen, key=lambda each: not each[0])
    pages = [np.frombuffer(path.read_bytes(), np.uint8).reshape(8000, -1) for path in (old, new)]
    expected = np.where(mixed[:, None], pages[1], pages[0]).tobytes()
    assert load_into(tmp_path / "back", saved) == expected


def test_new_pages_between_old_ones_are_written_in_long_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = np.ones(4096, dtype=np.bool_)
    even = np.arange(4096) % 2 == 0
    source = memory(tmp_path / "ram", whole)
    with writing(tmp_path / "m", source, 4096, PACKED) as (writer, fd):
        writer.save(fd, extents_of_mask(even))
        seen = watch_writes(monkeypatch)
        writer.save(fd, extents_of_mask(whole), threads=1)
        saved = writer.seal()
    assert seen == [(True, 512)] * 8
    assert load_into(tmp_path / "back", saved) == source.read_bytes()


def test_a_packed_file_never_has_more_places_than_memory_has_pages(tmp_path: Path) -> None:
    """Pages come, leave, and are cleared, round after round."""
    count = 600
    random = np.random.default_rng(4)
    source = memory(tmp_path / "ram", np.ones(count, dtype=np.bool_))
    half = memory(tmp_path / "half", np.arange(count) % 3 > 0)
    with MemoryFileWriter(tmp_path / "m", count, memory_format=PACKED) as writer:
        for turn in range(40):
            with opened(half if turn % 2 else source, os.O_RDONLY) as fd:
                writer.save(fd, extents_of_mask(random.random(count) < 0.6))
            writer.discard(extents_of_mask(random.random(count) < 0.5))
            assert (tmp_path / "m").stat().st_size <= count * PAGE_SIZE
        with opened(source, os.O_RDONLY) as fd:
            writer.save(fd, np.array([[0, count]]))
        saved = writer.seal()
    assert (tmp_path / "m").stat().st_size == count * PAGE_SIZE
    assert load_into(tmp_path / "back", saved) == source.read_bytes()


def test_only_sparse_files_care_how_the_file_system_takes_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = random_mask()
    source = memory(tmp_path / "ram", mask)
    monkeypatch.setattr(page_places, "allocated_bytes", lambda fd: 1 << 30)
    assert save(tmp_path / "packed", source, mask, PACKED).allocated_bytes == 1 << 30
    with pytest.raises(StorageError, match="does not keep holes page by page"):
        save(tmp_path / "sparse", source, mask, SPARSE)


@both
def test_a_disk_that_is_full_is_told_at_any_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory_format: MemoryFormat
) -> None:
    mask = random_mask(3000)
    mask[500:1500] = True
    source = memory(tmp_path / "ram", mask)
    left = 0

    def fill(fd: int, data: memoryview, offset_bytes: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, "no space")
        write_fully(fd, data, offset_bytes)

    write_run_by_run(monkeypatch, fill)
    for writes in range(3):
        left = writes
        with pytest.raises(StoreFull, match="no room to write"):
            save(tmp_path / "m", source, mask, memory_format)
        assert not (tmp_path / "m").exists()


@both
@pytest.mark.parametrize("room", [0, 700, 3000])  # none, for a part, for more
def test_what_is_staged_comes_last_and_only_once(
    tmp_path: Path, memory_format: MemoryFormat, room: int
) -> None:
    """Staged pages are those of the stop: newer than all that was saved, zeros among them."""
    whole = np.ones(3000, dtype=np.bool_)
    old, new = memory(tmp_path / "old", whole, 1), memory(tmp_path / "new", whole, 2)
    staged = np.random.default_rng(9).random(3000) < 0.4
    staged[1000:1400] = True
    with opened(new, os.O_RDWR) as fd:
        os.pwrite(fd, bytes(50 * PAGE_SIZE), 1100 * PAGE_SIZE)
    done: list[int] = []
    with MemoryFileWriter(tmp_path / "m", 3000, done.append, memory_format=memory_format) as writer:
        with opened(old, os.O_RDONLY) as fd:
            writer.save(fd, np.array([[0, 3000]]))
        writer.make_room(room)
        with opened(new, os.O_RDONLY) as fd:
            writer.stage(fd, extents_of_mask(staged))
        with pytest.raises(StorageError):
            writer.seal()
        done.clear()
        writer.settle()
        assert sum(done) == staged.sum()
        writer.settle()
        assert sum(done) == staged.sum()
        saved = writer.seal()
    pages = [np.frombuffer(path.read_bytes(), np.uint8).reshape(3000, -1) for path in (old, new)]
    expected = np.where(staged[:, None], pages[1], pages[0]).tobytes()
    assert load_into(tmp_path / "back", saved) == expected


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_SIZE


def test_staging_into_room_needs_no_more_memory(tmp_path: Path) -> None:
    count = 16 << 8
    source, every = memory(tmp_path / "ram", np.ones(count, dtype=np.bool_)), [[0, count]]
    taken: list[list[int]] = []
    for room in (0, count):
        with writing(tmp_path / "m", source, count, MemoryFormat.SPARSE) as (writer, fd):
            laps = [resident_bytes()]
            writer.make_room(room)
            writer.make_room(room // 2)  # there is more already
            laps.append(resident_bytes())
            writer.stage(fd, np.array(every))
            laps.append(resident_bytes())
        (tmp_path / "m").unlink(missing_ok=True)
        taken.append(np.diff(laps).tolist())
    half = count * PAGE_SIZE // 2
    (none, all_late), (all_early, nothing) = taken
    assert none < half < all_late
    assert nothing < half < all_early


def test_room_that_cannot_be_had_is_told_before_the_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(buffer: mmap.mmap, length_bytes: int) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(sources, "populate", none)
    with (
        MemoryFileWriter(tmp_path / "m", PAGES) as writer,
        pytest.raises(NoRoom, match=r"no memory to hold 8 MiB .*--mode stop"),
    ):
        writer.make_room(8 << 8)


@both
def test_a_sealed_file_and_its_name_are_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory_format: MemoryFormat
) -> None:
    """Its last change, fsync of the file, fsync of the folder, in this order."""
    done: list[str] = []

    def watch(module: object, name: str) -> None:
        real = getattr(module, name)

        def watched(fd: int, *args: object) -> object:
            done.append(f"{name} {os.readlink(f'/proc/self/fd/{fd}')}")
            return real(fd, *args)

        monkeypatch.setattr(module, name, watched)

    mask = random_mask(600)
    source = memory(tmp_path / "ram", mask)
    for module, name in (
        (page_places, "write_scattered"),
        (page_places, "punch_hole"),
        (os, "ftruncate"),
        (os, "fsync"),
    ):
        watch(module, name)
    path = tmp_path / "m"
    with writing(path, source, 600, memory_format) as (writer, fd):
        writer.save(fd, extents_of_mask(mask))
        writer.discard(np.array([[0, 200]]))
        writer.seal()
    assert f"fsync {path}" not in done[:-2]
    assert done[-2:] == [f"fsync {path}", f"fsync {tmp_path}"]


@both
def test_zeros_among_new_pages_keep_no_blocks(tmp_path: Path, memory_format: MemoryFormat) -> None:
    """Blocks are taken for long runs before it is known what is in them."""
    count = 3000
    source = memory(tmp_path / "ram", np.arange(count) < 200)
    saved = save(tmp_path / "m", source, np.ones(count, dtype=np.bool_), memory_format)
    assert saved.pages == count
    assert saved.bytes_written == 200 * PAGE_SIZE
    assert saved.allocated_bytes <= (200 + 16) * PAGE_SIZE
    assert load_into(tmp_path / "back", saved) == source.read_bytes()


def test_new_pages_fill_free_places_and_the_rest_is_one_long_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = memory(tmp_path / "ram", np.ones(3000, dtype=np.bool_))
    with writing(tmp_path / "m", source, 3000, PACKED) as (writer, fd):
        writer.save(fd, np.array([[0, 1000]]))
        writer.discard(np.array([[at, at + 1] for at in range(0, 1000, 10)]))
        seen = watch_writes(monkeypatch)
        writer.save(fd, np.array([[1000, 2000]]), threads=1)
        assert seen == [(True, 900)] + [(False, 1)] * 100
        saved = writer.seal()
    assert (tmp_path / "m").stat().st_size == 1900 * PAGE_SIZE
    assert verify(saved.file) == 1900


def test_a_disk_that_is_full_is_told_when_a_hole_takes_a_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "no space")

    mask = np.ones(PAGES, dtype=np.bool_)
    source = memory(tmp_path / "ram", mask)
    with writing(tmp_path / "m", source, PAGES, SPARSE) as (writer, fd):
        writer.save(fd, extents_of_mask(mask))
        monkeypatch.setattr(page_places, "punch_hole", full)
        with pytest.raises(StoreFull, match="no room to write"):
            writer.discard(np.array([[3, 4]]))


@pytest.mark.parametrize("short", [False, True])
def test_alternating_pages_are_read_in_few_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short: bool
) -> None:
    """In Python, too. And a call that is interrupted half-way loses nothing."""
    monkeypatch.setattr(bulk, "NATIVE", None)
    count = 4096
    mask = np.arange(count) % 2 == 0
    mask[100:900] = np.arange(800) % 17 == 0
    source = memory(tmp_path / "ram", np.ones(count, dtype=np.bool_))
    calls = 0
    preadv = os.preadv

    def counted(fd: int, buffers: list[memoryview], offset_bytes: int) -> int:
        nonlocal calls
        calls += 1
        if short and len(buffers) > 1:
            buffers = buffers[: len(buffers) // 2]
        return preadv(fd, buffers, offset_bytes)

    monkeypatch.setattr(os, "preadv", counted)
    saved = save(tmp_path / "m", source, mask, PACKED)
    monkeypatch.undo()
    assert calls > 1000 if short else 1 < calls <= 8
    content = np.frombuffer(source.read_bytes(), np.uint8).reshape(count, -1)
    expected = np.where(mask[:, None], content, np.uint8(0)).tobytes()
    assert load_into(tmp_path / "back", saved) == expected


steps = st.lists(
    st.tuples(
        st.sampled_from(["save", "discard", "stage", "zero"]),
        st.integers(0, 2**32 - 1),
        st.sampled_from([0.02, 0.3, 0.95]),
    ),
    max_size=12,
)


@both
@given(steps)
@settings(max_examples=40, deadline=None)
def test_whatever_is_saved_and_discarded_the_last_state_comes_back(
    memory_format: MemoryFormat, plan: list[tuple[str, int, float]]
) -> None:
    """Against an array that every step changes in the plainest way."""
    count = 700
    expected = np.zeros((count, PAGE_SIZE), dtype=np.uint8)
    here = np.zeros(count, dtype=np.bool_)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (
            opened(folder / "ram", os.O_RDWR | os.O_CREAT) as fd,
            MemoryFileWriter(folder / "m", count, memory_format=memory_format) as writer,
        ):
            os.ftruncate(fd, count * PAGE_SIZE)
            for what, seed, share in plan:
                random = np.random.default_rng(seed)
                chosen = random.random(count) < share
                if what == "discard":
                    writer.discard(extents_of_mask(chosen))
                    here &= ~chosen
                    expected[chosen] = 0
                    continue
                size = (int(chosen.sum()), PAGE_SIZE)
                fresh = random.integers(0, 256, size, np.uint8) if what != "zero" else 0
                expected[chosen] = fresh
                here |= chosen
                os.pwrite(fd, expected.tobytes(), 0)
                if what == "stage":
                    writer.stage(fd, extents_of_mask(chosen))
                    writer.settle()
                else:
                    writer.save(fd, extents_of_mask(chosen))
            saved = writer.seal()
        assert np.array_equal(saved.mask, here)
        assert load_into(folder / "back", saved) == expected.tobytes()
        full = int((here & expected.any(axis=1)).sum())
        if memory_format is PACKED:
            assert (folder / "m").stat().st_size == full * PAGE_SIZE
        assert saved.allocated_bytes <= (full + 16) * PAGE_SIZE


def packed(folder: Path, seed: int = 7) -> SavedMemory:
    """A packed file whose pages do not lie in order."""
    mask = random_mask(seed=seed)
    source = memory(folder / "ram", mask)
    late = mask & (np.arange(PAGES) < 20)
    with writing(folder / "memory.pack", source, PAGES, PACKED) as (writer, fd):
        writer.save(fd, extents_of_mask(mask & ~late))
        writer.save(fd, extents_of_mask(late))
        return writer.seal()


def test_a_packed_file_is_its_pages_one_after_the_other(tmp_path: Path) -> None:
    saved = packed(tmp_path)
    order = saved.file.order
    assert order is not None
    assert order.tolist() != sorted(order.tolist())
    memory_of = np.frombuffer((tmp_path / "ram").read_bytes(), np.uint8).reshape(PAGES, -1)
    assert saved.file.path.read_bytes() == memory_of[order].tobytes()


def test_damage_in_a_packed_file_is_found_and_named(tmp_path: Path) -> None:
    saved = packed(tmp_path)
    order = saved.file.order
    assert order is not None
    change(saved.file.path, 5 * PAGE_SIZE + 9)
    with pytest.raises(CheckpointCorrupt, match=f"page {order[5]} was altered"):
        verify(saved.file)
    with (
        PageReader(saved.file) as reader,
        pytest.raises(CheckpointCorrupt, match=f"page {order[5]} was altered"),
    ):
        reader.read(int(order[5]), int(order[5]) + 1)
    os.truncate(saved.file.path, 3 * PAGE_SIZE)
    with pytest.raises(CheckpointCorrupt, match="it has 12288 bytes instead of"):
        verify(saved.file)


def test_an_index_of_other_pages_is_found(tmp_path: Path) -> None:
    saved = packed(tmp_path)
    order = saved.file.order
    assert order is not None
    other = order.copy()
    other[0] = np.flatnonzero(~saved.mask)[0]
    with pytest.raises(CheckpointCorrupt, match=f"page {other[0]} is present but should not be"):
        verify(MemoryFile(saved.file.path, saved.mask, saved.file.sums, other))
    swapped = order.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    with pytest.raises(CheckpointCorrupt, match="was altered"):
        verify(MemoryFile(saved.file.path, saved.mask, saved.file.sums, swapped))


def test_a_page_of_zeros_may_become_a_hole_in_a_copy(tmp_path: Path) -> None:
    source = memory(tmp_path / "ram", np.ones(6, dtype=np.bool_))
    with opened(source, os.O_RDWR) as fd:
        os.pwrite(fd, bytes(2 * PAGE_SIZE), 2 * PAGE_SIZE)
    saved = save(tmp_path / "m", source, np.ones(6, dtype=np.bool_), SPARSE)
    with opened(tmp_path / "m", os.O_RDWR) as fd:
        files.punch_hole(fd, 2 * PAGE_SIZE, 2 * PAGE_SIZE)
    assert load_into(tmp_path / "back", saved) == source.read_bytes()
    with opened(tmp_path / "back", os.O_RDONLY) as fd:
        assert files.data_extents(fd, 6).tolist() == [[0, 6]]
    with opened(tmp_path / "m", os.O_RDWR) as fd:
        files.punch_hole(fd, 0, 5 * PAGE_SIZE)
    with pytest.raises(CheckpointCorrupt, match="page 0 is missing"):
        verify(saved.file)


@both
def test_progress_counts_every_page_once(tmp_path: Path, memory_format: MemoryFormat) -> None:
    mask = np.ones(5000, dtype=np.bool_)
    source = memory(tmp_path / "ram", mask)
    done: list[int] = []
    with (
        opened(source, os.O_RDONLY) as fd,
        MemoryFileWriter(tmp_path / "m", 5000, done.append, memory_format=memory_format) as writer,
    ):
        writer.save(fd, extents_of_mask(mask))
        saved = writer.seal()
    assert sum(done) == 5000
    assert len(done) > 3
    done.clear()
    verify(saved.file, done.append)
    assert sum(done) == 5000


@both
def test_a_thread_that_cannot_begin_is_an_error(
    tmp_path: Path, memory_format: MemoryFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else what is saved again would be as it was before, and pass every check."""

    def no_memory(length_bytes: int) -> NoReturn:
        raise OSError(errno.ENOMEM, "no memory")

    mask = np.ones(PAGES, dtype=np.bool_)
    source = memory(tmp_path / "ram", mask)
    with writing(tmp_path / "m", source, PAGES, memory_format) as (writer, fd):
        writer.save(fd, extents_of_mask(mask))
        saved = writer.seal()
        monkeypatch.setattr(transfer, "BUFFERS", Buffers(BATCH_PAGES * PAGE_SIZE))
        monkeypatch.setattr(buffers, "aligned_buffer", no_memory)
        with pytest.raises(OSError, match="no memory"):
            verify(saved.file)
    with writing(tmp_path / "n", source, PAGES, memory_format) as (writer, fd):
        with pytest.raises(OSError, match="no memory"):
            writer.save(fd, extents_of_mask(mask))
        with pytest.raises(StorageError, match="cannot be part of a checkpoint"):
            writer.seal()


def test_less_than_everything_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = np.arange(PAGES) % 2 == 0
    source = memory(tmp_path / "ram", mask)
    monkeypatch.setattr(transfer, "batches", lambda extents, reach: batches(extents[:1], reach))
    with (
        opened(source, os.O_RDONLY) as fd,
        MemoryFileWriter(tmp_path / "m", PAGES) as writer,
        pytest.raises(StorageError, match=f"1 of {PAGES // 2} pages were moved"),
    ):
        writer.save(fd, extents_of_mask(mask))


@both
def test_an_abandoned_writer_leaves_no_file(tmp_path: Path, memory_format: MemoryFormat) -> None:
    with MemoryFileWriter(tmp_path / "m", PAGES, memory_format=memory_format):
        assert (tmp_path / "m").exists()
    assert not (tmp_path / "m").exists()


@both
def test_a_failed_save_cannot_be_sealed(tmp_path: Path, memory_format: MemoryFormat) -> None:
    source = memory(tmp_path / "ram", np.ones(4, dtype=np.bool_))
    with writing(tmp_path / "m", source, PAGES, memory_format) as (writer, fd):
        with pytest.raises(ValueError, match="the source ends"):
            writer.save(fd, np.array([[0, 10]]))
        with pytest.raises(StorageError, match="failed"):
            writer.seal()
    assert not (tmp_path / "m").exists()


@both
def test_an_error_in_progress_stops_the_save(tmp_path: Path, memory_format: MemoryFormat) -> None:
    source = memory(tmp_path / "ram", np.ones(4, dtype=np.bool_))

    def cancelled(_: int) -> None:
        raise RuntimeError("cancelled")

    with (
        opened(source, os.O_RDONLY) as fd,
        MemoryFileWriter(tmp_path / "m", 4, cancelled, memory_format=memory_format) as writer,
        pytest.raises(RuntimeError, match="cancelled"),
    ):
        writer.save(fd, np.array([[0, 4]]))
    assert not (tmp_path / "m").exists()


@both
def test_an_existing_or_sealed_file_is_not_written(
    tmp_path: Path, memory_format: MemoryFormat
) -> None:
    mask = np.ones(4, dtype=np.bool_)
    source = memory(tmp_path / "ram", mask)
    save(tmp_path / "m", source, mask, memory_format)
    content = (tmp_path / "m").read_bytes()
    with (
        pytest.raises(Conflict, match="exists already"),
        MemoryFileWriter(tmp_path / "m", 4, memory_format=memory_format),
    ):
        pass
    assert (tmp_path / "m").read_bytes() == content
    with MemoryFileWriter(tmp_path / "n", 4, memory_format=memory_format) as writer:
        writer.seal()
        with pytest.raises(Conflict, match="sealed"):
            writer.discard(np.array([[0, 1]]))


@both
def test_without_direct_io_the_result_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory_format: MemoryFormat
) -> None:
    def plain(path: Path, flags: int, mode: int = 0o600) -> tuple[int, bool]:
        return os.open(path, flags, mode), False

    mask = random_mask(600)
    mask[100:400] = True
    source = memory(tmp_path / "ram", mask)
    direct = save(tmp_path / "direct", source, mask, memory_format)
    monkeypatch.setattr(page_places, "open_direct", plain)
    saved = save(tmp_path / "plain", source, mask, memory_format)
    assert (tmp_path / "plain").read_bytes() == (tmp_path / "direct").read_bytes()
    assert saved.file.sums.tolist() == direct.file.sums.tolist()
    assert load_into(tmp_path / "back", saved) == source.read_bytes()


def flip(path: Path, saved: SavedMemory) -> int:
    page = int(np.flatnonzero(saved.mask)[3])
    change(path, page * PAGE_SIZE + 77)
    change(path, int(np.flatnonzero(saved.mask)[9]) * PAGE_SIZE)
    return page


def change(path: Path, offset: int) -> None:
    with opened(path, os.O_RDWR) as fd:
        os.pwrite(fd, bytes([os.pread(fd, 1, offset)[0] ^ 4]), offset)


def lose(path: Path, saved: SavedMemory) -> int:
    page = int(np.flatnonzero(saved.mask)[2])
    with opened(path, os.O_RDWR) as fd:
        files.punch_hole(fd, page * PAGE_SIZE, PAGE_SIZE)
    return page


def add(path: Path, saved: SavedMemory) -> int:
    page = int(np.flatnonzero(~saved.mask)[2])
    with opened(path, os.O_RDWR) as fd:
        os.pwrite(fd, bytes(PAGE_SIZE), page * PAGE_SIZE)
    return page


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, "page {page} was altered"),
        (lose, "page {page} is missing"),
        (add, "page {page} is present but should not be"),
        (lambda path, _: os.truncate(path, 8 * PAGE_SIZE), "it has 32768 bytes instead of 163840"),
        (lambda path, _: os.truncate(path, 41 * PAGE_SIZE), "it has 167936 bytes"),
        (lambda path, _: os.truncate(path, PAGES * PAGE_SIZE - 1), "it has 163839 bytes"),
        (lambda path, _: path.unlink(), "it is missing"),
    ],
)
def test_damage_is_found_and_named(
    tmp_path: Path, damage: Callable[[Path, SavedMemory], int], message: str
) -> None:
    mask = random_mask()
    path = tmp_path / "memory.img"
    saved = save(path, memory(tmp_path / "ram", mask), mask, SPARSE)
    page = damage(path, saved)
    with pytest.raises(CheckpointCorrupt) as caught:
        verify(saved.file)
    assert f"{path}: {message.format(page=page)}" in str(caught.value)
    with pytest.raises(CheckpointCorrupt, match=r"memory\.img"):
        load_into(tmp_path / "back", saved)
    assert not any((tmp_path / "back").read_bytes())


def test_the_first_bad_page_is_named_whatever_the_threads_do(tmp_path: Path) -> None:
    mask = np.ones(8 * BATCH_PAGES, dtype=np.bool_)
    path = tmp_path / "memory.img"
    saved = save(path, memory(tmp_path / "ram", mask), mask, SPARSE)
    for page in (2 * BATCH_PAGES + 5, 2 * BATCH_PAGES + 900, 3 * BATCH_PAGES, 7 * BATCH_PAGES):
        change(path, page * PAGE_SIZE)
    for _ in range(5):
        with pytest.raises(CheckpointCorrupt, match=f"page {2 * BATCH_PAGES + 5} was altered"):
            verify(saved.file, threads=4)


@both
def test_a_bad_page_never_reaches_the_target(tmp_path: Path, memory_format: MemoryFormat) -> None:
    mask = np.ones(2 * BATCH_PAGES, dtype=np.bool_)
    path = tmp_path / "memory.img"
    saved = save(path, memory(tmp_path / "ram", mask), mask, memory_format)
    bad = BATCH_PAGES + 1
    order = saved.file.order  # threads place their batches as they come
    place = bad if order is None else int(np.flatnonzero(order == bad)[0])
    change(path, place * PAGE_SIZE)
    with pytest.raises(CheckpointCorrupt, match=f"page {bad} was altered"):
        load_into(tmp_path / "back", saved)
    data = (tmp_path / "back").read_bytes()
    assert not any(data[bad * PAGE_SIZE : (bad + 1) * PAGE_SIZE])


@both
def test_a_target_of_another_length_is_refused(tmp_path: Path, memory_format: MemoryFormat) -> None:
    mask = random_mask()
    saved = save(tmp_path / "m", memory(tmp_path / "ram", mask), mask, memory_format)
    (tmp_path / "t").write_bytes(b"")
    with opened(tmp_path / "t", os.O_RDWR) as fd, pytest.raises(ValueError, match="not 40 pages"):
        load(saved.file, fd)


def test_only_what_is_wanted_is_loaded(tmp_path: Path) -> None:
    mask, wanted = random_mask(600), random_mask(600, seed=6)
    source = memory(tmp_path / "ram", mask)
    path = tmp_path / "memory.img"
    saved = save(path, source, mask, SPARSE)
    unwanted = np.flatnonzero(mask & ~wanted).tolist()
    for page in unwanted:
        change(path, page * PAGE_SIZE + 5)
    done: list[int] = []
    with opened(tmp_path / "back", os.O_RDWR | os.O_CREAT) as fd:
        os.ftruncate(fd, 600 * PAGE_SIZE)
        count = load(saved.file, fd, done.append, wanted=wanted)
        found = files.data_extents(fd, 600)
    assert count == sum(done) == (mask & wanted).sum()
    assert np.array_equal(found, extents_of_mask(mask & wanted))
    back = np.frombuffer((tmp_path / "back").read_bytes(), np.uint8).reshape(600, -1)
    whole = np.frombuffer(source.read_bytes(), np.uint8).reshape(600, -1)
    assert np.array_equal(back[mask & wanted], whole[mask & wanted])


def test_what_is_wanted_must_be_right(tmp_path: Path) -> None:
    mask = np.ones(PAGES, dtype=np.bool_)
    path = tmp_path / "memory.img"
    saved = save(path, memory(tmp_path / "ram", mask), mask, SPARSE)
    change(path, 7 * PAGE_SIZE)
    with opened(tmp_path / "back", os.O_RDWR | os.O_CREAT) as fd:
        os.ftruncate(fd, PAGES * PAGE_SIZE)
        wanted = np.arange(PAGES) >= 7
        with pytest.raises(CheckpointCorrupt, match="page 7 was altered"):
            load(saved.file, fd, wanted=wanted)
        assert load(saved.file, fd, wanted=~wanted) == 7
        assert load(saved.file, fd, wanted=np.zeros(PAGES, dtype=np.bool_)) == 0
        # The holes of all of the file are looked at, whatever is wanted.
        lose(path, saved)
        with pytest.raises(CheckpointCorrupt, match="page 2 is missing"):
            load(saved.file, fd, wanted=wanted)
