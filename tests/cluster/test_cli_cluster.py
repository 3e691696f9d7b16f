"""Every command on a real cluster with a real guest, as a user would type it."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from dcres.config import parse_size
from dcres.linux.files import locked
from dcres.linux.marks import HOME_MARK
from dcres.linux.process import find_marked
from dcres.model.pages import PAGE_SIZE
from dcres.vm import witness
from tests.support.cli import Cli, ended, require_nothing_left
from tests.support.guest import guest_image
from tests.support.vm import stays
from tests.support.wait import until

pytestmark = [pytest.mark.cluster, pytest.mark.vm]

MEMORY = 256 << 20
HOST_MEMORY = "300MiB"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def cli(folder: Path) -> Iterator[Cli]:
    """``dcres up`` with three hosts; ``dcres down`` must leave the store alone, or nothing."""
    cli = Cli.at(folder / "home")
    up = cli.json("up", "--hosts", "3", "--memory", HOST_MEMORY, "--dashboard")
    assert [host["memory_bytes"] for host in up["hosts"]] == [parse_size(HOST_MEMORY)] * 3
    cluster_id = json.loads((folder / "home" / "cluster.json").read_text())["id"]
    try:
        yield cli
    finally:
        down = cli.json("down")
    assert down["stopped"] is True
    require_nothing_left(cluster_id)
    home = folder / "home"
    assert {path.name for path in home.iterdir()} == {HOME_MARK, "store"}
    removed = cli.json("down", "--purge", "--yes")["removed"]
    assert (removed, home.exists()) == ([str(home / "store"), str(home)], False)


def vm_file(folder: Path, name: str, **changes: Any) -> str:
    """A VM file for the witness guest; a value of None leaves the key out."""
    image = guest_image()
    values: dict[str, Any] = {
        "name": name,
        "memory": "256MiB",
        "kernel": str(image.kernel),
        "initrd": str(image.initrd),
        # More than the main host keeps; with pauses, since the commands want the cores as well.
        "append": "console=ttyS0 quiet panic=-1 witness=136 witness_pause=0.3",
        "accel": "tcg",
        "layout": {"main": "128MiB", "subs": ["64MiB", "64MiB"]},
        **changes,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({key: text for key, text in values.items() if text is not None}))
    return str(path)


def console(folder: Path, vm: str) -> Path:
    """The one console of the VM that is written: where it runs, or has run last."""
    found = (folder / "home" / "hosts").glob(f"*/run/{vm}/console.log")
    return max(found, key=lambda path: path.stat().st_mtime_ns)


def report(folder: Path, vm: str) -> witness.WitnessReport:
    return witness.read(console(folder, vm))


def await_checks(folder: Path, vm: str, checks: int) -> witness.WitnessReport:
    """Wait until the guest has made so many checks, all of them good."""
    until(lambda: report(folder, vm).checks >= checks, 120, f"{vm} made {checks} checks")
    found = report(folder, vm)
    assert found.failures == 0
    return found


def kill_qemu(folder: Path, host: str, vm: str) -> None:
    run = folder / "home" / "hosts" / host / "run" / vm
    (qemu,) = (
        each for each in find_marked("DCRES_VM_RUN", str(run)) if "qemu-system" in each.argv[0]
    )
    os.kill(qemu.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def box(cli: Cli, folder: Path) -> str:
    """A VM that runs and checks its memory under paging."""
    started = cli.json("start", vm_file(folder, "box"))
    assert (started["vm"], started["phase"]) == ("box", "running")
    assert [host["role"] for host in started["hosts"]] == ["main", "sub", "sub"]
    await_checks(folder, "box", 2)
    return "box"


@pytest.fixture(scope="module")
def saved(cli: Cli, box: str, folder: Path) -> dict[str, Any]:
    """A checkpoint of it, taken while it was paused, from where another store is read."""
    other = replace(cli, environ={**cli.environ, "DCRES_STORE": str(folder / "elsewhere")})
    taken = other.json("checkpoint", box, "--mode", "stop")
    assert other.json("checkpoints")["checkpoints"] == []
    assert isinstance(taken, dict)
    return taken


class TestVm:
    def test_list_and_status(self, cli: Cli, box: str) -> None:
        (found,) = cli.json("list")["vms"]
        assert (found["vm"], found["phase"], found["run_state"]) == (box, "running", "running")
        status = cli.json("status", box, "--over", "3")
        main, *subs = status["hosts"]
        assert main["pages"] <= main["share_pages"] == 128 << 20 >> 12
        assert sum(sub["pages"] for sub in subs) > 0, "it does not fit the main host"
        assert main["pages_in"] > 0
        assert 0 < main["page_in_median_us"] <= main["page_in_p99_us"]
        assert main["pages_in_per_s"] > 0, "it is paging right now"

    def test_placement(self, cli: Cli, box: str, folder: Path) -> None:
        status = cli.json("status", box, "--picture", str(folder / "box.png"))
        placement = status["placement"]
        assert placement["page_count"] == MEMORY // PAGE_SIZE
        assert len(placement["nowhere"]) * placement["bucket_pages"] == placement["page_count"]
        hosts = placement["hosts"]
        assert [host["host"] for host in hosts] == [host["host"] for host in status["hosts"]]
        for seen, told in zip(hosts, status["hosts"], strict=True):
            assert abs(sum(seen["pages"]) - told["pages"]) < told["pages"] // 2, "it is paging"
        assert sum(placement["not_yet_brought"]) == 0
        everywhere = [*(host["pages"] for host in hosts), placement["nowhere"]]
        assert sum(map(sum, everywhere)) == placement["page_count"]
        main, *subs = (min(age for age in host["age_s"] if age is not None) for host in hosts)
        assert main < min(5.0, *subs), "what was touched last is on the main host"
        assert (folder / "box.png").read_bytes().startswith(b"\x89PNG")

    def test_for_people(self, cli: Cli, box: str) -> None:
        ran = cli.run("status", box)
        assert ran.status == 0
        assert "box  running  TCG" in ran.out
        assert "█" in ran.out
        assert "\n128 MiB " in ran.out, "a line of the map"
        assert re.search(r"^m h\d \(main\) [\d.]+ MiB   a h\d", ran.out, re.M)
        assert ran.err == ""
        assert "WITNESS ready" in cli.run("console", box).out

    def test_resize(self, cli: Cli, box: str, folder: Path) -> None:
        planned = cli.json("resize", box, "--main", "160MiB", "--dry-run")
        assert planned["possible"] is True
        assert planned["hosts"][0]["change"] == "grows"
        assert {move["to"] for move in planned["moves"]} == {planned["hosts"][0]["host"]}
        grown = cli.json("resize", box, "--main", "160MiB")
        assert grown["hosts"][0]["share_pages"] == 160 << 20 >> 12
        before = report(folder, box).checks
        back = cli.json("resize", box, "--main", "128MiB")
        assert back["hosts"][0]["share_pages"] == 128 << 20 >> 12
        await_checks(folder, box, before + 2)

    def test_pause_and_resume(self, cli: Cli, box: str, folder: Path) -> None:
        paused = cli.json("pause", box)
        assert (paused["phase"], paused["run_state"]) == ("running", "paused")
        ran = cli.run("status", box)
        assert ran.status == 0
        assert "box  paused" in ran.out
        assert "`dcres resume box` lets it run" in ran.out
        assert " paused " in cli.run("list").out
        stood = report(folder, box).tick
        assert cli.json("checkpoint", box)["run_state"] == "paused"
        assert report(folder, box).tick == stood
        assert cli.json("resume", box)["run_state"] == "running"
        await_checks(folder, box, report(folder, box).checks + 1)

    def test_resize_too_small_or_too_large(self, cli: Cli, box: str) -> None:
        for size, status, words in (
            ("64MiB", 2, "give the hosts 64 MiB more"),
            ("512MiB", 1, "a share of 384 MiB does not fit host h"),
        ):
            message = cli.refused("resize", box, "--main", size, status=status)
            assert words in message
            planned = cli.run("resize", box, "--main", size, "--dry-run", "--json")
            assert (planned.status, planned.values["problems"]) == (1, [message])
            assert planned.values["possible"] is False
        assert cli.json("status", box)["hosts"][0]["share_pages"] == 128 << 20 >> 12

    def test_starting_it_again(self, cli: Cli, box: str, folder: Path) -> None:
        message = cli.refused("start", vm_file(folder, "box"))
        assert message == "VM box runs already; stop it first with `dcres stop box`"
        assert report(folder, box).failures == 0

    def test_an_unknown_vm(self, cli: Cli, box: str) -> None:
        for command in ("status", "stop", "checkpoint"):
            message = cli.refused(command, "nix")
            assert message == "there is no VM nix in the cluster; it has box; see `dcres list`"
        assert "did you mean box?" in cli.refused("stop", "bix")

    def test_cancelling_nothing(self, cli: Cli, box: str) -> None:
        assert cli.json("cancel", box) == {"vm": box, "cancelled": False}


class TestStartsThatFail:
    @pytest.mark.parametrize(
        ("changes", "status", "words"),
        [
            ({"kernel": "/nix/vmlinuz"}, 2, "the kernel /nix/vmlinuz of VM bad does not exist"),
            ({"layout": {"main": "64MiB"}}, 2, "give the hosts 192 MiB more"),
            ({"memroy": "1GiB"}, 2, "memroy: unknown key"),
            ({"extra_args": ["-device", "nix"]}, 1, "'nix' is not a valid device model name"),
            (
                {"layout": {"main": "64MiB", "subs": ["400MiB", "64MiB"]}},
                1,
                "a share of 400 MiB fits no host that is left",
            ),
            (
                {"layout": {"main": "64MiB", "subs": ["64MiB"] * 3}},
                1,
                "4 hosts are needed",
            ),
        ],
    )
    def test_says_why_and_leaves_nothing(
        self, changes: dict[str, Any], status: int, words: str, cli: Cli, box: str, folder: Path
    ) -> None:
        assert words in cli.refused("start", vm_file(folder, "bad", **changes), status=status)
        assert not list((folder / "home" / "hosts").glob("*/run/bad/*.sock"))

    def test_ctrl_c_takes_down_what_was_started(self, cli: Cli, box: str, folder: Path) -> None:
        layout = {"main": "128MiB", "subs": ["128MiB"]}
        starting = cli.start("start", vm_file(folder, "brief", layout=layout))
        run_folders = folder / "home" / "hosts"
        until(lambda: list(run_folders.glob("*/run/brief/*")), 60, "something has been started")
        starting.send_signal(signal.SIGINT)
        ran = ended(starting)
        assert (ran.status, "interrupted" in ran.err) == (130, True)
        assert [vm["vm"] for vm in cli.json("list")["vms"]] == ["box"], "as after bad starts"
        left = [path for path in run_folders.glob("*/run/brief/*") if not stays(path)]
        assert left == []


class TestCheckpoints:
    def test_its_json(self, saved: dict[str, Any], box: str) -> None:
        assert saved["vm"] == box
        assert (saved["mode"], saved["format"]) == ("stop", "segmented")
        assert saved["pages_moved_for_checkpoint"] == 0
        assert 0 < saved["downtime_seconds"] <= saved["seconds"]
        assert set(saved["paging_during"]) == {"pages_in", "pages_out"}
        assert isinstance(saved["rounds"], int)
        hosts = saved["hosts"]
        assert [host["role"] for host in hosts] == ["main", "sub", "sub"]
        assert sum(host["pages"] for host in hosts) == saved["pages"]
        for host in hosts:
            assert 0 < host["bytes_written"] <= host["pages"] * PAGE_SIZE  # zeros are not
            assert host["file_bytes_allocated"] >= host["bytes_written"]

    def test_listed_inspected_and_verified(self, cli: Cli, saved: dict[str, Any]) -> None:
        checkpoint = saved["checkpoint"]
        listed = cli.json("checkpoints", saved["vm"])["checkpoints"]
        assert checkpoint in [each["checkpoint"] for each in listed]
        manifest = cli.json("inspect", checkpoint)
        assert manifest["memory_bytes"] == MEMORY
        assert [host["pages"] for host in manifest["hosts"]] == [
            host["pages"] for host in saved["hosts"]
        ]
        verified = cli.json("verify", checkpoint)
        assert verified["ok"] is True
        assert verified["pages"] == saved["pages"]
        stamp = r"[0-9]{8}-[0-9]{6}-[0-9a-f]{4}\."  # of this one, and of those before it
        assert {re.sub(stamp, "", file["name"]) for file in verified["files"]} == {
            *("pack", "segment.arrow", "pages.arrow", "history.arrow", "vmcore")
        }

    def test_an_unknown_one(self, cli: Cli, saved: dict[str, Any]) -> None:
        other = f"box-20200101-000000-{saved['checkpoint'][-4:]}"
        for command in ("inspect", "verify", "restore"):
            message = cli.refused(command, other)
            assert f"there is no checkpoint '{other}'" in message
            assert saved["checkpoint"] in message, "it names the one that was meant"

    def test_damage_is_named(self, cli: Cli, box: str, folder: Path) -> None:
        ran = cli.run("checkpoint", box, "--json")  # a live one
        assert f"checkpoint of {box}: " in ran.err, "without a terminal there is a line a phase"
        taken = ran.values
        place = folder / "home" / "store" / box / taken["checkpoint"]
        core = next(place.glob("*/vmcore"))
        core.write_bytes(b"x" + core.read_bytes()[1:])
        ran = cli.run("verify", taken["checkpoint"], "--json")
        assert ran.status == 1
        (bad,) = (file for file in ran.values["files"] if not file["ok"])
        assert (bad["name"], bad["host"]) == ("vmcore", core.parent.name)
        assert "is damaged" in cli.run("verify", taken["checkpoint"]).out
        assert cli.json("delete", taken["checkpoint"], "--yes")["deleted"] is True
        assert not place.exists()

    def test_what_a_cluster_elsewhere_would_see(
        self, cli: Cli, saved: dict[str, Any], box: str, folder: Path
    ) -> None:
        """No store on this machine: the hosts are asked through Ray."""
        state = json.loads((folder / "home" / "cluster.json").read_text())
        token = str(folder / "home" / "token")
        away = Cli.at(folder / "away", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=token)
        address = ("--address", state["address"])
        listed = away.json("checkpoints", *address)["checkpoints"]
        assert saved["checkpoint"] in [each["checkpoint"] for each in listed]
        assert away.json("verify", saved["checkpoint"], *address)["ok"] is True
        assert "WITNESS ready" in away.json("console", box, *address)["console"]
        assert "there is no checkpoint" in away.refused(
            "inspect", "box-20200101-000000-0000", *address
        )


class TestRestore:
    """In this order: the VM runs, is stopped, and comes back in several ways."""

    def test_a_running_vm_is_left_alone(self, cli: Cli, saved: dict[str, Any]) -> None:
        message = cli.refused("restore", saved["checkpoint"])
        assert message == "VM box runs already; stop it first with `dcres stop box`"
        ran = cli.run("restore", saved["checkpoint"], "--dry-run", "--json")
        assert ran.status == 1
        assert ran.values["problems"] == [message]

    def test_stop(self, cli: Cli, box: str) -> None:
        assert cli.json("stop", box) == {"vm": box, "stopped": True}
        assert cli.json("list")["vms"] == []
        assert "there is no VM box in the cluster; it has none;" in cli.refused("status", box)

    def test_dry_run(self, cli: Cli, saved: dict[str, Any]) -> None:
        plan = cli.json("restore", saved["checkpoint"], "--hosts", "3", "--dry-run")
        assert (plan["possible"], plan["problems"]) == (True, [])
        assert sum(host["pages"] for host in plan["layout"]) == saved["pages"]
        assert [host["memory_bytes"] >> 20 for host in plan["layout"]] == [128, 64, 64]
        for host in plan["layout"]:
            assert host["verify_bytes"] == host["read_bytes"] >= host["pages"] * PAGE_SIZE
        assert (plan["bytes_moved"], plan["servers"]) == (0, [])
        assert 0 < plan["seconds"] < 60
        assert "it fits" in cli.run("restore", saved["checkpoint"], "--dry-run").out
        assert cli.json("list")["vms"] == [], "nothing was changed"

    @pytest.mark.parametrize("how", ["stopped", "killed"])
    def test_by_a_ray_job_that_ends(
        self, how: str, cli: Cli, saved: dict[str, Any], folder: Path
    ) -> None:
        """In the middle of it: nothing runs that nobody wants."""
        run_folders = folder / "home" / "hosts"
        # However fast the machine, the restore waits there: to begin a life takes this lock.
        with locked(folder / "home" / "store" / "box" / ".generation.lock"):
            job = RayJob.submit(folder / "home", "-c", JOB_PROGRAM, saved["checkpoint"])
            until(
                lambda: [vm["phase"] for vm in cli.json("list")["vms"]] == ["restoring"],
                60,
                "the job restores the VM",
            )
            job.stop() if how == "stopped" else job.kill()
            until(lambda: job.status() in ("STOPPED", "FAILED"), 60, "the job has ended")
        until(lambda: cli.json("list")["vms"] == [], 60, "the hosts are free")
        assert not find_marked("DCRES_VM_RUN", str(run_folders / "h0" / "run" / "box"))
        left = [path for path in run_folders.glob("*/run/box/*") if not stays(path)]
        assert left == []
        assert cli.json("verify", saved["checkpoint"])["ok"] is True

    def test_no_room(self, cli: Cli, saved: dict[str, Any], folder: Path) -> None:
        other = cli.json("start", vm_file(folder, "large", layout={"main": "256MiB"}))["vm"]
        layout = {"main": "240MiB", "subs": ["240MiB"]}
        wide = cli.json("start", vm_file(folder, "wide", layout=layout))["vm"]
        message = cli.refused("restore", saved["checkpoint"], status=1)
        assert message.startswith("the VM has 256 MiB of memory, 92 MiB more than all hosts have")
        for vm in (other, wide):
            cli.json("stop", vm)

    def test_where_dcres_finds_room(self, cli: Cli, saved: dict[str, Any]) -> None:
        restored = cli.json("restore", saved["checkpoint"])
        (host,) = restored["layout"]
        assert (host["role"], host["pages"]) == ("main", saved["pages"])
        assert "as few hosts as have room for 256 MiB" in restored["chosen"]
        cli.json("stop", "box")

    def test_over_a_lost_vm(self, cli: Cli, saved: dict[str, Any], folder: Path) -> None:
        """What is left of it stays until there is room, and counts as free."""
        restored = cli.json("restore", saved["checkpoint"], "--single")
        assert restored["guest_clock_behind_seconds"] > 0
        host = restored["layout"][0]["host"]
        ran = cli.json("status", "box")
        kill_qemu(folder, host, "box")
        until(lambda: cli.run("status", "box").status == 1, 30, "the VM is lost")
        lost = cli.run("status", "box", "--json").values
        assert (lost["phase"], lost["generation"]) == ("lost", ran["generation"])
        assert [each["host"] for each in lost["hosts"]] == [host]
        other = next(each for each in ("h0", "h1", "h2") if each != host)
        large = vm_file(folder, "large", layout={"main": "256MiB"})
        cli.json("start", large, "--hosts", other)
        wide = folder / "wide-layout.yaml"
        wide.write_text("main: 240MiB\nsubs: [240MiB, 240MiB]\n")
        message = cli.refused("restore", saved["checkpoint"], "--layout", str(wide), status=1)
        assert "a share of 240 MiB fits no host that is left" in message
        assert cli.run("status", "box", "--json").values["hosts"] == lost["hosts"]
        where = ("restore", saved["checkpoint"], "--single", "--hosts", host)
        assert cli.json(*where, "--dry-run")["possible"] is True
        cli.json("stop", "large")
        assert [each["host"] for each in cli.json(*where)["layout"]] == [host]
        cli.json("stop", "box")

    def test_a_layout_too_small(self, cli: Cli, saved: dict[str, Any], folder: Path) -> None:
        layout = folder / "layout.yaml"
        layout.write_text("main: 64MiB\nsubs: [64MiB]\n")
        checkpoint = saved["checkpoint"]
        words = "the layout holds 128 MiB and the VM has 256 MiB"
        assert words in cli.refused("restore", checkpoint, "--layout", str(layout))
        ran = cli.run("restore", checkpoint, "--layout", str(layout), "--dry-run", "--json")
        assert (ran.status, words in ran.values["problems"][0]) == (1, True)

    def test_two_at_once(self, cli: Cli, saved: dict[str, Any], folder: Path) -> None:
        before = saved["checkpoint"]
        both = [cli.start("restore", before, "--hosts", "3", "--json") for _ in range(2)]
        ran = sorted((ended(each) for each in both), key=lambda each: each.status)
        assert [each.status for each in ran] == [0, 2], [each.err for each in ran]
        assert ran[1].values["error"] == "Conflict"
        restored = ran[0].values
        assert (restored["vm"], restored["checkpoint"]) == ("box", before)
        assert [host["role"] for host in restored["layout"]] == ["main", "sub", "sub"]
        assert (restored["pages_moved"], restored["bytes_moved"]) == (0, 0)
        assert await_checks(folder, "box", 5).boots == 0
        cli.json("stop", "box")

    def test_on_one_host_that_is_named(self, cli: Cli, saved: dict[str, Any], folder: Path) -> None:
        restored = cli.json("restore", saved["checkpoint"], "--single", "--hosts", "h1")
        (host,) = restored["layout"]
        assert (host["host"], host["pages"]) == ("h1", saved["pages"])
        assert await_checks(folder, "box", 5).boots == 0
        (all_of_it,) = cli.json("status", "box")["placement"]["hosts"]
        assert all_of_it["host"] == "h1"
        assert sum(all_of_it["pages"]) >= saved["pages"]
        cli.json("stop", "box")

    def test_from_python(self, cli: Cli, saved: dict[str, Any], folder: Path) -> None:
        """The API, on the host's side of a cluster that runs already."""
        ran = ended(cli.start_python(API_PROGRAM, saved["checkpoint"]))
        assert ran.status == 0, ran.err
        assert cli.json("list")["vms"] == []
        assert json.loads(ran.out) == {
            "phases": True,
            "restored": "box",
            "deleted": True,
            "inside": ["h0", "h1", "h2"],
        }


