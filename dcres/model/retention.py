"""Which checkpoints of a VM stay: the newest ones, and the newest of each of so many hours, days, …

The rules are those of restic's ``forget`` (https://restic.readthedocs.io, "Removing snapshots
according to a policy"): each counts for itself, a checkpoint stays when one of them wants it, and
an hour or day without a checkpoint does not count. Times are UTC.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from datetime import datetime

_PERIODS = {
    "hourly": "%Y-%m-%d %H",
    "daily": "%Y-%m-%d",
    "weekly": "%G-%V",  # of ISO 8601, which begin on Monday
    "monthly": "%Y-%m",
    "yearly": "%Y",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """How many checkpoints stay by each rule. One of them at least is wanted."""

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    yearly: int = 0

    @classmethod
    def of(cls, values: object) -> Keep:
        """From ``last=3,hourly=24`` or a mapping; ValueError names what is wrong."""
        if isinstance(values, Keep):
            return values
        pairs = _pairs(values) if isinstance(values, str) else values
        if not isinstance(pairs, Mapping):
            raise ValueError(f"{values!r} is not {_EXAMPLE}")
        numbers: dict[str, int] = {}
        for rule, number in pairs.items():
            if rule not in RULES:
                raise ValueError(f"{rule!r} is no rule; there are {', '.join(RULES)}")
            if isinstance(number, bool) or not isinstance(number, int) or number < 0:
                raise ValueError(f"{rule} is to be a number from 0 on, and is {number!r}")
            numbers[rule] = number
        if not any(numbers.values()):
            raise ValueError(f"it keeps nothing; say how many, such as {_EXAMPLE}")
        return cls(**numbers)

    def __str__(self) -> str:
        numbers = {rule: getattr(self, rule) for rule in RULES}
        return ",".join(f"{rule}={number}" for rule, number in numbers.items() if number)


RULES = tuple(each.name for each in fields(Keep))
_EXAMPLE = "last=3,hourly=24,daily=7"


def _pairs(text: str) -> dict[str, object]:
    found: dict[str, object] = {}
    for pair in filter(None, (each.strip() for each in text.split(","))):
        rule, equals, number = (each.strip() for each in pair.partition("="))
        if not equals or not (number.isascii() and number.isdigit()):
            raise ValueError(f"{pair!r} is not a rule and a number, such as {_EXAMPLE}")
        if rule in found:
            raise ValueError(f"{rule} is there twice")
        found[rule] = int(number)
    return found


def reasons_to_keep(
    keep: Keep, taken: Iterable[tuple[str, datetime]]
) -> dict[str, tuple[str, ...]]:
    """Why each checkpoint stays, by id, the newest first: the rules that want it. None: it goes."""
    newest_first = sorted(taken, key=lambda each: (each[1], each[0]), reverse=True)
    wanted = {checkpoint: ["last"] for checkpoint, _ in newest_first[: keep.last]}
    for rule, period in _PERIODS.items():
        newest: dict[str, str] = {}
        for checkpoint, at in newest_first:
            newest.setdefault(at.strftime(period), checkpoint)
        for checkpoint in list(newest.values())[: getattr(keep, rule)]:
            wanted.setdefault(checkpoint, []).append(rule)
    return {checkpoint: tuple(wanted.get(checkpoint, ())) for checkpoint, _ in newest_first}
