"""How much a second, and how long ago, as people write it."""

from __future__ import annotations

import re

from dcres.errors import ConfigError

_RATE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(?:([kmgt]?)(i?)b?(?:/s)?)?\s*", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_AGE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([smhdw])\s*")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 24 * 3600, "w": 7 * 24 * 3600}


def bytes_per_s(rate: str | float | None) -> float | None:
    """Bytes per second from ``100MB/s``, ``12 MiB/s`` or a number; None is no limit.

    Raises ConfigError.
    """
    found = _RATE.fullmatch(str(rate)) if not isinstance(rate, bool) else None
    if rate is None:
        return None
    number = 0.0
    if found is not None:
        base = 1024 if found[3] else 1000
        number = float(found[1]) * base ** _POWERS[(found[2] or "").lower()]
    if number <= 0:
        raise ConfigError(f"{rate!r} is no rate; write bytes per second such as 100MB/s")
    return number


def age_s(age: str | float | None) -> float | None:
    """Seconds from ``7d``, ``12h``, ``30m`` or a number; None stays. Raises ConfigError."""
    if age is None or (isinstance(age, int | float) and not isinstance(age, bool) and age >= 0):
        return age
    found = _AGE.fullmatch(age) if isinstance(age, str) else None
    if found is None:
        raise ConfigError(f"{age!r} is no length of time; write such as 7d, 12h or 30m")
    return float(found[1]) * _SECONDS[found[2]]
