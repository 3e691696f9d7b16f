"""Access history pays: what the guest works on is there after a restore that was placed by it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dcres.model import plan as plan_module
from dcres.storage.manifest import Manifest
from tests.support.vm import Rig, await_checks, keeps_checking, rig, spec_of

pytestmark = [pytest.mark.vm, pytest.mark.linux]

HOT_MIB = 24
WATCH_S = 10


def page_ins(vm: Rig, manifest: Manifest) -> int:
    """Restore, and count what the pager brings while the witness goes on."""
    vm.restore(manifest)
    keeps_checking(vm.console, WATCH_S)
    brought: int = vm.coordinator.status()["hosts"][0]["pages_in"]
    vm.coordinator.stop()
    return brought


def by_chance(placement: Any, ticks: Any, *more: Any, **options: Any) -> Any:
    """The plan, had every page been touched at some other page's time."""
    dealt = np.random.default_rng(1).permutation(ticks)
    return PLAN(placement, dealt, *more, **options)


PLAN = plan_module.plan


def test_placed_by_history_the_guest_misses_a_fifth_at_most(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with rig(hosts=2, private=True) as vm:
        spec = spec_of(memory="192MiB", main="96MiB", subs=["96MiB"], fill=128)
        spec["append"] += f" witness_hot={HOT_MIB}"
        vm.boot(spec)
        await_checks(vm.console, 3 * HOT_MIB)
        manifest = vm.checkpoint()
        vm.coordinator.stop()
        by_history = page_ins(vm, manifest)
        monkeypatch.setattr(plan_module, "plan", by_chance)
        at_random = page_ins(vm, manifest)
    print(f"{by_history} pages brought by history, {at_random} at random")
    assert at_random > 1000, "the guest works on what is elsewhere"
    assert by_history <= at_random / 5
