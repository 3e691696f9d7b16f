"""``dcres status`` of a VM that runs, as pictures: scripts/pictures calls this.

status.svg is what the terminal shows, placement.png is the figure.
"""

from __future__ import annotations

import sys
import time
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.text import Text

import dcres
from dcres.cli.tables import status_view
from dcres.config import default_home
from dcres.vm import guest, witness

FILL_MIB = 352
CHECKS = 40  # that the guest makes first, so that its memory is not all of the same age
TIMEOUT_S = 300.0


def main(folder: Path) -> None:
    image = guest.prepare(default_home() / "guest")
    spec = {
        "name": "box",
        "memory": "512MiB",
        "kernel": str(image.kernel),
        "initrd": str(image.initrd),
        "append": f"console=ttyS0 quiet panic=-1 witness={FILL_MIB}",
        "layout": {"main": "256MiB", "subs": ["128MiB", "128MiB"]},
    }
    folder.mkdir(parents=True, exist_ok=True)
    with dcres.local_cluster(hosts=3, memory="512MiB") as cluster:
        vm = cluster.start(spec, ["h0", "h1", "h2"], progress=False)
        await_checks(vm)
        status, placement = vm.status(over_s=2), vm.placement()
    console = Console(record=True, width=110, file=StringIO(), force_terminal=True, highlight=False)
    console.print(Text("$ dcres status box", "bold"))
    console.print(status_view(status, placement=placement))
    console.save_svg(str(folder / "status.svg"), title="dcres")
    placement.save(folder / "placement.png")


def await_checks(vm: dcres.Vm) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while witness.parse(vm.console()).checks < CHECKS:
        if time.monotonic() > deadline:
            raise SystemExit(f"the guest did not make {CHECKS} checks in {TIMEOUT_S:.0f} s")
        time.sleep(0.5)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
