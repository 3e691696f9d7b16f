"""The home of a local cluster, without a cluster: who may use it, and what is removed from it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest

from dcres.actors.ray import local_home
from dcres.actors.ray.local_cluster import LocalCluster, purge
from dcres.actors.ray.local_home import Home
from dcres.cli import main
from dcres.errors import ClusterError, Conflict, NotFound, NotOurs
from dcres.linux.holding import hold, is_held
from dcres.linux.marks import HOME_MARK, Mark
from dcres.linux.removal import OwnFolder
from tests.support.homes import CHECKPOINT, left_by_a_cluster, state_of

ANOTHER_CONTAINER = {"pids": "pid:[1]"}
ANOTHER_MACHINE = {"machine": "other", "boot": "other", "host": "far", "pids": "pid:[1]"}
EARLIER_DCRES = {"machine": "", "host": "", "pids": ""}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def everything(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """All below a folder, with inode, mode and content."""
    return {
        str(path): (
            path.lstat().st_ino,
            path.lstat().st_mode,
            path.read_bytes() if path.is_file() else b"",
        )
        for path in sorted(folder.rglob("*"))
    }


@contextmanager
def a_node_of(home: Path) -> Iterator[None]:
    """A process that has inherited the lock of the home, as ``ray start`` does."""
    fd = Home(home).held()
    process = subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[fd]
    )
    os.close(fd)
    try:
        yield
    finally:
        process.kill()
        process.communicate()


class TestHolding:
    def test_a_lock_is_held_as_long_as_one_process_has_inherited_it(self, home: Path) -> None:
        home.mkdir()
        mark = home / HOME_MARK
        assert not is_held(mark)
        with a_node_of(home):
            assert is_held(mark)
        assert not is_held(mark)

    def test_who_looks_takes_nothing(self, tmp_path: Path) -> None:
        path = tmp_path / "lock"
        path.touch()
        with path.open("r+") as one, path.open("r+") as other:
            assert hold(one.fileno())
            assert hold(other.fileno()), "several may live"
            assert is_held(path)
            assert not hold(one.fileno(), alone=True)
            assert hold(one.fileno()), "it has it still"
        assert not is_held(path)

    def test_the_lock_is_told_from_every_namespace(self, home: Path) -> None:
        home.mkdir()
        question = "import sys; from pathlib import Path; from dcres.linux.holding import is_held; "
        question += "print(is_held(Path(sys.argv[1])))"
        argv = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc"]
        argv += [sys.executable, "-c", question, str(home / HOME_MARK)]
        answers = []
        with a_node_of(home):
            answers.append(subprocess.run(argv, capture_output=True, text=True, check=False))
        answers.append(subprocess.run(argv, capture_output=True, text=True, check=False))
        if "unshare" in answers[0].stderr:
            pytest.skip(f"no namespaces here: {answers[0].stderr}")
        assert [answer.stdout for answer in answers] == ["True\n", "False\n"]


class TestLooking:
    """`load`, and every command that looks, changes nothing, whatever it finds."""

    COMMANDS = (
        ["checkpoints"],
        ["list"],
        ["status", "box"],
        ["inspect", CHECKPOINT],
        ["verify", CHECKPOINT],
        ["down", "--purge"],  # not confirmed
    )

    @pytest.mark.parametrize("place", [{}, ANOTHER_CONTAINER, ANOTHER_MACHINE, EARLIER_DCRES])
    @pytest.mark.parametrize("lives", [False, True])
    def test_nothing_changes(
        self, place: dict[str, str], lives: bool, home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        left_by_a_cluster(home, **place)
        monkeypatch.setenv("DCRES_HOME", str(home))
        monkeypatch.delenv("DCRES_STORE", raising=False)
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        monkeypatch.setattr("ray.is_initialized", lambda: False)
        with a_node_of(home) if lives else nullcontext():
            before = everything(home.parent)
            for command in self.COMMANDS:
                main([*command, "--json"])
                assert everything(home.parent) == before, command

    def test_a_cluster_that_lives_is_found(self, home: Path) -> None:
        for place in ({}, ANOTHER_CONTAINER, ANOTHER_MACHINE):
            left_by_a_cluster(home, **place)
            with a_node_of(home):
                assert LocalCluster.load(home).id == Home(home).read().id  # type: ignore[union-attr]
            purge_by_force(home)

    def test_one_elsewhere_that_does_not_answer_is_named(
        self, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Its addresses are those of another machine, or of another container's network."""
        left_by_a_cluster(home, **ANOTHER_MACHINE)
        monkeypatch.setenv("DCRES_HOME", str(home))
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        monkeypatch.setattr("ray.is_initialized", lambda: False)
        with a_node_of(home):
            assert main(["list"]) == 2
        assert "on another machine (far); end it there" in capsys.readouterr().err

    def test_a_dead_one_is_not(self, home: Path) -> None:
        left_by_a_cluster(home)
        with pytest.raises(NotFound, match="start one with `dcres up`"):
            LocalCluster.load(home)

    def test_one_that_may_live_elsewhere_is_named(self, home: Path) -> None:
        left_by_a_cluster(home, **ANOTHER_MACHINE)
        words = r"cluster.json is of .* another machine \(far\).*Run `dcres down` there"
        with pytest.raises(NotFound, match=words):
            LocalCluster.load(home)

    @pytest.mark.parametrize("text", ["{}", "", "[]", "null", '{"id": "x", "unknown": 1}', "\xff"])
    def test_a_record_that_is_damaged_or_of_another_version(self, text: str, home: Path) -> None:
        left_by_a_cluster(home)
        (home / "cluster.json").write_text(text)
        before = everything(home.parent)
        for attempt in (LocalCluster.load, LocalCluster.clear_dead, purge, start):
            with pytest.raises(
                ClusterError, match=r"cluster.json is damaged, or of another version"
            ):
                attempt(home)
        assert everything(home.parent) == before


