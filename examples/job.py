"""Keeps a VM going as a Ray job: brings it up, then checkpoints it at regular intervals.

    ray job submit --address http://HEAD:8265 --working-dir examples -- python job.py vm.yaml

A VM that runs is taken as it is. Otherwise its newest checkpoint is restored, on whatever hosts
have room; without one it is booted. The VM outlives the job.
"""

import argparse
import time
from pathlib import Path

import yaml

import dcres


def brought_up(cluster: dcres.Cluster, file: Path) -> dcres.Vm:
    """The VM of a VM file: running already, restored, or booted."""
    name = yaml.safe_load(file.read_text())["name"]
    for vm in cluster.vms():
        if vm.name == name and vm.status().phase == "running":
            return vm
    saved = cluster.checkpoints(name)
    return saved[-1].restore(lazy=True) if saved else cluster.start(file)


def main() -> None:
    """Bring the VM up, then take and print checkpoints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="the VM file")
    parser.add_argument("--every", type=float, default=600.0, help="seconds between checkpoints")
    parser.add_argument("--times", type=int, default=6, help="how many to take")
    parser.add_argument("--keep", type=int, default=2, help="how many to keep")
    given = parser.parse_args()
    with dcres.connect() as cluster:
        vm = brought_up(cluster, given.file)
        print(vm.wait_until_whole(), flush=True)
        for _ in range(given.times):
            time.sleep(given.every)
            print(vm.checkpoint(), flush=True)
            for old in vm.checkpoints()[: -given.keep]:
                old.delete()


if __name__ == "__main__":
    main()
