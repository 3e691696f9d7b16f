"""What is done to every page, in C and in Python: the same results, and the same refusals."""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from dcres.linux.files import opened
from dcres.model.pages import PAGE_SIZE, Extents, Pages, pages_of_extents
from dcres.storage.engine import bulk
from dcres.storage.engine.transfer import ANYWHERE, batches
from tests.support.stored import memory

PAGES = 3000
NOISE = memoryview(np.random.default_rng(3).bytes(64 * PAGE_SIZE))


def test_this_installation_has_the_module_in_c() -> None:
    assert bulk.NATIVE is not None, (
        "dcres/storage/engine/bulk.c was not compiled: gcc, Python's headers"
    )


@pytest.fixture(name="native")
def _native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.param:
        monkeypatch.setattr(bulk, "NATIVE", None)


both = pytest.mark.parametrize("native", [True, False], ids=["c", "python"], indirect=True)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    path = memory(tmp_path_factory.mktemp("ram") / "ram", np.ones(PAGES, dtype=np.bool_))
    with opened(path, os.O_RDONLY) as fd:
        yield fd


def extents_of(runs: list[tuple[int, int]]) -> Extents:
    """Runs from the length of the gap before each and its own length."""
    bounds = np.cumsum(np.array(runs, dtype=np.int64).reshape(-1))
    return bounds.reshape(-1, 2)


def content(fd: int, pages: Pages) -> bytes:
    return b"".join(os.pread(fd, PAGE_SIZE, page * PAGE_SIZE) for page in pages.tolist())


def test_every_byte_of_a_page_counts_as_it_does_for_the_library() -> None:
    """Pages with one bit each, in every byte of the page, and pages of one value."""
    pages = np.zeros((PAGE_SIZE + 256, PAGE_SIZE), dtype=np.uint8)
    at = np.arange(PAGE_SIZE)
    pages[at, at] = 1 << (at % 8)
    pages[PAGE_SIZE:] = np.arange(256, dtype=np.uint8)[:, None]
    data, slots = memoryview(pages.tobytes()), np.arange(len(pages))
    expected = bulk.page_sums_plain(data, slots)
    assert len(set(expected.tolist())) == len(pages)
    assert bulk.NATIVE is not None
    assert np.array_equal(bulk.page_sums(data, slots), expected)


def test_checksums_of_any_slots_in_any_order() -> None:
    slots = np.random.default_rng(4).integers(0, 64, 200)
    assert np.array_equal(bulk.page_sums(NOISE, slots), bulk.page_sums_plain(NOISE, slots))
    backwards = np.arange(128)[::-2] // 2
    assert np.array_equal(bulk.page_sums(NOISE, backwards), bulk.page_sums_plain(NOISE, backwards))
    assert bulk.page_sums(NOISE, np.empty(0, dtype=np.int64)).tolist() == []