def start(home: Path) -> None:
    LocalCluster.start(home, 1, 1 << 20)


def purge_by_force(home: Path) -> None:
    place = Home(home)
    state = place.read()
    assert state is not None
    with place.claimed() as claim:
        claim.clear(state)
    for path in (home / "store" / "box" / CHECKPOINT, home / "store" / "box", home / "photos"):
        path.rmdir()


class TestClearing:
    @pytest.mark.parametrize(
        "place", [{}, ANOTHER_CONTAINER, {"boot": "before"}], ids=["crash", "container", "reboot"]
    )
    def test_what_a_dead_cluster_left_goes_but_its_store(
        self, place: dict[str, str], home: Path
    ) -> None:
        left_by_a_cluster(home, **place)
        assert LocalCluster.clear_dead(home)
        assert {path.name for path in home.iterdir()} == {HOME_MARK, "photos", "store"}
        assert [path.name for path in home.parent.iterdir()] == ["home"], "RAM and temporary files"
        assert (home / "store" / "box" / CHECKPOINT).is_dir()
        assert not LocalCluster.clear_dead(home)

    @pytest.mark.parametrize(
        ("place", "lives", "words"),
        [
            ({}, True, "runs in .* already; `dcres down` ends it"),
            (ANOTHER_CONTAINER, True, "in another container or on another machine"),
            (ANOTHER_MACHINE, True, r"another machine \(far\); end it there"),
            (ANOTHER_MACHINE, False, r"another machine \(far\).* cannot be seen from here"),
            (EARLIER_DCRES, False, "by an earlier dcres; whether it has ended cannot"),
        ],
    )
    def test_what_is_not_proved_dead_is_refused(
        self, place: dict[str, str], lives: bool, words: str, home: Path
    ) -> None:
        left_by_a_cluster(home, **place)
        with a_node_of(home) if lives else nullcontext():
            before = everything(home.parent)
            attempts: list[Callable[[Path], object]] = [LocalCluster.clear_dead, purge, start]
            for attempt in attempts:
                with pytest.raises(Conflict, match=words):
                    attempt(home)
            assert everything(home.parent) == before

    def test_one_that_lives_elsewhere_is_neither_ended_nor_changed(self, home: Path) -> None:
        left_by_a_cluster(home, **ANOTHER_CONTAINER)
        with a_node_of(home):
            before = everything(home.parent)
            cluster = LocalCluster.load(home)
            kill = partial(cluster.kill_host, "h0")
            acts: list[Callable[[], object]] = [cluster.stop, cluster.add_host, kill]
            for act in acts:
                with pytest.raises(Conflict, match="end it there, or set DCRES_HOME"):
                    act()
            assert everything(home.parent) == before

    def test_what_an_earlier_dcres_left_goes_without_marks(self, home: Path) -> None:
        """Its record is the proof, once it is sure that nothing of it runs."""
        left_by_a_cluster(home, **EARLIER_DCRES)
        state = Home(home).read()
        assert state is not None
        named = home.parent / f"dcres-{state.id}"
        for path in (home / "hosts", named):
            (path / ".dcres-folder").unlink()
        with Home(home).claimed() as claim:
            claim.clear(state)
        assert not named.exists()
        assert not (home / "hosts").exists()

    def test_folders_that_the_record_names_and_that_are_not_the_clusters_stay(
        self, home: Path, tmp_path: Path
    ) -> None:
        precious, of_another = tmp_path / "precious", tmp_path / "other"
        precious.mkdir()
        (precious / "thesis").write_text("mine")
        OwnFolder.new(of_another, Mark("RAM", "cluster 12345678"))
        left_by_a_cluster(home)
        record = json.loads((home / "cluster.json").read_text())
        record |= {"ram": str(of_another), "temp": str(precious)}
        (home / "cluster.json").write_text(json.dumps(record))
        assert LocalCluster.clear_dead(home)
        assert (precious / "thesis").exists()
        assert of_another.exists()

    def test_clearing_that_was_interrupted_goes_on(
        self, home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        left_by_a_cluster(home)

        def interrupted(folder: OwnFolder) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(OwnFolder, "remove", interrupted)
            with pytest.raises(KeyboardInterrupt):
                LocalCluster.clear_dead(home)
        assert LocalCluster.clear_dead(home)
        assert [path.name for path in home.parent.iterdir()] == ["home"]


class TestStarting:
    """What `up` refuses before it changes anything, and what it leaves when it is interrupted."""

    @pytest.mark.parametrize("name", ["token", "hosts", "store"])
    def test_a_users_file_of_our_name(self, name: str, home: Path) -> None:
        home.mkdir()
        own = home / name if name == "token" else home / name / "web1"
        own.parent.mkdir(exist_ok=True)
        own.write_text("mine")
        before = everything(home)
        with pytest.raises(NotOurs, match=rf"{name} is not dcres's.*or set DCRES_HOME to another"):
            start(home)
        assert everything(home) == before

    @pytest.mark.parametrize("name", ["token", "hosts", "store"])
    def test_a_link_to_a_users_folder(self, name: str, home: Path, tmp_path: Path) -> None:
        home.mkdir()
        (tmp_path / "precious").mkdir()
        (tmp_path / "precious" / "thesis").write_text("mine")
        (home / name).symlink_to(tmp_path / "precious")
        with pytest.raises(NotOurs, match=f"{name} is not dcres's"):
            start(home)
        assert (tmp_path / "precious" / "thesis").exists()

    def test_another_store_leaves_a_users_own_alone(
        self, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (home / "store").mkdir(parents=True)
        (home / "store" / "inventory.csv").write_text("book")
        interrupt_bringing_up(monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            LocalCluster.start(home, 1, 1 << 20, tmp_path / "elsewhere")
        assert (home / "store" / "inventory.csv").read_text() == "book"

    @pytest.mark.parametrize("known", ["guest", "photos"])
    def test_interrupted_it_leaves_what_was_there(
        self, known: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("DCRES_RAM", str(tmp_path / "ram"))
        (home / known).mkdir(parents=True)
        (home / known / "file").write_text("mine")
        interrupt_bringing_up(monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            start(home)
        assert {path.name for path in home.iterdir()} == {HOME_MARK, known, "store"}
        assert list((tmp_path / "ram").iterdir()) == []
        assert (home / known / "file").read_text() == "mine"

    def test_two_at_the_same_time(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        home.mkdir()
        monkeypatch.setattr(local_home, "_PATIENCE_S", 0.0)
        with Home(home).claimed(), pytest.raises(Conflict, match="or is being started or ended"):
            start(home)

    def test_a_temporary_folder_that_is_there_already(
        self, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Anybody may make one in /tmp."""
        state = state_of(home)
        Path(state.temp).mkdir()
        (Path(state.temp) / "trap").touch()
        monkeypatch.setattr("dcres.actors.ray.local_cluster._new_state", lambda *_: state)
        with pytest.raises(Conflict, match=r"dcres-.* exists already"):
            start(home)
        assert (Path(state.temp) / "trap").exists()
        assert not (home / "cluster.json").exists()

    def test_records_of_an_earlier_dcres_are_read(self, home: Path) -> None:
        values = asdict(state_of(home)) | {"owner": [1, 2]}
        for key in EARLIER_DCRES:
            del values[key]
        home.mkdir()
        (home / "cluster.json").write_text(json.dumps(values))
        state = Home(home).read()
        assert state is not None
        assert not state.place.is_known


def interrupt_bringing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """When all folders are made, and nothing is launched yet."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dcres.actors.ray.local_node.LocalNode.launch", interrupted)


def test_a_home_that_is_a_link(tmp_path: Path) -> None:
    real = left_by_a_cluster(tmp_path / "real")
    link = tmp_path / "link"
    link.symlink_to(real)
    assert LocalCluster.clear_dead(link)
    (real / "photos").rmdir()
    removed, left = purge(link)
    assert removed == [link / "store"]
    assert left == []
    assert link.is_symlink()
    assert list(real.iterdir()) == []
