"""What clusters have left is found by its marks, told, and ended only on demand."""

from __future__ import annotations

import json
import mmap
import os
import secrets
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dcres.actors.host import orphans
from dcres.actors.host.orphans import Orphans, end, find
from dcres.actors.host.vm_folder import VM_MARK, VmFolder
from dcres.actors.ray.local_home import RAM_MARK, Home
from dcres.actors.ray.local_node import CLUSTER_MARK
from dcres.cli import main
from dcres.doctor import Status, evaluate
from dcres.linux.files import is_open_for_writing
from dcres.linux.holding import hold
from dcres.linux.marks import MARK, Mark
from dcres.linux.process import ProcessId, spawn_detached
from dcres.linux.removal import OwnFolder
from tests.support.homes import left_by_a_cluster
from tests.unit.test_doctor import GOOD

NODE = [sys.executable, "-c", "import time; time.sleep(600)", "ray.scripts.scripts"]


class Machine:
    """A folder for guest memory, and processes that are ended with the test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ram = folder / "ram"
        self.ram.mkdir(mode=0o700)
        self.id = secrets.token_hex(4)
        self.processes: list[ProcessId] = []

    def process(self, *argv: str, **marks: str) -> ProcessId:
        environ = {"PATH": "/usr/bin:/bin", "DCRES_HOME": str(self.folder / "home"), **marks}
        process = spawn_detached(argv or ["sleep", "600"], self.folder / "log", environ)
        self.processes.append(process)
        return process

    def of_vm(self, cluster: str) -> ProcessId:
        run = self.folder / "home" / "hosts" / "h0" / "run" / "box"
        return self.process(**{CLUSTER_MARK: cluster, VM_MARK: str(run)})

    def memory(self, cluster: str) -> Path:
        """Guest memory of VM box on host h0, as a cluster makes it."""
        folder = OwnFolder.new(self.ram / f"dcres-{cluster}", Mark(RAM_MARK, f"cluster {cluster}"))
        vm = VmFolder(self.folder / "run" / "box", folder.path / "h0" / "box")
        vm.make()
        vm.release()
        (vm.ram / "guest.ram").write_bytes(bytes(1 << 16))
        return folder.path

    def found(self) -> list[Orphans]:
        """Without what other clusters on the machine that runs the tests have left."""
        return [each for each in find(self.ram) if each.cluster == self.id or self._own(each)]

    def _own(self, each: Orphans) -> bool:
        paths = [*each.runs, *(folder.path for folder in each.folders)]
        return any(path.is_relative_to(self.folder) for path in paths)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    monkeypatch.setenv("DCRES_RAM", str(tmp_path / "ram"))
    monkeypatch.setenv("DCRES_HOME", str(tmp_path / "none"))
    monkeypatch.setattr(orphans, "_SHARED_MEMORY", tmp_path / "ram")
    made = Machine(tmp_path)
    yield made
    for process in made.processes:
        process.kill()


class TestFinding:
    def test_a_vm_whose_cluster_is_gone(self, machine: Machine) -> None:
        process, memory = machine.of_vm(machine.id), machine.memory(machine.id)
        (found,) = machine.found()
        assert (found.cluster, found.vms) == (machine.id, ("box",))
        assert found.processes == (process,)
        assert [folder.path for folder in found.folders] == [memory]
        assert found.memory_bytes >= 1 << 16
        assert str(found).startswith(f"VM box of cluster {machine.id}: processes {process.pid} and")
        json.dumps(found.to_dict())

    def test_a_cluster_with_a_node_that_runs_has_left_nothing(self, machine: Machine) -> None:
        machine.of_vm(machine.id)
        machine.memory(machine.id)
        machine.process(*NODE, **{CLUSTER_MARK: machine.id})
        assert machine.found() == []

    def test_nor_one_whose_lock_is_held(self, machine: Machine) -> None:
        """Its nodes may be in another container."""
        home = left_by_a_cluster(machine.folder / "home", id=machine.id)
        machine.of_vm(machine.id)
        lock = Home(home).held()
        assert machine.found() == []
        os.close(lock)
        assert [each.cluster for each in machine.found()] == [machine.id]

    def test_memory_alone(self, machine: Machine) -> None:
        memory = machine.memory(machine.id)
        (found,) = machine.found()
        assert (found.processes, found.vms) == ((), ("box",))
        guest = memory / "h0" / "box" / "guest.ram"
        with guest.open("r+b") as file:
            assert machine.found() == [], "somebody has it open who is not seen from here"
            mapped = mmap.mmap(file.fileno(), 0)
        assert machine.found() == [], "or mapped"
        mapped.close()
        with (memory / MARK).open("r+b") as mark:
            hold(mark.fileno())
            assert machine.found() == [], "its cluster lives where it is not seen"
        assert machine.found() == [found]

    def test_what_is_not_marked_is_not_ours(self, machine: Machine) -> None:
        (machine.ram / f"dcres-{machine.id}").mkdir()
        (machine.ram / f"dcres-{machine.id}" / "guest.ram").touch()
        machine.process(SOMETHING=machine.id)
        assert machine.found() == []

    def test_where_ray_runs_its_actors_may_adopt_what_is_left(
        self, machine: Machine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of a cluster that `dcres up` did not start nothing else can be told."""
        run = machine.folder / "run" / "box"
        folder = VmFolder(run, machine.ram / "box")
        folder.make()
        folder.release()
        process = machine.process(**{VM_MARK: str(run), "RAY_RAYLET_PID": "1"})
        machine.process(**{VM_MARK: str(machine.folder / "run" / "without-ray")})
        monkeypatch.setattr(orphans, "_RAYLET", "none of that name")
        (found,) = machine.found()
        assert found.cluster == ""
        assert [path for path in found.runs if path.is_relative_to(machine.folder)] == [run]
        assert process in found.processes
        assert (machine.ram / "box") in [folder.path for folder in found.folders]
        monkeypatch.setattr(orphans, "_RAYLET", "sleep")  # as if the process were Ray's
        assert machine.found() == []


