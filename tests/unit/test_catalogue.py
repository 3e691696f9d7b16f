"""Checkpoints over the stores of several hosts, with the hosts played by folders."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dcres.actors import _ray
from dcres.api import catalogue
from dcres.api.catalogue import StoresOfHosts
from dcres.errors import Conflict, NotFound
from dcres.storage import layout, tables
from dcres.storage.manifest import Manifest
from dcres.storage.slices import write_memory_tables
from dcres.storage.store import Store
from tests.support.stored import (
    HOSTS,
    folder,
    memory,
    placement,
    republish,
    rewritten,
    save,
    take,
)


@pytest.fixture
def stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Store]:
    """A store of its own for each host; what runs "on a host" finds that host's."""
    found = {host: Store(tmp_path / host) for host in HOSTS}
    here = threading.local()

    def run_on(host: str, function: Callable[..., Any], *args: Any, timeout_s: float = 0) -> Any:
        here.host = host
        return function(*args)

    monkeypatch.setattr(catalogue, "_alive", lambda: list(HOSTS))
    monkeypatch.setattr(catalogue, "_store", lambda: found[here.host])
    monkeypatch.setattr(_ray, "run_on", run_on)
    monkeypatch.setattr(_ray, "run_apart", run_on)
    return found


@pytest.fixture
def apart(stores: dict[str, Store], tmp_path: Path) -> Manifest:
    """A checkpoint of which every host has its own part, and the main host the manifest."""
    whole = Store(tmp_path / "whole")
    manifest = take(whole, memory(tmp_path / "ram", placement() != tables.NOWHERE))
    for host, store in stores.items():
        store.begin(manifest.vm, manifest.checkpoint)
        (folder(whole, manifest) / host).rename(folder(store, manifest) / host)
    stores[HOSTS[0]].publish(manifest)
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
    one.begin(apart.vm, apart.checkpoint)
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
    assert damage(stores, forged) == f"page {page} was saved by h1 and is not its"


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
    assert damage(stores, forged) == f"page {page} was saved by h2 and is not its"


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


def test_every_host_says_what_it_has(stores: dict[str, Store], apart: Manifest) -> None:
    assert [store.parts_here(apart) for store in stores.values()] == [("h0",), ("h1",), ("h2",)]
