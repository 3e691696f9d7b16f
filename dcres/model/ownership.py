"""To which cluster a VM's name in a store belongs, and its files on a host: to one at a time.

`storage.store.lives` acts on the one, `actors.host.folder_claim` on the other.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import assert_never


@dataclass(frozen=True, slots=True)
class Claimant:
    """Who wants a VM's name: a cluster, and the host that is to run it.

    `machine` and `boot` name the machine and its kernel's life; empty where that is not known.
    """

    cluster: str
    host: str
    machine: str
    boot: str


@dataclass(frozen=True, slots=True)
class Life:
    """A life of the VM that the store tells of; `held` while its QEMU is seen to run."""

    generation: int
    owner: Claimant
    since: str
    held: bool


class Standing(StrEnum):
    """What the lives that a store knows mean for one who wants the name."""

    FREE = "free"  # nobody's
    OURS = "ours"  # our cluster's: its own former lives are its own affair
    ENDED = "ended"  # another's that has ended for certain
    UNCERTAIN = "uncertain"  # another's, and from here nobody can see whether it runs
    ALIVE = "alive"  # another's, and it runs


def judge(lives: Iterable[Life], me: Claimant) -> tuple[Standing, Life | None]:
    """The standing of `me`, and the life that decides it.

    A lock that is held proves life, from any machine. A lock that is free proves death only where
    the life's own kernel says so, or on its machine after another boot: network file systems need
    not pass locks on.
    """
    newest_first = sorted(lives, key=lambda life: -life.generation)
    for life in newest_first:
        if life.held and not _same(life.owner.cluster, me.cluster):
            return Standing.ALIVE, life
    if not newest_first:
        return Standing.FREE, None
    newest = newest_first[0]
    if _same(newest.owner.cluster, me.cluster):
        return Standing.OURS, newest
    here = _same(newest.owner.boot, me.boot) or _same(newest.owner.machine, me.machine)
    return Standing.ENDED if here else Standing.UNCERTAIN, newest


def _same(theirs: str, ours: str) -> bool:
    """What is not known is nobody's."""
    return bool(ours) and theirs == ours


def refusal(vm: str, lives: Iterable[Life], me: Claimant, take_over: bool) -> str:
    """Why `me` cannot have the name of `vm`; empty if it can."""
    standing, life = judge(lives, me)
    match standing:
        case Standing.FREE | Standing.OURS | Standing.ENDED:
            return ""
        case Standing.ALIVE:
            where = "" if life is None else f" on host {life.owner.host} since {life.since}"
            return (
                f"the name {vm} in the store belongs to a VM of another cluster, which "
                f"runs{where}; stop it there, or give this VM another name or store"
            )
        case Standing.UNCERTAIN:
            if take_over:
                return ""
            where = "" if life is None else f" on host {life.owner.host} at {life.since}"
            return (
                f"the name {vm} in the store belongs to a VM of another cluster, which was "
                f"started{where}; whether it still runs cannot be seen from here. Stop it there, "
                "or, if you know that it has ended, add --take-over (take_over=True)"
            )
        case _:
            assert_never(standing)


def judge_files(kept: Life, me: Claimant) -> Standing:
    """What files of a VM on a host, which `kept` tells of, mean for one who wants their folder.

    Files that name no cluster are an earlier dcres's, which nobody holds: ours. While somebody
    holds them they are just being named.
    """
    owner = kept.owner.cluster
    if owner == me.cluster:
        return Standing.OURS
    if not owner:
        return Standing.ALIVE if kept.held else Standing.OURS
    return judge([kept], me)[0]


def files_refusal(
    vm: str, place: str, variable: str, kept: Life, me: Claimant, take_over: bool
) -> str:
    """Why `me` cannot have what is in `place`, chosen by `variable`; empty if it can."""
    there = kept.owner.host or me.host
    since = f" since {kept.since}" if kept.since else ""
    match judge_files(kept, me):
        case Standing.FREE | Standing.OURS | Standing.ENDED:
            return ""
        case Standing.ALIVE:
            return (
                f"VM {vm} of another cluster is in use on host {there}{since}, with its files in "
                f"{place}; give this cluster another {variable}, or end that VM there "
                f"(`dcres stop {vm}`, or `dcres down --orphans` if its cluster has ended): one "
                "that runs is not taken over"
            )
        case Standing.UNCERTAIN:
            if take_over:
                return ""
            return (
                f"VM {vm} of another cluster was started on host {there}{since}, with its files in "
                f"{place}, and whether it still runs cannot be seen from here; give this cluster "
                f"another {variable}, end that VM there (`dcres stop {vm}`), or, if it has ended "
                "for certain, add --take-over (take_over=True)"
            )
        case standing:
            assert_never(standing)
