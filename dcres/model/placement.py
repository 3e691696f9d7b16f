"""The network page table as a value: one owner code per page, ``uint8``.

| code | the page is |
|---|---|
| `NOWHERE` | untouched by the guest; reads as zeros, costs nothing |
| `MAIN` | on the main host, in the guest's RAM file |
| `LEAVING` | on the main host, in the outbox, until a sub host has acknowledged it |
| `FIRST_SUB` + i | on sub host i |
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dcres.model.pages import Mask

Owners = npt.NDArray[np.uint8]

NOWHERE = 0
MAIN = 1
LEAVING = 2
FIRST_SUB = 16
SAVED_NOWHERE = 0xFF  # in a page placement file, where hosts are numbered from 0


def sub_code(index: int) -> int:
    """The owner code of sub host `index`."""
    return FIRST_SUB + index


def pages_by_host(owners: Owners, subs: int) -> list[int]:
    """Pages held per host, the main host first; what is leaving counts as the main host's."""
    counts = np.bincount(owners, minlength=FIRST_SUB + subs)
    return [int(counts[MAIN] + counts[LEAVING]), *map(int, counts[FIRST_SUB : FIRST_SUB + subs])]


def to_saved(owners: Owners) -> Owners:
    """Owner codes as a page placement file has them: index of the host, 0 = main."""
    saved = np.full(256, SAVED_NOWHERE, dtype=np.uint8)
    saved[[MAIN, LEAVING]] = 0
    saved[FIRST_SUB:] = np.arange(1, 256 - FIRST_SUB + 1)
    return saved[owners]


def from_saved(saved: Owners) -> Owners:
    """Owner codes from a page placement file."""
    codes = np.zeros(256, dtype=np.uint8)
    codes[0] = MAIN
    codes[1 : 256 - FIRST_SUB + 1] = np.arange(FIRST_SUB, 256)
    codes[SAVED_NOWHERE] = NOWHERE
    return codes[saved]


def digest(mask: Mask) -> str:
    """A short name for a set of pages, to compare sets across hosts without sending them."""
    return hashlib.sha256(np.packbits(mask).tobytes()).hexdigest()


@dataclass(frozen=True, slots=True)
class Recovered:
    """What a pager makes of the tables that its predecessor left."""

    owners: Owners
    stale_outbox: Mask  # copies in the outbox whose page is elsewhere by now
    lost: Mask  # pages that the table places on the main host and that are not there


def recover(owners: Owners, in_ram: Mask, in_outbox: Mask) -> Recovered:
    """Owners after a pager died at any instruction, from what its files really hold.

    A page in the RAM file is the main host's, whatever the table says: it was put there and
    the table not yet written. A page in the outbox only is leaving if the table still says
    main or leaving; if the table names a sub host, that host had acknowledged it.
    """
    main_side = (owners == MAIN) | (owners == LEAVING)
    after = owners.copy()
    after[in_ram] = MAIN
    after[main_side & ~in_ram & in_outbox] = LEAVING
    lost = main_side & ~in_ram & ~in_outbox
    return Recovered(after, in_outbox & (after != LEAVING), lost)
