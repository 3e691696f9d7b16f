"""Serving parts of a checkpoint, as far as no process is needed for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from dcres.actors.loading import SliceHost
from dcres.actors.messages import Incarnation, PartsOrder
from dcres.config import HostSettings
from dcres.errors import Conflict


def test_parts_are_not_served_after_the_end(tmp_path: Path) -> None:
    """An order that is overtaken by the end must leave nothing running."""
    settings = HostSettings(
        name="h0", run=tmp_path / "run", ram=tmp_path / "ram", store=tmp_path / "store"
    )
    host = SliceHost("vm", environ=settings.environ())
    host.end_serving_parts()
    with pytest.raises(Conflict, match="ended before its parts were served"):
        host.serve_parts(PartsOrder(Incarnation("vm", 1, "5e" * 32), "", ("h0",)))
    assert not settings.run.exists()
