"""Who should leave the main host: the pager's policy on recorded accesses, with FIFO and Belady.

Two traces are recorded in each round (`dcres/bench/recorder.py`), then replayed for main hosts
of an eighth, a quarter and half of all memory (`dcres/bench/replay.py`):

* ``witness``: a real guest whose witness goes round through its files, checks and rewrites them.
  Whoever walks in a circle through more than there is room for is the worst case of every policy
  that does not know the future;
* ``skewed``: a native program that touches few pages often and many seldom, as a cache does.

A hit rate is the part of the recorded accesses that would find their page on the main host. The
accesses that are not recorded, because they came shortly after one that was, would find it with
every policy. ``belady`` leaves out the page that is needed last: nothing can be better.

Besides, what trials cost: ``standby_run`` and ``standby_alone`` are the pager's time to put a
page on standby, among neighbours and by itself; ``standby_touch`` is what the guest's next touch
of such a page takes, and ``later_touch`` the one after it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from dcres.bench.recorder import Recorder, recording
from dcres.bench.replay import Trace, belady, hit_rate
from dcres.bench.result import Aim, Bench, Direction, Figure, Ratio, Row, Setup
from dcres.bench.rig import Writer, build_writer, wait_for
from dcres.config import Accel, VmSpec, default_home
from dcres.model.pages import pages_of
from dcres.model.policy import Fifo, SegmentedFifo
from dcres.paging.pager.watcher import STEP_PAGES
from dcres.vm import guest, process
from dcres.vm.command import VmFiles
from dcres.vm.witness import read as read_witness

PARTS = (8, 4, 2)
TRACES = ("witness", "skewed")
_TIMEOUT_S = 300.0
_GUEST_BYTES = 192 << 20
_FILL_MIB = 96
_WRITER_PAGES = 32768
_APART = 4


def measure(setup: Setup) -> list[Row]:
    """Every round's rows."""
    rows: list[Row] = []
    most = 25_000 if setup.quick else 300_000
    for at in range(1 if setup.quick else 3):
        for name, record in (("witness", _record_witness), ("skewed", _record_skewed)):
            setup.say(f"round {at + 1}: recording {name}")
            trace = record(setup.folder, most)
            setup.say(f"round {at + 1}: replaying {trace.pages.size} accesses of {name}")
            rows += _replay(name, trace, at)
        rows += _costs(setup.folder, at)
    return rows


