"""Memory files: what is saved comes back, nothing damaged gets through."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from dcres.errors import CheckpointCorrupt, Conflict, StorageError
from dcres.linux import files
from dcres.linux.files import opened
from dcres.model.pages import PAGE_SIZE, Mask, extents_of_mask
from dcres.storage import memory_file
from dcres.storage.memory_file import MemoryFileWriter, SavedMemory, load, verify
from dcres.storage.transfer import BATCH_PAGES, batches
from tests.support.stored import memory, save

PAGES = 40


def random_mask(page_count: int = PAGES, seed: int = 5) -> Mask:
    return np.random.default_rng(seed).random(page_count) < 0.5


def load_into(target: Path, path: Path, saved: SavedMemory) -> bytes:
    with opened(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC) as fd:
        os.ftruncate(fd, len(saved.mask) * PAGE_SIZE)
        load(path, saved.mask, saved.sums, fd)
    return target.read_bytes()


@given(
    st.lists(st.tuples(st.booleans(), st.integers(1, 700)), max_size=12),
    st.integers(1, 3),
)
@settings(max_examples=25, deadline=None)
def test_round_trip(runs: list[tuple[bool, int]], threads: int) -> None:
    mask = np.array([here for here, length in runs for _ in range(length)] or [False])
    with tempfile.TemporaryDirectory() as folder:
        source = memory(Path(folder, "ram"), mask)
        path = Path(folder, "memory.img")
        with (
            opened(source, os.O_RDONLY) as fd,
            MemoryFileWriter(path, len(mask), threads=threads) as writer,
        ):
            writer.save(fd, extents_of_mask(mask))
            saved = writer.seal()
        assert saved.mask.tolist() == mask.tolist()
        assert saved.bytes_written == saved.pages * PAGE_SIZE == mask.sum() * PAGE_SIZE
        assert load_into(Path(folder, "back"), path, saved) == source.read_bytes()
        assert verify(path, saved.mask, saved.sums, threads=threads) == saved.pages
        with opened(Path(folder, "back"), os.O_RDONLY) as fd:
            assert np.array_equal(files.data_extents(fd, len(mask)), extents_of_mask(mask))


def test_sums_are_xxh3_of_each_page(tmp_path: Path) -> None:
    mask = random_mask()
    source = memory(tmp_path / "ram", mask)
    saved = save(tmp_path / "m", source, mask)
    data = source.read_bytes()
    for page in np.flatnonzero(mask).tolist():
        content = data[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]
        assert int(saved.sums[page]) == xxh3_64_intdigest(content)


def test_batches_cover_the_extents_in_order() -> None:
    extents = extents_of_mask(random_mask(10_000))
    found = list(batches(extents))
    assert list(itertools.chain.from_iterable(found)) == [tuple(row) for row in extents.tolist()]
    assert all(runs[-1][1] - runs[0][0] <= BATCH_PAGES for runs in found)
    assert len(found) < 15


def test_far_runs_are_not_read_through_the_hole_between() -> None:
    assert list(batches(np.array([[0, 1], [500, 501]]))) == [[(0, 1)], [(500, 501)]]


def test_holes_take_no_disk_blocks(tmp_path: Path) -> None:
    mask = np.zeros(20_000, dtype=np.bool_)
    mask[::1000] = True
    saved = save(tmp_path / "m", memory(tmp_path / "ram", mask), mask)
    assert saved.pages == 20
    assert saved.allocated_bytes < 100 * PAGE_SIZE
    assert (tmp_path / "m").stat().st_size == 20_000 * PAGE_SIZE


@pytest.mark.parametrize("page_count", [1, 200])
def test_rewriting_does_not_grow_the_file(tmp_path: Path, page_count: int) -> None:
    mask = np.ones(page_count, dtype=np.bool_)
    old, new = memory(tmp_path / "old", mask, 1), memory(tmp_path / "new", mask, 2)
    with MemoryFileWriter(tmp_path / "m", page_count) as writer:
        for source in (old, new, old, new):
            with opened(source, os.O_RDONLY) as fd:
                writer.save(fd, extents_of_mask(mask))
        saved = writer.seal()
    assert saved.bytes_written == 4 * page_count * PAGE_SIZE
    assert saved.allocated_bytes <= (page_count + 8) * PAGE_SIZE
    assert load_into(tmp_path / "back", tmp_path / "m", saved) == new.read_bytes()


def test_short_rewrites_over_long_ones_and_back(tmp_path: Path) -> None:
    """Single pages go through the page cache, long runs past it: the last write must win."""
    whole = np.ones(400, dtype=np.bool_)
    single = np.zeros(400, dtype=np.bool_)
    single[7::20] = True
    one, two, three = (memory(tmp_path / f"ram{seed}", whole, seed) for seed in (1, 2, 3))
    with MemoryFileWriter(tmp_path / "m", 400) as writer:
        for source, mask in ((one, single), (two, whole), (three, single)):
            with opened(source, os.O_RDONLY) as fd:
                writer.save(fd, extents_of_mask(mask))
        saved = writer.seal()
    pages = [np.frombuffer(path.read_bytes(), np.uint8).reshape(400, -1) for path in (two, three)]
    expected = np.where(single[:, None], pages[1], pages[0]).tobytes()
    assert load_into(tmp_path / "back", tmp_path / "m", saved) == expected


def test_discarded_pages_are_holes(tmp_path: Path) -> None:
    mask = np.ones(PAGES, dtype=np.bool_)
    source = memory(tmp_path / "ram", mask)
    with (
        opened(source, os.O_RDONLY) as fd,
        MemoryFileWriter(tmp_path / "m", PAGES) as writer,
    ):
        writer.save(fd, extents_of_mask(mask))
        writer.discard(np.array([[3, 9], [20, 21]]))
        writer.save(fd, np.array([[5, 6]]))
        saved = writer.seal()
    gone = {3, 4, 6, 7, 8, 20}
    assert set(np.flatnonzero(~saved.mask).tolist()) == gone
    data = (tmp_path / "m").read_bytes()
    assert all(not any(data[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]) for page in gone)
    assert verify(tmp_path / "m", saved.mask, saved.sums) == PAGES - len(gone)


def test_a_page_of_zeros_is_a_page(tmp_path: Path) -> None:
    source = tmp_path / "ram"
    source.write_bytes(bytes(2 * PAGE_SIZE))
    saved = save(tmp_path / "m", source, np.array([True, False]))
    assert verify(tmp_path / "m", saved.mask, saved.sums) == 1


def test_a_page_of_zeros_may_become_a_hole_in_a_copy(tmp_path: Path) -> None:
    source = memory(tmp_path / "ram", np.ones(6, dtype=np.bool_))
    with opened(source, os.O_RDWR) as fd:
        os.pwrite(fd, bytes(2 * PAGE_SIZE), 2 * PAGE_SIZE)
    saved = save(tmp_path / "m", source, np.ones(6, dtype=np.bool_))
    with opened(tmp_path / "m", os.O_RDWR) as fd:
        files.punch_hole(fd, 2 * PAGE_SIZE, 2 * PAGE_SIZE)
    assert load_into(tmp_path / "back", tmp_path / "m", saved) == source.read_bytes()
    with opened(tmp_path / "back", os.O_RDONLY) as fd:
        assert files.data_extents(fd, 6).tolist() == [[0, 6]]
    with opened(tmp_path / "m", os.O_RDWR) as fd:
        files.punch_hole(fd, 0, 5 * PAGE_SIZE)
    with pytest.raises(CheckpointCorrupt, match="page 0 is missing"):
        verify(tmp_path / "m", saved.mask, saved.sums)


def test_progress_counts_every_page_once(tmp_path: Path) -> None:
    mask = np.ones(5000, dtype=np.bool_)
    source = memory(tmp_path / "ram", mask)
    done: list[int] = []
    with (
        opened(source, os.O_RDONLY) as fd,
        MemoryFileWriter(tmp_path / "m", 5000, done.append) as writer,
    ):
        writer.save(fd, extents_of_mask(mask))
        saved = writer.seal()
    assert sum(done) == 5000
    assert len(done) > 3
    done.clear()
    verify(tmp_path / "m", saved.mask, saved.sums, done.append)
    assert sum(done) == 5000


def test_an_abandoned_writer_leaves_no_file(tmp_path: Path) -> None:
    with MemoryFileWriter(tmp_path / "m", PAGES):
        assert (tmp_path / "m").exists()
    assert not (tmp_path / "m").exists()


def test_a_failed_save_cannot_be_sealed(tmp_path: Path) -> None:
    source = memory(tmp_path / "ram", np.ones(4, dtype=np.bool_))
    with (
        opened(source, os.O_RDONLY) as fd,
        MemoryFileWriter(tmp_path / "m", PAGES) as writer,
    ):
        with pytest.raises(ValueError, match="the source ends"):
            writer.save(fd, np.array([[0, 10]]))
        with pytest.raises(StorageError, match="failed"):
            writer.seal()
    assert not (tmp_path / "m").exists()


def test_an_error_in_progress_stops_the_save(tmp_path: Path) -> None:
    source = memory(tmp_path / "ram", np.ones(4, dtype=np.bool_))

    def cancelled(_: int) -> None:
        raise RuntimeError("cancelled")

    with (
        opened(source, os.O_RDONLY) as fd,
        MemoryFileWriter(tmp_path / "m", 4, cancelled) as writer,
        pytest.raises(RuntimeError, match="cancelled"),
    ):
        writer.save(fd, np.array([[0, 4]]))
    assert not (tmp_path / "m").exists()


def test_an_existing_or_sealed_file_is_not_written(tmp_path: Path) -> None:
    mask = np.ones(4, dtype=np.bool_)
    source = memory(tmp_path / "ram", mask)
    save(tmp_path / "m", source, mask)
    content = (tmp_path / "m").read_bytes()
    with pytest.raises(Conflict, match="exists already"), MemoryFileWriter(tmp_path / "m", 4):
        pass
    assert (tmp_path / "m").read_bytes() == content
    with MemoryFileWriter(tmp_path / "n", 4) as writer:
        writer.seal()
        with pytest.raises(Conflict, match="sealed"):
            writer.discard(np.array([[0, 1]]))


def test_without_direct_io_the_result_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plain(path: Path, flags: int, mode: int = 0o600) -> tuple[int, bool]:
        return os.open(path, flags, mode), False

    mask = random_mask(600)
    mask[100:400] = True
    source = memory(tmp_path / "ram", mask)
    direct = save(tmp_path / "direct", source, mask)
    monkeypatch.setattr(memory_file, "open_direct", plain)
    saved = save(tmp_path / "plain", source, mask)
    assert (tmp_path / "plain").read_bytes() == (tmp_path / "direct").read_bytes()
    assert saved.sums.tolist() == direct.sums.tolist()
    assert load_into(tmp_path / "back", tmp_path / "plain", saved) == source.read_bytes()


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
        (add, "page {page} is there and should not be"),
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
    saved = save(path, memory(tmp_path / "ram", mask), mask)
    page = damage(path, saved)
    with pytest.raises(CheckpointCorrupt) as caught:
        verify(path, saved.mask, saved.sums)
    assert f"{path}: {message.format(page=page)}" in str(caught.value)
    with pytest.raises(CheckpointCorrupt, match=r"memory\.img"):
        load_into(tmp_path / "back", path, saved)
    assert not any((tmp_path / "back").read_bytes())


def test_the_first_bad_page_is_named_whatever_the_threads_do(tmp_path: Path) -> None:
    mask = np.ones(8 * BATCH_PAGES, dtype=np.bool_)
    path = tmp_path / "memory.img"
    saved = save(path, memory(tmp_path / "ram", mask), mask)
    for page in (2 * BATCH_PAGES + 5, 2 * BATCH_PAGES + 900, 3 * BATCH_PAGES, 7 * BATCH_PAGES):
        change(path, page * PAGE_SIZE)
    for _ in range(5):
        with pytest.raises(CheckpointCorrupt, match=f"page {2 * BATCH_PAGES + 5} was altered"):
            verify(path, saved.mask, saved.sums, threads=4)


def test_a_bad_page_never_reaches_the_target(tmp_path: Path) -> None:
    mask = np.ones(2 * BATCH_PAGES, dtype=np.bool_)
    path = tmp_path / "memory.img"
    saved = save(path, memory(tmp_path / "ram", mask), mask)
    change(path, (BATCH_PAGES + 1) * PAGE_SIZE)
    with pytest.raises(CheckpointCorrupt):
        load_into(tmp_path / "back", path, saved)
    data = (tmp_path / "back").read_bytes()
    assert not any(data[(BATCH_PAGES + 1) * PAGE_SIZE : (BATCH_PAGES + 2) * PAGE_SIZE])


def test_a_target_of_another_length_is_refused(tmp_path: Path) -> None:
    mask = random_mask()
    saved = save(tmp_path / "m", memory(tmp_path / "ram", mask), mask)
    (tmp_path / "t").write_bytes(b"")
    with opened(tmp_path / "t", os.O_RDWR) as fd, pytest.raises(ValueError, match="not 40 pages"):
        load(tmp_path / "m", saved.mask, saved.sums, fd)


def test_only_what_is_wanted_is_loaded(tmp_path: Path) -> None:
    mask, wanted = random_mask(600), random_mask(600, seed=6)
    source = memory(tmp_path / "ram", mask)
    path = tmp_path / "memory.img"
    saved = save(path, source, mask)
    unwanted = np.flatnonzero(mask & ~wanted).tolist()
    for page in unwanted:
        change(path, page * PAGE_SIZE + 5)
    done: list[int] = []
    with opened(tmp_path / "back", os.O_RDWR | os.O_CREAT) as fd:
        os.ftruncate(fd, 600 * PAGE_SIZE)
        count = load(path, saved.mask, saved.sums, fd, done.append, wanted=wanted)
        found = files.data_extents(fd, 600)
    assert count == sum(done) == (mask & wanted).sum()
    assert np.array_equal(found, extents_of_mask(mask & wanted))
    back = np.frombuffer((tmp_path / "back").read_bytes(), np.uint8).reshape(600, -1)
    whole = np.frombuffer(source.read_bytes(), np.uint8).reshape(600, -1)
    assert np.array_equal(back[mask & wanted], whole[mask & wanted])


def test_what_is_wanted_must_be_right(tmp_path: Path) -> None:
    mask = np.ones(PAGES, dtype=np.bool_)
    path = tmp_path / "memory.img"
    saved = save(path, memory(tmp_path / "ram", mask), mask)
    change(path, 7 * PAGE_SIZE)
    with opened(tmp_path / "back", os.O_RDWR | os.O_CREAT) as fd:
        os.ftruncate(fd, PAGES * PAGE_SIZE)
        wanted = np.arange(PAGES) >= 7
        with pytest.raises(CheckpointCorrupt, match="page 7 was altered"):
            load(path, saved.mask, saved.sums, fd, wanted=wanted)
        assert load(path, saved.mask, saved.sums, fd, wanted=~wanted) == 7
        assert load(path, saved.mask, saved.sums, fd, wanted=np.zeros(PAGES, dtype=np.bool_)) == 0
        # The holes of all of the file are looked at, whatever is wanted.
        lose(path, saved)
        with pytest.raises(CheckpointCorrupt, match="page 2 is missing"):
            load(path, saved.mask, saved.sums, fd, wanted=wanted)
