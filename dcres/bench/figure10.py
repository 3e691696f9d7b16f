"""The report's figure 10: how long a restore takes over main:sub ratios from 1:7 to 7:1.

The VM is checkpointed once at every ratio, with disks as fast as they are. In each round every
one of these checkpoints is restored as it was saved, on the same two hosts, whose disks are then
as slow as in `dcres.bench.figure7`. A restore takes from the order until the guest runs: Ray sets
memory aside and starts actors, QEMU starts while all hosts load their pages, the main host alone
loads the VM core in the end. ``load`` is the middle of it, in which hosts load their pages.
"""

from __future__ import annotations

from dcres.bench import ratios
from dcres.bench.result import Bench, Row, Setup
from dcres.bench.split import SplitVm, restore_details
from dcres.storage.manifest import Manifest

ROUNDS, QUICK_ROUNDS = 4, 1
_RESTORE, _LOAD = "restore", "load"


def measure(setup: Setup) -> list[Row]:
    """Every round's rows."""
    rounds = QUICK_ROUNDS if setup.quick else ROUNDS
    rows: list[Row] = []
    with ratios.filled(setup, "figure10") as (hosts, vm):
        manifests = _save(setup, vm)
        hosts.limit(ratios.DISK_BYTES_PER_S)
        for at in range(rounds):
            rows += hosts.rates(at)
            for parts in ratios.order(at):
                name = ratios.name_of(parts)
                setup.say(f"round {at + 1} of {rounds}: {name.replace('_', ':')}")
                layout = ratios.layout_at(parts, ratios.memory_mib(setup))
                restored = vm.restore(manifests[parts], layout)
                vm.stop()
                details = restore_details(restored)
                rows.append(Row(f"{_RESTORE}_{name}", at, restored.seconds, "s", details))
                load = restored.facts["parts_seconds"]["boot"]
                rows.append(Row(f"{_LOAD}_{name}", at, load, "s"))
    return rows


def _save(setup: Setup, vm: SplitVm) -> dict[int, Manifest]:
    """A checkpoint at every ratio, by the main host's parts; the VM has ended."""
    manifests = {}
    for parts in ratios.order(0):
        setup.say(f"a checkpoint at {ratios.name_of(parts).replace('_', ':')}")
        vm.resize(ratios.layout_at(parts, ratios.memory_mib(setup)))
        _, manifests[parts] = vm.checkpoint()
    vm.stop()
    return manifests


BENCH = Bench(
    name="figure10",
    about="restores of a VM over two hosts, main:sub from 1:7 to 7:1",
    measure=measure,
    ratios=ratios.ratios(_RESTORE),
    aims=(),
    figures=(
        ratios.figure("Restore over main:sub ratios", _RESTORE, "tab:orange"),
        ratios.figure("of which hosts load pages", _LOAD, "tab:green"),
    ),
)
