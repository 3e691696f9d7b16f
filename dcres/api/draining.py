"""What emptying a sub host would move where, worked out from a VM's status."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dcres.api.status import VmStatus
from dcres.config import Layout, format_size
from dcres.errors import InputError, NotFound
from dcres.model.pages import PAGE_SIZE
from dcres.model.transport import least_moves


@dataclass(frozen=True, slots=True)
class DrainPlan:
    """The pages that would go from `host` to each other sub host, as things were when asked."""

    vm: str
    host: str
    moves: dict[str, int]  # sub host → pages
    problems: tuple[str, ...] = ()

    @property
    def pages(self) -> int:
        """Pages that would move."""
        return sum(self.moves.values())

    @property
    def possible(self) -> bool:
        """Whether it would be tried."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as ``dcres drain --dry-run --json`` prints them."""
        return {
            "vm": self.vm,
            "host": self.host,
            "dry_run": True,
            "possible": self.possible,
            "problems": list(self.problems),
            "moves": [{"host": host, "pages": pages} for host, pages in self.moves.items()],
            "pages_moved": self.pages,
            "bytes_moved": self.pages * PAGE_SIZE,
        }

    def __repr__(self) -> str:
        to = ", ".join(f"{host} {format_size(n * PAGE_SIZE)}" for host, n in self.moves.items())
        what = "; ".join(self.problems) or to or "nothing to move"
        return f"<DrainPlan {self.host} of {self.vm}: {what}>"


def plan_drain(status: VmStatus, host: str, memory_bytes: int) -> DrainPlan:
    """The plan for a VM that runs; its numbers are those that the main host would come to.

    Raises NotFound when `host` is no sub host of it.
    """
    main, *subs = status.hosts
    names = [sub.host for sub in subs]
    if host not in names:
        raise NotFound(
            f"{host} is no sub host of VM {status.vm}; it has {', '.join(names) or 'none'}"
        )
    staying = [sub for sub in subs if sub.host != host]
    problems = []
    if status.bringing_in:
        problems.append(
            f"VM {status.vm} is still being restored ({status.bringing}); wait until its pages "
            "are there"
        )
    shares = [sub.share_pages * PAGE_SIZE for sub in staying]
    try:
        Layout(main=main.share_pages * PAGE_SIZE, subs=tuple(shares)).require_room_for(memory_bytes)
    except InputError as error:
        return DrainPlan(status.vm, host, {}, (*problems, str(error)))
    supply = np.array([sub.pages for sub in subs], dtype=np.int64)
    room = np.array([0 if sub.host == host else sub.share_pages for sub in subs], dtype=np.int64)
    if supply.sum() > room.sum():
        short = format_size(int(supply.sum() - room.sum()) * PAGE_SIZE)
        problems.append(f"the other sub hosts have {short} too little room; give them more first")
        return DrainPlan(status.vm, host, {}, tuple(problems))
    flow = least_moves(supply, room, np.eye(len(subs), dtype=np.bool_))
    row = flow[names.index(host)].tolist()
    moves = {name: pages for name, pages in zip(names, row, strict=True) if pages}
    return DrainPlan(status.vm, host, moves, tuple(problems))
