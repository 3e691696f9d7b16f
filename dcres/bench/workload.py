"""What a guest gets done with half and a quarter of its memory here, and otherwise.

Two guests of stock QEMU (TCG) and Linux that do the same, one at a time while the other stands
still. Nearly all of their memory is records of a page each; `worker.c` reads them as YCSB's
workload B does (Zipfian, one in twenty updated), with a scan of them all in between, adds up
every word and stops at the first that is wrong. Work is records a second.

* *local*: no pager, no limit.
* *half remote*, *quarter remote*: dcres over loopback; the main host may keep half and a quarter
  of the guest's memory (so a quarter means that three quarters are remote).
* *half swapped*: the local guest again, in a memory cgroup with half of its memory and what QEMU
  has for itself, and a swap file on the disk.

A change of what fits happens while the guest is paused, and a while passes before its work is
counted, so that whatever chooses pages has learned something.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from dcres.bench.filler import fill_mib
from dcres.bench.result import Aim, Direction, Figure, Ratio, Row, Setup
from dcres.bench.rig import Paged, build, wait_for
from dcres.bench.squeeze import MemoryCgroup, SwapFile, memory_cgroup, swap_file
from dcres.config import Accel, VmSpec, default_home
from dcres.errors import VmError
from dcres.model.pages import PAGES_PER_MIB
from dcres.vm import guest, process
from dcres.vm.command import VmFiles
from dcres.vm.monitor import Monitor

RATIOS = {
    "half_remote_over_local": Ratio("work_half_remote", "work_local"),
    "quarter_here_over_local": Ratio("work_quarter_here", "work_local"),
    "half_remote_over_cgroup_swap": Ratio("work_half_remote", "work_half_swapped"),
}
AIMS = (Aim("half_remote_over_cgroup_swap", Direction.AT_LEAST, 1.0),)
FIGURE = Figure(
    "What a guest gets done",
    "records/s",
    ("work_local", "work_half_remote", "work_quarter_here", "work_half_swapped"),
    color="tab:green",
)
_SOURCE = Path(__file__).with_name("worker.c")
_MIB = 1 << 20
_BOOKKEEPING_BYTES = 8 * _MIB  # page tables and the like, which version 2 counts
_TIMEOUT_S = 120.0
_AT_REST_S = 0.1


@dataclass(frozen=True, slots=True)
class Guest:
    """One of the two guests; it is paused but while it is `measured`."""

    qemu: process.QemuProcess
    monitor: Monitor
    console: Path

    def worked(self) -> int:
        """Records until now. Raises VmError when the guest has stopped working."""
        text = self.console.read_text(errors="replace")
        if "WRONG" in text:
            raise VmError(f"the guest found a wrong record: {text.strip()[-200:]}")
        if "panic" in text:
            raise VmError(f"the guest's kernel gave up: {text[text.index('panic') - 100 :][:400]}")
        lines = [line for line in text.split("\n")[:-1] if line.startswith("WORKED ")]
        return int(lines[-1].split()[1]) if lines else 0

    def ready(self) -> None:
        """Let it fill its memory, and then pause it."""
        self.monitor.cont()
        wait_for(lambda: self.worked() > 0, _TIMEOUT_S, "the guest has filled its memory")
        self.monitor.stop()

    def measured(self, warm_s: float, seconds: float) -> float:
        """Records a second in the `seconds` after the first `warm_s`."""
        self.monitor.cont()
        time.sleep(warm_s)
        first, began = self._next()
        time.sleep(seconds)
        last, ended = self._next()
        self.monitor.stop()
        return (last - first) / (ended - began)

    def _next(self) -> tuple[int, float]:
        """The next count that it tells, and when."""
        before = self.worked()
        wait_for(lambda: self.worked() > before, _TIMEOUT_S, "the guest works")
        return self.worked(), time.monotonic()


@contextmanager
def _booted(setup: Setup, name: str, memory_mib: int, ram: Path) -> Iterator[Guest]:
    """A guest before its first instruction; gone afterwards."""
    program = build(_SOURCE, setup.folder / "worker", "-static", "-lm")
    initrd = setup.folder / "worker.gz"
    initrd.write_bytes(guest.initramfs(program.read_bytes()))
    spec = VmSpec.model_validate(
        {
            "name": name,
            "memory": f"{memory_mib}MiB",
            "kernel": str(guest.prepare(default_home() / "guest").kernel),
            "initrd": str(initrd),
            "append": f"console=ttyS0 quiet panic=-1 data={fill_mib(memory_mib)}",
            "layout": {"main": f"{memory_mib}MiB"},
        }
    )
    folder = setup.folder / name
    files = VmFiles(ram / "guest.ram", folder / "qmp", folder / "console", folder / "log")
    qemu, monitor = process.start(spec, files, Accel.TCG)
    try:
        yield Guest(qemu, monitor, files.console)
    finally:
        monitor.close()
        qemu.end()


def measure(setup: Setup, rounds: int) -> list[Row]:
    """Every round's rows. Raises UnsupportedHost without memory cgroups or swap."""
    memory_mib = 512 if setup.quick else 1024
    warm_s, seconds = (1.0, 2.5) if setup.quick else (5.0, 15.0)
    pages = memory_mib * PAGES_PER_MIB
    with ExitStack() as stack:
        local = stack.enter_context(_local(setup, memory_mib))
        remote = stack.enter_context(_remote(setup, memory_mib))
        rows: list[Row] = []
        for at in range(rounds):
            setup.say(f"round {at + 1}: a guest of {memory_mib} MiB at work")
            for what, place, share in (
                ("work_local", local, pages),
                ("work_half_remote", remote, pages // 2),
                ("work_half_swapped", local, pages // 2),
                ("work_quarter_here", remote, pages // 4),
            ):
                place.keep(share)
                value = place.guest.measured(warm_s, seconds)
                rows.append(Row(what, at, value, "records/s", place.seen()))
        return rows


@dataclass(frozen=True, slots=True)
class _Local:
    """The guest that has only this host."""

    guest: Guest
    cgroup: MemoryCgroup
    swap: SwapFile
    pages: int

    def keep(self, pages: int) -> None:
        """Let so much of the guest's memory be here, and QEMU's own besides."""
        self.cgroup.limit(None)
        self.swap.off()
        if pages < self.pages:
            self.swap.on()
            own_bytes = self.cgroup.private_bytes + _BOOKKEEPING_BYTES
            self.cgroup.limit(pages * 4096 + own_bytes)

    def seen(self) -> dict[str, int]:
        """What else there is to tell."""
        return {"cgroup_bytes": self.cgroup.used_bytes}


@contextmanager
def _local(setup: Setup, memory_mib: int) -> Iterator[_Local]:
    with ExitStack() as stack:
        swap = stack.enter_context(swap_file(setup.folder / "swap", memory_mib * _MIB))
        cgroup = stack.enter_context(memory_cgroup())
        ram = Path(stack.enter_context(tempfile.TemporaryDirectory("", "dcres-w-", "/dev/shm")))
        made = stack.enter_context(_booted(setup, "work-local", memory_mib, ram))
        cgroup.add(made.qemu.process.pid)
        made.ready()
        yield _Local(made, cgroup, swap, memory_mib * PAGES_PER_MIB)


@dataclass(frozen=True, slots=True)
class _Remote:
    """The guest under dcres."""

    guest: Guest
    paged: Paged

    def keep(self, pages: int) -> None:
        """Change the main host's share, and wait until all is where it belongs."""
        self.paged.order("resize", limit_pages=pages)
        moved = [-1]

        def at_rest() -> bool:
            time.sleep(_AT_REST_S)
            status = self.paged.status()
            moved.append(status["pages_in"] + status["pages_out"])
            return bool(status["leaving"] == 0 and moved[-1] == moved[-2])

        wait_for(at_rest, _TIMEOUT_S, "the main host is within its share")

    def seen(self) -> dict[str, int]:
        """Counters until now."""
        status = self.paged.status()
        names = ("pages_in", "pages_out", "faults", "taken_back")
        return {"pages_here": status["pages"][0], **{name: status[name] for name in names}}


@contextmanager
def _remote(setup: Setup, memory_mib: int) -> Iterator[_Remote]:
    with ExitStack() as stack:
        pages = memory_mib * PAGES_PER_MIB
        ram = Path(stack.enter_context(tempfile.TemporaryDirectory("", "dcres-w-", "/dev/shm")))
        run = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dcres-w-")))
        made = stack.enter_context(_booted(setup, "work-remote", memory_mib, ram))
        paged = Paged(run, ram, made.qemu.process.pid, pages)
        stack.callback(paged.close)
        paged.start(pages, (pages,))
        made.ready()
        yield _Remote(made, paged)
