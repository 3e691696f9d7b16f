"""Starting and restoring a VM: its coordinator does the work, and is attended meanwhile."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from dcres.actors.control.choosing import Wish
from dcres.actors.control.coordinator import Coordinator
from dcres.actors.ray import gateway
from dcres.actors.ray.coordinators import Coordinators
from dcres.api.operation import Attended, ProgressOption
from dcres.api.plan import warn_of
from dcres.api.status import status_of
from dcres.config import VmSpec
from dcres.linux.interrupt import ended_by_sigterm
from dcres.linux.machine import caller
from dcres.storage.format.manifest import Manifest, dumps

Facts = dict[str, Any]  # what was done, for people

_CHOOSE_TIMEOUT_S = 300.0


def start(
    spec: VmSpec, hosts: Sequence[str] | None, progress: ProgressOption, *, take_over: bool
) -> Facts:
    """Boot a VM; see `Cluster.start`."""
    began = time.monotonic()
    values = spec.model_dump(mode="json", by_alias=True)
    with _attended(spec.name, f"start of {spec.name}", progress) as attended:
        order = values, hosts, take_over, gateway.own_driver(), caller()
        answer = attended.run(Coordinator.start, *order)
    return {**status_of(answer).to_dict(), "seconds": time.monotonic() - began}


def restore(
    manifest: Manifest, wish: Wish, progress: ProgressOption, *, lazy: bool, take_over: bool
) -> Facts:
    """Bring a VM back; see `Checkpoint.restore`."""
    text = dumps(manifest)
    with _attended(manifest.vm, f"restore of {manifest.vm}", progress) as attended:
        choice = attended.coordinator.within(_CHOOSE_TIMEOUT_S).call(Coordinator.choose, text, wish)
        warn_of(choice.left_out)
        order = text, choice.layout, list(choice.hosts), lazy, take_over
        driver = gateway.own_driver()
        return {**attended.run(Coordinator.restore, *order, driver, caller()), "chosen": choice.why}


@contextmanager
def _attended(vm: str, title: str, progress: ProgressOption) -> Iterator[Attended]:
    with ended_by_sigterm(), Coordinators().bringing_up(vm) as coordinator:
        yield Attended(coordinator, title, progress)
