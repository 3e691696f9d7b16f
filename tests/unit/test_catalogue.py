"""Checkpoints over the stores of several hosts, with the hosts played by folders."""

from __future__ import annotations

import errno
import shutil
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dcres.actors.ray import gateway
from dcres.api import catalogue
from dcres.api.catalogue import StoresOfHosts
from dcres.errors import ActorGone, Conflict, NotFound, OperationFailed
from dcres.linux.removal import CheckpointFolder
from dcres.storage import layout
from dcres.storage.format import tables
from dcres.storage.format.host_part import write_memory_tables
from dcres.storage.format.manifest import Manifest
from dcres.storage.store.store import Store
from tests.support.stored import (
    HOSTS,
    begin,
    folder,
    memory,
    placement,
    republish,
    rewritten,
    save,
    take,
)


class Asking:
    """A store of its own for each host; what runs "on a host" finds that host's.

    `dying` is a function that a host dies of: its name, the host, and whether it was done by then.
    """

    def __init__(self, folder: Path) -> None:
        self.stores = {host: Store(folder / host) for host in HOSTS}
        self.dying: tuple[str, str, bool] | None = None
        self._here = threading.local()

    def store(self) -> Store:
        return self.stores[self._here.host]

    def run_on(
        self, host: str, function: Callable[..., Any], *args: Any, timeout_s: float = 0
    ) -> Any:
        self._here.host = host
        if self.dying == (function.__name__, host, False):
            raise ActorGone(f"{host} has died")
        answer = function(*args)
        if self.dying == (function.__name__, host, True):
            raise ActorGone(f"{host} has died")
        return answer


@pytest.fixture
def asking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Asking:
    made = Asking(tmp_path)
    monkeypatch.setattr(catalogue, "_alive", lambda: list(HOSTS))
    monkeypatch.setattr(catalogue, "_store", made.store)
    monkeypatch.setattr(gateway, "run_on", made.run_on)
    monkeypatch.setattr(gateway, "run_apart", made.run_on)
    return made


@pytest.fixture
def stores(asking: Asking) -> dict[str, Store]:
    return asking.stores


@pytest.fixture
def apart(stores: dict[str, Store], tmp_path: Path) -> Manifest:
    """A checkpoint of which every host has its own part, and the main host the manifest."""
    whole = Store(tmp_path / "whole")
    manifest = take(whole, memory(tmp_path / "ram", placement() != tables.NOWHERE))
    for host, store in stores.items():
        begin(store, manifest)
        (folder(whole, manifest) / host).rename(folder(store, manifest) / host)
    stores[HOSTS[0]].publish(manifest, HOSTS[:1])
    return manifest


def folders(stores: dict[str, Store], manifest: Manifest) -> list[str]:
    return [
        host
        for host, store in stores.items()
        if (folder(store, manifest) / host / layout.MEMORY).exists()
    ]


def test_a_checkpoint_is_deleted_everywhere(stores: dict[str, Store], apart: Manifest) -> None:
    assert StoresOfHosts().verify(apart.checkpoint).ok
    StoresOfHosts().delete(apart.checkpoint)
    assert folders(stores, apart) == []
    with pytest.raises(NotFound):
        StoresOfHosts().delete(apart.checkpoint)


def test_what_a_host_keeps_that_does_not_answer_is_told(
    stores: dict[str, Store], apart: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogue, "_alive", lambda: list(HOSTS[:-1]))
    with pytest.raises(OperationFailed, match="not all of its files") as told:
        StoresOfHosts().delete(apart.checkpoint)
    assert list(told.value.failures) == [HOSTS[-1]]
    assert f"remove {apart.vm}/{apart.checkpoint} from its store" in str(told.value)
    assert folders(stores, apart) == [HOSTS[-1]]


def test_a_part_that_is_lost_does_not_keep_the_rest(
    stores: dict[str, Store], apart: Manifest
) -> None:
    shutil.rmtree(folder(stores[HOSTS[-1]], apart))
    StoresOfHosts().delete(apart.checkpoint)
    assert folders(stores, apart) == []


@pytest.mark.parametrize("host", HOSTS)
def test_a_pin_on_one_host_keeps_it_on_all(
    stores: dict[str, Store], apart: Manifest, host: str
) -> None:
    with stores[host].pin(apart.checkpoint), pytest.raises(Conflict, match="is in use"):
        StoresOfHosts().delete(apart.checkpoint)
    assert folders(stores, apart) == list(HOSTS)
    assert StoresOfHosts().verify(apart.checkpoint).ok
    StoresOfHosts().delete(apart.checkpoint)


