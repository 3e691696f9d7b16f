"""What a checkpoint is by default, and what kinds there are; loads nothing."""

from __future__ import annotations

DEFAULT_MODE = "stop"
MODES = ("stop",)
DEFAULT_FORMAT = "sparse"
FORMATS = ("sparse",)
