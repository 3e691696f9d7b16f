"""Which generation a life gets, and whether it has the name, whatever the store can do."""

from __future__ import annotations

import codecs
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dcres.actors.host.name_in_store import NameInStore, claimant
from dcres.actors.messages import ClaimOrder
from dcres.errors import NameTaken
from dcres.storage import layout
from dcres.storage.store.store import Store

NOBODY = 65534
codecs.lookup("ascii")  # Python's own files may be for root alone


@pytest.fixture
def folder() -> Iterator[Path]:
    """One that any user may reach."""
    with tempfile.TemporaryDirectory(prefix="dcres-t-", dir="/dev/shm") as name:
        path = Path(name)
        path.chmod(0o755)
        (path / "run").mkdir()
        yield path


@contextmanager
def to_read_only(folder: Path) -> Iterator[None]:
    """The store can be read and not be written to; root could, so that it is another user."""
    root, before = os.geteuid() == 0, {}
    for path in [folder / "store", *(folder / "store").rglob("*")]:
        before[path] = path.stat().st_mode
        path.chmod(0o555 if path.is_dir() else 0o444)
    if root:
        os.chown(folder / "run", NOBODY, -1)
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        for path, mode in before.items():
            path.chmod(mode)


def of(folder: Path) -> NameInStore:
    return NameInStore(Store(folder / "store"), "vm", "h0", folder / "run" / "vm.generation")


def order(cluster: str = "mine", *, needs_name: bool = True) -> ClaimOrder:
    return ClaimOrder(cluster, 0, False, needs_name)


def test_generations_grow_also_from_a_store_to_read_only_to_one_to_write_to(folder: Path) -> None:
    name = of(folder)
    first = name.claim(order())
    name.release("mine", first)
    with to_read_only(folder):
        without = [of(folder).claim(order()) for _ in range(2)]
    name = of(folder)
    assert [first, *without, name.claim(order())] == [1, 2, 3, 4]
    name.release_last()


@pytest.mark.parametrize("needs_name", [False, True], ids=["start", "restore"])
def test_the_name_of_a_vm_that_runs_is_not_had_by_whoever_cannot_claim_it(
    folder: Path, needs_name: bool
) -> None:
    """A VM restored from a store to read only would be a second one of the same."""
    other = of(folder)
    other.claim(order("other"))
    with to_read_only(folder):
        mine = of(folder)
        if needs_name:
            with pytest.raises(NameTaken, match=r"another cluster, which runs on host h0"):
                mine.claim(order())
        else:
            assert mine.claim(order(needs_name=False)) == 2
            assert "no checkpoint" in mine.unclaimed
    other.release_last()


def test_a_former_life_whose_file_stays_is_in_nobodys_way(folder: Path) -> None:
    """The VM's folder is a link to another disk, and no removal follows one."""
    (folder / "store").mkdir()
    (folder / "disk").mkdir()
    (folder / "store" / "vm").symlink_to(folder / "disk")
    for generation in (1, 2, 3):
        name = of(folder)
        assert name.claim(order()) == generation
        assert name._store.lives("vm").trouble(claimant("other", "h0"))
        name.release_last()
    assert not name._store.lives("vm").trouble(claimant("other", "h0"))
    assert (folder / "disk" / layout.life_file(1)).exists()