def test_verified_as_in_one_store(
    stores: dict[str, Store], apart: Manifest, tmp_path: Path
) -> None:
    found = StoresOfHosts().verify(apart.checkpoint)
    one = Store(tmp_path / "one")
    begin(one, apart)
    for host, store in stores.items():
        (folder(store, apart) / host).rename(folder(one, apart) / host)
    one.publish(apart)
    assert found == one.verify(apart.checkpoint)
    assert found.pages == apart.pages


def test_a_page_that_the_placement_gives_another_host_is_found(
    stores: dict[str, Store], apart: Manifest
) -> None:
    where = placement()
    page = int(np.flatnonzero(where == 1)[0])
    where[page] = 2
    main = stores["h0"]
    forged = rewritten(
        main, apart, 0, **{layout.PAGES: lambda path: tables.write_placement(path, where, HOSTS)}
    )
    republish(main, forged)
    assert damage(stores, forged) == f"page {page} was saved by h1 and does not belong to it"


def test_a_page_that_two_hosts_have_is_found(
    stores: dict[str, Store], apart: Manifest, tmp_path: Path
) -> None:
    """Each of the two has whole files that agree with each other."""
    page = int(np.flatnonzero(placement() == 1)[0])
    mask = placement() == 2
    mask[page] = True
    place = folder(stores["h2"], apart) / "h2"
    (place / layout.MEMORY).unlink()
    saved = save(place / layout.MEMORY, tmp_path / "ram", mask)
    part = apart.hosts[2].model_copy(
        update={
            "pages": saved.pages,
            "files": (
                *write_memory_tables(place, saved),
                tables.write_existence(place / layout.PAGES, mask),
            ),
        }
    )
    forged = apart.model_copy(update={"hosts": (*apart.hosts[:2], part)})
    republish(stores["h0"], forged)
    assert damage(stores, forged) == f"page {page} was saved by h2 and does not belong to it"


def damage(stores: dict[str, Store], manifest: Manifest) -> str:
    """What is wrong with the placement; each part by itself is whole."""
    for host, store in stores.items():
        assert store.verify_part(manifest, host).report.ok
    report = StoresOfHosts().verify(manifest.checkpoint)
    ((host, name, problem),) = [
        (file.host, file.name, file.problem) for file in report.files if file.problem
    ]
    assert (host, name) == ("h0", layout.PAGES)
    return problem.split(": ", 1)[1].split(";")[0]


@pytest.mark.parametrize("order", [HOSTS, HOSTS[::-1]], ids=["main first", "main last"])
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("name", ["_is_published", "_require_unpinned", "_delete"])
def test_a_deletion_that_fails_leaves_no_half_of_a_checkpoint(
    name: str,
    host: str,
    late: bool,
    order: tuple[str, ...],
    asking: Asking,
    apart: Manifest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whichever host fails, and when: all of it is listed, or none."""
    monkeypatch.setattr(catalogue, "_alive", lambda: list(order))
    asking.dying = (name, host, late)
    # The main host's store has the manifest: nobody else is asked for it then.
    asked = name != "_is_published" or order.index(host) <= order.index(HOSTS[0])
    with pytest.raises((ActorGone, OperationFailed), match=host) if asked else nullcontext():
        StoresOfHosts().delete(apart.checkpoint)
    asking.dying = None
    listed = [entry.checkpoint for entry in StoresOfHosts().list()]
    begun = not asked or (name == "_delete" and (host, late) != (HOSTS[0], False))
    assert listed == ([] if begun else [apart.checkpoint])
    if not begun:
        assert StoresOfHosts().verify(apart.checkpoint).ok
    elif host != HOSTS[0]:  # the others are rid of theirs all the same
        assert folders(asking.stores, apart) == ([host] if asked and not late else [])


def test_a_main_host_that_dies_in_the_middle_has_nothing_that_is_listed(
    asking: Asking, apart: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files are still there, its manifest is not; its next start sweeps them."""

    def die(folder: CheckpointFolder) -> None:
        raise OSError(errno.EIO, "the disk is gone")

    with monkeypatch.context() as broken:
        broken.setattr(CheckpointFolder, "remove", die)
        with pytest.raises(OSError, match="the disk is gone"):
            StoresOfHosts().delete(apart.checkpoint)
    assert StoresOfHosts().list() == []
    assert folders(asking.stores, apart) == list(HOSTS)
    assert asking.stores[HOSTS[0]].sweep(apart.vm) == [apart.checkpoint]


def test_every_host_says_what_it_has(stores: dict[str, Store], apart: Manifest) -> None:
    assert [store.parts_here(apart) for store in stores.values()] == [("h0",), ("h1",), ("h2",)]
