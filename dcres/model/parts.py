"""Who has which part of a checkpoint, and what that means for those who restore it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dcres.errors import NotFound

Names = tuple[str, ...]  # hosts of the checkpoint, as names of their parts
Flow = Sequence[Sequence[int]]  # pages per part and target host


@dataclass(frozen=True, slots=True)
class Where:
    """Which hosts have which parts, as far as was asked; `targets`, the VM's hosts, come first."""

    parts: Names
    targets: tuple[str, ...]
    here: Mapping[str, Names]

    @property
    def missing(self) -> Names:
        """Names that no host has."""
        found = {part for parts in self.here.values() for part in parts}
        return tuple(part for part in self.parts if part not in found)

    def helped_by(self, holders: Mapping[str, Names]) -> Where:
        """With hosts outside the VM for what its own lack, no more of them than it takes."""
        here, left = dict(self.here), set(self.missing)
        for host, parts in holders.items():
            if host not in here and left & set(parts):
                here[host] = parts
                left -= set(parts)
        return replace(self, here=here)

    def completed(self, holders: Mapping[str, Names], checkpoint: str) -> Where:
        """As `helped_by`. Raises NotFound for a part that no host has."""
        helped = self.helped_by(holders)
        if helped.missing:
            raise NotFound(helped.lack(checkpoint))
        return helped

    def lack(self, checkpoint: str) -> str:
        """What is missing, as a sentence."""
        return (
            f"the part that {', '.join(sorted(self.missing))} saved of checkpoint {checkpoint} "
            "is on no host that answers; bring that host back"
        )

    @property
    def helpers(self) -> tuple[str, ...]:
        """Hosts that only have parts."""
        return tuple(host for host in self.here if host not in self.targets)

    @property
    def holds(self) -> tuple[tuple[bool, ...], ...]:
        """Per part: which target hosts have it."""
        return tuple(tuple(part in self.here[host] for host in self.targets) for part in self.parts)

    def holder(self, part: str) -> str:
        """A host that has `part`: the main host if it does, else another of the VM's, else any."""
        return next(host for host, parts in self.here.items() if part in parts)

    def served(self, parts: Sequence[str]) -> dict[str, Names]:
        """Who is to serve these parts to others, by host."""
        served: dict[str, Names] = {}
        for part in parts:
            host = self.holder(part)
            served[host] = (*served.get(host, ()), part)
        return served

    def from_afar(self, flow: Flow) -> Names:
        """Parts that a host is to load pages of and does not have."""
        return tuple(
            part
            for part, pages, held in zip(self.parts, flow, self.holds, strict=True)
            if any(count and not here for count, here in zip(pages, held, strict=True))
        )

    def waits(self, host: str, flow: Flow) -> bool:
        """Whether `host` is to load pages that another one has to serve."""
        to = self.targets.index(host)
        return any(pages[to] and not held[to] for pages, held in zip(flow, self.holds, strict=True))

    def moved_pages(self, flow: Flow) -> int:
        """Pages that cross the network."""
        return sum(
            count
            for pages, held in zip(flow, self.holds, strict=True)
            for count, here in zip(pages, held, strict=True)
            if not here
        )
