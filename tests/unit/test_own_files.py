"""Nobody makes dcres write elsewhere by a symbolic link in place of a file of its own."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dcres.actors.host.state import write_json
from dcres.errors import Conflict, HostError
from dcres.linux.files import held, locked, open_own
from dcres.linux.process import spawn_detached
from dcres.model.moves import NO_MOVES
from dcres.paging import moves, settings
from dcres.paging.alone import alone
from dcres.paging.changes import DirtyBitmap
from dcres.paging.pager.table import PageTable
from dcres.paging.server.subtable import SubTable
from dcres.paging.settings import SubAddress
from dcres.storage.atomic import write_durably
from dcres.storage.engine.memory_file import MemoryFileWriter

PAGES = 8
NOWHERE = np.zeros(PAGES, dtype=np.uint8)


def take_lock(path: Path) -> None:
    with locked(path):
        pass


def take_lock_in_time(path: Path) -> None:
    with held(path, 0):
        pass


def be_alone(path: Path) -> None:
    with alone(path, "a pager"):
        pass


def append_a_log(path: Path) -> None:
    spawn_detached(["true"], path)


WRITERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a RAM file": ("file", lambda path: open_own(path, os.O_RDWR | os.O_CREAT)),
    "a sub host's store file": ("file", lambda path: SubTable(path, PAGES, PAGES)),
    "marks": ("file", lambda path: DirtyBitmap(path, PAGES)),
    "a page table": ("file", lambda path: PageTable(path, PAGES)),
    "a new page table": ("file.new", lambda path: PageTable.create(path, NOWHERE, PAGES)),
    "moves": ("file.new", lambda path: moves.save(path, NO_MOVES)),
    "settings": ("file.new", lambda path: settings.save(SubAddress("h", "127.0.0.1", 1), path)),
    "an actor's state": ("file.new", lambda path: write_json(path, {})),
    "a lock": ("file", take_lock),
    "a lock that is waited for": ("file", take_lock_in_time),
    "a process's lock": ("file", be_alone),
    "a log": ("file", append_a_log),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "ours"
    made.mkdir(mode=0o700)
    return made


@pytest.fixture(params=["there", "missing"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """What a link points to: a file that must keep its content, or one that must not appear."""
    path = tmp_path / "precious"
    if request.param == "there":
        path.write_bytes(b"precious")
    return path


def content(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


@pytest.mark.parametrize(("name", "write"), WRITERS.values(), ids=WRITERS)
def test_a_link_in_place_of_a_file_is_refused(
    name: str, write: Callable[[Path], object], folder: Path, target: Path
) -> None:
    before = content(target)
    (folder / name).symlink_to(target)
    with pytest.raises(HostError, match=f"{name} is a symbolic link where dcres writes"):
        write(folder / "file")
    assert content(target) == before


def test_a_link_in_place_of_a_memory_file_is_refused(folder: Path, target: Path) -> None:
    before = content(target)
    (folder / "memory.pack").symlink_to(target)
    with (
        pytest.raises(Conflict, match="exists already"),
        MemoryFileWriter(folder / "memory.pack", PAGES),
    ):
        pass
    assert content(target) == before


def test_a_link_where_a_file_of_a_checkpoint_is_written_is_refused(
    folder: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name is a matter of chance; here it was guessed."""
    monkeypatch.setattr(secrets, "token_hex", lambda _: "abcd")
    before = content(target)
    (folder / ".file.abcd.tmp").symlink_to(target)
    with pytest.raises(FileExistsError):
        write_durably(folder / "file", b"data")
    assert content(target) == before
    assert (folder / ".file.abcd.tmp").is_symlink()


def test_folders_on_the_way_may_be_links(tmp_path: Path, folder: Path) -> None:
    """Only the last name is ours to judge: /var/run, for one, is a link to /run."""
    shutil.rmtree(folder)
    (tmp_path / "real").mkdir()
    folder.symlink_to(tmp_path / "real")
    os.close(open_own(folder / "file", os.O_RDWR | os.O_CREAT))
    assert (tmp_path / "real/file").stat().st_mode & 0o777 == 0o600