class TestEnding:
    def test_memory_of_another_cluster_at_that_name_stays(self, machine: Machine) -> None:
        process = machine.of_vm(machine.id)
        run = machine.folder / "home" / "hosts" / "h0" / "run" / "box"
        left = VmFolder(run, machine.folder / "mem" / "box", "left")
        lives = VmFolder(machine.folder / "run" / "box", machine.ram / "box", "lives")
        for folder in (left, lives):
            folder.make()
            for path in (folder.state, folder.ram / "guest.ram"):
                path.touch()
        left.release()
        (found,) = (each for each in machine.found() if each.cluster == machine.id)
        assert end(found, machine.ram)
        assert not process.alive
        assert not left.state.exists()
        assert lives.state.exists()
        assert (lives.ram / "guest.ram").exists()
        lives.release()

    def test_what_is_left_goes_and_nothing_else(self, machine: Machine) -> None:
        other = secrets.token_hex(4)
        home = left_by_a_cluster(machine.folder / "home", id=machine.id)
        mine, memory = machine.of_vm(machine.id), machine.memory(machine.id)
        theirs, their_memory = machine.of_vm(other), machine.memory(other)
        machine.process(*NODE, **{CLUSTER_MARK: other})
        stranger = machine.process()
        (machine.ram / "precious").mkdir()
        (found,) = machine.found()
        assert end(found, machine.ram)
        assert not mine.alive
        assert not memory.exists()
        assert {path.name for path in home.iterdir()} == {".dcres-home", "photos", "store"}
        assert theirs.alive
        assert their_memory.is_dir()
        assert stranger.alive
        assert (machine.ram / "precious").is_dir()
        assert not end(found, machine.ram)

    def test_what_has_come_to_live_meanwhile_stays(self, machine: Machine) -> None:
        process = machine.of_vm(machine.id)
        (found,) = machine.found()
        machine.process(*NODE, **{CLUSTER_MARK: machine.id})
        assert not end(found, machine.ram)
        assert process.alive


class TestCommands:
    @pytest.fixture
    def left(self, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> ProcessId:
        """A VM that is left, and nothing that other clusters here have."""
        process = machine.of_vm(machine.id)
        machine.memory(machine.id)
        monkeypatch.setattr(orphans, "find", lambda _: machine.found())
        monkeypatch.setattr("ray.is_initialized", lambda: False)
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        return process

    def answer(self, capsys: pytest.CaptureFixture[str]) -> Any:
        return json.loads(capsys.readouterr().out)

    def test_a_look_ends_nothing(
        self, left: ProcessId, machine: Machine, capsys: pytest.CaptureFixture[str]
    ) -> None:
        before = machine.found()
        assert main(["down", "--orphans", "--dry-run", "--json"]) == 0
        answer = self.answer(capsys)
        assert answer["ended"] is False
        (told,) = answer["orphans"]
        assert [process["pid"] for process in told["processes"]] == [left.pid]
        assert main(["list"]) == 2
        error = capsys.readouterr().err
        assert "no local cluster runs" in error
        assert f"left VM box of cluster {machine.id} on this machine" in error
        assert "see `dcres down --orphans`" in error
        assert main(["list", "--address", "127.0.0.1:1"]) == 1  # where all of Ray is gone
        error = capsys.readouterr().err
        assert "no Ray cluster answers" in error
        assert f"left VM box of cluster {machine.id} on this machine" in error
        assert machine.found() == before

    def test_it_is_confirmed_first(
        self, left: ProcessId, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["down", "--orphans"]) == 2
        assert "ending what is left of VM box" in capsys.readouterr().err
        assert left.alive
        assert main(["down", "--orphans", "--yes", "--json"]) == 0
        assert self.answer(capsys)["ended"] is True
        assert left.wait_gone(0)
        assert main(["down", "--orphans", "--yes"]) == 0
        assert "no cluster has left anything here" in capsys.readouterr().out

    @pytest.mark.parametrize("options", [["--orphans", "--purge"], ["--dry-run"]])
    def test_options_that_do_not_go_together(
        self, options: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["down", *options]) == 2
        assert "--orphans" in capsys.readouterr().err


def test_doctor_names_them(machine: Machine) -> None:
    machine.of_vm(machine.id)
    (found,) = machine.found()
    (check,) = (
        each for each in evaluate(replace(GOOD, orphans=(str(found),))) if each.name == "orphans"
    )
    assert check.status is Status.WARN
    assert check.detail == str(found)
    assert "dcres down --orphans" in check.remedy


def test_a_file_that_is_open_for_writing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(4096))
    assert not is_open_for_writing(path)
    with path.open("rb"):
        assert not is_open_for_writing(path)
    with path.open("r+b"):
        assert is_open_for_writing(path)
