"""The command line without a cluster: options, JSON, errors, exit status, what people read."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any, NoReturn

import pytest
from rich.console import Console, RenderableType

import dcres
from dcres import doctor
from dcres.actors.messages import Foreseen, PageFlow
from dcres.actors.ray.local_cluster import LocalCluster
from dcres.api import cluster as api_cluster
from dcres.api.placement import Placement
from dcres.api.plan import RestorePlan
from dcres.api.resizing import DrainPlan, ResizePlan
from dcres.api.status import Host, HostStatus, VmStatus
from dcres.cli import commands, judge, main, tables
from dcres.cli.stage import ConsoleStage
from dcres.cli.tables import checkpoint_view
from dcres.config import Layout
from dcres.demo import Life, Step, Story
from dcres.errors import (
    CheckpointCorrupt,
    Conflict,
    DcresError,
    HostFailure,
    NotFound,
    OperationFailed,
    VmLost,
)
from dcres.linux.interrupt import OperationInterrupted
from dcres.model.restore_plan import PlannedHost
from dcres.storage.format.checks import FileResult, VerifyReport
from dcres.storage.store.protocols import Listed
from dcres.vm.witness import WitnessReport
from tests.support.homes import left_by_a_cluster
from tests.support.placement import placement

MAIN = HostStatus("h0", "main", 48, 64, 10, 20, 123.0, 456.0, 7.0, 8.0)
SUB = HostStatus("h1", "sub", 16, 32, 10, 20)
PLACEMENT = placement(b"mma", age_s=3.0)
PAUSED = VmStatus("box", "running", run_state="paused", advice="`dcres resume box` lets it run")
RUNNING = VmStatus("box", "running", "", "tcg", "running", "/console", (MAIN, SUB))


FORESEEN = Foreseen(
    (("h0", 64 << 20, 48 << 20), ("h1", 32 << 20, 0), ("h2", 0, 32 << 20)),
    (PageFlow("h0", "h2", 256), PageFlow("h1", "h2", 16)),
)
FULL = Foreseen((("h0", 4096, 8192), ("", 0, 4096)), problem="no host has 4 KiB free")


class FakeVm:
    """A VM that remembers what was asked of it."""

    def __init__(self, asked: list[Any]) -> None:
        self.asked = asked

    def status(self, over_s: float = 0.0) -> VmStatus:
        self.asked.append(("status", over_s))
        return RUNNING

    def placement(self) -> Placement:
        return PLACEMENT

    def resize(self, main: str | None, subs: str | None) -> VmStatus:
        self.asked.append(("resize", main, subs))
        return RUNNING

    def plan_resize(self, main: str | None, subs: str | None) -> ResizePlan:
        self.asked.append(("plan_resize", main, subs))
        return ResizePlan.of("box", FULL if main else FORESEEN)

    def drain(self, host: str) -> VmStatus:
        self.asked.append(("drain", host))
        return RUNNING

    def plan_drain(self, host: str) -> DrainPlan:
        return DrainPlan("box", host, {"h2": 16})

    def pause(self) -> VmStatus:
        self.asked.append(("pause",))
        return PAUSED

    def resume(self) -> VmStatus:
        self.asked.append(("resume",))
        return RUNNING

    def stop(self) -> None:
        self.asked.append(("stop",))

    def cancel(self) -> bool:
        return False

    def console(self) -> str:
        return "hello"


class FakeCluster:
    """A cluster with the VM ``box``; it remembers how it was found."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def vm(self, name: str) -> FakeVm:
        if name != "box":
            raise NotFound(f"there is no VM {name} in the cluster; it has box")
        return FakeVm(self.asked)

    def statuses(self) -> list[VmStatus]:
        return [RUNNING]

    def listing(self, vm: str) -> list[Listed]:
        return []

    def checkpoint(self, checkpoint: str) -> FakeCheckpoint:
        return FakeCheckpoint(self.asked)


class FakeCheckpoint:
    """A checkpoint that remembers how it was to be restored."""

    def __init__(self, asked: list[Any]) -> None:
        self.asked = asked

    def plan(self, layout: Layout | None, **where: Any) -> RestorePlan:
        self.asked.append(("plan", layout, where))
        problems = () if where["single"] else ("h0 has no room",)
        return RestorePlan("box", "box-1", (), problems, where["lazy"])

    def restore(self, layout: Layout | None, **where: Any) -> FakeCheckpoint:
        self.asked.append(("restore", layout, where))
        return self

    @property
    def facts(self) -> dict[str, Any]:
        return RESTORED


