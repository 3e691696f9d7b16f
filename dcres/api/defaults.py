"""What a checkpoint is by default, and what kinds there are; loads next to nothing."""

from __future__ import annotations

from dcres.errors import ConfigError
from dcres.model.formats import DEFAULT_FORMAT, MemoryFormat

__all__ = [
    "DEFAULT_DOWNTIME_S",
    "DEFAULT_FORMAT",
    "DEFAULT_MAX_ROUNDS",
    "DEFAULT_MODE",
    "DEFAULT_RATE",
    "FORMATS",
    "MODES",
    "require_kind",
]

DEFAULT_MODE = "live"
MODES = ("live", "stop")
DEFAULT_DOWNTIME_S = 0.1
DEFAULT_MAX_ROUNDS = 8
DEFAULT_RATE = "100MB/s"  # of scrubbing, on each host
FORMATS = tuple(str(each) for each in MemoryFormat)


def require_kind(mode: str, format: str) -> None:
    """ConfigError unless there are checkpoints of that mode and memory files of that format."""
    for what, value, known in (("mode", mode, MODES), ("format", format, FORMATS)):
        if value not in known:
            raise ConfigError(
                f"{what} {value!r} is not supported by this version of dcres; "
                f"use {' or '.join(known)}"
            )
