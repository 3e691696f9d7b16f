"""Remote paging: how long a missing page takes, how many move, and what a guest gets done.

One main host and two sub hosts on this machine; the native writer stands for the guest. Half of
its memory fits the main host. In each round, side by side:

* the same program with all its memory local and no pager;
* a plain TCP copy over loopback, of as many bytes as half the memory;
* page-in alone (page-out held back), page-out alone, and both at once while the program walks
  through all of its memory, which is twice the share: the worst case of every LRU;
* single reads at random places, as the program sees them: from the fault to the next instruction;
* the same reads and the same walk when `handler.c` answers: what page-in costs in C alone;
* page-in alone between two network namespaces with 1 Gbit between them, and a plain TCP copy there.

Last, guests at work with half and a quarter of their memory here: see `workload.py`.
"""

from __future__ import annotations

import socket
import tempfile
import threading
import time
from pathlib import Path

from dcres.bench import workload
from dcres.bench.move import one_gbit, plain_copy
from dcres.bench.result import Aim, Bench, Direction, Figure, Ratio, Row, Setup
from dcres.bench.rig import Net, Rig, Writer, build_writer, rig, wait_for
from dcres.bench.yardstick import build_handler, paged_by_handler
from dcres.errors import PagingError
from dcres.model.around import MOST_PAGES
from dcres.model.pages import PAGE_SIZE

_PIECE_BYTES = 1 << 20
_APART = 16  # pages between the only pages that exist, where fault-around finds no neighbours
_JUMP = _APART * 389  # so that no reader would be taken for a walk
_PAUSE_US = 1000
_SETTLE_TIMEOUT_S = 60.0


