"""Remote paging loses nothing: under storms, under kills, under strangers."""

from __future__ import annotations

import itertools
import os
import random
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from dcres.actors.host.shape import Shape, foresee
from dcres.errors import PagesLost, PagingError
from dcres.linux import files, inject
from dcres.linux.pagemap import WriteTracker
from dcres.model import wire
from dcres.model.handshake import NONCE_BYTES, ClientHandshake, Identity, Role
from dcres.model.pages import PAGE_SIZE
from dcres.model.placement import FIRST_SUB, MAIN, NOWHERE, digest, sub_code
from dcres.model.wire import Kind
from dcres.paging import settings as settings_
from dcres.paging.pager.homes import REGION_PAGES
from dcres.paging.pager.share import STEP_PAGES
from dcres.paging.pager.table import PageTable
from tests.support.paging import Rig, rig
from tests.support.speed import patience
from tests.support.wait import until

pytestmark = pytest.mark.linux

PAGES = 2048


@pytest.fixture
def paged(tmp_path: Path, writer_program: Path) -> Iterator[Rig]:
    """2048 pages, of which the main host may keep 512."""
    with rig(tmp_path, writer_program, PAGES, 512, (1024, 1024)) as made:
        yield made


def finished(paged: Rig) -> tuple[int, int]:
    """Wait for the writer's run to end: its (operations, damaged pages)."""
    answer = paged.writer.answer()
    assert answer[0] == "ops", answer
    return int(answer[1]), int(answer[3])


def test_untouched_pages_live_nowhere(paged: Rig) -> None:
    paged.writer.ask("write 1 100")
    status = paged.status()
    assert sum(status["pages"]) == 100
    for name in ("guest.ram", "outbox.ram", "sub0.ram", "sub1.ram"):
        assert os.stat(paged.ram / name).st_blocks * 512 <= 100 * PAGE_SIZE


def test_400_storms_lose_no_update(paged: Rig) -> None:
    """In lots, so that the writer writes for as long as the storms take and not much longer.

    Or more, until so much has moved that it means something.
    """
    rng = random.Random(7)
    paged.writer.ask("fill")
    before, operations = paged.status(), 0
    storms = itertools.count()

    def moved() -> dict[str, int]:
        after = paged.status()
        return {key: after[key] - before[key] for key in ("pages_out", "pages_in")}

    while (first := next(storms)) < 400 or min(moved().values()) <= 10_000:
        paged.writer.tell("run 2")
        over = time.monotonic() + 1.8
        storm(paged, rng)
        while time.monotonic() < over:
            storm(paged, rng)
            next(storms)
        written, damaged = finished(paged)
        assert damaged == 0, f"in the lot of storms from number {first} on"
        operations += written
    print(f"{operations} operations in {first} storms; {moved()}")
    assert operations > 0


def storm(paged: Rig, rng: random.Random) -> None:
    """Another limit, and some movement because of it."""
    paged.order("resize", limit_pages=rng.choice([64, 128, 512, 1024, 2048]))
    goal = paged.status()["pages_out"] + rng.randrange(1, 60)
    deadline = rng.uniform(0.02, 0.1)
    with_deadline(lambda: paged.status()["pages_out"] >= goal, deadline)


def left(paged: Rig, goal: int) -> bool:
    """Whether so many pages have left the main host."""
    return bool(paged.status()["pages_out"] >= goal)


def with_deadline(predicate: Callable[[], bool], timeout_s: float) -> None:
    """Wait until the predicate holds or the time is over; both are fine."""
    over = time.monotonic() + timeout_s
    until(lambda: predicate() or time.monotonic() > over, what="the time is over")


def test_nothing_is_frozen_while_a_sub_host_is_away(paged: Rig) -> None:
    """What it holds is not known to agree with the table; the VM is paused, so not for long."""
    paged.writer.ask("fill")
    until(lambda: paged.status()["leaving"] == 0, 30, "page-out has come to rest")
    paged.kill("sub0")
    until(lambda: paged.status()["links"]["sub0"]["state"] != "ready", 10, "the link is down")
    began = time.monotonic()
    with pytest.raises(PagingError, match="the link to sub0 is down"):
        paged.order("freeze")
    assert time.monotonic() - began < patience(5)
    assert paged.status()["state"] == "running"
    paged.order("thaw")
    paged.start_server(0)
    assert paged.order("freeze")["tick"] > 0  # it waits until the link is there again
    assert paged.status()["state"] == "frozen"
    paged.order("thaw")


