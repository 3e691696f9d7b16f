"""Figure 10 of Murata and Kourai (2019): restores over main:sub ratios from 1:7 to 7:1.

The VM is checkpointed once at every ratio, with disks as fast as they are. In each round every
one of these checkpoints is restored as it was saved, on the same two hosts, whose disks are then
as slow as in `dcres.bench.figure7`:

* ``restore``: from when memory is set aside and the hosts' actors are there until the guest runs.
  QEMU and pager start, all hosts load their pages at the same time, the main host loads the VM
  core in the end;
* ``load``: the middle of it, in which hosts load their pages while QEMU starts;
* ``whole``: the whole order, with the second or two that Ray takes before: it starts a process for
  every actor, for which it makes no difference who will hold how much.
"""

from __future__ import annotations

from dcres.bench import ratios
from dcres.bench.result import Bench, Row, Setup
from dcres.bench.split import SplitVm, Timed, restore_details
from dcres.storage.format.manifest import Manifest

ROUNDS, QUICK_ROUNDS = 4, 1
_RESTORE, _LOAD, _WHOLE = "restore", "load", "whole"


def measure(setup: Setup) -> list[Row]:
    """Every round's rows."""
    rounds = QUICK_ROUNDS if setup.quick else ROUNDS
    rows: list[Row] = []
    with ratios.filled(setup, "figure10") as (hosts, vm):
        manifests = _save(setup, vm)
        hosts.limit(ratios.DISK_MB_PER_S)
        for at in range(rounds):
            rows += hosts.rates(at)
            for parts in ratios.order(setup, at):
                name = ratios.name_of(parts)
                setup.say(f"round {at + 1} of {rounds}: {name.replace('_', ':')}")
                layout = ratios.layout_at(parts, ratios.memory_mib(setup))
                restored = vm.restore(manifests[parts], layout)
                vm.stop()
                rows += _rows(name, at, restored)
    return rows


def _rows(name: str, at: int, restored: Timed) -> list[Row]:
    parts = restored.facts["parts_seconds"]
    own = restored.seconds - parts["reserve"]
    return [
        Row(f"{_RESTORE}_{name}", at, own, "s", restore_details(restored)),
        Row(f"{_LOAD}_{name}", at, parts["boot"], "s"),
        Row(f"{_WHOLE}_{name}", at, restored.seconds, "s"),
    ]


def _save(setup: Setup, vm: SplitVm) -> dict[int, Manifest]:
    """A checkpoint at every ratio, by the main host's parts; the VM has ended."""
    manifests = {}
    for parts in ratios.order(setup, 0):
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