RESTORED = {
    "vm": "box",
    "checkpoint": "box-1",
    "seconds": 1.25,
    "lazy": True,
    "layout": [{"host": "h2", "role": "main", "memory_bytes": 4096, "pages": 1}],
    "pages_moved": 1,
    "bytes_moved": 4096,
    "chosen": "as few hosts as have room",
}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCluster:
    cluster = FakeCluster()

    @contextmanager
    def connect(address: str | None = None, *, store: Path | None = None) -> Iterator[FakeCluster]:
        cluster.asked.append(("connect", address, store))
        yield cluster

    monkeypatch.setattr(api_cluster, "connect", connect)
    return cluster


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home in which no cluster runs, and nothing that names another."""
    for name in ("RAY_ADDRESS", "DCRES_STORE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DCRES_HOME", str(tmp_path))
    # Tests that ran before in this process may have joined a cluster.
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    return tmp_path


def answer_of(capsys: pytest.CaptureFixture[str]) -> Any:
    """The one JSON object on standard output."""
    return json.loads(capsys.readouterr().out)


class TestStarting:
    def test_help_loads_neither_ray_nor_arrow(self) -> None:
        program = (
            "import sys; from dcres.cli import main; main(['--help']);"
            "sys.exit(bool({'ray', 'pyarrow', 'pydantic', 'numpy'} & set(sys.modules)))"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        for command in (
            "doctor",
            "demo",
            "up",
            "down",
            "start",
            "list",
            "status",
            "resize",
            "drain",
        ):
            assert f" {command} " in done.stdout
        for command in ("stop", "checkpoint", "checkpoints", "inspect", "verify", "restore"):
            assert f" {command} " in done.stdout

    def test_the_facade_loads_nothing_either(self) -> None:
        program = "import sys, dcres; sys.exit('ray' in sys.modules or 'numpy' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0

    def test_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--version"]) == 0
        assert capsys.readouterr().out == f"dcres {dcres.__version__}\n"
        for arguments in (["--version", "--json"], ["--json", "--version"]):
            assert main(arguments) == 0
            assert answer_of(capsys) == {"version": dcres.__version__}

    def test_without_a_command_it_shows_help(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main([]) == 2
        assert "Usage: dcres" in capsys.readouterr().out


class TestUsage:
    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["nix"], "No such command 'nix'; see `dcres --help`"),
            (["status"], "Missing argument 'VM'; see `dcres status --help`"),
            (["status", "box", "--nix"], "No such option: --nix"),
            (["up", "--hosts", "0"], "Invalid value for '--hosts'"),
            (["up", "--hosts", "1", "--memory", "3"], "not a multiple of 4096 bytes"),
            (["demo", "--memory", "256MiB"], "at least 512 MiB of memory, not 256 MiB"),
            (["start", "nix.yaml"], "cannot read nix.yaml: No such file"),
            (["checkpoint", "box", "--mode", "lively"], "is not supported"),
            (["checkpoint", "box", "--format", "zip"], "is not supported"),
            (["delete", "box-20260101-000000-0000"], "needs confirmation; give --yes"),
        ],
    )
    def test_wrong_input(
        self, arguments: list[str], words: str, nowhere: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(arguments) == 2
        printed = capsys.readouterr()
        assert "error: " in printed.err
        assert words in printed.err
        assert printed.err.count("\n") == 1, "one sentence"
        assert printed.out == ""

    def test_no_cluster(self, nowhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for command in (["list"], ["checkpoints"], ["down"], ["status", "box"], ["stop", "box"]):
            assert main(command) == 2
            assert f"no local cluster runs in {nowhere}; start one with `dcres up`" in (
                capsys.readouterr().err
            )

    def test_an_address_where_nothing_listens(
        self, nowhere: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["list", "--address", "127.0.0.1:1"]) == 1
        assert "no Ray cluster answers at 127.0.0.1:1" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "arguments", [["list", "--address", ""], ["--address", "", "stop", "box"]]
    )
    def test_an_address_that_is_empty(
        self, arguments: list[str], nowhere: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Of a variable that has no value: not the cluster that a command without it means."""
        assert main(arguments) == 2
        assert "error: the address is empty; write host:port" in capsys.readouterr().err

    def test_a_store_is_read_without_a_cluster(
        self, nowhere: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["checkpoints", "--json", "--store", str(tmp_path / "store")]) == 0
        assert answer_of(capsys) == {"checkpoints": []}
        assert main(["verify", "box-20260101-000000-0000", "--store", str(tmp_path)]) == 2
        assert "there is no checkpoint" in capsys.readouterr().err


