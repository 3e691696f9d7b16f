"""The page sub-table against a dictionary, and that it outlives its process."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcres.errors import NoRoom, PagesLost
from dcres.linux.files import data_extents, opened
from dcres.model.pages import PAGE_SIZE, Extents, extents_of_pages, pages_of_extents
from dcres.paging.changes import DirtyBitmap
from dcres.paging.server.subtable import SubTable

PAGES = 40
CAPACITY = 24

sets = st.sets(st.integers(0, PAGES - 1), min_size=1, max_size=20)
operations = st.lists(
    st.tuples(st.sampled_from(["write", "release", "read", "reopen"]), sets), max_size=25
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("subtable") / "store.ram"


def extents(pages: set[int]) -> Extents:
    return extents_of_pages(np.array(sorted(pages), dtype=np.int64))


def content(page: int, version: int) -> bytes:
    return page.to_bytes(8, "little") * 256 + version.to_bytes(8, "little") * 256


def data_of(pages: set[int], version: int) -> memoryview:
    return memoryview(b"".join(content(page, version) for page in sorted(pages)))


def agrees(table: SubTable, model: dict[int, bytes]) -> None:
    assert np.flatnonzero(table.existence(0, PAGES)).tolist() == sorted(model)
    assert table.held_pages == len(model)
    if model:
        assert b"".join(table.read(extents(set(model)))) == b"".join(
            model[page] for page in sorted(model)
        )


@given(operations)
def test_it_is_a_dictionary_with_a_capacity(path: Path, steps: list[tuple[str, set[int]]]) -> None:
    path.unlink(missing_ok=True)
    model: dict[int, bytes] = {}
    table = SubTable(path, PAGES, CAPACITY)
    for version, (step, pages) in enumerate(steps):
        match step:
            case "write" if len(model.keys() | pages) > CAPACITY:
                with pytest.raises(NoRoom, match=f"holds {len(model)} of {CAPACITY}"):
                    table.write(extents(pages), data_of(pages, version))
            case "write":
                table.write(extents(pages), data_of(pages, version))
                model |= {page: content(page, version) for page in pages}
            case "release":
                table.release(extents(pages))
                model = {page: data for page, data in model.items() if page not in pages}
            case "read" if not pages <= model.keys():
                with pytest.raises(PagesLost):
                    table.read(extents(pages))
            case "read":
                assert len(table.read(extents(pages))) == len(extents(pages))
            case _:
                table.__exit__()
                table = SubTable(path, PAGES, CAPACITY)
        agrees(table, model)
    table.__exit__()


def test_the_file_has_the_shape_of_a_memory_file(path: Path) -> None:
    path.unlink(missing_ok=True)
    with SubTable(path, PAGES, CAPACITY) as table:
        table.write(extents({3, 4, 9, 30}), data_of({3, 4, 9, 30}, 1))
        table.release([(4, 5)])
    with opened(path, os.O_RDONLY) as fd:
        assert os.fstat(fd).st_size == PAGES * PAGE_SIZE
        assert pages_of_extents(data_extents(fd, PAGES)).tolist() == [3, 9, 30]
        assert os.pread(fd, PAGE_SIZE, 9 * PAGE_SIZE) == content(9, 1)
    assert path.stat().st_mode & 0o077 == 0


def test_a_page_of_zeros_is_here_as_any_other(path: Path) -> None:
    path.unlink(missing_ok=True)
    with SubTable(path, PAGES, CAPACITY) as table:
        table.write(extents({7}), memoryview(bytes(PAGE_SIZE)))
    with SubTable(path, PAGES, CAPACITY) as table:
        assert table.held_pages == 1
        assert table.read(extents({7})) == [bytes(PAGE_SIZE)]


def test_what_comes_and_goes_is_marked(path: Path, tmp_path: Path) -> None:
    path.unlink(missing_ok=True)
    with SubTable(path, PAGES, CAPACITY) as table:
        table.write(extents({1, 2}), data_of({1, 2}, 1))
        table.changes = DirtyBitmap(tmp_path / "changes", PAGES)
        table.write(extents({2, 6}), data_of({2, 6}, 2))
        table.release([(1, 2)])
        table.release([(20, 30)])  # nothing there: nothing has changed
        marks = DirtyBitmap(tmp_path / "changes", PAGES)
        assert pages_of_extents(marks.take()).tolist() == [1, 2, 6]
        assert marks.count() == 0


@contextmanager
def room_for(pages: int) -> Iterator[None]:
    """The kernel takes no more than the first `pages` of a file, as when a tmpfs is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (pages * PAGE_SIZE, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def data_in(path: Path) -> list[int]:
    with opened(path, os.O_RDONLY) as fd:
        return pages_of_extents(data_extents(fd, PAGES)).tolist()


def test_a_write_cut_short_is_no_room_and_leaves_nothing_behind(path: Path, tmp_path: Path) -> None:
    path.unlink(missing_ok=True)
    with SubTable(path, PAGES, CAPACITY) as table:
        table.write(extents({10}), data_of({10}, 1))
        table.changes = DirtyBitmap(tmp_path / "changes", PAGES)
        run = set(range(8, 16))
        with room_for(12), pytest.raises(NoRoom, match="tmpfs"):
            table.write(extents({2} | run), data_of({2} | run, 2))
        assert np.flatnonzero(table.existence(0, PAGES)).tolist() == [2, 10]
        assert table.held_pages == 2
        assert data_in(path) == [2, 10], "a checkpoint would save what is in the file"
        assert pages_of_extents(table.changes.take()).tolist() == [2, *sorted(run)]


def test_a_full_tmpfs_is_no_room(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: memoryview, at: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path.unlink(missing_ok=True)
    with SubTable(path, PAGES, CAPACITY) as table:
        with monkeypatch.context() as patched:
            patched.setattr(os, "pwrite", full)
            with pytest.raises(NoRoom, match="tmpfs"):
                table.write(extents({1}), data_of({1}, 1))
        assert table.held_pages == 0


def test_what_is_released_is_not_in_the_file_whatever_came_before(path: Path) -> None:
    path.unlink(missing_ok=True)
    with SubTable(path, PAGES, CAPACITY) as table:
        with opened(path, os.O_RDWR) as fd:
            os.pwrite(fd, bytes(data_of({4, 5}, 1)), 4 * PAGE_SIZE)
        table.release(extents({4, 5}))
        assert data_in(path) == []


@given(sets, sets)
def test_peek_gives_what_is_here(path: Path, held: set[int], asked: set[int]) -> None:
    path.unlink(missing_ok=True)
    with SubTable(path, PAGES, PAGES) as table:
        table.write(extents(held), data_of(held, 1))
        here, pieces = table.peek(extents(asked))
        assert pages_of_extents(here).tolist() == sorted(held & asked)
        assert [len(piece) for piece in pieces] == [(b - a) * PAGE_SIZE for a, b in here.tolist()]
        assert b"".join(pieces) == bytes(data_of(held & asked, 1))


def test_a_table_that_holds_too_much_takes_nothing_more(path: Path) -> None:
    path.unlink(missing_ok=True)
    with SubTable(path, PAGES, CAPACITY) as table:
        table.write(extents({1, 2, 3}), data_of({1, 2, 3}, 1))
        table.capacity_pages = 2
        table.write(extents({1, 2}), data_of({1, 2}, 2))
        with pytest.raises(NoRoom, match="holds 3 of 2 pages"):
            table.write(extents({1, 4}), data_of({1, 4}, 3))
        assert b"".join(table.read(extents({1, 2}))) == bytes(data_of({1, 2}, 2))
        table.release(extents({1, 2}))
        table.write(extents({4}), data_of({4}, 3))
