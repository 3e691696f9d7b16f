"""Pages that are moved from host to host while a writer changes them: none is lost or stale."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from dcres.errors import PagingError
from dcres.model.moves import Moves, moves
from dcres.model.placement import FIRST_SUB, sub_code
from dcres.paging import moves as moves_file
from dcres.paging import settings
from dcres.paging.pager.table import PageTable
from tests.support.paging import Rig, rig
from tests.support.wait import until

pytestmark = pytest.mark.linux

PAGES = 2048
SUBS = 3


def at_rest(made: Rig, seen: list[int]) -> bool:
    """Whether nothing leaves any more, somewhere in the main host's headroom.

    Faults come in the middle of a batch, too, so where is not known; `seen` is what was there.
    """
    status = made.status()
    seen.append(status["pages"][0] if not status["leaving"] else PAGES)
    return len(seen) > 1 and seen[-1] == seen[-2] <= 512


@pytest.fixture
def paged(tmp_path: Path, writer_program: Path) -> Iterator[Rig]:
    """2048 pages, of which the main host may keep 512; every sub host has room for all others."""
    with rig(tmp_path, writer_program, PAGES, 512, (1600,) * SUBS) as made:
        made.writer.ask("fill")
        until(partial(at_rest, made, []), 30, "page-out has come to rest")
        yield made


def table(paged: Rig) -> PageTable:
    return PageTable(paged.ram / "table", PAGES, writable=False)


def everything_to(paged: Rig, sub: int) -> Moves:
    """Moves of all remote pages to one sub host, from wherever each is now."""
    found = table(paged)
    owners = found.owners.copy()
    wanted = np.where(owners >= FIRST_SUB, sub_code(sub), owners).astype(np.uint8)
    return moves(owners, wanted, found.ticks, int(found.ticks.max()))


def order(paged: Rig, rows: Moves) -> None:
    moves_file.save(Path(paged.pager_settings.moves), rows)
    paged.order("reload")


def done(paged: Rig) -> bool:
    return not paged.status()["moving"]


def test_all_pages_of_the_sub_hosts_go_to_one(paged: Rig) -> None:
    for sub in range(SUBS):
        order(paged, everything_to(paged, sub))
        until(lambda: done(paged), 30, "the moves")
        pages = paged.status()["pages"]
        assert pages[1 + sub] == sum(pages[1:]) > 1000
        # The table is right at once; those that pages left are told so in batches.
        until(partial(holds, paged, pages[1:]), 30, "the sub hosts hold as much")
    paged.order("quiesce")
    paged.order("freeze")
    memory = np.frombuffer(paged.memory(), np.uint64).reshape(PAGES, -1)
    assert (memory[:, 0] == np.arange(PAGES)).all()


def test_moves_under_a_writer_lose_no_update(paged: Rig) -> None:
    rng = random.Random(11)
    rounds = moved = 0
    before = [paged.status(f"sub{index}")["pages_out"] for index in range(SUBS)]
    while rounds < 100 or moved < 1000:
        paged.writer.tell("run 3")
        over = time.monotonic() + 2.8
        while time.monotonic() < over:
            rows = everything_to(paged, rng.randrange(SUBS))
            order(paged, rows)
            paged.order("resize", limit_pages=rng.choice([64, 256, 512, 1024]))
            moved += len(rows)
            rounds += 1
            pass_time(rng.uniform(0, 0.2))
        answer = paged.writer.answer()
        assert answer[0] == "ops"
        assert int(answer[3]) == 0, f"{answer[3]} pages are damaged after {rounds} rounds of moves"
    after = [paged.status(f"sub{index}")["pages_out"] for index in range(SUBS)]
    assert all(now > then for now, then in zip(after, before, strict=True)), "none left for a host"


@pytest.mark.parametrize("victim", ["pager", "sub0", "sub1"])
def test_kills_in_the_middle_of_moves_lose_nothing(paged: Rig, victim: str) -> None:
    rng = random.Random(victim)
    paged.writer.tell("run 8")
    over = time.monotonic() + 7
    while time.monotonic() < over:
        order(paged, everything_to(paged, rng.randrange(2)))
        paged.kill(victim)
        if victim == "pager":
            paged.start_pager()
        else:
            paged.start_server(int(victim[3:]))
    answer = paged.writer.answer()
    assert answer[0] == "ops"
    assert int(answer[3]) == 0
    subs = paged.pager_settings.subs
    page_with(paged, tuple(replace(sub, capacity_pages=0) for sub in subs[:2]) + subs[2:])
    # What is on its way there, by page-out or an earlier move, is in no sub host's row yet.
    until(lambda: paged.status()["leaving"] == 0, 30, "page-out has come to rest")
    for _ in range(2):
        order(paged, everything_to(paged, 2))
        until(lambda: done(paged), 30, "the moves")
    until(lambda: held(paged, 0) + held(paged, 1) == 0, 30, "both are empty")


def pass_time(seconds: float) -> None:
    """Let the moves go on."""
    over = time.monotonic() + seconds
    until(lambda: time.monotonic() > over)


def holds(paged: Rig, pages: list[int]) -> bool:
    return [held(paged, sub) for sub in range(SUBS)] == pages


def held(paged: Rig, sub: int) -> int:
    return int(paged.status(f"sub{sub}")["held_pages"])


def test_an_empty_sub_host_may_leave_and_come_back(paged: Rig) -> None:
    all_subs = paged.pager_settings.subs
    with pytest.raises(PagingError, match="sub0 still has pages"):
        page_with(paged, all_subs[1:])
    page_with(paged, (replace(all_subs[0], capacity_pages=0), *all_subs[1:]))
    order(paged, everything_to(paged, 2))
    until(lambda: done(paged), 30, "the moves")
    page_with(paged, all_subs[1:])
    paged.writer.ask("run 1")
    assert len(paged.status()["pages"]) == SUBS
    page_with(paged, all_subs)
    order(paged, everything_to(paged, 0))
    until(lambda: done(paged), 30, "the moves")
    assert held(paged, 0) > 1000  # by fetches that FETCHED has answered


def page_with(paged: Rig, subs: tuple[settings.SubAddress, ...]) -> None:
    changed = replace(paged.pager_settings, subs=subs)
    settings.save(changed, paged.folder / "pager.json")
    paged.order("reload")
    until(
        lambda: all(link["state"] == "ready" for link in paged.status()["links"].values()),
        5,
        "all links are ready",
    )
