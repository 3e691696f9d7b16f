"""What emptying a sub host would move where."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Self

from dcres.actors.messages import Foreseen
from dcres.config import format_size
from dcres.model.pages import PAGE_SIZE


def problems_of(foreseen: Foreseen) -> tuple[str, ...]:
    """Sentences that say why it would not be tried: one, or none."""
    return (foreseen.problem,) if foreseen.problem else ()


@dataclass(frozen=True, slots=True)
class DrainPlan:
    """The pages that would go from `host` to each other host, as things were when asked."""

    vm: str
    host: str
    moves: dict[str, int]  # host → pages
    problems: tuple[str, ...] = ()

    @classmethod
    def of(cls, vm: str, host: str, foreseen: Foreseen) -> Self:
        """From what the coordinator says."""
        moves: Counter[str] = Counter()
        for each in foreseen.transfers:
            moves[each.target] += each.pages
        return cls(vm, host, dict(moves), problems_of(foreseen))

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