def _replay(name: str, trace: Trace, at: int) -> Iterator[Row]:
    touched = np.unique(trace.pages).size
    seen = {"accesses": int(trace.pages.size), "pages": int(touched)}
    for part in PARTS:
        capacity = max(1, touched // part)
        ours = SegmentedFifo(np.zeros(trace.page_count, dtype=np.uint32))
        for policy, rate in (
            ("ours", hit_rate(trace, ours, capacity)),
            ("fifo", hit_rate(trace, Fifo(trace.page_count), capacity)),
            ("belady", belady(trace, capacity)),
        ):
            yield Row(f"hit_rate_{policy}_{name}_1_{part}", at, rate, "", seen)


@contextmanager
def _writer(folder: Path, most: int) -> Iterator[tuple[Writer, Recorder]]:
    """The native writer, all of its memory filled, under a recorder."""
    with tempfile.TemporaryDirectory(prefix="dcres-bench-", dir="/dev/shm") as ram:
        path = Path(ram) / "ram"
        writer = Writer(build_writer(folder), path, _WRITER_PAGES)
        try:
            writer.ask("fill")
            with recording(writer.process.pid, path, _WRITER_PAGES, most) as recorder:
                yield writer, recorder
        finally:
            writer.kill()


def _record_skewed(folder: Path, most: int) -> Trace:
    with _writer(folder, most) as (writer, recorder):
        recorder.begin(_WRITER_PAGES // 64)
        while not recorder.full:
            writer.ask("skewed 10000")
        return recorder.trace()


def _costs(folder: Path, at: int) -> Iterator[Row]:
    """Microseconds per page, with nobody else on the page table."""
    with _writer(folder, 0) as (writer, recorder):
        for what, apart in (("standby_run", 1), ("standby_alone", _APART)):
            pages = np.arange(0, _WRITER_PAGES, _APART) // _APART * apart
            began = time.perf_counter()
            for first in range(0, pages.size, STEP_PAGES):
                recorder.put_on_standby(pages[first : first + STEP_PAGES])
            seconds = time.perf_counter() - began
            yield Row(what, at, seconds * 1e6 / pages.size, "µs")
            touches = f"read {apart} {pages.size}"
            first_ns, later_ns = (writer.numbers(touches)["ns"] / pages.size for _ in range(2))
        yield Row("standby_touch", at, first_ns / 1000, "µs")
        yield Row("later_touch", at, later_ns / 1000, "µs")


def _record_witness(folder: Path, most: int) -> Trace:
    with _guest(folder, most) as (files, recorder):
        wait_for(lambda: read_witness(files.console).ready, _TIMEOUT_S, "the guest is ready")
        recorder.begin(pages_of(_GUEST_BYTES) // 32)
        wait_for(lambda: recorder.full, _TIMEOUT_S, "enough accesses are recorded")
        return recorder.trace()


@contextmanager
def _guest(folder: Path, most: int) -> Iterator[tuple[VmFiles, Recorder]]:
    """The demonstration's guest, smaller, under a recorder."""
    image = guest.prepare(default_home() / "guest")
    spec = VmSpec.model_validate(
        {
            "name": "recorded",
            "memory": _GUEST_BYTES,
            "kernel": str(image.kernel),
            "initrd": str(image.initrd),
            "append": f"console=ttyS0 quiet panic=-1 witness={_FILL_MIB} witness_chunk=1",
            "layout": {"main": _GUEST_BYTES},
        }
    )
    with tempfile.TemporaryDirectory(prefix="dcres-bench-", dir="/dev/shm") as ram:
        files = VmFiles(Path(ram) / "ram", folder / "q.sock", folder / "console", folder / "q.log")
        files.console.unlink(missing_ok=True)
        qemu, monitor = process.start(spec, files, Accel.TCG)
        try:
            with recording(qemu.process.pid, files.ram, pages_of(spec.memory), most) as recorder:
                monitor.cont()
                yield files, recorder
        finally:
            monitor.close()
            qemu.end(grace_s=0.1)


def _names(*policies: str) -> tuple[str, ...]:
    return tuple(
        f"hit_rate_{policy}_{trace}_1_{part}"
        for trace in TRACES
        for part in PARTS
        for policy in policies
    )


BENCH = Bench(
    name="policy",
    about="hit rates of the replacement policy on recorded accesses, with FIFO and the optimum",
    measure=measure,
    ratios={
        f"hit_rate_ours_over_{other}_{trace}_1_{part}": Ratio(
            f"hit_rate_ours_{trace}_1_{part}", f"hit_rate_{other}_{trace}_1_{part}"
        )
        for trace in TRACES
        for part in PARTS
        for other in ("fifo", "belady")
    },
    aims=tuple(
        Aim(f"hit_rate_ours_over_fifo_{trace}_1_{part}", Direction.AT_LEAST, 1.0)
        for trace in TRACES
        for part in PARTS
    ),
    figures=(
        *(
            Figure(
                f"{trace}: accesses that find their page on the main host",
                "of 1",
                tuple(name for name in _names("fifo", "ours", "belady") if f"_{trace}_" in name),
                color,
            )
            for trace, color in zip(TRACES, ("tab:blue", "tab:orange"), strict=True)
        ),
        Figure(
            "What trials cost",
            "µs",
            ("standby_run", "standby_alone", "standby_touch", "later_touch"),
            "tab:green",
        ),
    ),
)
