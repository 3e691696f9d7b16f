"""Live checkpoints of guests that write at different rates, beside QEMU's own ways.

A real guest over a main host (three quarters) and a sub host fills its memory and then writes
to pages at random in half of it, at a given rate. Once that half is on the main host, each round
has its speed before, a live checkpoint, and its speed meanwhile. A guest that writes at a given
rate makes up for what it lost, so two others have none: ``busy`` reads a word of 64 pages at
random for every page that it writes, as fast as it can, and ``flat_out`` does nothing but write a
word of one page after the other, which dirties all its pages again within 50 ms.

QEMU's own ways save the same guest on one host, without dcres: ``migrate`` of the stopped VM to a
file, and ``savevm`` into a QCOW2 disk; the VM is stopped for all of it. What the first write to
a protected page costs is measured with the native writer.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dcres.actors.control.coordinator import Coordinator
from dcres.actors.ray import gateway
from dcres.actors.ray.coordinator import RayCoordinator
from dcres.actors.ray.fleet import coordinator_name
from dcres.actors.ray.local_cluster import LocalCluster
from dcres.bench.filler import fill_mib, filler_image
from dcres.bench.result import Aim, Bench, Direction, Figure, Ratio, Row, Setup
from dcres.bench.rig import build_writer, rig, wait_for
from dcres.config import Accel, VmSpec
from dcres.model.pages import PAGE_SIZE
from dcres.storage.store.store import Store
from dcres.vm import process
from dcres.vm.command import VmFiles
from dcres.vm.monitor import Monitor

FLAT_OUT = 100_000  # MB/s that no guest reaches
RATES, QUICK_RATES = (0, 10, 50, 200, FLAT_OUT), (0, 50, FLAT_OUT)
READS = 64  # of the busy guest, for each page that it writes
_TIMEOUT_S = 300.0
_BEFORE_S = 2.0
_AT_REST_PAGES = 64


def _name(rate: int, reads: int = 0) -> str:
    return "busy" if reads else {0: "idle", FLAT_OUT: "flat_out"}.get(rate, f"{rate}MBps")


def measure(setup: Setup) -> list[Row]:
    """Every round's rows."""
    memory_mib = 256 if setup.quick else 1024
    rounds = 2 if setup.quick else 5
    rates = QUICK_RATES if setup.quick else RATES
    rows: list[Row] = []
    room = memory_mib << 20
    with connected(LocalCluster.start(setup.folder / "c", 2, memory_per_host=room)) as cluster:
        for rate, reads in (*((rate, 0) for rate in rates), (FLAT_OUT, READS)):
            setup.say(f"a guest of {memory_mib} MiB that writes: {_name(rate, reads)}")
            rows += _Subject(cluster, setup.folder, memory_mib, rate, reads).measure(rounds)
    setup.say("QEMU's own ways, with an idle guest")
    rows += _qemu_rows(setup.folder, memory_mib, rounds)
    setup.say("the first write to a protected page")
    rows += _protected_rows(setup.folder, rounds)
    rows += [Row("second", at, 1.0, "s") for at in range(rounds)]
    return rows


@contextmanager
def connected(cluster: LocalCluster) -> Iterator[LocalCluster]:
    """The cluster, with this process as a driver of it."""
    with cluster:
        gateway.connect(cluster.address, cluster.token_path)
        try:
            yield cluster
        finally:
            gateway.disconnect()


def spec_of(
    folder: Path, memory_mib: int, rate: int, reads: int = 0, **more: object
) -> dict[str, object]:
    """The VM file of a guest that writes to half of its memory, `rate` MB/s of pages."""
    image = filler_image(folder)
    words = f"fill={fill_mib(memory_mib)} dirty={rate} span={memory_mib // 2} reads={reads}"
    return {
        "name": f"live-{_name(rate, reads).lower().replace('_', '-')}",
        "memory": f"{memory_mib}MiB",
        "kernel": str(image.kernel),
        "initrd": str(image.initrd),
        "append": f"console=ttyS0 quiet panic=-1 {words}",
        **more,
    }


