"""What a pager takes up at its start: a page table that its settings can serve."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from dcres.errors import PagingError, VmLost
from dcres.model.pages import PAGE_SIZE
from dcres.model.placement import LEAVING, MAIN, NOWHERE, sub_code
from dcres.paging.pager.attach import _adopt_pipe, open_table
from dcres.paging.pager.table import PageTable
from dcres.paging.settings import PagerSettings, SubAddress

PAGES = 8


def settings_in(folder: Path, *codes: int) -> PagerSettings:
    hosts = [SubAddress(f"h{code}", "127.0.0.1", 1, PAGES, code) for code in codes]
    return PagerSettings(
        vm="ab" * 16,
        generation=1,
        secret="cd" * 32,
        page_count=PAGES,
        limit_pages=4,
        qemu_pid=1,
        ram=str(folder / "guest.ram"),
        outbox=str(folder / "outbox.ram"),
        table=str(folder / "table"),
        control=str(folder / "pager.sock"),
        subs=tuple(hosts[:1]),
        moves=str(folder / "moves"),
        sources=tuple(hosts[1:]),
    )


def test_pages_of_a_host_that_the_settings_do_not_name_are_refused(tmp_path: Path) -> None:
    owners = np.array([NOWHERE, MAIN, LEAVING, sub_code(0), *[sub_code(1)] * 3, sub_code(2)])
    PageTable.create(tmp_path / "table", owners.astype(np.uint8), 4)
    with pytest.raises(PagingError, match="has 3 pages with owner 17, 1 pages with owner 18, and"):
        open_table(settings_in(tmp_path, sub_code(0)))
    with pytest.raises(PagingError, match="has 1 pages with owner 18, and"):
        open_table(settings_in(tmp_path, sub_code(0), sub_code(1)))
    known = open_table(settings_in(tmp_path, *map(sub_code, range(3))))
    assert known.owners.tolist() == owners.tolist()


def test_a_first_table_has_what_the_ram_file_has(tmp_path: Path) -> None:
    with open(tmp_path / "guest.ram", "wb") as ram:
        ram.truncate(PAGES * PAGE_SIZE)
        ram.seek(3 * PAGE_SIZE)
        ram.write(b"x" * PAGE_SIZE)
    table = open_table(settings_in(tmp_path, sub_code(0)))
    assert np.flatnonzero(table.owners == MAIN).tolist() == [3]
    assert table.limit_pages == 4


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


def pipe_of_qemu(stack: ExitStack, *, read_first: bool) -> tuple[int, int]:
    """A pipe that this process has in QEMU's place; which end has the lower number is given."""
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    first, second = (read_end, write_end) if read_first else (write_end, read_end)
    ordered = {first: fcntl.fcntl(first, fcntl.F_DUPFD_CLOEXEC, 0)}
    ordered[second] = fcntl.fcntl(second, fcntl.F_DUPFD_CLOEXEC, ordered[first])
    for before, fd in ordered.items():
        os.close(before)
        stack.callback(os.close, fd)
    return ordered[read_end], ordered[write_end]


def adopted(stack: ExitStack, end: int) -> tuple[int, int]:
    return _adopt_pipe(os.getpid(), os.fstat(end).st_ino, stack)


@pytest.mark.parametrize("read_first", [True, False])
def test_the_ends_of_a_pipe_are_told_apart_by_what_they_are(
    stack: ExitStack, read_first: bool
) -> None:
    read_there, write_there = pipe_of_qemu(stack, read_first=read_first)
    assert (read_there < write_there) == read_first
    read_end, write_end = adopted(stack, read_there)
    os.write(write_end, b"page")
    assert os.read(read_end, 4) == b"page"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.write(read_end, b"page")


@pytest.mark.parametrize("kept", [0, 1], ids=["reads twice", "writes twice"])
def test_a_pipe_of_which_one_end_is_gone_is_refused(stack: ExitStack, kept: int) -> None:
    ends = os.pipe2(os.O_CLOEXEC)
    os.close(ends[1 - kept])
    twice = [ends[kept], os.dup(ends[kept])]
    for fd in twice:
        stack.callback(os.close, fd)
    with pytest.raises(VmLost, match="holds one end of the pipe of dcres twice"):
        adopted(stack, twice[0])


def test_a_pipe_that_is_gone_is_refused(stack: ExitStack) -> None:
    end, other = os.pipe2(os.O_CLOEXEC)
    stack.callback(os.close, end)
    os.close(other)
    with pytest.raises(VmLost, match="no longer holds the pipe of dcres"):
        adopted(stack, end)
