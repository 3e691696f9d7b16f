"""Which checkpoints rules keep."""

from __future__ import annotations

from dataclasses import astuple, replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcres.model.retention import RULES, Keep, reasons_to_keep

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)  # a Thursday, in the first week


def taken(*hours: float) -> list[tuple[str, datetime]]:
    """So many hours after `BEGIN`; their names are these."""
    return [(f"{each:g}", BEGIN + timedelta(hours=each)) for each in hours]


def kept(keep: str, *hours: float) -> dict[str, tuple[str, ...]]:
    found = reasons_to_keep(Keep.of(keep), taken(*hours))
    return {checkpoint: reasons for checkpoint, reasons in found.items() if reasons}


def test_the_newest_stay() -> None:
    assert kept("last=2", 1, 3, 2) == {"3": ("last",), "2": ("last",)}


def test_the_newest_of_each_period_stays_and_periods_without_one_do_not_count() -> None:
    hours = (0, 0.5, 1, 1.25, 1.5, 30, 31)
    assert list(kept("hourly=3", *hours)) == ["31", "30", "1.5"]
    assert list(kept("daily=3", *hours)) == ["31", "1.5"]
    # Sunday the 4th is of the first week, Monday the 5th of the second.
    assert list(kept("weekly=9", 0, 95, 96, 97)) == ["97", "95"]
    assert list(kept("monthly=2", 0, 24 * 30, 24 * 31, 24 * 90)) == ["2160", "744"]
    assert list(kept("yearly=9", -1, 0, 24 * 364)) == ["8736", "-1"]


def test_each_rule_counts_for_itself() -> None:
    assert kept("last=1,hourly=1,daily=2", 0, 23, 24, 25) == {
        "25": ("last", "hourly", "daily"),
        "23": ("daily",),
    }


def test_what_begins_in_one_second_is_in_order_of_its_name() -> None:
    twins = [("box-1-a", BEGIN), ("box-1-b", BEGIN)]
    assert reasons_to_keep(Keep(last=1), twins) == {"box-1-b": ("last",), "box-1-a": ()}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ("last", "is not a rule and a number"),
        ("last=-1", "is not a rule and a number"),
        ("last=³", "is not a rule and a number"),
        ("last=1,last=2", "there twice"),
        ("secondly=3", "no rule; there are last, hourly, daily, weekly, monthly, yearly"),
        ("last=0", "keeps nothing"),
        ("", "keeps nothing"),
        ({}, "keeps nothing"),
        ({"last": True}, "a number from 0 on, and is True"),
        ({"last": "3"}, "a number from 0 on"),
        ({"daily": -1}, "a number from 0 on"),
        (3, "3 is not last="),
        (None, "None is not last="),
    ],
)
def test_rules_that_cannot_be(values: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Keep.of(values)


def test_rules_are_read_as_they_are_written() -> None:
    keep = Keep.of(" last = 3, weekly=1,hourly=0 ")
    assert keep == Keep(last=3, weekly=1) == Keep.of({"last": 3, "weekly": 1})
    assert str(keep) == "last=3,weekly=1"
    assert Keep.of(str(keep)) == keep == Keep.of(keep)


numbers = st.integers(0, 4)
rules = st.builds(Keep, **dict.fromkeys(RULES, numbers)).filter(lambda keep: any(astuple(keep)))
times = st.lists(st.integers(0, 3 * 365 * 24 * 4), max_size=40).map(
    lambda quarters: [
        (f"{n:03}", BEGIN + timedelta(minutes=15 * q)) for n, q in enumerate(quarters)
    ]
)


@given(rules, times)
def test_whatever_the_rules_are(keep: Keep, checkpoints: list[tuple[str, datetime]]) -> None:
    found = reasons_to_keep(keep, checkpoints)
    stay = [checkpoint for checkpoint, reasons in found.items() if reasons]
    assert sorted(found) == sorted(checkpoint for checkpoint, _ in checkpoints)
    assert len(stay) <= sum(astuple(keep))
    if checkpoints:
        newest = max(checkpoints, key=lambda each: (each[1], each[0]))[0]
        assert stay[0] == newest == next(iter(found)), "the newest never goes"
    for rule in RULES:
        more = reasons_to_keep(replace(keep, **{rule: getattr(keep, rule) + 1}), checkpoints)
        assert {each for each, reasons in more.items() if reasons} >= {*stay}


@given(rules, times)
def test_what_has_been_removed_makes_no_difference(
    keep: Keep, checkpoints: list[tuple[str, datetime]]
) -> None:
    """So it does not matter how often checkpoints are pruned."""
    stay = {
        each: reasons for each, reasons in reasons_to_keep(keep, checkpoints).items() if reasons
    }
    left = [each for each in checkpoints if each[0] in stay]
    assert reasons_to_keep(keep, left) == stay