class _Subject:
    """One VM that writes at one rate."""

    def __init__(
        self, cluster: LocalCluster, folder: Path, memory_mib: int, rate: int, reads: int
    ) -> None:
        self._rate, self._reads = rate, reads
        self._store = Store(cluster.settings(cluster.hosts[0]).store)
        quarter = memory_mib // 4
        layout = {"main": f"{3 * quarter}MiB", "subs": [f"{quarter}MiB"]}
        spec = spec_of(folder, memory_mib, rate, reads, layout=layout)
        self._vm = str(spec["name"])
        self._port = gateway.spawn(RayCoordinator, coordinator_name(self._vm), (self._vm,))
        self._port.wait_ready(60.0)
        status = self._port.within(_TIMEOUT_S).call(Coordinator.start, spec)
        self._console = Path(status["hosts"][0]["console"])
        last = "FILLED" if rate == 0 else "WROTE"
        wait_for(lambda: last in self._text(), _TIMEOUT_S, "the guest has filled its memory")
        wait_for(self._at_rest, _TIMEOUT_S, "what the guest writes is on the main host")

    def _at_rest(self) -> bool:
        """Whether hardly a page came in a second: before, its speed is that of page-in."""
        before = self._pages_in()
        time.sleep(1.0)
        return self._pages_in() - before < _AT_REST_PAGES

    def _pages_in(self) -> int:
        return int(self._port.call(Coordinator.status)["hosts"][0]["pages_in"])

    def _text(self) -> str:
        return self._console.read_text(errors="replace")

    def _written(self) -> int:
        lines = [line for line in self._text().split("\n")[:-1] if line.startswith("WROTE ")]
        return int(lines[-1].split()[1]) if lines else 0

    def measure(self, rounds: int) -> list[Row]:
        """All rounds; the VM is gone afterwards."""
        rows = [row for at in range(rounds) for row in self._round(at)]
        self._port.call(Coordinator.stop)
        gateway.kill(coordinator_name(self._vm))
        return rows

    def _round(self, at: int) -> list[Row]:
        before, _ = self._speed(lambda: time.sleep(_BEFORE_S))
        facts: dict[str, object] = {}

        def checkpoint() -> None:
            facts.update(
                self._port.within(_TIMEOUT_S).call(Coordinator.checkpoint, "live", full=True)
            )

        during, seconds = self._speed(checkpoint)
        self._store.delete(str(facts["checkpoint"]))
        name = _name(self._rate, self._reads)
        seen = {"rounds": facts["rounds"], "verdict": facts["verdict"]}
        downtime = float(str(facts["downtime_seconds"]))
        rows = [
            Row(f"downtime_{name}", at, downtime, "s", seen),
            Row(f"checkpoint_{name}", at, seconds, "s", seen),
        ]
        if self._rate:
            rows.append(Row(f"written_before_{name}", at, before * PAGE_SIZE / 1e6, "MB/s"))
            rows.append(Row(f"written_during_{name}", at, during * PAGE_SIZE / 1e6, "MB/s"))
        return rows

    def _speed(self, what: object) -> tuple[float, float]:
        """Pages per second that the guest writes while `what` goes on, and how long that is."""
        assert callable(what)
        began, first = time.monotonic(), self._written()
        what()
        ended, last = time.monotonic(), self._written()
        return (last - first) / (ended - began), ended - began


def _qemu_rows(folder: Path, memory_mib: int, rounds: int) -> list[Row]:
    """The same guest in a QEMU of its own, stopped and saved by QEMU itself."""
    disk = folder / "savevm.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", disk, "1M"], check=True)
    layout = {"main": f"{memory_mib}MiB"}
    disks = [{"path": str(disk)}]
    spec = VmSpec.model_validate(spec_of(folder, memory_mib, 0, layout=layout, disks=disks))
    with tempfile.TemporaryDirectory(prefix="dcres-bench-", dir="/dev/shm") as ram:
        files = VmFiles(Path(ram) / "ram", folder / "q.sock", folder / "console", folder / "q.log")
        qemu, monitor = process.start(spec, files, Accel.TCG)
        try:
            monitor.cont()
            wait_for(lambda: "FILLED" in files.console.read_text(), _TIMEOUT_S, "filling")
            return [row for at in range(rounds) for row in _qemu_round(monitor, folder, at)]
        finally:
            monitor.close()
            qemu.end()