@contextmanager
def stuck_half_way(folder: Path, writer_program: Path) -> Iterator[Rig]:
    """Pages are on their way to the only sub host, which has died and holds none."""
    with rig(folder, writer_program, PAGES, 2 * PAGES, (PAGES,)) as made:
        made.writer.ask("fill")
        os.kill(made.status("sub0")["pid"], signal.SIGSTOP)
        made.order("resize", limit_pages=PAGES // 2)
        until(lambda: made.status()["leaving"] > 100, 30, "pages are on their way")
        made.kill("sub0")
        yield made


def test_pages_that_no_sub_host_is_to_take_any_more_come_back(
    tmp_path: Path, writer_program: Path
) -> None:
    """Else no checkpoint could be taken, and a later first sub host would find holes."""
    with stuck_half_way(tmp_path, writer_program) as made:
        settings_.save(of_capacity(made, 0), made.folder / "pager.json")
        made.order("reload")
        made.order("resize", limit_pages=PAGES)
        until(lambda: made.status()["leaving"] == 0, 30, "they are here again")
        made.start_server(0)
        until(lambda: made.status()["links"]["sub0"]["state"] == "ready", 10, "the link is back")
        made.order("resize", limit_pages=2 * PAGES)
        until(lambda: made.status()["pages"] == [PAGES, 0], 30, "all pages are here")
        made.order("freeze")
        memory = np.frombuffer(made.memory(), np.uint64).reshape(PAGES, -1)
        assert (memory[:, 0] == np.arange(PAGES)).all()
        made.order("thaw")
        settings_.save(replace(made.pager_settings, subs=()), made.folder / "pager.json")
        made.order("reload")


def of_capacity(made: Rig, pages: int) -> settings_.PagerSettings:
    subs = tuple(replace(sub, capacity_pages=pages) for sub in made.pager_settings.subs)
    return replace(made.pager_settings, subs=subs)


def test_the_last_sub_host_stays_while_pages_are_on_their_way(
    tmp_path: Path, writer_program: Path
) -> None:
    with stuck_half_way(tmp_path, writer_program) as made:
        until(lambda: made.status()["links"]["sub0"]["state"] != "ready", 10, "the link is down")
        settings_.save(replace(made.pager_settings, subs=()), made.folder / "pager.json")
        with pytest.raises(PagingError, match="still on their way"):
            made.order("reload")
        made.start_server(0)
        until(lambda: made.status()["leaving"] == 0, 30, "page-out has come to rest")


def test_the_main_host_keeps_its_share(paged: Rig) -> None:
    paged.writer.ask("fill")
    paged.writer.ask("run 1")
    until(lambda: paged.status()["pages"][0] <= 512, 30, "page-out")
    allocated = os.stat(paged.ram / "guest.ram").st_blocks * 512
    assert allocated <= (512 + 64) * PAGE_SIZE
    # Which pages leave is for the pager to say, and with them whose home they have.
    for limit, most_wrong in ((128, REGION_PAGES), (1024, STEP_PAGES)):
        expected = foreseen(paged, limit)
        assert expected[0] <= limit
        paged.order("resize", limit_pages=limit)
        until(partial(near, paged, expected, most_wrong), 30, f"{expected} pages on the hosts")
    assert expected[0] >= 900, "they have come back"


def foreseen(paged: Rig, limit_pages: int) -> list[int]:
    """The pages of every host after another limit, by what a dry run says of it."""
    until(lambda: paged.status()["leaving"] == 0, 30, "page-out has come to rest")
    table = PageTable(paged.ram / "table", PAGES, writable=False)
    codes = [sub_code(0), sub_code(1)]
    shape = Shape(dict.fromkeys(codes, 1024), limit_pages, replaced=False)
    pages = dict(zip([MAIN, *codes], paged.status()["pages"], strict=True))
    flow = foresee(table.owners.copy(), table.ticks.copy(), table.limit_pages, shape)
    for (source, target), count in flow.items():
        pages[source] -= count
        pages[target] += count
    return list(pages.values())


def near(paged: Rig, pages: list[int], most_wrong: int) -> bool:
    """Whether they are on the hosts: on the main host but for less than one step of page-out."""
    found = paged.status()["pages"]
    wrong = [abs(one - other) for one, other in zip(found, pages, strict=True)]
    return wrong[0] <= STEP_PAGES and max(wrong) <= most_wrong


def test_a_guest_that_writes_is_served_while_its_main_host_shrinks(
    tmp_path: Path, writer_program: Path
) -> None:
    many, few = 32768, 2048
    with rig(tmp_path, writer_program, many, many, (many,)) as made:
        made.writer.ask("fill")
        begin = at = time.monotonic()
        made.order("resize", limit_pages=few)
        longest, batches = 0.0, 0
        while made.status()["pages"][0] > few + few // 16:
            made.writer.ask("write 0 16")
            longest, at = max(longest, time.monotonic() - at), time.monotonic()
            batches += 1
            busy = "the main host reaches its share although its guest is busy"
            assert at - begin < patience(60), busy
    assert batches > 3
    assert longest < (at - begin) * 2 / 3, "its longest wait is not the whole move"


def test_pages_that_are_only_read_stay_while_others_pass(paged: Rig) -> None:
    """A stock kernel tells nothing of reads, yet these are told from the others."""
    paged.writer.ask("fill")

    def brought(order: str) -> int:
        before = paged.status()["pages_in"]
        paged.writer.ask(order)
        return int(paged.status()["pages_in"]) - before

    passing = [(brought("read 1 200"), brought("time 0 10 10000")) for _ in range(40)]
    hot, others = (sum(counts) for counts in zip(*passing[20:], strict=True))
    assert others > 500
    assert hot < others / 10, "first come, first gone would bring the 200 pages again and again"


def mapped(paged: Rig) -> int:
    """How many pages are in the writer's page table."""
    pid = paged.writer.process.pid
    ((base, _, _),) = inject.mappings(pid, str(paged.ram / "guest.ram"))
    with WriteTracker(pid, base, PAGES) as tracker:
        return int(tracker.mapped(np.arange(PAGES)).sum())


def test_the_history_knows_who_is_read_though_nobody_has_to_leave(paged: Rig) -> None:
    paged.order("resize", limit_pages=2 * PAGES)
    paged.writer.ask("fill")
    table = PageTable(paged.ram / "table", PAGES, writable=False)

    def told_apart() -> bool:
        paged.writer.ask("read 1 100")
        return bool(table.ticks[:100].min() > table.ticks[100:].max())

    until(told_apart, 30, "the pages that are read are the last touched")
    assert paged.status()["pages"] == [PAGES, 0, 0]
    assert os.stat(paged.ram / "outbox.ram").st_blocks == 0


def test_nobody_is_put_on_standby_while_a_checkpoint_is_taken(paged: Rig, tmp_path: Path) -> None:
    paged.order("resize", limit_pages=2 * PAGES)
    paged.writer.ask("fill")
    until(lambda: mapped(paged) == 0, 30, "all pages are on standby")
    paged.order("track", changes=str(tmp_path / "changes"))
    paged.writer.ask(f"read 1 {PAGES}")
    paged.writer.ask("time 1 5 100000")  # half a second
    assert mapped(paged) == PAGES
    assert paged.order("scan", changes=str(tmp_path / "changes"))["written"] == 0
    paged.order("untrack")
    until(lambda: mapped(paged) < PAGES, 30, "standby again")


def test_frozen_placement_is_whole_and_agrees_everywhere(paged: Rig) -> None:
    paged.writer.ask("fill")
    paged.writer.ask("run 1")
    paged.order("quiesce")
    frozen = paged.order("freeze")
    table = PageTable(paged.ram / "table", PAGES, writable=False)
    for index in range(2):
        placed = digest(table.owners == sub_code(index))
        assert paged.status(f"sub{index}")["digest"] == placed
    assert frozen["pages_out"] > 0
    assert sum(paged.status()["pages"]) == PAGES
    memory = np.frombuffer(paged.memory(), np.uint64).reshape(PAGES, -1)
    assert (memory[:, 0] == np.arange(PAGES)).all()
    assert (memory[:, 1] == memory[:, -1]).all()
    assert set(np.unique(table.owners)) <= {MAIN, FIRST_SUB, FIRST_SUB + 1}
    paged.writer.tell("run 0.3")
    served = paged.status()["pages_in"]
    until(lambda: paged.status()["state"] == "frozen", 1, "still frozen")
    assert paged.status()["pages_in"] == served
    paged.order("thaw")
    assert finished(paged)[1] == 0


def test_a_killed_pager_is_replaced_and_nothing_is_lost(paged: Rig) -> None:
    rng = random.Random(3)
    paged.writer.ask("fill")
    paged.writer.tell("run 12")
    for _ in range(12):
        goal = paged.status()["pages_out"] + rng.randrange(1, 400)
        with_deadline(partial(left, paged, goal), 0.3)
        paged.kill("pager")
        paged.start_pager()
        assert paged.status()["adopted"]
    operations, damaged = finished(paged)
    assert (damaged, paged.status()["state"]) == (0, "running")
    assert operations > 0


def test_a_killed_memory_server_is_replaced_and_nothing_is_lost(paged: Rig) -> None:
    rng = random.Random(5)
    paged.writer.ask("fill")
    paged.writer.tell("run 10")
    for turn in range(10):
        goal = paged.status()["pages_out"] + rng.randrange(1, 400)
        with_deadline(partial(left, paged, goal), 0.3)
        paged.kill(f"sub{turn % 2}")
        paged.start_server(turn % 2)
    operations, damaged = finished(paged)
    assert (damaged, paged.status()["state"]) == (0, "running")
    assert operations > 0


def second(paged: Rig, name: str, module: str) -> tuple[int, str]:
    """Start ``pager`` or ``subN`` once more beside the one that runs: exit status and words."""
    twin = subprocess.run(
        [sys.executable, "-m", module, str(paged.folder / f"{name}.json")],
        capture_output=True,
        text=True,
        timeout=patience(10),
    )
    return twin.returncode, twin.stderr


def test_a_second_pager_ends_and_the_first_pages_on(paged: Rig) -> None:
    paged.writer.ask("fill")
    paged.writer.tell("run 1.5")
    code, words = second(paged, "pager", "dcres.paging.pager")
    assert (code, "a pager of this VM is running already" in words) == (1, True), words
    assert finished(paged)[1] == 0
    status = paged.status()
    assert (status["pid"], status["state"]) == (paged.processes["pager"].pid, "running")


def test_a_second_memory_server_ends_and_the_first_serves_on(paged: Rig) -> None:
    paged.writer.ask("fill")
    code, words = second(paged, "sub0", "dcres.paging.server")
    assert (code, "a memory server of this VM is running already" in words) == (1, True), words
    assert paged.status("sub0")["pid"] == paged.processes["sub0"].pid
    paged.writer.ask("run 0.2")


def test_without_a_pager_the_guest_waits_and_never_reads_zeros(paged: Rig) -> None:
    paged.writer.ask("fill")
    paged.kill("pager")
    paged.writer.tell("run 0.1")
    assert paged.writer.process.stdout is not None
    answered, _, _ = select.select([paged.writer.process.stdout.fileno()], [], [], 0.6)
    assert not answered, "the writer went on without a pager"
    paged.start_pager()
    assert finished(paged)[1] == 0


def test_a_page_gone_from_a_sub_host_is_reported_and_never_read_as_zeros(paged: Rig) -> None:
    paged.writer.ask("fill")
    until(lambda: paged.status()["leaving"] == 0, 30, "drained")
    paged.kill("sub0")
    store = os.open(paged.ram / "sub0.ram", os.O_RDWR)
    first = int(files.data_extents(store, PAGES)[0, 0])
    files.punch_hole(store, first * PAGE_SIZE, PAGE_SIZE)
    os.close(store)
    paged.start_server(0)
    until(lambda: paged.status()["state"] == "lost", 30, "the loss is noticed")
    assert "lacks 1 pages" in paged.status()["lost_why"]
    with pytest.raises(PagesLost):
        paged.order("quiesce")


def exchange(port: int, *frames: bytes) -> bytes:
    """Send frames one by one and return all that comes back until the server hangs up."""
    with socket.create_connection(("127.0.0.1", port), timeout=patience(10)) as sock:
        for frame in frames:
            sock.sendall(frame)
        received = b""
        while data := sock.recv(65536):
            received += data
    return received


def hello(vm: bytes, generation: int) -> bytes:
    me = Identity(vm, generation, b"x" * 32)
    return ClientHandshake(me, b"n" * 32, Role.PAGER).hello()


@pytest.mark.parametrize(
    ("who", "frames"),
    [
        ("a stranger", lambda vm: [b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"]),
        ("a wrong VM", lambda vm: [hello(b"w" * 16, 1)]),
        ("a wrong generation", lambda vm: [hello(vm, 2)]),
        ("a wrong secret", lambda vm: [hello(vm, 1), wire.frame(Kind.PROOF, 0, b"p" * 32)]),
        (
            "no proof at all",
            lambda vm: [wire.frame(Kind.PAGE_IN, 1, wire.pack_extents(np.array([[0, 1]])))],
        ),
        ("a wrong version", lambda vm: [b"DCRP\x63" + bytes(11)]),
        ("a too long frame", lambda vm: [wire.header(Kind.HELLO, 0, 1 << 30)]),
    ],
)
def test_who_does_not_belong_is_refused_and_logged(paged: Rig, who: str, frames: object) -> None:
    paged.writer.ask("fill")
    assert callable(frames)
    before = paged.status("sub0")
    received = exchange(paged.servers[0].port, *frames(bytes.fromhex(paged.vm)))
    assert len(received) <= 2 * wire.HEADER.size + NONCE_BYTES, who
    after = paged.status("sub0")
    assert after["refused"] == before["refused"] + 1
    assert "refused 127.0.0.1" in paged.log("sub0")
    assert paged.writer.ask("run 0.2")[3] == "0"


def test_fresh_memory_costs_nothing_and_reads_as_zeros(paged: Rig) -> None:
    assert paged.writer.ask("read 1 10")[3] == "0"
    table = PageTable(paged.ram / "table", PAGES, writable=False)
    assert (table.owners[10:] == NOWHERE).all()