@dataclass(frozen=True, slots=True)
class RayJob:
    """A Python program that runs as a Ray job on the cluster of a home, by Ray's own interface."""

    home: Path
    id: str

    @classmethod
    def submit(cls, home: Path, *arguments: str) -> RayJob:
        entrypoint = shlex.join(["python", *arguments])
        return cls(home, _asked(home, "", {"entrypoint": entrypoint})["submission_id"])

    def stop(self) -> None:
        """As `ray job stop`: SIGTERM, and SIGKILL after RAY_JOB_STOP_WAIT_TIME_S."""
        assert _asked(self.home, f"{self.id}/stop", {})["stopped"] is True

    def kill(self) -> None:
        """Its driver alone, which has no time to say anything."""
        os.kill(int(_asked(self.home, self.id)["driver_info"]["pid"]), signal.SIGKILL)

    def status(self) -> str:
        return str(_asked(self.home, self.id)["status"])


def _asked(home: Path, path: str, values: dict[str, str] | None = None) -> Any:
    port = json.loads((home / "cluster.json").read_text())["dashboard_port"]
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/api/jobs/{path}",
        data=None if values is None else json.dumps(values).encode(),
        headers={"Authorization": f"Bearer {(home / 'token').read_text()}"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


JOB_PROGRAM = "import dcres, sys; dcres.connect().restore(sys.argv[1], hosts=3)"


API_PROGRAM = """
import json, sys, time
import dcres
from dcres.actors.ray import gateway

def inside():
    with dcres.connect() as cluster:
        found = sorted(host.name for host in cluster.hosts() if host.alive)
    assert gateway.connected_address(), "the task's own connection stays"
    return found

with dcres.connect() as cluster:
    seen = []
    vm = cluster.restore(sys.argv[1], hosts=3, progress=seen.append)
    assert vm.status(over_s=0.1).phase == "running", vm
    assert "<Vm box running" in repr(vm), repr(vm)
    placement = vm.placement(buckets=64)
    assert len(placement.picture.pages) == 64 and len(placement.picture.hosts) == 3, placement
    assert "<svg" in placement._repr_html_()
    taken = vm.checkpoint(mode="stop", progress=seen.append)
    assert taken.verify().ok and taken.id in [each.id for each in vm.checkpoints()]
    assert "3 hosts, VMs: ['box']" in repr(cluster), repr(cluster)
    vm.kill()
    try:
        cluster.vm("box")
    except dcres.DcresError as error:
        assert "there is no VM box" in str(error)
    again = taken.restore(dcres.Layout(main=256 << 20), hosts=["h2"])
    assert [host.host for host in again.status().hosts] == ["h2"]
    again.stop()
    taken.delete()
    print(json.dumps({
        "phases": bool(seen) and all(each.vm == "box" for each in seen),
        "restored": again.name,
        "deleted": taken.id not in [each.id for each in cluster.checkpoints()],
        "inside": gateway.run_on("h1", inside),
    }))
"""
