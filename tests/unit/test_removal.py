"""Nothing is removed that is not provably ours: what counts as a proof, and what does not."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from dcres.errors import HostError, NotOurs
from dcres.linux import removal
from dcres.linux.marks import MARK, Mark
from dcres.linux.removal import CheckpointFolder, OwnFolder, create, remove_if_empty, remove_socket
from dcres.storage import layout

MINE = Mark("RAM", "cluster ab12")
THEIRS = Mark("RAM", "cluster cd34")
CHECKPOINT = "box-20260102-030405-abcd"


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    """A folder of the user's, with a file in it that must stay."""
    folder = tmp_path / "precious"
    folder.mkdir()
    (folder / "thesis").write_text("mine")
    return folder


def owned(path: Path) -> OwnFolder:
    folder = OwnFolder.made(path, MINE)
    (path / "a" / "b").mkdir(parents=True)
    (path / "a" / "b" / "c").touch()
    return folder


class TestFolder:
    def test_ours_goes_with_all_that_is_in_it(self, tmp_path: Path) -> None:
        folder = owned(tmp_path / "ram")
        assert folder.path.stat().st_mode & 0o777 == 0o700
        folder.remove()
        folder.remove()
        assert not folder.path.exists()

    def test_it_may_be_made_again(self, tmp_path: Path) -> None:
        owned(tmp_path / "ram")
        again = OwnFolder.made(tmp_path / "ram", MINE)
        assert (again.path / "a").exists(), "what is in it stays"

    def test_an_empty_one_is_taken(self, tmp_path: Path) -> None:
        (tmp_path / "ram").mkdir()
        OwnFolder.made(tmp_path / "ram", MINE).remove()

    def test_one_that_we_were_killed_while_marking(self, tmp_path: Path) -> None:
        (tmp_path / "ram").mkdir()
        (tmp_path / "ram" / MARK).touch()
        OwnFolder.made(tmp_path / "ram", MINE).remove()

    def test_a_foreign_one_is_refused(self, precious: Path) -> None:
        with pytest.raises(NotOurs, match=r"precious is not the RAM of cluster ab12: it does not"):
            OwnFolder.made(precious, MINE)
        assert OwnFolder.found(precious, MINE) is None
        assert [path.name for path in precious.iterdir()] == ["thesis"], "nor is it marked"

    def test_one_of_another_cluster_is_refused(self, tmp_path: Path) -> None:
        folder = owned(tmp_path / "ram")
        with pytest.raises(NotOurs, match="but the RAM of cluster ab12; it may hold files of"):
            OwnFolder.made(folder.path, THEIRS)
        assert OwnFolder.found(folder.path, THEIRS) is None

    def test_a_link_to_one_is_none(self, tmp_path: Path, precious: Path) -> None:
        (tmp_path / "link").symlink_to(precious)
        (tmp_path / "marked").symlink_to(owned(tmp_path / "ram").path)
        (tmp_path / "nothing").symlink_to(tmp_path / "missing")
        for name in ("link", "marked", "nothing"):
            assert OwnFolder.found(tmp_path / name, MINE) is None
            with pytest.raises(NotOurs):
                OwnFolder.made(tmp_path / name, MINE)

    def test_a_mark_is_a_file_and_no_link(self, tmp_path: Path, precious: Path) -> None:
        (precious / MARK).symlink_to(owned(tmp_path / "ram").path / MARK)
        assert OwnFolder.found(precious, MINE) is None
        (precious / MARK).unlink()
        os.mkfifo(precious / MARK)
        assert OwnFolder.found(precious, MINE) is None, "and nobody waits for a pipe"

    @pytest.mark.parametrize("text", ["", "{}", "[1]", "\x00\xff", '{"what": "RAM"}'])
    def test_a_mark_that_says_nothing(self, text: str, precious: Path) -> None:
        (precious / MARK).write_text(text)
        with pytest.raises(NotOurs):
            OwnFolder.made(precious, MINE)

    def test_links_in_it_are_not_followed(self, tmp_path: Path, precious: Path) -> None:
        folder = owned(tmp_path / "ram")
        (folder.path / "link").symlink_to(precious)
        (folder.path / "a" / "link").symlink_to(precious)
        (folder.path / "a" / "file").symlink_to(precious / "thesis")
        folder.remove()
        assert (precious / "thesis").read_text() == "mine"
        assert not folder.path.exists()

    def test_nothing_goes_while_something_is_mounted_below(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = owned(tmp_path / "a b")
        mounts = tmp_path / "mountinfo"
        point = str(folder.path / "a").replace(" ", "\\040")
        mounts.write_text(f"36 35 98:0 / {point} rw,noatime - ext4 /dev/root rw\n")
        monkeypatch.setattr(removal, "_MOUNTS", mounts)
        with pytest.raises(HostError, match=r"a b/a is mounted below .*; unmount it"):
            folder.remove()
        assert (folder.path / "a" / "b" / "c").exists()
        mounts.write_text("36 35 98:0 / / rw - ext4 /dev/root rw\n")
        folder.remove()

    def test_clearing_keeps_what_is_named(self, tmp_path: Path) -> None:
        folder = owned(tmp_path / "ram")
        (folder.path / "log").touch()
        folder.clear(keep=lambda path: path.name == "log")
        assert {path.name for path in folder.path.iterdir()} == {"log", MARK}

    def test_a_file_beside_it_is_not_in_it(self, tmp_path: Path, precious: Path) -> None:
        folder = owned(tmp_path / "ram")
        (folder.path / "link").symlink_to(precious)
        for path in (precious / "thesis", folder.path / "link" / "thesis", folder.path / "../x"):
            with pytest.raises(NotOurs, match="is not in"):
                folder.remove_file(path)
        folder.remove_file(folder.path / "a" / "b" / "c")
        folder.remove_file(folder.path / "a" / "b" / "c")
        assert (precious / "thesis").exists()

    def test_the_one_around_a_file(self, tmp_path: Path, precious: Path) -> None:
        folder = owned(tmp_path / "ram")
        assert OwnFolder.around(folder.path / "a" / "b" / "c") == folder
        with pytest.raises(NotOurs, match="lies in no folder"):
            OwnFolder.around(precious / "thesis")

    def test_what_an_earlier_dcres_made(self, precious: Path) -> None:
        with pytest.raises(NotOurs):
            OwnFolder.made(precious, MINE, earlier=lambda names: set(names) <= {"guest.ram"})
        OwnFolder.made(precious, MINE, earlier=lambda names: set(names) <= {"thesis"}).remove()


class TestCheckpoint:
    def test_it_goes_alone(self, tmp_path: Path) -> None:
        folder = tmp_path / "box" / CHECKPOINT
        (folder / "h0").mkdir(parents=True)
        (folder / "h0" / "memory.img").touch()
        (folder.parent / "notes").touch()
        CheckpointFolder(folder).remove()
        CheckpointFolder(folder).remove()
        assert [path.name for path in folder.parent.iterdir()] == ["notes"]

    @pytest.mark.parametrize(
        "name", ["box", "box/photos", f"other/{CHECKPOINT}", f"box/{CHECKPOINT}.old", CHECKPOINT]
    )
    def test_nothing_else_is_one(self, name: str, tmp_path: Path) -> None:
        (tmp_path / name).mkdir(parents=True)
        with pytest.raises(NotOurs, match="is not a folder of a checkpoint"):
            CheckpointFolder(tmp_path / name)

    def test_a_link_is_none(self, tmp_path: Path, precious: Path) -> None:
        (tmp_path / "box").mkdir()
        (tmp_path / "box" / CHECKPOINT).symlink_to(precious)
        with pytest.raises(NotOurs):
            CheckpointFolder(tmp_path / "box" / CHECKPOINT)

    def test_its_name_is_the_one_of_the_layout(self, tmp_path: Path) -> None:
        for vm in ("a", "box", "a-1", "x" * 48):
            name = f"{vm}-20260102-030405-00ff"
            assert layout.is_checkpoint_of(vm, name)
            CheckpointFolder(tmp_path / vm / name)


class TestFiles:
    def test_a_created_one(self, tmp_path: Path) -> None:
        fd, created = create(tmp_path / "file", os.O_WRONLY)
        os.close(fd)
        created.remove()
        created.remove()
        assert not list(tmp_path.iterdir())

    def test_one_in_its_place_stays(self, tmp_path: Path) -> None:
        fd, created = create(tmp_path / "file", os.O_WRONLY)
        (tmp_path / "other").write_text("mine")
        os.rename(tmp_path / "other", tmp_path / "file")
        created.remove()
        os.close(fd)
        assert (tmp_path / "file").read_text() == "mine"

    def test_one_that_was_there_is_not_created(self, precious: Path) -> None:
        with pytest.raises(FileExistsError):
            create(precious / "thesis", os.O_WRONLY)

    def test_a_socket_goes_and_a_file_in_its_place_does_not(
        self, tmp_path: Path, precious: Path
    ) -> None:
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(tmp_path / "sock"))
        remove_socket(tmp_path / "sock")
        remove_socket(tmp_path / "sock")
        (tmp_path / "link").symlink_to(precious / "thesis")
        for path in (precious / "thesis", tmp_path / "link"):
            with pytest.raises(NotOurs, match="is not a socket"):
                remove_socket(path)

    def test_an_empty_folder(self, tmp_path: Path, precious: Path) -> None:
        (tmp_path / "empty").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "empty")
        assert [
            remove_if_empty(path) for path in (precious, tmp_path / "link", tmp_path / "empty")
        ] == [False, False, True]
