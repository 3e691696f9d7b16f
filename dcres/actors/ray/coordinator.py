"""The coordinator as Ray runs it: over hosts that Ray provides."""

from __future__ import annotations

from dcres.actors.control.coordinator import Coordinator
from dcres.actors.ray.fleet import RayFleet


class RayCoordinator(Coordinator):
    """Spawned by name, see `dcres.actors.ray.fleet.coordinator_name`; called as a `Coordinator`."""

    def __init__(self, vm: str) -> None:
        super().__init__(vm, RayFleet())
