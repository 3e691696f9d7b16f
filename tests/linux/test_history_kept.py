"""A restored guest's access history is what the checkpoint says, until the guest touches pages."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import pytest

from dcres.model.pages import PAGE_SIZE
from dcres.model.placement import MAIN
from dcres.paging.pager.table import PageTable
from tests.support.paging import Rig
from tests.support.wait import until

pytestmark = pytest.mark.linux

PAGES = 16384
HOT = PAGES // 4
KEPT = PAGES // 2


def test_what_was_loaded_is_no_younger_than_it_was_saved(
    tmp_path: Path, writer_program: Path
) -> None:
    with tempfile.TemporaryDirectory(prefix="dcres-test-", dir="/dev/shm") as ram:
        made = Rig(tmp_path, Path(ram), writer_program, PAGES)
        try:
            (made.ram / "guest.ram").write_bytes(os.urandom(PAGES * PAGE_SIZE))
            owners = np.full(PAGES, MAIN, dtype=np.uint8)
            table = PageTable.create(made.ram / "table", owners, KEPT)
            table.ticks[:HOT], table.ticks[HOT:] = 1000, 10
            made.start(KEPT, (PAGES,))
            until(lambda: made.status()["pages"][0] <= KEPT, 30, "as many pages left as must")
            assert (table.owners[:HOT] == MAIN).all()
        finally:
            made.close()
