"""What a main host says of other shares, from its files: it changes none of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dcres.actors.host.agent import HostAgent
from dcres.actors.host.page_moves import PageMoves
from dcres.actors.host.roles import MainRole
from dcres.actors.host.shape import kept_pages
from dcres.actors.host.state import write_json
from dcres.actors.host.vm_folder import VmFolder
from dcres.actors.messages import ChangeId, PageFlow, Role
from dcres.config import HostSettings
from dcres.errors import NoRoom, VmLost
from dcres.linux.process import ProcessId
from dcres.model.pages import PAGE_SIZE
from dcres.model.placement import MAIN, NOWHERE, sub_code
from dcres.paging.pager.table import PageTable
from dcres.vm.command import VmFiles
from dcres.vm.process import QemuProcess

PAGES = 1024
SPEC = {"name": "vm", "memory": PAGES * PAGE_SIZE, "kernel": "/k", "layout": {"main": "4MiB"}}


@pytest.fixture
def settings(tmp_path: Path) -> HostSettings:
    run, ram, store = (tmp_path / name for name in ("run", "ram", "store"))
    return HostSettings(name="h0", run=run, ram=ram, store=store)


def main_host(
    settings: HostSettings, owners: list[int], *subs: str, alive: bool = True
) -> PageMoves:
    """One whose QEMU is this process, with pages in the RAM file where `owners` has MAIN."""
    folder = VmFolder.of(settings, "vm")
    folder.make()
    ram = folder.ram / "guest.ram"
    with ram.open("wb") as file:
        file.truncate(PAGES * PAGE_SIZE)
        for page in np.flatnonzero(np.array(owners) == MAIN).tolist():
            os.pwrite(file.fileno(), b"x", page * PAGE_SIZE)
    table = np.array(owners if subs else [NOWHERE] * PAGES, dtype=np.uint8)
    PageTable.create(folder.ram / "table", table, PAGES)
    us = ProcessId.of(os.getpid())
    assert us is not None
    process = us if alive else ProcessId(us.pid, us.start_time + 1)
    qemu = QemuProcess(process, VmFiles(ram, ram, ram, folder.run / "qemu.log"))
    codes = [sub_code(index) for index in range(len(subs))]
    state: dict[str, Any] = {"generation": 1, "spec": SPEC, "hosts": ["h0", *subs], "codes": codes}
    write_json(folder.state, {**state, "qemu": qemu.to_dict()})
    main = HostAgent("vm", Role.MAIN, environ=settings.environ()).composed
    assert isinstance(main, MainRole)
    return main.paging


def files(settings: HostSettings) -> dict[Path, bytes]:
    places = (settings.run, settings.ram)
    return {path: path.read_bytes() for top in places for path in top.rglob("*") if path.is_file()}


def test_pages_of_a_host_that_leaves_go_to_those_that_stay_and_join(settings: HostSettings) -> None:
    host = main_host(settings, [MAIN] * 624 + [sub_code(0)] * 300 + [sub_code(1)] * 100, "h1", "h2")
    before = files(settings)
    limit = 624 - 64  # it is kept below that, so it has no room
    moves = host.plan_moves({"h1": 0, "h2": 200, "h3": 512}, PAGES, replaced=True)
    assert {each.source for each in moves} == {"h1"}
    assert sum(each.pages for each in moves) == 300
    assert {each.target for each in moves} <= {"h0", "h2", "h3"}
    moves = host.plan_moves({"h1": 512, "h2": 512}, limit, replaced=False)
    assert {each.source for each in moves} == {"h0"}
    assert sum(each.pages for each in moves) == 624 - kept_pages(limit)
    with pytest.raises(NoRoom, match="1 MiB more"):
        host.plan_moves({"h1": 0, "h2": 10}, PAGES, replaced=True)
    assert files(settings) == before


def test_without_sub_hosts_the_ram_file_says_what_is_here(settings: HostSettings) -> None:
    host = main_host(settings, [MAIN] * 600 + [NOWHERE] * 424)
    moves = host.plan_moves({"h1": 1024}, 512, replaced=True)
    assert moves == (PageFlow("h0", "h1", 600 - kept_pages(512)),)


def test_nothing_is_planned_or_begun_without_qemu(settings: HostSettings) -> None:
    host = main_host(settings, [MAIN] * PAGES, alive=False)
    before = files(settings)
    with pytest.raises(VmLost, match="QEMU of VM vm has ended"):
        host.plan_moves({"h1": 1024}, 512, replaced=True)
    with pytest.raises(VmLost, match="QEMU of VM vm has ended"):
        host.begin_reshape(ChangeId(1, 1))
    assert files(settings) == before
