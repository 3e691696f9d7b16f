"""Increments: what they cost beside what changed, and beside a full checkpoint of the same VM.

A real guest over a main host (three quarters) and a sub host fills its memory. One writes to pages
at random in half of it, so that about 1 % or 10 % of them change between two checkpoints; each
round takes an increment of either and a full checkpoint. A chain of 30 is then restored beside a
full checkpoint of the same memory. What the guest gets done with an increment every 5 s is
counted beside what it does without any: it reads so many pages for each that it writes that about
10 MB/s change, as fast as it can. The tables of an increment of a VM of 1 TiB are written for
made-up pages, by the code that writes all others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dcres.actors.control.coordinator import Coordinator
from dcres.actors.ray import gateway
from dcres.actors.ray.coordinator import RayCoordinator
from dcres.actors.ray.fleet import coordinator_name
from dcres.actors.ray.local_cluster import LocalCluster
from dcres.bench.live import connected, spec_of
from dcres.bench.result import Aim, Bench, Direction, Figure, Ratio, Row, Setup
from dcres.bench.rig import wait_for
from dcres.model.pages import PAGE_SIZE
from dcres.storage import layout
from dcres.storage.format import tables
from dcres.storage.format.main_tables import MainTables, write_changes
from dcres.storage.format.manifest import dumps
from dcres.storage.store.store import Store

_TIMEOUT_S = 600.0
_EVERY_S = 5.0
_FEW_READS = 150  # for each page that the guest writes: about 10 MB/s change
_UNPACED = 100_000  # MB/s that no guest reaches
_TIB_PAGES = (1 << 40) // PAGE_SIZE
_STAMP = "vm-20260101-000000-{:04x}"


def measure(setup: Setup) -> list[Row]:
    """Every round's rows."""
    memory_mib, rounds, chain = (512, 2, 8) if setup.quick else (4096, 5, 30)
    rows: list[Row] = []
    room = memory_mib << 20
    with connected(LocalCluster.start(setup.folder / "c", 2, memory_per_host=room)) as cluster:
        for percent in (1, 10):
            setup.say(f"a guest of {memory_mib} MiB of which {percent} % change")
            with _Subject(cluster, setup.folder, memory_mib, percent) as vm:
                rows += [row for at in range(rounds) for row in vm.round(at, percent)]
                if percent == 1:
                    setup.say(f"a chain of {chain}, and a full checkpoint, restored")
                    rows += vm.restores(rounds, chain)
        setup.say(f"a guest with an increment every {_EVERY_S:g} s")
        with _Subject(cluster, setup.folder, memory_mib, 0, reads=_FEW_READS) as vm:
            rows += [
                row for at in range(rounds) for row in vm.throughput(at, 2 if setup.quick else 4)
            ]
    setup.say("the tables of an increment of 1 TiB")
    rows += _table_rows(setup.folder, _TIB_PAGES // (64 if setup.quick else 1))
    return rows


class _Subject:
    """One VM that runs, and its coordinator."""

    def __init__(
        self, cluster: LocalCluster, folder: Path, memory_mib: int, percent: int, reads: int = 0
    ) -> None:
        self._store = Store(cluster.settings(cluster.hosts[0]).store)
        self._pause_s = 4.0
        quarter = memory_mib // 4
        rate = max(1, round(memory_mib * percent / 100 / self._pause_s)) if percent else _UNPACED
        shares = {"main": f"{3 * quarter}MiB", "subs": [f"{quarter}MiB"]}
        spec = spec_of(folder, memory_mib, rate, reads, layout=shares, name=f"incr-{percent}")
        self._vm = str(spec["name"])
        self._port = gateway.spawn(RayCoordinator, coordinator_name(self._vm), (self._vm,))
        self._port.wait_ready(60.0)
        status = self._port.within(_TIMEOUT_S).call(Coordinator.start, spec)
        self._console = Path(status["hosts"][0]["console"])
        wait_for(lambda: "WROTE" in self._text(), _TIMEOUT_S, "the guest writes")

    def __enter__(self) -> _Subject:
        return self

    def __exit__(self, *_: object) -> None:
        self._port.within(_TIMEOUT_S).call(Coordinator.stop)
        gateway.kill(coordinator_name(self._vm))
        for listed in self._store.list(self._vm):
            self._store.delete(listed.checkpoint)

    def _text(self) -> str:
        return self._console.read_text(errors="replace")

    def _written(self) -> int:
        lines = [line for line in self._text().split("\n")[:-1] if line.startswith("WROTE ")]
        return int(lines[-1].split()[1]) if lines else 0

    def _take(self, *, full: bool) -> dict[str, Any]:
        call = self._port.within(_TIMEOUT_S).call
        return call(Coordinator.checkpoint, "live", full=full)

    def round(self, at: int, percent: int) -> Iterator[Row]:
        """A full checkpoint, and an increment upon it after a while."""
        full = self._take(full=True)
        time.sleep(self._pause_s)
        upon = self._take(full=False)
        seen = {"pages_changed": upon["pages_changed"], "pages": upon["pages"]}
        dirty = upon["pages_changed"] * PAGE_SIZE
        written = self._own_bytes(str(upon["checkpoint"]))
        yield Row(f"full_{percent}pct", at, full["seconds"], "s")
        yield Row(f"increment_{percent}pct", at, upon["seconds"], "s", seen)
        yield Row(f"downtime_full_{percent}pct", at, full["downtime_seconds"], "s")
        yield Row(f"downtime_{percent}pct", at, upon["downtime_seconds"], "s")
        yield Row(f"changed_{percent}pct", at, dirty / 1e6, "MB", seen)
        yield Row(f"written_{percent}pct", at, written / 1e6, "MB")
        self._store.delete(str(full["checkpoint"]))
        self._store.delete(str(upon["checkpoint"]))

    def _own_bytes(self, checkpoint: str) -> int:
        """What its memory files and tables take that no other checkpoint has."""
        files = (self._store.root / self._vm / checkpoint).glob("*/*.*")
        stamp = layout.by_origin(checkpoint, "")
        return sum(path.stat().st_size for path in files if path.name.startswith(stamp))

    def restores(self, rounds: int, chain: int) -> Iterator[Row]:
        """The last of a chain, and a full checkpoint, in turns; the VM runs in the end."""
        taken = [self._take(full=number == 0)["checkpoint"] for number in range(chain)]
        full = self._take(full=True)["checkpoint"]
        for at in range(rounds):
            for what, checkpoint in (("chain", str(taken[-1])), ("full", str(full))):
                self._port.within(_TIMEOUT_S).call(Coordinator.stop)
                text = dumps(self._store.get(checkpoint))
                facts = self._port.within(_TIMEOUT_S).call(Coordinator.restore, text)
                seconds = facts["seconds"] - facts["parts_seconds"]["reserve"]
                yield Row(f"restore_{what}", at, seconds, "s")
        for name in (*taken, full):
            self._store.delete(str(name))

    def throughput(self, at: int, checkpoints: int) -> Iterator[Row]:
        """Pages that the guest writes in a second, without checkpoints and with them."""
        seconds = checkpoints * _EVERY_S
        yield Row("work_alone", at, self._speed(lambda: time.sleep(seconds)), "pages/s")
        last = self._take(full=True)
        changed = 0

        def every() -> None:
            nonlocal last, changed
            for _ in range(checkpoints):
                began = time.monotonic()
                before, last = last, self._take(full=False)
                changed += last["pages_changed"]
                self._store.delete(str(before["checkpoint"]))
                time.sleep(max(0.0, _EVERY_S - (time.monotonic() - began)))

        speed = self._speed(every)
        dirtied = changed * PAGE_SIZE / 1e6 / seconds
        yield Row("work_every_5s", at, speed, "pages/s", {"dirtied_mb_per_s": round(dirtied, 2)})
        self._store.delete(str(last["checkpoint"]))

    def _speed(self, what: Callable[[], object]) -> float:
        began, first = time.monotonic(), self._written()
        what()
        ended, last = time.monotonic(), self._written()
        return (last - first) / (ended - began)


def _table_rows(folder: Path, pages: int) -> Iterator[Row]:
    """Tables of an increment with 1 % of the pages written and five times as many touched."""
    rng = np.random.default_rng(1)
    place = folder / "tables"
    place.mkdir(mode=0o700)
    written = np.flatnonzero(rng.random(pages) < 0.01)
    hosts = ("h0", "h1", "h2", "h3")
    before = np.repeat(rng.integers(0, 4, pages // 512, dtype=np.uint8), 512)
    base = MainTables(before, hosts, np.full(pages, 7, dtype=np.uint32))
    placement, history = before.copy(), base.history.copy()
    placement[written] = 0  # the guest wrote them, so they are on the main host
    history[rng.integers(0, pages, written.size * 5)] = 900
    now = MainTables(placement, hosts, history)
    files = write_changes(place, _STAMP.format(2), now, 1000, written.size, base)
    sums = rng.integers(0, 1 << 63, written.size, dtype=np.uint64)
    rows = tables.SegmentRows(written, np.arange(written.size, dtype=np.uint32), sums)
    segment = tables.write_segment(place / layout.by_origin(_STAMP.format(2), "s"), rows, pages)
    gone = sum(int((before[written] == index).sum()) for index in (1, 2, 3)) * 20
    bytes_ = sum(file.length_bytes for file in (*files, segment)) + gone
    seen = {"pages": pages, "pages_saved": int(written.size)}
    yield Row("metadata", 0, bytes_, "bytes", seen)
    yield Row("pages_saved", 0, float(written.size), "pages")


BENCH = Bench(
    name="incremental",
    about="increments beside what changed, and beside full checkpoints",
    measure=measure,
    ratios={
        "bytes_over_dirty_1pct": Ratio("written_1pct", "changed_1pct"),
        "bytes_over_dirty_10pct": Ratio("written_10pct", "changed_10pct"),
        "metadata_bytes_per_page_1TiB": Ratio("metadata", "pages_saved"),
        "seconds_1pct_over_full": Ratio("increment_1pct", "full_1pct"),
        "downtime_over_full": Ratio("downtime_1pct", "downtime_full_1pct"),
        "restore_chain30_over_full": Ratio("restore_chain", "restore_full"),
        "guest_throughput_every_5s": Ratio("work_every_5s", "work_alone"),
    },
    aims=(
        Aim("bytes_over_dirty_1pct", Direction.AT_MOST, 1.05),
        Aim("bytes_over_dirty_10pct", Direction.AT_MOST, 1.05),
        Aim("metadata_bytes_per_page_1TiB", Direction.AT_MOST, 64.0),
        Aim("seconds_1pct_over_full", Direction.AT_MOST, 0.1),
        Aim("downtime_over_full", Direction.AT_MOST, 1.0),
        Aim("restore_chain30_over_full", Direction.AT_MOST, 1.15),
        Aim("guest_throughput_every_5s", Direction.AT_LEAST, 0.95),
    ),
    figures=(
        Figure("checkpoint", "s", ("full_1pct", "increment_1pct", "full_10pct", "increment_10pct")),
        Figure("the VM is paused", "s", ("downtime_full_1pct", "downtime_1pct"), "tab:orange"),
        Figure("restore", "s", ("restore_full", "restore_chain"), "tab:green"),
    ),
)
