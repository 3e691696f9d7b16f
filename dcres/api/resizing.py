"""What other shares would mean for a running VM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from dcres.actors.messages import Foreseen, Transfer
from dcres.api.draining import problems_of
from dcres.config import format_size
from dcres.model.pages import PAGE_SIZE


@dataclass(frozen=True, slots=True)
class ResizedHost:
    """A host's share, in bytes: 0 before it joins, and after it has left.

    `host` is None for one that would join where no host has room.
    """

    host: str | None
    role: str
    before_bytes: int
    after_bytes: int

    @property
    def change(self) -> str:
        """What becomes of it, in a word."""
        if not self.before_bytes:
            return "joins"
        if not self.after_bytes:
            return "leaves"
        more = self.after_bytes - self.before_bytes
        return "grows" if more > 0 else "shrinks" if more < 0 else ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "host": self.host,
            "role": self.role,
            "share_bytes_before": self.before_bytes,
            "share_bytes_after": self.after_bytes,
            "change": self.change,
        }


@dataclass(frozen=True, slots=True)
class ResizePlan:
    """The shares before and after, and the pages that would move, as things were when asked.

    `moves` are those of a guest that stands still, about: the real one goes on, and who takes what
    a smaller main host sends out is decided page by page. Memory was looked for and not
    reserved. `problems` say why the change would be refused.
    """

    vm: str
    hosts: tuple[ResizedHost, ...]
    moves: tuple[Transfer, ...]
    problems: tuple[str, ...] = ()

    @classmethod
    def of(cls, vm: str, foreseen: Foreseen) -> Self:
        """From what the coordinator says."""
        hosts = tuple(
            ResizedHost(host or None, "sub" if index else "main", before, after)
            for index, (host, before, after) in enumerate(foreseen.hosts)
        )
        return cls(vm, hosts, foreseen.transfers, problems_of(foreseen))

    @property
    def pages(self) -> int:
        """Pages that would move."""
        return sum(each.pages for each in self.moves)

    @property
    def possible(self) -> bool:
        """Whether it would be tried."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as ``dcres resize --dry-run --json`` prints them."""
        return {
            "vm": self.vm,
            "dry_run": True,
            "possible": self.possible,
            "problems": list(self.problems),
            "hosts": [host.to_dict() for host in self.hosts],
            "moves": [
                {"from": each.source, "to": each.target, "pages": each.pages} for each in self.moves
            ],
            "pages_moved": self.pages,
            "bytes_moved": self.pages * PAGE_SIZE,
        }

    def __repr__(self) -> str:
        moves = ", ".join(
            f"{each.source} to {each.target} {format_size(each.pages * PAGE_SIZE)}"
            for each in self.moves
        )
        return f"<ResizePlan {self.vm}: {'; '.join(self.problems) or moves or 'nothing to move'}>"
