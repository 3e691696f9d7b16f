"""Access history pays: what the guest works on is there after a restore that was placed by it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dcres.bench.filler import filler_image
from dcres.model import plan as plan_module
from dcres.storage.format.manifest import Manifest
from tests.support.speed import patience
from tests.support.vm import Rig, rig, spec_of
from tests.support.wait import until

pytestmark = [pytest.mark.vm, pytest.mark.linux]

FILL_MIB, HOT_MIB = 160, 80
LEARNT_WRITES = 100_000  # at most 5000 a second, so for 20 s at least
WATCH_S = patience(5)
PLAN = plan_module.plan


def written(vm: Rig) -> int:
    """How many pages the guest has written, with three read before each."""
    lines = vm.console.read_text(errors="replace").split("\n")[:-1]
    counts = [int(line.split()[1]) for line in lines if line.startswith("WROTE ")]
    return counts[-1] if counts else 0


def page_ins(vm: Rig, manifest: Manifest) -> int:
    """Restore, and count what the pager brings in the first seconds."""
    vm.restore(manifest)
    over = time.monotonic() + WATCH_S
    until(lambda: written(vm) > LEARNT_WRITES, 60, "the guest goes on")
    until(lambda: time.monotonic() > over, 2 * WATCH_S, "the time to be watched is over")
    brought: int = vm.coordinator.status()["hosts"][0]["pages_in"]
    vm.coordinator.stop()
    return brought


def by_chance(placement: Any, ticks: Any, *more: Any, **options: Any) -> Any:
    """The plan, had every page been touched when some other page was."""
    return PLAN(placement, np.random.default_rng(1).permutation(ticks), *more, **options)


def test_placed_by_history_the_guest_misses_a_fifth_at_most(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    image = filler_image(tmp_path)
    work = f"fill={FILL_MIB} dirty=20 reads=3 span={HOT_MIB}"
    spec = {
        **spec_of(memory="240MiB", main="120MiB", subs=["120MiB"]),
        "initrd": str(image.initrd),
        "append": f"console=ttyS0 quiet panic=-1 {work}",
    }
    with rig(hosts=2, private=True) as vm:
        vm.coordinator.start(spec)
        until(lambda: written(vm) > LEARNT_WRITES, 240, "the policy had time to learn")
        manifest = vm.checkpoint()
        vm.coordinator.stop()
        by_history = page_ins(vm, manifest)
        monkeypatch.setattr(plan_module, "plan", by_chance)
        at_random = page_ins(vm, manifest)
    print(f"{by_history} pages brought by history, {at_random} at random")
    assert at_random > 1000, "the guest works on what is elsewhere"
    assert by_history <= at_random / 5
