"""The network page table as a value: one owner code per page, ``uint8``.

| code | the page is |
|---|---|
| `NOWHERE` | untouched by the guest; reads as zeros, costs nothing |
| `MAIN` | on the main host, in the guest's RAM file |
| `LEAVING` | on the main host, in the outbox, until a sub host has acknowledged it |
| `FIRST_SUB` … | on the sub host, or in the part of a checkpoint, that has this code |

A sub host keeps its code for as long as it serves the VM: hosts come and go while the VM runs,
and pages of the others must not be looked for elsewhere then.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dcres.errors import NoRoom, PagesLost
from dcres.model.pages import Mask

Owners = npt.NDArray[np.uint8]

NOWHERE = 0
MAIN = 1
LEAVING = 2
FIRST_SUB = 16
SAVED_NOWHERE = 0xFF  # in a page placement file, where hosts are numbered from 0


def sub_code(index: int) -> int:
    """The owner code of sub host `index` when a VM begins to run."""
    return FIRST_SUB + index


def free_codes(taken: Sequence[int], count: int) -> list[int]:
    """`count` owner codes that nobody has. Raises NoRoom when there are not so many."""
    free = sorted(set(range(FIRST_SUB, 256)) - set(taken))
    if len(free) < count:
        raise NoRoom(
            f"{len(taken) + count} sub hosts and part servers, but a VM can have "
            f"{256 - FIRST_SUB}; use fewer sub hosts, or restore without --lazy"
        )
    return free[:count]


def codes_of(hosts: Sequence[str], known: Mapping[str, int]) -> list[int]:
    """The owner codes of sub hosts: those that are `known`, free ones for others. Raises NoRoom."""
    joining = [host for host in hosts if host not in known]
    codes = {
        **known,
        **dict(zip(joining, free_codes([*known.values()], len(joining)), strict=True)),
    }
    return [codes[host] for host in hosts]


def pages_by_host(owners: Owners, codes: Sequence[int]) -> list[int]:
    """Pages held by the main host, then by each code; what is leaving is the main host's."""
    counts = np.bincount(owners, minlength=256)
    return [int(counts[MAIN] + counts[LEAVING]), *(int(counts[code]) for code in codes)]


def to_saved(owners: Owners, codes: Sequence[int]) -> Owners:
    """Owner codes as a page placement file has them: index of the host, 0 = main.

    `codes` are the sub hosts' in the file's order. Raises PagesLost if a page is with none of
    these hosts.
    """
    saved = np.full(256, SAVED_NOWHERE, dtype=np.uint8)
    saved[[MAIN, LEAVING]] = 0
    saved[list(codes)] = np.arange(1, len(codes) + 1)
    placed = saved[owners]
    astray = int(((placed == SAVED_NOWHERE) & (owners != NOWHERE)).sum())
    if astray:
        raise PagesLost(f"{astray} pages are with none of the VM's hosts yet; try again later")
    return placed


def from_saved(saved: Owners, codes: Sequence[int]) -> Owners:
    """Owner codes from a page placement file, given the codes of its sub hosts."""
    owners = np.zeros(256, dtype=np.uint8)
    owners[: len(codes) + 1] = [MAIN, *codes]
    owners[SAVED_NOWHERE] = NOWHERE
    return owners[saved]


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
