"""When a live checkpoint has saved enough to stop the VM: pure arithmetic over its rounds.

A round saves what was marked, while the guest runs and marks more. When the pages that are
left fit the downtime target, or when more rounds would not help, the hosts synchronise, with
a last round if they fitted, and the VM is stopped for the rest, if that still fits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from dcres.model.pages import PAGE_SIZE

DOWNTIME_S = 0.1
MAX_ROUNDS = 8
# Stop, drain, disk snapshot, VM core and the calls between hosts, before it was ever measured.
FIXED_S = 0.06
STALLED_SHRINK = 0.9


class Verdict(StrEnum):
    """What to do after a round."""

    GO_ON = "go on"
    FITS = "the rest fits the downtime target"
    BOUND = "the limit on rounds is reached"
    STALLED = "the guest writes as fast as its pages are saved"
    TOO_SHORT = "the stop itself takes longer than the downtime target"


@dataclass(frozen=True, slots=True)
class Target:
    """What the user asks for."""

    downtime_s: float = DOWNTIME_S
    max_rounds: int = MAX_ROUNDS
    fixed_s: float = FIXED_S


@dataclass(frozen=True, slots=True)
class HostRound:
    """One host's round: what is marked now, how long it took, and how fast it reads memory."""

    left_pages: int
    seconds: float
    stage_bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Judgement:
    """A verdict and the downtime to expect if the VM were stopped now."""

    verdict: Verdict
    estimated_downtime_s: float

    @property
    def go_on(self) -> bool:
        """Whether another round is worth it."""
        return self.verdict is Verdict.GO_ON


def estimates_s(hosts: Mapping[str, HostRound], fixed_s: float) -> dict[str, float]:
    """For each host its time to take the rest into memory, and the fixed part."""
    return {
        host: fixed_s + each.left_pages * PAGE_SIZE / each.stage_bytes_per_s
        for host, each in hosts.items()
    }


def estimate_downtime_s(hosts: Mapping[str, HostRound], fixed_s: float) -> float:
    """The VM is paused for as long as its slowest host needs."""
    return max(estimates_s(hosts, fixed_s).values(), default=fixed_s)


def judge(target: Target, rounds: Sequence[Mapping[str, HostRound]]) -> Judgement:
    """What to do after `rounds`, each a mapping host → what it did. Needs at least one."""
    estimate = estimate_downtime_s(rounds[-1], target.fixed_s)
    if estimate <= target.downtime_s:
        return Judgement(Verdict.FITS, estimate)
    if len(rounds) >= target.max_rounds:
        return Judgement(Verdict.BOUND, estimate)
    if len(rounds) >= 2 and _has_stalled(target, rounds[-2], rounds[-1]):
        hopeless = target.fixed_s > target.downtime_s
        return Judgement(Verdict.TOO_SHORT if hopeless else Verdict.STALLED, estimate)
    return Judgement(Verdict.GO_ON, estimate)


def _has_stalled(
    target: Target, before: Mapping[str, HostRound], now: Mapping[str, HostRound]
) -> bool:
    """Whether a round left about what the one before did; not if that had been little enough."""
    fitted = estimate_downtime_s(before, target.fixed_s) <= target.downtime_s
    return not fitted and _left(now) > STALLED_SHRINK * _left(before)


def _left(hosts: Mapping[str, HostRound]) -> int:
    return sum(each.left_pages for each in hosts.values())