@pytest.mark.parametrize("slot", [-1, 64])
def test_a_slot_outside_the_data_is_refused(slot: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a slot"):
        bulk.page_sums(NOISE, np.array([0, slot]))
    with opened(tmp_path / "f", os.O_RDWR | os.O_CREAT) as fd:
        with pytest.raises(ValueError, match="a slot"):
            bulk.write_scattered(fd, NOISE, np.array([0, 1]), np.array([0, slot]))
        assert os.fstat(fd).st_size == 0


@both
@pytest.mark.usefixtures("native")
@pytest.mark.parametrize(
    "runs",
    [
        [(0, 1)],
        [(7, 900)],
        [(1, 1)] * 1020,
        [(0, 3), (16, 1), (2, 40)],
        [(1, 1)] * 600 + [(5, 9)],
        [(1, 3), (700, 1), (1, 200), (17, 1), (900, 300), (1, 2)],
        [(0, 128), (1, 128), (3, 128)],
    ],
    ids=["one page", "one run", "alternating", "gaps", "many", "far apart", "as many as at once"],
)
def test_runs_are_gathered_one_after_the_other(source: int, runs: list[tuple[int, int]]) -> None:
    for extents in batches(extents_of(runs), ANYWHERE):
        pages = pages_of_extents(extents)
        buffer = memoryview(bytearray((len(pages) + 16) * PAGE_SIZE))
        slots, sums = bulk.read_gathered(source, buffer, extents)
        assert np.array_equal(sums, bulk.page_sums_plain(buffer, slots))
        assert slots.tolist() == list(range(len(pages)))
        assert buffer[: len(pages) * PAGE_SIZE] == content(source, pages)


@both
@pytest.mark.usefixtures("native")
def test_the_end_of_the_file_is_told_where_it_is(source: int) -> None:
    buffer = memoryview(bytearray(40 * PAGE_SIZE))
    with pytest.raises(bulk.EndOfFile) as end:
        bulk.read_gathered(
            source, buffer, np.array([[PAGES - 4, PAGES - 2], [PAGES - 1, PAGES + 2]])
        )
    assert end.value.args == (PAGES * PAGE_SIZE,)


@both
@pytest.mark.usefixtures("native")
def test_what_cannot_be_read_is_an_error_with_its_number(tmp_path: Path) -> None:
    with (
        opened(tmp_path / "f", os.O_WRONLY | os.O_CREAT) as fd,
        pytest.raises(OSError, match="Bad file") as error,
    ):
        bulk.read_gathered(fd, memoryview(bytearray(20 * PAGE_SIZE)), np.array([[0, 2]]))
    assert error.value.errno == errno.EBADF


@pytest.mark.parametrize(
    ("extents", "pages", "sums"),
    [
        ([[0, 4], [6, 8]], 6, 6),
        ([[0, 4], [6, 8]], 8, 5),
        ([[4, 4]], 9, 0),
        ([[4, 6], [5, 8]], 20, 5),
        ([[-1, 2]], 20, 3),
        ([], 20, 0),
    ],
    ids=["no room for a gap", "too few sums", "empty", "overlap", "before the file", "none"],
)
def test_runs_that_are_none_are_refused(
    source: int, extents: list[list[int]], pages: int, sums: int
) -> None:
    assert bulk.NATIVE is not None
    runs = np.array(extents, dtype=np.int64).reshape(-1, 2)
    with pytest.raises(ValueError, match="runs"):
        bulk.NATIVE.gather(source, bytearray(pages * PAGE_SIZE), runs, np.zeros(sums, np.uint64))


@both
@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("seed", range(4))
def test_pages_are_scattered_to_their_places(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    pages = np.flatnonzero(rng.random(120) < (seed + 1) / 4)[:60]
    slots = np.sort(rng.permutation(64)[: len(pages)])
    expected = bytearray(b"\xee" * 120 * PAGE_SIZE)
    for page, slot in zip(pages.tolist(), slots.tolist(), strict=True):
        expected[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = NOISE[slot * PAGE_SIZE :][:PAGE_SIZE]
    path = tmp_path / "f"
    path.write_bytes(b"\xee" * 120 * PAGE_SIZE)
    with opened(path, os.O_RDWR) as fd:
        bulk.write_scattered(fd, NOISE, pages, slots)
    assert path.read_bytes() == expected


@both
@pytest.mark.usefixtures("native")
def test_a_write_that_ends_early_goes_on_to_the_error(tmp_path: Path) -> None:
    """RLIMIT_FSIZE cuts a write, as a full file system does, and refuses the next."""
    with opened(tmp_path / "f", os.O_RDWR | os.O_CREAT) as fd, file_size_limit(5 * PAGE_SIZE):
        with pytest.raises(OSError, match="too large") as error:
            bulk.write_scattered(fd, NOISE, np.arange(8), np.arange(8))
        assert error.value.errno == errno.EFBIG
        assert os.pread(fd, 64 * PAGE_SIZE, 0) == NOISE[: 5 * PAGE_SIZE]


@contextmanager
def file_size_limit(length_bytes: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (length_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
