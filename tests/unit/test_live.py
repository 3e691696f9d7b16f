"""When a live checkpoint stops the VM."""

from __future__ import annotations

import pytest

from dcres.model.live import HostRound, Target, Verdict, estimates_s, judge
from dcres.model.pages import PAGE_SIZE

GB = 1e9


def rounds(*left: int) -> list[dict[str, HostRound]]:
    return [{"m": HostRound(pages, 0.1, GB), "s": HostRound(0, 0.1, GB)} for pages in left]


def test_it_stops_when_the_rest_fits() -> None:
    fits = int(0.04 * GB / PAGE_SIZE)
    judgement = judge(Target(), rounds(fits))
    assert judgement.verdict is Verdict.FITS
    assert 0.09 < judgement.estimated_downtime_s <= 0.1
    assert judge(Target(), rounds(fits * 2)).go_on


def test_the_slowest_host_counts() -> None:
    slow = {"m": HostRound(10, 0.1, GB), "s": HostRound(100_000, 0.1, GB)}
    assert judge(Target(), [slow]).estimated_downtime_s > 0.4


def test_each_host_has_an_estimate_of_its_own() -> None:
    hosts = {"m": HostRound(10_000, 0.1, GB), "s": HostRound(10_000, 0.1, 2 * GB)}
    found = estimates_s(hosts, fixed_s=0.05)
    staging_s = 10_000 * PAGE_SIZE / GB
    assert found == pytest.approx({"m": 0.05 + staging_s, "s": 0.05 + staging_s / 2})
    assert judge(Target(fixed_s=0.05), [hosts]).estimated_downtime_s == found["m"]
    assert judge(Target(fixed_s=0.05), [{}]).estimated_downtime_s == 0.05


def test_a_busy_guest_does_not_make_it_endless() -> None:
    left = [10**6, 5 * 10**5, 4 * 10**5, 3 * 10**5]
    assert judge(Target(max_rounds=4), rounds(*left)).verdict is Verdict.BOUND
    assert judge(Target(), rounds(10**6, 9 * 10**5, 89 * 10**4)).verdict is Verdict.STALLED
    assert judge(Target(), rounds(10**6, 9 * 10**5)).go_on
    assert judge(Target(), rounds(10**6, 95 * 10**4)).verdict is Verdict.STALLED


def test_a_guest_that_begins_to_write_gets_another_round() -> None:
    assert judge(Target(), rounds(100, 10**5)).go_on, "rounds had helped before"
    assert judge(Target(), rounds(100, 10**5, 10**5)).verdict is Verdict.STALLED
    assert judge(Target(max_rounds=2), rounds(100, 10**5)).verdict is Verdict.BOUND


def test_a_target_below_what_every_stop_takes_is_told() -> None:
    left = rounds(100, 90, 89)
    assert judge(Target(downtime_s=0.02, fixed_s=0.03), left).verdict is Verdict.TOO_SHORT
    assert judge(Target(downtime_s=0.04, fixed_s=0.03), left).verdict is Verdict.FITS
