"""64 hosts and 1,000 VMs: ``python -m tests.simulation.large [SEED]`` prints what came of it."""

from __future__ import annotations

import sys
import time

from tests.simulation.run import Broken, Plan, Run

PLAN = Plan(
    vms=1000,
    hosts=64,
    room=50,
    operations=3,
    faults=200,
    apart_s=0.5,
    repeat="python -m tests.simulation.large {seed}",
)


def main(seed: int) -> int:
    """The exit status: 1 if something did not hold."""
    began_s, run, why = time.monotonic(), Run(seed, PLAN), ""
    try:
        run.go()
    except Broken as error:
        why = str(error)
    print(
        f"seed {seed}: {PLAN.hosts} hosts, {PLAN.vms} VMs, {run.done} operations, {run.taken} "
        f"checkpoints, {run.clock.events} events in {run.clock.now_s():.0f} s of the cluster and "
        f"{time.monotonic() - began_s:.0f} s of this machine; {why or 'all holds'}"
    )
    return 1 if why else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 1))
