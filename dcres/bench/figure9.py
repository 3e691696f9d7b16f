"""Figure 9 of Murata and Kourai (2019): checkpoints over main:sub ratios from 1:7 to 7:1.

The VM runs on while its shares are changed from one ratio to the next (`dcres.bench.ratios`); at
each it is checkpointed stopped. Every host's disk is as slow as in `dcres.bench.figure7`, so the
host that holds most decides: an even split should be fastest, 1:7 and 7:1 should take 1.75 times
as long.
"""

from __future__ import annotations

from dcres.bench import ratios
from dcres.bench.result import Aim, Bench, Direction, Row, Setup
from dcres.bench.split import checkpoint_details

ROUNDS, QUICK_ROUNDS = 4, 1
_CHECKPOINT = "checkpoint"


def measure(setup: Setup) -> list[Row]:
    """Every round's rows."""
    rounds = QUICK_ROUNDS if setup.quick else ROUNDS
    memory = ratios.memory_mib(setup)
    rows: list[Row] = []
    with ratios.filled(setup, "figure9") as (hosts, vm):
        hosts.limit(ratios.DISK_MB_PER_S)
        for at in range(rounds):
            rows += hosts.rates(at)
            for parts in ratios.order(setup, at):
                name = ratios.name_of(parts)
                setup.say(f"round {at + 1} of {rounds}: {name.replace('_', ':')}")
                vm.resize(ratios.layout_at(parts, memory))
                saved, manifest = vm.checkpoint()
                vm.forget(manifest)
                details = checkpoint_details(saved)
                rows.append(Row(f"{_CHECKPOINT}_{name}", at, saved.seconds, "s", details))
    return rows


BENCH = Bench(
    name="figure9",
    about="checkpoints of a VM over two hosts, main:sub from 1:7 to 7:1",
    measure=measure,
    ratios=ratios.ratios(_CHECKPOINT),
    aims=(
        Aim("ratio_1_7", Direction.AT_LEAST, 1),
        Aim("ratio_7_1", Direction.AT_LEAST, 1),
    ),
    figures=(ratios.figure("Checkpoint over main:sub ratios", _CHECKPOINT, "tab:blue"),),
)
