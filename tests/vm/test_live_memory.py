"""Live checkpoints of a guest that writes as fast as it can, against its memory at the stop."""

from __future__ import annotations

from pathlib import Path

import pytest

from dcres.bench.filler import fill_mib, filler_image
from dcres.model.formats import MemoryFormat
from tests.support.vm import spec_of
from tests.support.wait import until
from tests.support.watched import Watched, require_same, require_tables_agree, saved_memory, watched

pytestmark = pytest.mark.vm

MEMORY_MIB = 256
CHECKPOINTS, MOST_CHECKPOINTS = 16, 24
ROUNDS = 3 * CHECKPOINTS
SEGMENTED = MemoryFormat.SEGMENTED
FORMATS = (MemoryFormat.SPARSE, SEGMENTED, MemoryFormat.PACKED, SEGMENTED)


def test_a_live_checkpoint_is_the_busy_guests_memory_at_the_stop(tmp_path: Path) -> None:
    """Thousands of stretches of memory are written between two looks, and during each look."""
    image = filler_image(tmp_path)
    words = f"fill={fill_mib(MEMORY_MIB)} span={MEMORY_MIB // 2} dirty=100000 reads=8"
    spec = spec_of(
        memory=f"{MEMORY_MIB}MiB",
        main=f"{MEMORY_MIB * 3 // 4}MiB",
        subs=[f"{MEMORY_MIB // 8}MiB"] * 2,
        kernel=str(image.kernel),
        initrd=str(image.initrd),
        append=f"console=ttyS0 quiet panic=-1 {words}",
    )
    with watched() as vm:
        vm.coordinator.start(spec)
        until(lambda: "WROTE" in vm.console.read_text(), 120, "the guest writes")
        rounds = number = increments = 0
        base = ""
        # How many rounds a checkpoint takes is for the machine to say; so many are looked at.
        while number < CHECKPOINTS or (rounds <= ROUNDS and number < MOST_CHECKPOINTS):
            memory_format = FORMATS[number % len(FORMATS)]
            facts = vm.coordinator.checkpoint("live", downtime_s=0.05, memory_format=memory_format)
            manifest = vm.store.get(facts["checkpoint"])
            saved = saved_memory(vm, manifest)
            segmented = memory_format is SEGMENTED
            increments += (increment := manifest.base is not None)
            require_same(saved, Watched.seen.pop(), moved=increment)
            require_tables_agree(vm, manifest, saved)
            assert manifest.pages_moved_for_checkpoint == 0
            rounds += int(facts["rounds"])
            # What the next increment is made upon stays; it has all that those before it had.
            gone, base = (base, manifest.checkpoint) if segmented else (manifest.checkpoint, base)
            if gone:
                vm.store.delete(gone)
            number += 1
    assert rounds > ROUNDS  # the last of each is that in which hosts synchronise
    assert increments >= number // 2 - 2
