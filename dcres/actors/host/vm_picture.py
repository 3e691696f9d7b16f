"""A look at a running VM's memory from the main host, past the pager.

The network page table and the RAM file are shared files; reading them costs the pager nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dcres.linux.files import opened
from dcres.model.picture import Picture, summarise
from dcres.model.placement import MAIN, NOWHERE, Owners
from dcres.paging.pager.attach import present
from dcres.paging.pager.pager import TICK_S
from dcres.paging.pager.table import PageTable


def look(
    table: Path, ram: Path, page_count: int, hosts: Mapping[int, str], buckets: int
) -> Picture:
    """The picture as it is now; `hosts` as for `summarise`. Raises PagingError, OSError."""
    seen = PageTable(table, page_count, writable=False)
    return summarise(
        owners_in(seen, ram, only_main=len(set(hosts.values())) == 1),
        seen.ticks,
        hosts,
        buckets=buckets,
        tick_now=int(seen.ticks.max(initial=0)),
        tick_s=TICK_S,
    )


def owners_in(table: PageTable, ram: Path, *, only_main: bool) -> Owners:
    """Where every page is. Raises PagingError, OSError.

    Without sub hosts the pager keeps no account of pages that come to the main host.
    """
    owners = table.owners
    if not only_main:
        return owners
    with opened(ram, os.O_RDONLY) as fd:
        here = present(fd, owners.size)
    elsewhere = np.where(owners == MAIN, NOWHERE, owners)
    return np.where(here, MAIN, elsewhere).astype(np.uint8)