def _qemu_round(monitor: Monitor, folder: Path, at: int) -> Iterator[Row]:
    stream = folder / "stream"
    capability = {"capability": "x-ignore-shared", "state": False}
    monitor.execute("migrate-set-capabilities", {"capabilities": [capability]})
    monitor.execute("migrate-set-parameters", {"max-bandwidth": 1 << 40})
    began = time.monotonic()
    monitor.stop()
    monitor.execute("migrate", {"uri": f"exec:cat > {stream}; sync {stream}"})
    wait_for(
        lambda: monitor.execute("query-migrate").get("status") == "completed", _TIMEOUT_S, "migrate"
    )
    monitor.cont()
    yield Row("downtime_qemu_migrate", at, time.monotonic() - began, "s")
    stream.unlink()
    began = time.monotonic()
    said = monitor.execute(
        "human-monitor-command", {"command-line": "savevm bench"}, timeout_s=_TIMEOUT_S
    )
    if said:
        raise RuntimeError(f"savevm: {said}")
    yield Row("downtime_qemu_savevm", at, time.monotonic() - began, "s")
    monitor.execute("human-monitor-command", {"command-line": "delvm bench"}, timeout_s=60.0)


def _protected_rows(folder: Path, rounds: int) -> Iterator[Row]:
    """Writes to pages that were just protected, and the same writes once more."""
    pages = 65536
    with rig(build_writer(folder), pages, pages, ()) as writer:
        writer.writer.ask("fill")
        for at in range(rounds):
            writer.order("track", changes=str(folder / "changes"))
            first = writer.writer.numbers(f"write 1 {pages}")["ns"] / pages
            again = writer.writer.numbers(f"write 1 {pages}")["ns"] / pages
            yield Row("first_write", at, first / 1000, "µs")
            yield Row("later_write", at, again / 1000, "µs")


NAMES = (*map(_name, RATES), _name(FLAT_OUT, READS))


BENCH = Bench(
    name="live",
    about="live checkpoints of guests that write, beside QEMU's migrate and savevm",
    measure=measure,
    ratios={
        "guest_throughput_during": Ratio("written_during_busy", "written_before_busy"),
        "guest_throughput_during_flat_out": Ratio(
            "written_during_flat_out", "written_before_flat_out"
        ),
        "guest_throughput_during_50MBps": Ratio("written_during_50MBps", "written_before_50MBps"),
        "downtime_idle_seconds": Ratio("downtime_idle", "second"),
        "downtime_50MBps_seconds": Ratio("downtime_50MBps", "second"),
        "downtime_over_qemu_migrate": Ratio("downtime_idle", "downtime_qemu_migrate"),
        "downtime_over_qemu_savevm": Ratio("downtime_idle", "downtime_qemu_savevm"),
    },
    aims=(
        Aim("downtime_idle_seconds", Direction.AT_MOST, 0.1),
        Aim("downtime_50MBps_seconds", Direction.AT_MOST, 0.2),
        Aim("guest_throughput_during", Direction.AT_LEAST, 0.9),
        Aim("guest_throughput_during_flat_out", Direction.AT_LEAST, 0.9),
        Aim("first_write", Direction.AT_MOST, 2.0, "µs"),
    ),
    figures=(
        Figure("downtime", "s", tuple(f"downtime_{name}" for name in NAMES)),
        Figure(
            "QEMU's own ways", "s", ("downtime_qemu_migrate", "downtime_qemu_savevm"), "tab:orange"
        ),
        Figure(
            "the guest writes",
            "MB/s",
            tuple(f"written_{when}_{name}" for name in NAMES[1:] for when in ("before", "during")),
            "tab:green",
        ),
    ),
)
