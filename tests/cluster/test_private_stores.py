"""Hosts with stores of their own, as a user has them: restored elsewhere, lazily, then drained.

And copied to an object store, from where the checkpoint comes back when all disks are lost.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dcres.model.pages import PAGE_SIZE
from dcres.vm import witness
from tests.support.cli import Cli, ended, require_nothing_left
from tests.support.guest import guest_image
from tests.support.object_store import PASSWORD, object_store
from tests.support.wait import until

pytestmark = [pytest.mark.cluster, pytest.mark.vm]

MEMORY = "192MiB"
WHOLE_PROGRAM = """
import dcres
from tests.support.speed import patience

with dcres.connect() as cluster:
    vm = cluster.vm("box")
    vm.wait_until_whole(timeout_s=patience(60))
    print(vm.status(over_s=0).bringing_in)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("private")


@pytest.fixture(scope="module")
def cli(folder: Path) -> Iterator[Cli]:
    """``dcres up`` with five hosts, whose checkpoints lie in ``disks/HOST``."""
    cli = Cli.at(folder / "home")
    store = str(folder / "disks" / "{host}")
    up = cli.json("up", "--hosts", "5", "--memory", "200MiB", "--store", store)
    assert up["store"] == store
    cluster_id = json.loads((folder / "home" / "cluster.json").read_text())["id"]
    try:
        yield cli
    finally:
        cli.json("down")
    require_nothing_left(cluster_id)


@pytest.fixture(scope="module")
def saved(cli: Cli, folder: Path) -> dict[str, Any]:
    """A checkpoint over h0, h1 and h2, whose VM has ended."""
    image = guest_image()
    spec = {
        "name": "box",
        "memory": MEMORY,
        "kernel": str(image.kernel),
        "initrd": str(image.initrd),
        "append": "console=ttyS0 quiet panic=-1 witness=64 witness_pause=0.3",
        "accel": "tcg",
        "layout": {"main": "96MiB", "subs": ["64MiB", "64MiB"]},
    }
    file = folder / "box.yaml"
    file.write_text(yaml.safe_dump(spec))
    cli.json("start", str(file), "--hosts", "h0,h1,h2")
    require_checks(folder, "h0", 1)
    taken = cli.json("checkpoint", "box")
    cli.json("stop", "box")
    assert isinstance(taken, dict)
    return taken


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """The URL of a place for copies in an object store."""
    with object_store() as server:
        yield server.url("copies", server.port)


def require_checks(folder: Path, main: str, more: int) -> None:
    """The guest makes so many more checks, all of them good, and has not booted again."""
    console = folder / "home" / "hosts" / main / "run" / "box" / "console.log"
    before = witness.read(console).checks
    until(lambda: witness.read(console).checks >= before + more, 120, f"{more} more checks")
    assert witness.read(console).failures == 0


def require_whole(cli: Cli) -> None:
    """Every page is where it belongs: the checkpoint is not needed any more."""
    ran = ended(cli.start_python(WHOLE_PROGRAM))
    assert (ran.status, ran.out) == (0, "False\n"), ran.err


def test_each_host_has_its_part(cli: Cli, saved: dict[str, Any], folder: Path) -> None:
    for host in ("h0", "h1", "h2"):
        place = folder / "disks" / host / "box" / saved["checkpoint"]
        assert list((place / host).glob("*.pack"))
        assert (place / "manifest.json").exists() == (host == "h0")
    listed = cli.json("checkpoints")["checkpoints"]
    assert [each["checkpoint"] for each in listed] == [saved["checkpoint"]]
    assert cli.json("verify", saved["checkpoint"])["ok"] is True


def test_each_host_scrubs_its_own(cli: Cli, saved: dict[str, Any], folder: Path) -> None:
    found = cli.json("scrub", "--rate", "none")
    assert (found["ok"], found["damaged"]) == (True, [])
    files = {each["store"]: sum(vm["files"] for vm in each["vms"]) for each in found["stores"]}
    assert {host: files[host] for host in ("h0", "h1", "h2")} == {"h0": 5, "h1": 2, "h2": 2}
    assert found["bytes"] > saved["pages"] * PAGE_SIZE // 2
    for host in ("h0", "h1", "h2"):
        assert (folder / "disks" / host / "box" / "scrubbed.json").exists()
    again = cli.json("scrub", "--older", "1d")
    assert (again["ok"], again["files"], again["skipped"]) == (True, 0, 9)


def test_each_host_copies_its_part(
    cli: Cli, saved: dict[str, Any], folder: Path, bucket: str
) -> None:
    copied = cli.json("copy", saved["checkpoint"], "--to", bucket)
    assert [host["host"] for host in copied["hosts"]] == ["h0", "h1", "h2"]
    parts = (folder / "disks").glob(f"h*/box/{saved['checkpoint']}/h*/*")
    assert copied["bytes_sent"] == sum(path.stat().st_size for path in parts)
    assert PASSWORD not in json.dumps(copied)
    again = cli.json("copy", saved["checkpoint"], "--to", bucket)
    assert (again["bytes_sent"], again["bytes_there"]) == (0, copied["bytes_sent"])


