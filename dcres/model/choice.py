"""Which hosts to restore on when nobody names them, and how much of the VM each is given.

Hosts that hold parts of the checkpoint come before those that hold none, because their pages
need no network; among each kind, those with the most room, because few hosts are better than
many. The main host is the one with the most room of those chosen.

Ray reserves memory in whole MiB, so the room of a host is what it has in whole MiB.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dcres.errors import NoRoom
from dcres.model.pages import PAGES_PER_MIB, mib_of

Share = tuple[str, int]  # a host and its pages


@dataclass(frozen=True, slots=True)
class Candidate:
    """A host that may be chosen; `held_pages` of the checkpoint it reads without the network."""

    name: str
    free_pages: int
    held_pages: int
    holds_main: bool  # whether the main host's part is among them

    @property
    def room_mib(self) -> int:
        """What can be reserved on it."""
        return self.free_pages // PAGES_PER_MIB


def choose(memory_pages: int, candidates: Sequence[Candidate]) -> list[Share]:
    """As few hosts as hold the VM's memory, in the order of preference; the main host first.

    The main host's share is all that it has room for, the others' what is left, in order;
    together they are `memory_pages`. Raises NoRoom.
    """
    holders, others = _by_preference(candidates)
    chosen: list[Candidate] = []
    missing_mib = mib_of(memory_pages)
    for candidate in holders + others:
        if missing_mib <= 0:
            break
        chosen.append(candidate)
        missing_mib -= candidate.room_mib
    if missing_mib > 0:
        raise _no_room(memory_pages, missing_mib, "all hosts")
    shares = []
    left = memory_pages
    for candidate in _main_first(chosen):
        share = min(left, candidate.room_mib * PAGES_PER_MIB)
        shares.append((candidate.name, share))
        left -= share
    return [(name, share) for name, share in shares if share]


def choose_evenly(memory_pages: int, candidates: Sequence[Candidate], count: int) -> list[Share]:
    """Exactly `count` hosts, with shares as even as their room allows; the main host first.

    Shares are whole MiB, and together at least `memory_pages`. A host that holds parts gives
    way to one that holds none only if the memory would not fit otherwise. Raises NoRoom.
    """
    holders, others = _by_preference(candidates)
    if count > len(holders) + len(others):
        raise NoRoom(
            f"{count} hosts are asked for, but only {len(holders) + len(others)} have room; ask "
            "for fewer, or add hosts"
        )
    wanted_mib = mib_of(memory_pages)
    missing_mib = wanted_mib
    for kept in range(min(count, len(holders)), max(count - len(others), 0) - 1, -1):
        chosen = holders[:kept] + others[: count - kept]
        lacking_mib = wanted_mib - sum(each.room_mib for each in chosen)
        if lacking_mib <= 0:
            return _even_shares(wanted_mib, _main_first(chosen))
        missing_mib = min(missing_mib, lacking_mib)
    raise _no_room(memory_pages, missing_mib, f"any {count} of the hosts")


def choose_for(shares: Sequence[int], candidates: Sequence[Candidate]) -> list[str]:
    """A host of its own for every share of a layout, in their order, the main host's first.

    Hosts that hold parts come first, and for the main host's share the one that holds its part;
    among equals the one with the least room. Raises NoRoom.
    """
    places: dict[int, str] = {}
    # What has room for a share has room for every smaller one, so that any choice leaves enough.
    for index in sorted(range(len(shares)), key=lambda index: -shares[index]):
        fit = [
            each
            for each in candidates
            if each.name not in places.values() and each.room_mib >= mib_of(shares[index])
        ]
        if not fit:
            raise NoRoom(
                f"{len(shares)} hosts are needed, and none of the remaining ones has room for a "
                f"share of {mib_of(shares[index])} MiB; free memory or add hosts"
            )
        main = index == 0
        best = min(fit, key=lambda each: _fitness(each, main=main))
        places[index] = best.name
    return [places[index] for index in range(len(shares))]


def _fitness(candidate: Candidate, main: bool) -> tuple[bool, bool, int, str]:
    """Least is best."""
    return (
        main and not candidate.holds_main,
        not candidate.held_pages,
        candidate.room_mib,
        candidate.name,
    )


def _by_preference(candidates: Sequence[Candidate]) -> tuple[list[Candidate], list[Candidate]]:
    """Those with room that hold parts, and those that hold none; the most room first."""
    fit = [each for each in candidates if each.room_mib > 0]
    fit.sort(key=lambda each: (-each.room_mib, -each.held_pages, each.name))
    return [each for each in fit if each.held_pages], [each for each in fit if not each.held_pages]


def _main_first(chosen: Sequence[Candidate]) -> list[Candidate]:
    """The main host, then the others as they were. Among equals, who holds the main part."""
    main = max(chosen, key=lambda each: (each.room_mib, each.holds_main))
    return [main, *(each for each in chosen if each is not main)]


def _even_shares(wanted_mib: int, hosts: Sequence[Candidate]) -> list[Share]:
    """The same for everyone, except for those that have less room than that."""
    level, left_mib = 0, wanted_mib
    for smaller, host in enumerate(sorted(hosts, key=lambda each: each.room_mib)):
        level = -(-left_mib // (len(hosts) - smaller))
        if level <= host.room_mib:
            break
        left_mib -= host.room_mib
    return [(host.name, min(level, host.room_mib) * PAGES_PER_MIB) for host in hosts]


def _no_room(memory_pages: int, missing_mib: int, whose: str) -> NoRoom:
    return NoRoom(
        f"the VM has {mib_of(memory_pages)} MiB of memory, {missing_mib} MiB more than {whose} "
        "have room for; free memory or add hosts"
    )