def measure(setup: Setup) -> list[Row]:
    """Every round's rows."""
    pages = (64 << 20 if setup.quick else 512 << 20) // PAGE_SIZE
    rounds = 2 if setup.quick else 5
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="dcres-bench-") as folder:
        program, handler = build_writer(Path(folder)), build_handler(Path(folder))
        for at in range(rounds):
            setup.say(f"round {at + 1}: local memory and TCP over loopback")
            rows += _local(program, pages, at)
            rows.append(Row("loopback_copy", at, _loopback(pages // 2 * PAGE_SIZE), "MB/s"))
            setup.say(f"round {at + 1}: throughput and latency with half the memory remote")
            with rig(program, pages, pages // 2, (pages // 2, pages // 2)) as made:
                rows += _throughput(made, at)
                rows += _latency(made, at)
            setup.say(f"round {at + 1}: latency without neighbours")
            with rig(program, pages, pages // _APART // 4, (pages, pages)) as made:
                rows += _single(made, at)
            setup.say(f"round {at + 1}: the same with a handler in C")
            rows += _handler(program, handler, pages, at)
            setup.say(f"round {at + 1}: over 1 Gbit")
            rows += _one_gbit(program, pages // 2, at)
    return rows + workload.measure(setup, rounds)


def _handler(program: Path, handler: Path, pages: int, at: int) -> list[Row]:
    """As `_single` and `_page_in`, with as many neighbours as dcres brings on a long walk."""
    with paged_by_handler(program, handler, pages, 1) as writer:
        order = f"time {_JUMP} {pages // _APART // 2} {_PAUSE_US}"
        rows = _percentiles(writer.numbers(order), "handler_single", at, {})
    with paged_by_handler(program, handler, pages, MOST_PAGES) as writer:
        seconds = writer.numbers(f"read 1 {pages // 2}")["ns"] / 1e9
    return [*rows, Row("handler_page_in", at, _rate(pages // 2, seconds), "MB/s")]


def _one_gbit(program: Path, pages: int, at: int) -> list[Row]:
    with one_gbit() as (left, right):
        net = Net(tuple(left.prefix), tuple(right.prefix), right.address)
        with rig(program, pages, pages // 2, (pages,), net) as made:
            made.writer.ask("fill")
            row = _page_in(made, at, "page_in_1gbit")
        return [row, plain_copy(right, left, pages // 2 * PAGE_SIZE, "copy_1gbit", at)]


def _rate(pages: int, seconds: float) -> float:
    return pages * PAGE_SIZE / 1e6 / seconds


def _walk(writer: Writer, pages: int, order: str, what: str, at: int) -> Row:
    """One pass over all memory, as the program sees it: its own bytes in its own time."""
    seconds = writer.numbers(f"{order} 1 {pages}")["ns"] / 1e9
    return Row(what, at, _rate(pages, seconds), "MB/s", {"seconds": seconds})


def _local(program: Path, pages: int, at: int) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="dcres-bench-", dir="/dev/shm") as ram:
        writer = Writer(program, Path(ram) / "local.ram", pages)
        try:
            writer.ask("fill")
            return [
                _walk(writer, pages, "read", "walk_reading_local", at),
                _walk(writer, pages, "write", "walk_writing_local", at),
            ]
        finally:
            writer.kill()


def _loopback(length_bytes: int) -> float:
    """MB/s of one TCP connection over loopback, from memory to memory."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sender = threading.Thread(target=_send, args=(listener.getsockname()[1], length_bytes))
        sender.start()
        receiving, _ = listener.accept()
        with receiving:
            buffer = memoryview(bytearray(_PIECE_BYTES))
            left, started = length_bytes, time.perf_counter()
            while left:
                received = receiving.recv_into(buffer)
                if received == 0:
                    raise PagingError("the loopback connection ended early")
                left -= received
            seconds = time.perf_counter() - started
    sender.join()
    return length_bytes / 1e6 / seconds


def _send(port: int, length_bytes: int) -> None:
    piece = bytes(_PIECE_BYTES)
    with socket.create_connection(("127.0.0.1", port)) as sending:
        for start in range(0, length_bytes, _PIECE_BYTES):
            sending.sendall(piece[: length_bytes - start])


def _settle(made: Rig) -> None:
    """Wait until the main host is within its share and nothing is on the way."""

    def settled() -> bool:
        status = made.status()
        return bool(status["leaving"] == 0 and status["pages"][0] <= status["limit_pages"])

    wait_for(settled, _SETTLE_TIMEOUT_S, "the main host is within its share")


def _throughput(made: Rig, at: int) -> list[Row]:
    made.writer.ask("fill")
    _settle(made)
    return [
        _paged_walk(made, "read", "walk_reading_twice_share", at),
        _paged_walk(made, "write", "walk_writing_twice_share", at),
        _page_in(made, at),
        _page_out(made, at),
    ]


def _paged_walk(made: Rig, order: str, what: str, at: int) -> Row:
    before = made.status()
    row = _walk(made.writer, made.pages, order, what, at)
    after = made.status()
    moved = {key: after[key] - before[key] for key in ("pages_in", "pages_out", "faults")}
    return Row(what, at, row.value, row.unit, {**row.details, **moved})


def _page_in(made: Rig, at: int, what: str = "page_in") -> Row:
    """Bring the remote half while no page is sent out."""
    _settle(made)
    made.order("quiesce")
    before = made.status()
    seconds = made.writer.numbers(f"read 1 {made.pages}")["ns"] / 1e9
    after = made.status()
    pages, faults = (after[key] - before[key] for key in ("pages_in", "faults"))
    return Row(what, at, _rate(pages, seconds), "MB/s", {"pages": pages, "faults": faults})


def _page_out(made: Rig, at: int) -> Row:
    """Send out the half that is too much while the program is idle."""
    before = made.status()
    started = time.perf_counter()
    made.order("thaw")
    _settle(made)
    seconds = time.perf_counter() - started
    pages = made.status()["pages_out"] - before["pages_out"]
    return Row("page_out", at, _rate(pages, seconds), "MB/s", {"pages": pages})


def _latency(made: Rig, at: int) -> list[Row]:
    """With fault-around: apart, back to back, and back to back while pages also leave."""
    reads = made.pages // 32
    rows = []
    for what, pause_us, page_out in (
        ("page_in_apart", _PAUSE_US, False),
        ("page_in_back_to_back", 0, False),
        ("page_in_while_pages_leave", 0, True),
    ):
        _settle(made)
        if not page_out:
            made.order("quiesce")
        rows += _timed(made, f"time 0 {reads} {pause_us}", what, at)
        made.order("thaw")
    return rows


def _single(made: Rig, at: int) -> list[Row]:
    """Every sixteenth page exists, so a fault brings one page and nothing else."""
    count = made.pages // _APART
    made.writer.ask(f"write {_APART} {count}")
    _settle(made)
    made.order("quiesce")
    return _timed(made, f"time {_JUMP} {count // 2} {_PAUSE_US}", "page_in_single", at)


def _timed(made: Rig, order: str, what: str, at: int) -> list[Row]:
    took = made.writer.numbers(order)
    pager = {key: made.status()[key] for key in ("page_in_median_us", "page_in_p99_us")}
    return _percentiles(took, what, at, pager)


def _percentiles(took: dict[str, int], what: str, at: int, more: dict[str, float]) -> list[Row]:
    details = {"missed": took["missed"], **more}
    return [
        Row(f"{what}_median", at, took["median_ns"] / 1000, "µs", details),
        Row(f"{what}_p99", at, took["p99_ns"] / 1000, "µs", details),
    ]


BENCH = Bench(
    name="paging",
    about="page-in and page-out, latency and throughput, beside C; a guest's work beside swapping",
    measure=measure,
    ratios={
        "page_in_over_c_handler": Ratio("page_in_single_median", "handler_single_median"),
        "page_in_rate_over_c_handler": Ratio("page_in", "handler_page_in"),
        "page_in_over_1gbit": Ratio("page_in_1gbit", "copy_1gbit"),
        "page_in_over_link": Ratio("page_in", "loopback_copy"),
        "page_out_over_link": Ratio("page_out", "loopback_copy"),
        "walk_writing_over_local": Ratio("walk_writing_twice_share", "walk_writing_local"),
        "walk_reading_over_local": Ratio("walk_reading_twice_share", "walk_reading_local"),
        "fault_around_over_single": Ratio("page_in_apart_median", "page_in_single_median"),
        **workload.RATIOS,
    },
    aims=(
        Aim("page_in_single_median", Direction.AT_MOST, 200, "µs"),
        Aim("page_in_apart_median", Direction.AT_MOST, 200, "µs"),
        Aim("page_in_back_to_back_median", Direction.AT_MOST, 200, "µs"),
        Aim("page_in_over_c_handler", Direction.AT_MOST, 1.25),
        Aim("page_in_rate_over_c_handler", Direction.AT_LEAST, 0.75),
        Aim("page_in_over_1gbit", Direction.AT_LEAST, 0.8),
        *workload.AIMS,
    ),
    figures=(
        Figure(
            "From the fault to the next instruction",
            "µs",
            (
                "handler_single_median",
                "page_in_single_median",
                "page_in_apart_median",
                "page_in_back_to_back_median",
                "page_in_while_pages_leave_median",
            ),
        ),
        Figure(
            "Throughput over loopback",
            "MB/s",
            (
                "loopback_copy",
                "handler_page_in",
                "page_in",
                "page_in_1gbit",
                "page_out",
                "walk_reading_twice_share",
                "walk_writing_twice_share",
            ),
            color="tab:orange",
        ),
        workload.FIGURE,
    ),
)
