"""A split-memory VM to measure: a guest full of noise over the hosts of a cluster.

What is timed is the whole order, as the caller sees it: from asking the VM's coordinator to its
answer.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcres.actors.control.coordinator import Coordinator
from dcres.actors.host.vm_folder import VmFolder
from dcres.actors.ports import Port
from dcres.actors.ray.local_cluster import LocalCluster
from dcres.bench.apart import FILL_TIMEOUT_S, await_word, coordinator, delete, folder_of, store_of
from dcres.bench.filler import filler_image
from dcres.bench.move import forget
from dcres.bench.rig import wait_for
from dcres.config import Layout
from dcres.storage.format.manifest import Manifest, dumps

MIB = 1 << 20
TIMEOUT_S = 600.0
_GUEST_MIB = 96  # what the guest's kernel keeps for itself, and a little more
_HOT_MIB = 16


def guest_spec(folder: Path, name: str, memory_mib: int) -> dict[str, Any]:
    """A VM file's values without its layout.

    The guest fills what its kernel lets it have, so that all but a few percent of memory is
    touched. (With huge pages the kernel would keep 5 % free.) In the end it writes a megabyte a
    second, and says so: it shows that it lives.
    """
    image = filler_image(folder)
    fill = memory_mib - _GUEST_MIB - memory_mib // 64
    return {
        "name": name,
        "memory": f"{memory_mib}MiB",
        "kernel": str(image.kernel),
        "initrd": str(image.initrd),
        "append": "console=ttyS0 quiet panic=-1 transparent_hugepage=never "
        f"fill={fill} dirty=1 span={_HOT_MIB}",
        "accel": "tcg",
    }


@dataclass(frozen=True, slots=True)
class Timed:
    """How long an order took, and its answer."""

    seconds: float
    facts: dict[str, Any]


def layout_of(*shares_mib: int) -> Layout:
    """The main host's share first."""
    main, *subs = (share * MIB for share in shares_mib)
    return Layout(main=main, subs=tuple(subs))


class SplitVm:
    """The VM `name` on the first hosts of `cluster`; it ends with `held`."""

    def __init__(self, held: ExitStack, cluster: LocalCluster, spec: dict[str, Any]) -> None:
        self._cluster = cluster
        self._spec = spec
        self.port: Port = held.enter_context(coordinator(str(spec["name"])))

    def start(self, layout: Layout, extra_args: Sequence[str] = ()) -> float:
        """Seconds until it runs, or with ``-incoming`` among `extra_args` until it could."""
        spec = {**self._spec, "layout": layout.model_dump(), "extra_args": list(extra_args)}
        began = time.monotonic()
        self.port.within(TIMEOUT_S).call(Coordinator.start, spec, self._hosts(layout))
        return time.monotonic() - began

    def _hosts(self, layout: Layout) -> list[str]:
        return list(self._cluster.hosts[: len(layout.shares)])

    @property
    def main_host(self) -> str:
        """Where QEMU runs."""
        return self._cluster.hosts[0]

    def await_filled(self) -> None:
        """Wait until memory is full, and until no host holds more than its share."""
        self.await_life()
        self.await_rest()

    def await_life(self) -> None:
        """Wait until the guest has said something, in this life of it."""
        settings = self._cluster.settings(self.main_host)
        await_word(VmFolder.of(settings, str(self._spec["name"])).run / "console.log", "WROTE")

    def await_rest(self) -> None:
        """Wait until no page is on its way out."""

        def rests() -> bool:
            main = self.port.call(Coordinator.status)["hosts"][0]
            return bool(main["leaving"] == 0 and main["pages"][0] <= main["limit_pages"])

        wait_for(rests, FILL_TIMEOUT_S, "the main host is within its share")

    def resize(self, layout: Layout) -> None:
        """Other shares on the same hosts; done when nothing moves any more."""
        self.port.within(TIMEOUT_S).call(Coordinator.resize, layout.main, list(layout.subs))
        self.await_rest()

    def checkpoint(self) -> tuple[Timed, Manifest]:
        """A checkpoint of the stopped VM, which runs again."""
        began = time.monotonic()
        facts = self.port.within(TIMEOUT_S).call(Coordinator.checkpoint, "stop", full=True)
        timed = Timed(time.monotonic() - began, facts)
        return timed, store_of(self._cluster, self.main_host).get(facts["checkpoint"])

    def stop(self) -> None:
        """End it."""
        self.port.within(TIMEOUT_S).call(Coordinator.stop)

    def restore(self, manifest: Manifest, layout: Layout) -> Timed:
        """Bring it back on the hosts that saved it, from disk; it has shown that it lives."""
        for part in manifest.hosts:
            forget(folder_of(self._cluster, manifest, part.host) / part.memory_file)
        text = dumps(manifest)
        began = time.monotonic()
        facts = self.port.within(TIMEOUT_S).call(
            Coordinator.restore, text, layout, self._hosts(layout)
        )
        timed = Timed(time.monotonic() - began, facts)
        self.await_life()
        return timed

    def forget(self, manifest: Manifest) -> None:
        """Delete a checkpoint on all hosts."""
        delete(self._cluster, manifest)


def checkpoint_details(timed: Timed) -> dict[str, Any]:
    """What the page may want to know of a checkpoint."""
    facts = timed.facts
    return {
        "pages": [each["pages"] for each in facts["hosts"]],
        "bytes_written": [each["bytes_written"] for each in facts["hosts"]],
        "host_seconds": [each["seconds"] for each in facts["hosts"]],
        "downtime_seconds": facts["downtime_seconds"],
        "downtime_parts_seconds": facts["downtime_parts_seconds"],
    }


def restore_details(timed: Timed) -> dict[str, Any]:
    """What the page may want to know of a restore."""
    facts = timed.facts
    return {
        "pages": [each["pages"] for each in facts["layout"]],
        "parts_seconds": facts["parts_seconds"],
        "pages_moved": facts["pages_moved"],
    }
