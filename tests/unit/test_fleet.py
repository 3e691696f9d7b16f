"""The fleet on Ray, as far as Ray need not be there for it."""

from __future__ import annotations

from typing import Any

import pytest

from dcres.actors import _ray
from dcres.actors.fleet import RayFleet, end_what_is_left
from dcres.errors import ActorGone, ClusterError


def test_what_a_silent_helper_leaves_is_swept(monkeypatch: pytest.MonkeyPatch) -> None:
    """h1 is dead, h2 did not answer in time, h3 ended all."""
    errors = {"h1": ActorGone("it died"), "h2": ClusterError("it did not answer"), "h3": None}
    killed: list[str] = []
    swept: list[tuple[Any, ...]] = []

    class Port:
        def __init__(self, name: str) -> None:
            self._error = errors[name.rpartition("/")[2]]

        def call(self, method: str) -> None:
            assert method == "destroy"
            if self._error is not None:
                raise self._error

    monkeypatch.setattr(_ray, "list_actors", lambda prefix: [prefix + host for host in errors])
    monkeypatch.setattr(_ray, "ActorPort", Port)
    monkeypatch.setattr(_ray, "kill", killed.append)
    monkeypatch.setattr(_ray, "run_on", lambda *call, timeout_s: swept.append(call))
    monkeypatch.setattr(RayFleet, "alive", lambda fleet, host: host != "h1")
    RayFleet().leave("box")
    assert killed == [f"dcres-parts/box/{host}" for host in errors]
    assert swept == [("h2", end_what_is_left, "box.parts")]
