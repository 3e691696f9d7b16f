"""Checkpoints over the stores of several hosts, with the hosts played by folders."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dcres.actors import _ray
from dcres.api import catalogue
from dcres.api.catalogue import StoresOfHosts
from dcres.errors import Conflict, NotFound
from dcres.storage import layout, tables
from dcres.storage.manifest import Manifest
from dcres.storage.store import Store
from tests.support.stored import HOSTS, memory, placement, take


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
        folder = store.begin(manifest.vm, manifest.checkpoint)
        (whole.root / manifest.vm / manifest.checkpoint / host).rename(folder / host)
    stores[HOSTS[0]].publish(manifest)
    return manifest


def folders(stores: dict[str, Store], manifest: Manifest) -> list[str]:
    return [
        host
        for host, store in stores.items()
        if (store.root / manifest.vm / manifest.checkpoint / host / layout.MEMORY).exists()
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


def test_every_host_says_what_it_has(stores: dict[str, Store], apart: Manifest) -> None:
    assert [store.parts_here(apart) for store in stores.values()] == [("h0",), ("h1",), ("h2",)]
