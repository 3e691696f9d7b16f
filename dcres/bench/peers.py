"""One host, one disk: dcres beside QEMU's own ways to save a VM, and fio as the limit.

The same guest, its memory filled with noise, in three VMs: one that dcres runs, saved as it saves
a stopped VM (``packed`` and ``sparse``); one in the installed QEMU, saved as its migration stream
into a file (``stream``); one in a QEMU of 9.1 or newer, saved with mapped-ram, multifd and
direct-io (``mapped_ram``). All write to the same disk, one after the other. fio writes and reads
as many bytes as the guest has filled, from a clock that starts when the file has its blocks. Over
the rounds each takes every place and follows every other as often, and what the one before has left
to write is written before the next begins.

Rates are the bytes of memory that were saved by the time taken, in MB/s:

* ``save``: from the order until all is durable and the caller knows it: the guest's stop and the
  VM core are included, and with dcres tables, manifest and the calls between Ray's actors;
* ``engine``: the host's share of that, from its first preparation until its part was durable;
* ``restore``: from the order until the guest runs, every page in its place: the start of a QEMU,
  the loading and the VM core. Without the time in which Ray sets memory aside and starts actors,
  for which the peers have no counterpart; ``restore_whole`` includes that.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from dcres.actors.control.coordinator import Coordinator
from dcres.actors.ports import Port
from dcres.actors.ray import gateway
from dcres.actors.ray.local_cluster import LocalCluster
from dcres.bench import fio
from dcres.bench.apart import await_word, coordinator
from dcres.bench.backport import QemuProgram, with_mapped_ram
from dcres.bench.filler import fill_mib, filler_image
from dcres.bench.qemu_vm import QemuVm, Way
from dcres.bench.result import Aim, Bench, Direction, Figure, Ratio, Row, Setup
from dcres.config import VmSpec, default_cache
from dcres.errors import UnsupportedHost
from dcres.model.formats import MemoryFormat
from dcres.model.live import DOWNTIME_S, MAX_ROUNDS
from dcres.storage.format.manifest import dumps
from dcres.storage.store.store import Store
from dcres.vm.command import QEMU

MIB = 1 << 20
_VM = "peers"
_MEMORY_MIB, _QUICK_MEMORY_MIB = 2048, 1024
_FEWEST_ROUNDS = 8
_TIMEOUT_S = 600.0

Contender = Callable[[int], list[Row]]  # saves and restores in the round of this number


def measure(setup: Setup) -> list[Row]:
    """Every round's rows."""
    fio.require()
    memory_mib = _QUICK_MEMORY_MIB if setup.quick else _MEMORY_MIB
    spec = _spec(setup.folder, memory_mib)
    rows: list[Row] = []
    with ExitStack() as held:
        shm = Path(held.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
        setup.say(f"guests of {memory_mib} MiB fill their memory")
        rivals = {way: _rival(held, setup, way, spec, shm) for way in Way}
        subject = Subject(held, setup.folder, spec)
        contenders: list[Contender] = [
            partial(subject.round, MemoryFormat.PACKED),
            partial(_fio, setup.folder, fill_mib(memory_mib) * MIB),
            partial(subject.round, MemoryFormat.SPARSE),
        ]
        for way, vm in rivals.items():
            if vm is not None:
                vm.await_filled()
                contenders.append(partial(_rival_round, way, vm))
        orders = balanced_orders(len(contenders))
        rounds = orders[:1] if setup.quick else orders * -(-_FEWEST_ROUNDS // len(orders))
        for at, order in enumerate(rounds):
            setup.say(f"round {at + 1} of {len(rounds)}")
            for each in order:
                os.sync()
                rows += contenders[each](at)
    return rows


def _spec(folder: Path, memory_mib: int) -> dict[str, Any]:
    image = filler_image(folder)
    return {
        "name": _VM,
        "memory": f"{memory_mib}MiB",
        "kernel": str(image.kernel),
        "initrd": str(image.initrd),
        "append": f"console=ttyS0 quiet panic=-1 fill={fill_mib(memory_mib)}",
        "accel": "tcg",
        "layout": {"main": f"{memory_mib}MiB"},
    }


def _rival(
    held: ExitStack, setup: Setup, way: Way, spec: dict[str, Any], shm: Path
) -> QemuVm | None:
    """A VM of the plain QEMU that knows `way`, or None where there is no such QEMU."""
    try:
        program = QemuProgram(QEMU) if way is Way.STREAM else with_mapped_ram(default_cache())
    except UnsupportedHost as error:
        setup.say(f"without {way}: {error}")
        return None
    vm = QemuVm(program, way, VmSpec.model_validate(spec), shm, setup.folder)
    held.callback(vm.end)
    return vm


class Subject:
    """The VM that dcres runs, on a cluster of one host; it has filled its memory."""

    def __init__(self, held: ExitStack, folder: Path, spec: dict[str, Any]) -> None:
        self._cluster = held.enter_context(_cluster(folder / "c", int(spec["memory"][:-3])))
        self._store = Store(self._cluster.settings(self._cluster.hosts[0]).store)
        self._port: Port = held.enter_context(coordinator(_VM))
        self._port.within(_TIMEOUT_S).call(Coordinator.start, spec)
        await_word(Path(self._port.call(Coordinator.status)["hosts"][0]["console"]), "FILLED")

    def round(self, memory_format: MemoryFormat, at: int) -> list[Row]:
        """A checkpoint and a restore from it; the checkpoint is deleted in the end."""
        order = ("stop", None, DOWNTIME_S, MAX_ROUNDS, memory_format)
        facts = self._port.within(_TIMEOUT_S).call(Coordinator.checkpoint, *order)
        self._port.call(Coordinator.stop)
        manifest = dumps(self._store.get(facts["checkpoint"]))
        restored = self._port.within(_TIMEOUT_S).call(Coordinator.restore, manifest)
        self._store.delete(facts["checkpoint"])
        (host,) = facts["hosts"]
        length = host["bytes_written"]
        parts = restored["parts_seconds"]
        return [
            _row(f"save_{memory_format}", at, length, facts["seconds"], facts["downtime_seconds"]),
            _row(f"engine_{memory_format}", at, length, host["seconds"]),
            _row(f"restore_{memory_format}", at, length, restored["seconds"] - parts["reserve"]),
            _row(f"restore_whole_{memory_format}", at, length, restored["seconds"]),
        ]


@contextmanager
def _cluster(folder: Path, memory_mib: int) -> Iterator[LocalCluster]:
    with LocalCluster.start(folder, 1, memory_per_host=memory_mib * MIB) as cluster:
        gateway.connect(cluster.address, cluster.token_path)
        try:
            yield cluster
        finally:
            gateway.disconnect()


def _row(what: str, at: int, length: int, seconds: float, downtime: float | None = None) -> Row:
    details = {"seconds": seconds, "bytes": length}
    if downtime is not None:
        details["downtime_seconds"] = downtime
    return Row(what, at, length / 1e6 / seconds, "MB/s", details)


def balanced_orders(count: int) -> list[list[int]]:
    """Orders of `count` contenders: each takes every place, and follows every other, as often.

    What was done before tells: fio wrote 2,030 MB/s after a restore and 1,630 after itself
    (medians of five), and memory that was just given back is faster to get. E. J. Williams,
    Experimental designs balanced for the estimation of residual effects of treatments (1949).
    """
    zigzag = [place // 2 + 1 if place % 2 else -(place // 2) for place in range(count)]
    orders = [[(first + step) % count for step in zigzag] for first in range(count)]
    return orders if count % 2 == 0 else orders + [order[::-1] for order in orders]


def _fio(folder: Path, length: int, at: int) -> list[Row]:
    written = fio.write(folder / "fio", length)
    read = fio.read(folder / "fio", length)
    (folder / "fio").unlink()
    return [
        Row("fio_write", at, written / 1e6, "MB/s"),
        Row("fio_read", at, read / 1e6, "MB/s"),
    ]


def _rival_round(way: Way, vm: QemuVm, at: int) -> list[Row]:
    saved, restored = vm.save(), vm.restore()
    return [
        _row(f"save_{way}", at, saved.length_bytes, saved.seconds),
        _row(f"restore_{way}", at, restored.length_bytes, restored.seconds),
    ]


_MAPPED_RAM = {
    "save_over_mapped_ram": Ratio(f"save_{MemoryFormat.PACKED}", "save_mapped_ram"),
    "restore_over_mapped_ram": Ratio(f"restore_{MemoryFormat.PACKED}", "restore_mapped_ram"),
    "restore_whole_over_mapped_ram": Ratio(
        f"restore_whole_{MemoryFormat.PACKED}", "restore_mapped_ram"
    ),
}

BENCH = Bench(
    name="peers",
    about="one host: dcres beside QEMU's stream and mapped-ram, and the disk's rate by fio",
    measure=measure,
    ratios={
        "save_packed_over_fio": Ratio("save_packed", "fio_write"),
        "save_sparse_over_fio": Ratio("save_sparse", "fio_write"),
        "engine_packed_over_fio": Ratio("engine_packed", "fio_write"),
        "engine_sparse_over_fio": Ratio("engine_sparse", "fio_write"),
        "restore_packed_over_fio": Ratio("restore_packed", "fio_read"),
        **_MAPPED_RAM,
        "save_over_qemu_stream": Ratio(f"save_{MemoryFormat.PACKED}", "save_stream"),
        "restore_over_qemu_stream": Ratio(f"restore_{MemoryFormat.PACKED}", "restore_stream"),
    },
    aims=(
        Aim("save_packed_over_fio", Direction.AT_LEAST, 0.85),
        Aim("save_sparse_over_fio", Direction.AT_LEAST, 0.8),
        Aim("save_over_mapped_ram", Direction.AT_LEAST, 1.3),
        Aim("restore_over_mapped_ram", Direction.AT_LEAST, 1.5),
    ),
    figures=(
        Figure(
            "Saving a stopped VM",
            "MB/s",
            ("fio_write", "save_packed", "save_sparse", "save_mapped_ram", "save_stream"),
        ),
        Figure(
            "Restoring it",
            "MB/s",
            (
                "fio_read",
                "restore_packed",
                "restore_sparse",
                "restore_mapped_ram",
                "restore_stream",
            ),
            color="tab:orange",
        ),
    ),
    optional=frozenset(_MAPPED_RAM),
)