class TestPurging:
    """`dcres down --purge`: what clusters made, and nothing else."""

    @pytest.fixture
    def home(self, nowhere: Path) -> Path:
        """What a crash leaves of a cluster, beside a folder of somebody else's."""
        return left_by_a_cluster(nowhere)

    def test_what_clusters_made_without_one_that_runs(
        self, home: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["down", "--purge", "--yes", "--json"]) == 0
        assert answer_of(capsys) == {
            "stopped": False,
            "hosts": [],
            "removed": [str(home / name) for name in ("cluster.json", "hosts", "store", "token")],
            "left": [str(home / "photos")],
        }
        assert [path.name for path in home.iterdir()] == ["photos"]
        assert main(["down", "--purge", "--yes"]) == 2
        assert "none has left anything there" in capsys.readouterr().err

    def test_the_home_when_that_was_all(
        self, home: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (home / "photos").rmdir()
        assert main(["down", "--purge", "--yes"]) == 0
        names = ("cluster.json", "hosts", "store", "token", "")
        assert capsys.readouterr().out.splitlines() == [f"removed {home / name}" for name in names]
        assert not home.exists()
        assert main(["down", "--purge", "--yes"]) == 2
        assert f"no local cluster runs in {home}" in capsys.readouterr().err

    def test_a_running_cluster_is_ended_first(
        self, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        class Running:
            hosts = ("h0",)

            def require_here(self) -> None:
                pass

            def stop(self) -> None:
                LocalCluster.clear_dead(home)

        monkeypatch.setattr(LocalCluster, "load", lambda _: Running())
        assert main(["down", "--purge"]) == 2
        assert (home / "token").exists(), "nothing is ended before it is confirmed"
        capsys.readouterr()
        assert main(["down", "--purge", "--yes", "--json"]) == 0
        values = answer_of(capsys)
        assert (values["stopped"], values["hosts"]) == (True, ["h0"])
        assert values["removed"] == [str(home / "store")]

    @pytest.mark.parametrize("options", [["--json"], []])
    def test_has_to_be_confirmed(
        self, options: list[str], home: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        before = sorted(home.rglob("*"))
        assert main(["down", "--purge", *options]) == 2
        assert (
            f"removing cluster.json, hosts, store, token in {home} needs confirmation; give --yes"
        ) in capsys.readouterr().err
        assert sorted(home.rglob("*")) == before

    def test_a_no_on_a_terminal(
        self, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        class Terminal(StringIO):
            def isatty(self) -> bool:
                return True

        monkeypatch.setattr("sys.stdin", Terminal("n\n"))
        before = sorted(home.rglob("*"))
        assert main(["down", "--purge"]) == 1
        printed = capsys.readouterr()
        words = f"remove cluster.json, hosts, store, token in {home} for good"
        assert words in printed.out + printed.err
        assert "nothing was done" in printed.err
        assert sorted(home.rglob("*")) == before

    def test_a_store_elsewhere_stays_and_so_does_the_link_to_it(
        self, home: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        elsewhere = tmp_path_factory.mktemp("elsewhere") / "store"
        (home / "store").rename(elsewhere)
        before = sorted(elsewhere.rglob("*"))
        (home / "store").symlink_to(elsewhere)
        assert main(["down", "--purge", "--yes"]) == 0
        assert sorted(elsewhere.rglob("*")) == before
        assert (home / "store").is_symlink(), "dcres makes no links"

    def test_what_cannot_be_removed_is_said(
        self, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def fail(*_: object, **__: object) -> None:
            raise PermissionError(1, "Operation not permitted", "memory.pack")

        monkeypatch.setattr("os.rmdir", fail)
        assert main(["down", "--purge", "--yes"]) == 1
        error = capsys.readouterr().err
        assert "cannot remove all of" in error
        assert "(Operation not permitted: memory.pack); remove the rest by hand" in error
        assert (home / "cluster.json").exists(), "it goes last, so that `down` finds the rest"

    def test_a_users_own_files_stay(
        self, nowhere: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """They bear our names, and no cluster ever ran here."""
        of_a_user(nowhere)
        before = sorted(nowhere.rglob("*"))
        assert main(["down", "--purge", "--yes"]) == 2
        assert "none has left anything there" in capsys.readouterr().err
        assert main(["down"]) == 2
        assert main(["up", "--hosts", "1", "--memory", "64MiB"]) == 1
        error = capsys.readouterr().err
        for name in ("token", "hosts", "store"):
            assert str(nowhere / name) in error
        assert "move that away, or set DCRES_HOME to another folder" in error
        assert sorted(nowhere.rglob("*")) == before

    def test_a_users_files_beside_checkpoints_stay(
        self, home: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        own = [home / "store" / "inventory.csv", home / "store" / "box" / "notes"]
        for path in own:
            path.write_text("mine")
        assert main(["down", "--purge", "--yes", "--json"]) == 0
        values = answer_of(capsys)
        assert str(home / "store") in values["left"]
        assert sorted(path for path in (home / "store").rglob("*") if path.is_file()) == sorted(own)


def of_a_user(home: Path) -> None:
    (home / "hosts" / "web1").mkdir(parents=True)
    (home / "hosts" / "web1" / "config").write_text("mine")
    (home / "token").write_text("secret")
    (home / "store").mkdir()
    (home / "store" / "inventory.csv").write_text("book")


class TestErrors:
    def test_an_error_as_json_too(self, nowhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--json", "list"]) == 2
        printed = capsys.readouterr()
        assert json.loads(printed.out)["error"] == "NotFound"
        assert json.loads(printed.out)["message"] in printed.err

    def test_a_traceback_only_with_debug(
        self, nowhere: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["list"]) == 2
        assert "Traceback" not in capsys.readouterr().err
        assert main(["list", "--debug"]) == 2
        assert "Traceback" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("error", "status", "words"),
        [
            (Conflict("it runs"), 2, "it runs"),
            (CheckpointCorrupt("a file is short"), 1, "a file is short"),
            (OperationFailed("given up", {"h1": "disk full"}), 1, "given up (h1: disk full)"),
            (KeyboardInterrupt(), 130, "interrupted"),
            (KeyError("key"), 1, "dcres failed unexpectedly (KeyError: 'key')"),
        ],
    )
    def test_status_and_sentence(self, error: BaseException, status: int, words: str) -> None:
        found, sentence = judge(error)
        assert found == status
        assert sentence.startswith(words)

    def test_brackets_in_an_error_are_no_markup(
        self, fake: FakeCluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def fail(name: str) -> FakeVm:
            raise DcresError("QEMU said [bold]no[/] (" + "x" * 200 + ")")

        monkeypatch.setattr(fake, "vm", fail)
        assert main(["stop", "box"]) == 1
        assert "QEMU said [bold]no[/] (xxx" in capsys.readouterr().err

    def test_json_says_which_host_failed_and_how(
        self, fake: FakeCluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        failure = HostFailure("h1", "StoreFull", "the disk is full")
        errors = iter([OperationFailed.of("given up", [failure]), failure.error])

        def fail(name: str) -> FakeVm:
            raise next(errors)

        monkeypatch.setattr(fake, "vm", fail)
        for kind in ("OperationFailed", "StoreFull"):
            assert main(["stop", "box", "--json"]) == 1
            said = answer_of(capsys)
            assert said["error"] == kind
            assert said["failures"] == [
                {"host": "h1", "type": "StoreFull", "message": "the disk is full"}
            ]

    def test_following_as_json(self, fake: FakeCluster, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["console", "box", "-f", "--json"]) == 2
        assert "give --json or --follow, not both" in answer_of(capsys)["message"]

    @pytest.mark.parametrize(
        ("error", "words"),
        [
            (KeyboardInterrupt("SIGINT"), "error: interrupted\n"),
            (
                OperationInterrupted("checkpoint box-1 was published before that"),
                "error: interrupted; checkpoint box-1 was published before that\n",
            ),
        ],
    )
    def test_interrupted(
        self,
        error: BaseException,
        words: str,
        fake: FakeCluster,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr(FakeVm, "checkpoint", raising(error), raising=False)
        assert main(["checkpoint", "box"]) == 130
        assert capsys.readouterr().err == words


class TestConsole:
    """What is followed ends with Ctrl-C or the VM: no failure. A VM that is not there is one."""

    @pytest.mark.parametrize("end", [KeyboardInterrupt(), NotFound("no VM"), VmLost("lost")])
    def test_following(
        self,
        end: BaseException,
        fake: FakeCluster,
        monkeypatch: pytest.MonkeyPatch,
        capfdbinary: pytest.CaptureFixture[bytes],
    ) -> None:
        told = iter([b"one ", b"two"])
        seen = []

        def console_from(vm: FakeVm, offset: int) -> bytes:
            seen.append(offset)
            text = next(told, None)
            if text is None:
                raise end
            return text

        monkeypatch.setattr(commands, "_CONSOLE_POLL_S", 0)
        monkeypatch.setattr(FakeVm, "console_from", console_from, raising=False)
        assert main(["console", "box", "-f"]) == 0
        assert capfdbinary.readouterr() == (b"one two", b"")
        assert seen == [0, 4, 7]

    def test_one_that_has_ended(
        self, fake: FakeCluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(FakeVm, "console_from", raising(VmLost("it is lost")), raising=False)
        for follow in ([], ["-f"]):
            assert main(["console", "box", *follow]) == 1
            assert "it is lost" in capsys.readouterr().err


def raising(error: BaseException) -> Callable[..., NoReturn]:
    def fail(*_: object, **__: object) -> NoReturn:
        raise error

    return fail


class TestOptions:
    @pytest.mark.parametrize(
        "arguments",
        [
            ["--json", "--address", "a:1", "--store", "s", "status", "box"],
            ["status", "box", "--json", "--address", "a:1", "--store", "s"],
            ["--address", "b:2", "status", "box", "--json", "--address", "a:1", "--store", "s"],
        ],
    )
    def test_shared_options_before_or_after_the_command(
        self, arguments: list[str], fake: FakeCluster, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(arguments) == 0
        assert fake.asked[0] == ("connect", "a:1", Path.cwd() / "s")
        assert answer_of(capsys)["hosts"][0]["page_in_median_us"] == 123.0

    @pytest.mark.parametrize(
        ("arguments", "option"),
        [
            (["--address", "a:1", "doctor"], "address"),
            (["--address", "a:1", "down"], "address"),
            (["--store", "s", "down"], "store"),
            (["--address", "a:1", "up"], "address"),
            (["--address", "", "up"], "address"),
            (["--json", "--store", "s", "stop", "box"], "store"),
        ],
    )
    def test_one_that_the_command_does_not_have_is_refused_before_it_too(
        self,
        arguments: list[str],
        option: str,
        nowhere: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        command = next(each for each in arguments if each in ("doctor", "down", "up", "stop"))
        assert main(arguments) == 2
        words = f"`dcres {command}` has no option --{option}; see `dcres {command} --help`"
        assert words in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("arguments", "environ", "expected"),
        [
            (["--store", "before", "up"], "environ", "before"),
            (["--store", "before", "up", "--store", "after"], "/environ", "after"),
            (["up"], "/environ", "/environ"),
            (["up"], "", None),
        ],
    )
    def test_the_store_of_a_new_cluster(
        self,
        arguments: list[str],
        environ: str,
        expected: str | None,
        nowhere: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        asked: list[Path | None] = []

        def start(home: Path, hosts: int, memory: int | None, store: Path | None, **_: Any) -> None:
            asked.append(store)
            raise NotFound("it is not started here")

        monkeypatch.setattr(LocalCluster, "start", start)
        monkeypatch.setenv("DCRES_STORE", environ)
        assert main(arguments) == 2
        assert asked == [None if expected is None else Path.cwd() / expected]

    @pytest.mark.parametrize("command", [["up"], ["checkpoints"], ["verify", "box"]])
    def test_an_empty_store_is_not_the_current_folder(
        self, command: list[str], nowhere: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """As a shell leaves it of a variable that is not set."""
        assert main([*command, "--store", ""]) == 2
        assert "the name of the store is empty" in capsys.readouterr().err

    def test_a_store_only_for_what_reads_checkpoints(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def takes_store(command: str) -> bool:
            assert main([command, "--help"]) == 0
            return "--store" in capsys.readouterr().out

        reading = {"status", "checkpoints", "inspect", "verify", "restore", "delete", "prune"}
        others = {"start", "list", "resize", "drain", "stop", "console", "checkpoint", "cancel"}
        assert {each for each in reading | others if takes_store(each)} == reading


class TestJson:
    def test_status(self, fake: FakeCluster, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["status", "box", "--json", "--over", "0.5"]) == 0
        values = answer_of(capsys)
        assert (values["vm"], values["phase"], values["checkpoints"]) == ("box", "running", [])
        assert [host["role"] for host in values["hosts"]] == ["main", "sub"]
        assert values["hosts"][0]["pages_in_per_s"] == 7.0
        assert fake.asked[-1] == ("status", 0.5)

    def test_placement(self, fake: FakeCluster, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["status", "box", "--json"]) == 0
        found = answer_of(capsys)["placement"]
        assert (found["page_count"], found["bucket_pages"]) == (3, 1)
        assert found["hosts"] == [
            {"host": "h0", "pages": [1, 1, 0], "age_s": [3.0, 3.0, None]},
            {"host": "h1", "pages": [0, 0, 1], "age_s": [None, None, 3.0]},
        ]
        assert found["nowhere"] == found["not_yet_brought"] == [0, 0, 0]

    def test_other_commands(self, fake: FakeCluster, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["resize", "box", "--main", "64MiB", "--json"]) == 0
        assert answer_of(capsys)["vm"] == "box"
        assert fake.asked[-1] == ("resize", "64MiB", None)
        assert main(["stop", "box", "--json"]) == 0
        assert answer_of(capsys) == {"vm": "box", "stopped": True}
        assert main(["cancel", "box", "--json"]) == 0
        assert answer_of(capsys) == {"vm": "box", "cancelled": False}
        assert main(["console", "box", "--json"]) == 0
        assert answer_of(capsys) == {"vm": "box", "console": "hello"}

    def test_shares(self, fake: FakeCluster, capsys: pytest.CaptureFixture[str]) -> None:
        for given in ("64MiB,32MiB", ""):
            assert main(["resize", "box", "--subs", given, "--json"]) == 0
            assert fake.asked[-1] == ("resize", None, given)
        assert main(["drain", "box", "h1", "--json"]) == 0
        assert fake.asked[-1] == ("drain", "h1")
        capsys.readouterr()
        assert main(["drain", "box", "h1", "--dry-run", "--json"]) == 0
        assert answer_of(capsys)["moves"] == [{"host": "h2", "pages": 16}]
        assert main(["drain", "box", "h1", "--dry-run"]) == 0
        assert "64 KiB would move" in capsys.readouterr().out

    def test_planning_other_shares(
        self, fake: FakeCluster, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["resize", "box", "--subs", "32MiB", "--dry-run", "--json"]) == 0
        assert fake.asked[1:] == [("plan_resize", None, "32MiB")], "and nothing else"
        plan = answer_of(capsys)
        assert plan["possible"] is plan["dry_run"] is True
        assert [host["change"] for host in plan["hosts"]] == ["shrinks", "leaves", "joins"]
        assert plan["moves"] == [
            {"from": "h0", "to": "h2", "pages": 256},
            {"from": "h1", "to": "h2", "pages": 16},
        ]
        assert (plan["pages_moved"], plan["bytes_moved"]) == (272, 272 * 4096)
        assert main(["resize", "box", "--main", "8KiB", "--dry-run", "--json"]) == 1
        plan = answer_of(capsys)
        assert (plan["possible"], plan["problems"]) == (False, ["no host has 4 KiB free"])
        assert plan["hosts"][1] == {
            "host": None,
            "role": "sub",
            "share_bytes_before": 0,
            "share_bytes_after": 4096,
            "change": "joins",
        }
        assert main(["resize", "box", "--main", "8KiB", "--dry-run"]) == 1
        assert "no host has 4 KiB free" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            ([], {"single": False, "hosts": None, "lazy": False}),
            (["--single", "--hosts", "h1"], {"single": True, "hosts": "h1", "lazy": False}),
            (["--hosts", "3", "--lazy"], {"single": False, "hosts": 3, "lazy": True}),
            (["--hosts", "h1,h2"], {"single": False, "hosts": "h1,h2", "lazy": False}),
            (["--hosts", "²"], {"single": False, "hosts": "²", "lazy": False}),
            (["--take-over"], {"single": False, "hosts": None, "lazy": False, "take_over": True}),
        ],
    )
    def test_where_to_restore(
        self,
        arguments: list[str],
        expected: dict[str, Any],
        fake: FakeCluster,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        expected = {"take_over": False, **expected}
        assert main(["restore", "box-1", *arguments, "--json"]) == 0
        assert fake.asked[-1] == ("restore", None, expected)
        assert answer_of(capsys) == RESTORED
        possible = expected["single"]
        assert main(["restore", "box-1", *arguments, "--dry-run", "--json"]) == 1 - possible
        assert fake.asked[-1] == ("plan", None, expected)
        assert answer_of(capsys)["possible"] is possible

    def test_a_layout_file(self, fake: FakeCluster, tmp_path: Path) -> None:
        file = tmp_path / "layout.yaml"
        file.write_text("main: 64MiB\nsubs: [32MiB]\n")
        assert main(["restore", "box-1", "--layout", str(file)]) == 0
        assert fake.asked[-1][1] == Layout(main=64 << 20, subs=(32 << 20,))

    def test_a_lost_vm_fails_the_status(
        self, fake: FakeCluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        lost = VmStatus("box", "lost", "host h0 is gone")
        monkeypatch.setattr(FakeVm, "status", lambda *_: lost)
        assert main(["status", "box"]) == 1
        assert "host h0 is gone" in capsys.readouterr().out
        assert main(["status", "box", "--json"]) == 1
        assert answer_of(capsys)["placement"] is None
        assert main(["status", "box", "--picture", "x.svg"]) == 2
        assert "VM box is lost, so there is no placement to draw" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("found", "status", "words"),
        [
            (VmStatus("box", "unknown", "host h1 does not answer"), 1, "h1 does not answer"),
            (VmStatus("box", "off", "its guest has shut down"), 0, "its guest has shut down"),
            (VmStatus("box", "running", run_state="io-error", advice="make room"), 1, "make room"),
            (VmStatus("box", "running", run_state="paused", advice="resume"), 0, "box  paused"),
        ],
    )
    def test_bad_news_of_a_vm_fail_its_status_and_are_listed(
        self,
        found: VmStatus,
        status: int,
        words: str,
        fake: FakeCluster,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr(FakeVm, "status", lambda *_: found)
        monkeypatch.setattr(FakeCluster, "statuses", lambda *_: [found])
        assert main(["status", "box"]) == status
        assert words in capsys.readouterr().out
        assert main(["list"]) == 0
        shown = capsys.readouterr().out
        assert found.doing in shown
        assert found.words in shown

    def test_pause_and_resume(self, fake: FakeCluster, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["pause", "box"]) == 0
        assert "`dcres resume box` lets it run" in capsys.readouterr().out
        assert main(["resume", "box", "--json"]) == 0
        assert answer_of(capsys) == json.loads(json.dumps(RUNNING.to_dict()))
        assert [each for each in fake.asked if each[0] != "connect"] == [("pause",), ("resume",)]

    def test_a_disk_that_fails_again_fails_the_resume(
        self,
        fake: FakeCluster,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        again = VmStatus("box", "running", run_state="io-error", advice="make room")
        monkeypatch.setattr(FakeVm, "resume", lambda _: again)
        assert main(["resume", "box"]) == 1
        assert "make room" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("behind_s", "told"), [(3.4, "3 s"), (150, "2 minutes"), (9000, "2 hours"), (2e5, "2 days")]
    )
    def test_a_restore_says_how_far_the_guests_clock_is_behind(
        self,
        behind_s: float,
        told: str,
        fake: FakeCluster,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        facts = {**RESTORED, "guest_clock_behind_seconds": behind_s, "run_state": "paused"}
        monkeypatch.setattr(FakeCheckpoint, "facts", facts)
        assert main(["restore", "box-1"]) == 0
        shown = capsys.readouterr().out
        assert f"the guest's clock is {told} behind; `hwclock -s` in it sets it" in shown
        assert "is there again, paused as it was, from box-1" in shown
        assert "`dcres resume box` lets it run" in shown


class TestPicture:
    def test_is_written_beside_the_answer(
        self, fake: FakeCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["status", "box", "--picture", str(tmp_path / "box.svg")]) == 0
        assert "MMA" in capsys.readouterr().out
        assert "<svg" in (tmp_path / "box.svg").read_text()

    def test_what_cannot_be_written_is_said_before_anything_is_asked(
        self, fake: FakeCluster, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["status", "box", "--picture", "box.pdf"]) == 2
        assert "name a file that ends in .png or .svg" in capsys.readouterr().err
        assert fake.asked == []


def shown(renderable: RenderableType) -> str:
    console = Console(width=200, file=StringIO())
    console.print(renderable)
    return written(console)


def written(console: Console) -> str:
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


class TestTables:
    def test_status(self) -> None:
        text = shown(tables.status_view(RUNNING, ["box-1", "box-2"]))
        assert "box  running  TCG, 256 KiB in use" in text
        assert "newest of 2 checkpoints: box-2" in text
        assert text.count("█") == 18 + 12
        assert "123 (p99 456)" in text

    @pytest.mark.parametrize(("fill", "full"), [(0, 0), (0.001, 1), (0.5, 12), (1, 24), (1.2, 24)])
    def test_bar(self, fill: float, full: int) -> None:
        assert tables.bar(fill).plain.count("█") == full
        assert len(tables.bar(fill).plain) == 24

    def test_lists(self) -> None:
        assert "no VM runs" in shown(tables.vms_view([]))
        assert "h0 h1" in shown(tables.vms_view([RUNNING]))
        assert "no checkpoint" in shown(tables.checkpoints_view([]))
        damaged = Listed("box-1", "box", None, "manifest.json was altered")
        assert "manifest.json was altered" in shown(tables.checkpoints_view([damaged]))
        hosts = [Host("h0", "127.0.0.1", 1 << 30, 1 << 29, True), Host("h1", "a", 1, 0, False)]
        assert "1 GiB  512 MiB" in shown(tables.hosts_view(hosts, "a:1"))

    def test_verify(self) -> None:
        good = VerifyReport("box-1", 7, (FileResult("h0", "memory.img", None),))
        assert "box-1 is whole: 1 files, 7 pages read" in shown(tables.verify_view(good))
        bad = VerifyReport("box-1", 7, (FileResult("h0", "memory.img", "page 3 was altered"),))
        assert "page 3 was altered" in shown(tables.verify_view(bad))

    def test_plan(self) -> None:
        main = PlannedHost("h0", "main", 4096, 1, 4200, {"h1": 8 << 20}, 0)
        server = PlannedHost("h1", "parts", 0, 0, 0, {}, 8 << 20)
        plan = RestorePlan("box", "box-1", (main, server), (), chosen="as asked")
        text = shown(tables.plan_view(plan))
        assert "8 MiB (h1 8 MiB)" in text
        assert "it fits: 8.004 MiB to read and verify, 8 MiB over the network" in text
        assert "as asked" in text
        assert "assumed: 1000 MB/s" in text
        lazy = replace(plan, lazy=True)
        assert "the guest runs after about 1.0 s, all its memory is there after" in (
            shown(tables.plan_view(lazy))
        )
        full = replace(plan, problems=("h0 has no room",))
        assert "h0 has no room" in shown(tables.plan_view(full))
        assert "it fits" not in shown(tables.plan_view(full))

    def test_drain(self) -> None:
        text = shown(tables.drain_view(DrainPlan("box", "h1", {"h2": 256})))
        assert "h1 of VM box would be emptied; nothing was changed" in text
        assert "1 MiB would move" in text
        assert "no room" in shown(tables.drain_view(DrainPlan("box", "h1", {}, ("no room",))))

    def test_resize(self) -> None:
        text = shown(tables.resize_view(ResizePlan.of("box", FORESEEN)))
        assert "VM box would be resized; nothing was changed" in text
        assert re.search(r"^h0 +main +64 MiB +48 MiB +shrinks *$", text, re.M)
        assert re.search(r"^h1 +sub +32 MiB +leaves *$", text, re.M)
        assert re.search(r"^h0 +h2 +256 +1 MiB$", text, re.M)
        assert "1.062 MiB would move" in text
        text = shown(tables.resize_view(ResizePlan.of("box", FULL)))
        assert re.search(r"^\? +sub +4 KiB +joins *$", text, re.M)
        assert "no host has 4 KiB free" in text
        assert "would move" not in text
        busy = shown(tables.resize_view(ResizePlan("box", (), (), ("it is busy",))))
        assert busy.splitlines()[1:] == ["it is busy"]

    def test_restored(self) -> None:
        text = shown(tables.restore_view(RESTORED))
        assert "box runs again from box-1, after 1.25 s" in text
        assert "as few hosts as have room; 4 KiB over the network" in text
        assert "its memory follows: `dcres status box` tells how much is left" in text
        assert "its memory follows" not in shown(tables.restore_view({**RESTORED, "lazy": False}))

    def test_status_of_a_lazy_restore(self) -> None:
        status = replace(RUNNING, bringing_in=True, pages_to_bring=512)
        assert "256 KiB in use  bringing in: 2 MiB left" in shown(tables.status_view(status))

    def test_doctor(self) -> None:
        checks = [doctor.Check("kernel", doctor.Status.FAIL, "Linux 6.1", "boot a newer one")]
        assert "→ boot a newer one" in shown(tables.checks_view(checks))

    def test_story(self) -> None:
        story = Story("tcg", "TCG, which is slower", 512 << 20)
        place = {"host": "h0", "role": "main", "pages": 512}
        guest = {"tick": 3, "checks": 4, "failures": 0}
        story.steps.append(Step("boot", 0.0, 1.25, "", [place], 5.0, 6.0, 120.0, guest))
        text = shown(tables.story_view(story))
        assert "h0* 2" in text
        assert "4 ok" in text
        assert "the guest lost nothing" in text
        story.lives.append(Life(WitnessReport(), WitnessReport(failures=1, tick=1, checks=1)))
        story.steps[0].guest = {**guest, "failures": 1}
        text = shown(tables.story_view(story))
        assert "1 FAILED" in text
        assert "the guest was harmed" in text

    def test_the_stage_in_a_log(self) -> None:
        console = Console(width=60, file=StringIO())
        with ConsoleStage(console) as stage:
            stage.begin("boot")
            stage.note("waiting")
            guest = {"tick": 1, "checks": 1, "failures": 0}
            stage.end(Step("boot", 0.0, 2.0, "x" * 80, guest=guest))
        text = written(console)
        assert text.count("\n") == 1
        assert text.endswith("1 checks, 0 failures\n")


@pytest.mark.parametrize(
    ("state", "told"),
    [
        ("running", "the VM was paused for 12 ms after 2 rounds: the rest fits"),
        ("paused", "in 0.50 s, the VM is paused, as it was\n"),
        ("running", "an increment upon box-0: 4 KiB changed, 4 KiB saved"),
    ],
)
def test_what_a_checkpoint_says_of_its_vm(state: str, told: str) -> None:
    facts = {
        "checkpoint": "box-1",
        "pages": 2,
        "seconds": 0.5,
        "downtime_seconds": 0.012,
        "pages_moved_for_checkpoint": 0,
        "hosts": [],
        "run_state": state,
        "rounds": 2,
        "verdict": "the rest fits",
        "base": "box-0",
        "pages_changed": 1,
        "pages_saved": 1,
    }
    console = Console(width=120, file=StringIO(), record=True)
    console.print(checkpoint_view(facts))
    assert told in console.export_text()
