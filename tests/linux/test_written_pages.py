"""PAGEMAP_SCAN while the process writes, with more regions than the kernel keeps at a time."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from dcres.linux import abi, inject, pagemap
from dcres.linux.pagemap import WriteTracker
from dcres.linux.userfaultfd import Userfaultfd
from dcres.model.pages import PAGE_SIZE, mask_of_extents
from tests.support.paging import Writer

pytestmark = pytest.mark.linux

PAGES = 4096
REGIONS = 1500  # three times as many as the kernel hands over at once


@pytest.fixture
def writer(ram_path: Path, writer_program: Path) -> Iterator[Writer]:
    made = Writer(writer_program, ram_path, PAGES)
    try:
        made.ask(f"write 1 {PAGES}")
        yield made
    finally:
        made.kill()


@pytest.fixture
def tracker(writer: Writer, ram_path: Path) -> Iterator[WriteTracker]:
    """Every page is present and protected."""
    pid = writer.process.pid
    number = inject.make_userfaultfd(pid)
    with Userfaultfd(inject.take(pid, number)) as uffd:
        ((base, _, _),) = inject.mappings(pid, str(ram_path))
        uffd.enable()
        uffd.register(base, PAGES * PAGE_SIZE, missing=False)
        with WriteTracker(pid, base, PAGES) as made:
            made.scan()
            yield made


def written(tracker: WriteTracker) -> set[int]:
    extents = tracker.scan()
    assert (extents[:, 0] < extents[:, 1]).all()
    assert (extents[1:, 0] > extents[:-1, 1]).all(), "not ascending, or not apart"
    return set(np.flatnonzero(mask_of_extents(extents, PAGES)).tolist())


@contextmanager
def after_each_look(do: Callable[[], object]) -> Iterator[list[int]]:
    """`do` something whenever the kernel has looked; the list gets how much it found."""
    looks: list[int] = []
    honest = fcntl.ioctl

    def ioctl(fd: int, request: int, *arguments: Any) -> int:
        found = honest(fd, request, *arguments)
        if request == abi.PAGEMAP_SCAN:
            looks.append(found)
            do()
        return found

    with patch.object(fcntl, "ioctl", ioctl):
        yield looks


@pytest.mark.parametrize("room", [64, 512, 700, REGIONS, 16384])
def test_pages_that_are_written_during_a_scan_are_neither_lost_nor_invented(
    room: int, writer: Writer, tracker: WriteTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel says that its walk ended where its own buffer was last full."""
    monkeypatch.setattr(pagemap, "_REGIONS_AT_ONCE", room)
    monkeypatch.setattr(tracker, "_regions", np.empty((room, 3), dtype=np.uint64))
    even = set(range(0, 2 * REGIONS, 2))
    thirds = set(range(0, 3 * 1000, 3))  # they make longer runs, and begin or end others
    writer.ask(f"write 2 {REGIONS}")
    with after_each_look(lambda: writer.ask("write 3 1000")) as looks:
        first = written(tracker)
    assert looks[0] == min(room, REGIONS)
    assert (len(looks) > 1) == (room <= REGIONS)
    assert even <= first <= even | thirds
    assert thirds <= written(tracker) | (first - even)
    assert written(tracker) == set()
