"""What other shares would mean for a running VM, and the emptying of one of its sub hosts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass
from typing import Any, Self

from dcres.actors.messages import Foreseen, PageFlow
from dcres.config import format_size
from dcres.model.pages import PAGE_SIZE


def _problems_of(foreseen: Foreseen) -> tuple[str, ...]:
    """Sentences that say why it would not be tried: one, or none."""
    return (foreseen.problem,) if foreseen.problem else ()


class ChangePlan(ABC):
    """What is said of every change of shares; `problems` say why it would be refused."""

    __slots__ = ()
    vm: str
    problems: tuple[str, ...]

    @property
    @abstractmethod
    def pages(self) -> int:
        """Pages that would move."""

    @property
    def possible(self) -> bool:
        """Whether it would be tried."""
        return not self.problems

    def _verdict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "vm": self.vm,
            "dry_run": True,
            "possible": self.possible,
            "problems": list(self.problems),
            "pages_moved": self.pages,
            "bytes_moved": self.pages * PAGE_SIZE,
        }

    def _in_brief(self, moves: dict[str, int]) -> str:
        """In a line: where how many pages go."""
        sizes = (f"{what} {format_size(pages * PAGE_SIZE)}" for what, pages in moves.items())
        return "; ".join(self.problems) or ", ".join(sizes) or "nothing to move"


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
class ResizePlan(ChangePlan):
    """The shares before and after, and the pages that would move, as things were when asked.

    `moves` are about those of a paused guest: the real one goes on, and which sub host takes what
    a smaller main host sends out is decided page by page. Memory was looked for and not
    reserved.
    """

    vm: str
    hosts: tuple[ResizedHost, ...]
    moves: tuple[PageFlow, ...]
    problems: tuple[str, ...] = ()

    @classmethod
    def of(cls, vm: str, foreseen: Foreseen) -> Self:
        """From what the coordinator says."""
        hosts = tuple(
            ResizedHost(host or None, "sub" if index else "main", before, after)
            for index, (host, before, after) in enumerate(foreseen.hosts)
        )
        return cls(vm, hosts, foreseen.flows, _problems_of(foreseen))

    @property
    def pages(self) -> int:
        """Pages that would move."""
        return sum(each.pages for each in self.moves)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as ``dcres resize --dry-run --json`` prints them."""
        moves = [
            {"from": each.source, "to": each.target, "pages": each.pages} for each in self.moves
        ]
        return {
            **self._verdict(),
            "hosts": [host.to_dict() for host in self.hosts],
            "moves": moves,
        }

    def __repr__(self) -> str:
        moves = {f"{each.source} to {each.target}": each.pages for each in self.moves}
        return f"<ResizePlan {self.vm}: {self._in_brief(moves)}>"


@dataclass(frozen=True, slots=True)
class DrainPlan(ChangePlan):
    """The pages that would go from `host` to each other host, as things were when asked."""

    vm: str
    host: str
    moves: dict[str, int]  # host → pages
    problems: tuple[str, ...] = ()

    @classmethod
    def of(cls, vm: str, host: str, foreseen: Foreseen) -> Self:
        """From what the coordinator says."""
        moves: Counter[str] = Counter()
        for each in foreseen.flows:
            moves[each.target] += each.pages
        return cls(vm, host, dict(moves), _problems_of(foreseen))

    @property
    def pages(self) -> int:
        """Pages that would move."""
        return sum(self.moves.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as ``dcres drain --dry-run --json`` prints them."""
        moves = [{"host": host, "pages": pages} for host, pages in self.moves.items()]
        return {**self._verdict(), "host": self.host, "moves": moves}

    def __repr__(self) -> str:
        return f"<DrainPlan {self.host} of {self.vm}: {self._in_brief(self.moves)}>"
