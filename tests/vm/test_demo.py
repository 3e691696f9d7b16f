"""The acceptance: ``dcres demo`` does the main job, and what it prints can be relied on."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from dcres.linux.process import find_marked
from dcres.model.pages import PAGE_SIZE
from tests.support.cli import Cli, ended
from tests.support.guest import guest_image
from tests.support.speed import patience
from tests.support.wait import until

pytestmark = [pytest.mark.cluster, pytest.mark.vm, pytest.mark.slow]

MEMORY = 512 << 20
_TIMEOUT_S = patience(600)  # for machines that do other things as well


def cli_with_mark(mark: str) -> Cli:
    """Whatever the command starts carries the mark; kernel and cache are the machine's own."""
    return Cli({"DCRES_TEST_DEMO": mark})


def folders_of_demos() -> set[Path]:
    return {*Path("/var/tmp").glob("dcres-*"), *Path("/dev/shm").glob("dcres-????????")}


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    """The JSON of a whole demonstration that went well."""
    guest_image()
    cli = cli_with_mark("whole")
    values = cli.json("demo", timeout_s=_TIMEOUT_S)
    assert isinstance(values, dict)
    assert not find_marked("DCRES_TEST_DEMO", "whole"), "nothing of it runs any more"
    return values


@pytest.mark.timeout(_TIMEOUT_S)
class TestDemo:
    def test_the_guest_lost_nothing(self, told: dict[str, Any]) -> None:
        guest = told["guest"]
        assert guest["failures"] == 0
        assert guest["ticks_lost"] == 0
        assert guest["checks"] >= 75
        assert told["problems"] == []
        assert told["accel"] in ("kvm", "tcg")
        assert told["memory_bytes"] == MEMORY

    def test_its_checkpoint(self, told: dict[str, Any]) -> None:
        (taken,) = told["checkpoints"]
        assert taken["pages_moved_for_checkpoint"] == 0
        assert taken["pages"] * PAGE_SIZE >= 0.6 * MEMORY, "the guest had filled its memory"
        main, *subs = taken["hosts"]
        assert main["role"] == "main"
        assert main["pages"] * PAGE_SIZE <= MEMORY / 2
        assert all(sub["role"] == "sub" and sub["pages"] > 0 for sub in subs)

    def test_its_restores(self, told: dict[str, Any]) -> None:
        (taken,) = told["checkpoints"]
        spread, single = told["restores"]
        for restored in (spread, single):
            assert (restored["vm"], restored["checkpoint"]) == ("demo", taken["checkpoint"])
            assert sum(host["pages"] for host in restored["layout"]) == taken["pages"]
        assert [host["role"] for host in spread["layout"]] == ["main", "sub", "sub"]
        assert [host["memory_bytes"] for host in single["layout"]] == [MEMORY]
        lost = {host["host"] for host in taken["hosts"][:2]}
        assert not lost & {host["host"] for host in (*spread["layout"], *single["layout"])}

    def test_its_steps(self, told: dict[str, Any]) -> None:
        steps = told["steps"]
        assert all(step["seconds"] >= 0 for step in steps)
        watched = [step for step in steps if "guest" in step]
        assert len(watched) == 5
        assert all(step["guest"]["failures"] == 0 for step in watched)
        paged = [step for step in watched if len(step["hosts"]) == 3 and step["guest"]["checks"]]
        assert all(step["pages_in_per_s"] > 0 for step in paged if step["seconds"] > 1)

    def test_the_guest_pages_before_and_after(self, told: dict[str, Any]) -> None:
        rates = [step["pages_in_per_s"] for step in told["steps"] if "pages_in_per_s" in step]
        assert max(rates[:3]) > 0
        assert rates[3] > 0, "restored over three hosts"
        assert rates[4] == 0, "on a single host there is nobody to page to"


@pytest.mark.timeout(_TIMEOUT_S)
def test_interrupted_it_leaves_nothing() -> None:
    """By SIGTERM, which Ray's core takes over when it can; Ctrl-C is `test_cli_cluster`'s."""
    guest_image()
    mark = "interrupted"
    before = folders_of_demos()
    running = cli_with_mark(mark).start("demo", "--json")

    def guest_runs() -> bool:
        homes = folders_of_demos() - before
        return any(list(home.glob("hosts/*/run/demo/console.log")) for home in homes)

    until(guest_runs, 120, "the guest has been started")
    mine = folders_of_demos() - before
    running.send_signal(signal.SIGTERM)
    ran = ended(running)
    assert ran.status == 130
    assert json.loads(ran.out)["error"] == "Interrupted"
    until(lambda: not find_marked("DCRES_TEST_DEMO", mark), 30, "all its processes are gone")
    assert not {folder for folder in mine if folder.exists()}