def test_what_would_move(cli: Cli, saved: dict[str, Any]) -> None:
    plan = cli.json("restore", saved["checkpoint"], "--hosts", "h1,h3", "--dry-run")
    assert plan["possible"], plan["problems"]
    h0, h1, h2 = (host["pages"] for host in saved["hosts"])
    main, sub = plan["layout"]
    assert main["pages"] + sub["pages"] == saved["pages"]
    servers = {each["host"]: each["served_bytes"] // PAGE_SIZE for each in plan["servers"]}
    assert servers == {"h0": h0, "h2": h2}
    assert plan["pages_moved"] == h0 + h2 + sub["moved_from"].get("h1", 0) // PAGE_SIZE
    assert h1 > 0


def test_found_where_the_parts_are(cli: Cli, saved: dict[str, Any]) -> None:
    plan = cli.json("restore", saved["checkpoint"], "--dry-run")
    (host,) = plan["layout"]
    assert host["host"] in {"h0", "h1", "h2"}


def test_on_other_hosts_lazily_then_drained(cli: Cli, saved: dict[str, Any], folder: Path) -> None:
    restored = cli.json("restore", saved["checkpoint"], "--hosts", "h3,h4", "--lazy")
    assert [host["host"] for host in restored["layout"]] == ["h3", "h4"]
    assert restored["lazy"] is True
    assert restored["pages_moved"] == saved["pages"], "neither of them had any"
    require_checks(folder, "h3", 1)
    require_whole(cli)
    (_, sub) = cli.json("status", "box")["hosts"]
    assert sub["pages"] > 0

    planned = cli.json("resize", "box", "--subs", "96MiB,96MiB", "--dry-run")
    assert [host["change"] for host in planned["hosts"]][2:] == ["joins"]
    assert len(cli.json("status", "box")["hosts"]) == 2, "it was only asked"
    grown = cli.json("resize", "box", "--subs", "96MiB,96MiB")
    assert len(grown["hosts"]) == 3
    fresh = grown["hosts"][2]["host"]
    assert [host["host"] for host in planned["hosts"]] == ["h3", "h4", fresh]
    plan = cli.json("drain", "box", "h4", "--dry-run")
    assert [move["host"] for move in plan["moves"]] == [fresh]
    drained = cli.json("drain", "box", "h4")
    assert [host["host"] for host in drained["hosts"]] == ["h3", fresh]
    require_checks(folder, "h3", 1)

    assert "no sub host" in cli.refused("drain", "box", "h4")
    cli.json("stop", "box")


def test_eagerly_and_checkpointed_anew(cli: Cli, saved: dict[str, Any], folder: Path) -> None:
    """The checkpoint is as it was, and what it became can be saved and restored again."""
    where = (saved["checkpoint"], "--hosts", "h4,h1")
    plan = cli.json("restore", *where, "--dry-run")
    restored = cli.json("restore", *where)
    for told in ("pages_moved", "bytes_moved"):
        assert restored[told] == plan[told] > 0
    require_checks(folder, "h4", 1)
    again = cli.json("checkpoint", "box")
    cli.json("stop", "box")
    single = cli.json("restore", again["checkpoint"], "--single", "--hosts", "h0")
    assert [host["host"] for host in single["layout"]] == ["h0"]
    assert single["pages_moved"] == again["pages"]
    require_checks(folder, "h0", 1)
    cli.json("stop", "box")
    pruned = cli.json("prune", "box", "--keep", "last=1", "--yes")
    assert pruned["removed"] == [saved["checkpoint"]]
    assert pruned["checkpoints"][0]["reasons"] == ["last"], "all of its parts were found"
    assert cli.json("delete", again["checkpoint"], "--yes")["deleted"] is True
    assert cli.json("checkpoints") == {"checkpoints": []}


def test_comes_back_from_its_copy_when_all_disks_are_lost(
    cli: Cli, saved: dict[str, Any], folder: Path, bucket: str
) -> None:
    for host in (folder / "disks").iterdir():
        shutil.rmtree(host)
    assert cli.json("checkpoints") == {"checkpoints": []}
    listed = cli.json("checkpoints", "--from", bucket)["checkpoints"]
    assert [each["checkpoint"] for each in listed] == [saved["checkpoint"]]
    cli.json("restore", saved["checkpoint"], "--from", bucket, "--hosts", "h3,h4")
    require_checks(folder, "h3", 1)
    cli.json("stop", "box")
    assert cli.json("verify", saved["checkpoint"])["ok"] is True
    assert sorted(path.name for path in (folder / "disks").iterdir()) == ["h3", "h4"]
    assert cli.json("delete", saved["checkpoint"], "--yes")["deleted"] is True
    assert len(cli.json("checkpoints", "--from", bucket)["checkpoints"]) == 1
