"""What a pager takes up at its start: a page table that its settings can serve."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dcres.errors import PagingError
from dcres.model.pages import PAGE_SIZE
from dcres.model.placement import LEAVING, MAIN, NOWHERE, sub_code
from dcres.paging.attach import open_table
from dcres.paging.settings import PagerSettings, SubAddress
from dcres.paging.table import PageTable

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
