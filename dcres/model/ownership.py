"""To whom a VM's name in a store belongs: one cluster at a time. `storage.lives` acts on it."""

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
                f"VM {vm} of another cluster has this name in the store, and runs{where}; stop it "
                "there, or give this one another name or another store"
            )
        case Standing.UNCERTAIN:
            if take_over:
                return ""
            where = "" if life is None else f" on host {life.owner.host} at {life.since}"
            return (
                f"VM {vm} of another cluster has this name in the store: it was started{where}, "
                "and whether it still runs cannot be seen from here; stop it there, or, if it has "
                "ended for certain, add --take-over (take_over=True)"
            )
        case _:
            assert_never(standing)
