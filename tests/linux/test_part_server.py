"""Part servers: the pages of a checkpoint, verified, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dcres.actors.host.daemon import Daemon
from dcres.actors.host.vm_folder import VmFolder
from dcres.errors import CheckpointCorrupt, Conflict, NotFound
from dcres.linux.files import opened
from dcres.model import wire
from dcres.model.handshake import Role
from dcres.model.pages import PAGE_SIZE, Extents, extents_of_mask
from dcres.model.wire import Endpoint, Kind
from dcres.paging import settings
from dcres.paging.settings import SubAddress
from dcres.paging.transport.puller import pull
from dcres.storage import layout
from dcres.storage.format import tables
from dcres.storage.format.manifest import Manifest
from dcres.storage.store.store import Store
from tests.support.servers import (
    ME,
    Client,
    Server,
    Target,
    ended,
    extents,
    memory_server,
    part_server,
    slice_settings,
)
from tests.support.speed import patience
from tests.support.stored import PAGE_COUNT, memory, placement, take
from tests.support.wait import until

pytestmark = pytest.mark.linux


@pytest.fixture
def stored(tmp_path: Path) -> tuple[Store, Manifest, bytes]:
    """A checkpoint, and the memory that it is of."""
    store = Store(tmp_path / "store")
    ram = memory(tmp_path / "ram", placement() != tables.NOWHERE)
    manifest = take(store, ram)
    store.publish(manifest)
    return store, manifest, ram.read_bytes()


@pytest.fixture
def serving(tmp_path: Path, stored: tuple[Store, Manifest, bytes]) -> Iterator[Server]:
    """A part server of the main host's part and of one more."""
    store, manifest, _ = stored
    parts = ("h0", "h2")
    chosen = slice_settings(tmp_path, "parts", store, manifest, parts)
    with part_server(tmp_path, "parts", chosen) as server:
        yield server


SERVED = (placement() == 0) | (placement() == 2)


def at(memory: bytes, which: Extents) -> bytes:
    return b"".join(memory[a * PAGE_SIZE : b * PAGE_SIZE] for a, b in which.tolist())


def test_the_parts_of_a_checkpoint_are_served(
    serving: Server, stored: tuple[Store, Manifest, bytes]
) -> None:
    ram, which = stored[2], extents_of_mask(SERVED)
    with (
        Client(serving) as pager,
        Client(serving) as second,
        Client(serving, Role.READER) as reader,
    ):
        assert extents(*pager.here()).tolist() == which.tolist()
        assert pager.page_in(which[:3]) == at(ram, which[:3])
        found, data = reader.peek(np.array([[0, PAGE_COUNT]]))
        assert found.tolist() == which.tolist()
        assert data == at(ram, which)
        pager.release(which)
        assert second.page_in(which[:1]) == at(ram, which[:1])
        assert serving.status()["pagers"] == 2
    target = Target(PAGE_COUNT)
    pull(serving.address, ME, PAGE_COUNT, which, target.write)
    assert at(bytes(target.data), which) == at(ram, which)


def test_a_memory_server_fetches_from_it(
    serving: Server, tmp_path: Path, stored: tuple[Store, Manifest, bytes]
) -> None:
    which = extents_of_mask(SERVED)
    with memory_server(tmp_path, "sub", PAGE_COUNT) as sub, Client(sub) as pager:
        stored_ = pager.fetched(pager.fetch(serving.endpoint, np.array([[0, PAGE_COUNT]])))
        assert extents(*stored_).tolist() == which.tolist()
        assert pager.page_in(which) == at(stored[2], which)


@pytest.mark.parametrize(
    ("kind", "payload", "text"),
    [
        (Kind.PAGE_OUT, wire.pack_run(0, 1) + b"\1", b"takes no pages"),
        (Kind.FETCH, wire.pack_fetch(Endpoint("::1", 1), extents(1)), b"fetches no pages"),
    ],
)
def test_it_takes_nothing(serving: Server, kind: Kind, payload: bytes, text: bytes) -> None:
    with Client(serving) as pager:
        pager.tell(kind, payload)
        assert b"ProtocolError: a part server " + text == ended(pager)


def test_pages_of_other_parts_are_not_here(serving: Server) -> None:
    which = extents_of_mask(placement() == 1)
    with Client(serving) as pager:
        pager.tell(Kind.PAGE_IN, wire.pack_extents(which[:1]))
        assert ended(pager).startswith(b"PagesLost: ")
    assert serving.status()["trouble"] == ""


def test_a_flipped_bit_is_named_and_not_sent(
    serving: Server, tmp_path: Path, stored: tuple[Store, Manifest, bytes]
) -> None:
    store, manifest, _ = stored
    page = int(np.flatnonzero(placement() == 2)[5])
    path = store.root / manifest.vm / manifest.checkpoint / "h2" / layout.MEMORY
    with opened(path, os.O_RDWR) as fd:
        byte = os.pread(fd, 1, page * PAGE_SIZE + 99)
        os.pwrite(fd, bytes([byte[0] ^ 16]), page * PAGE_SIZE + 99)
    sentence = f"{path}: page {page} was altered: its checksum differs"
    target = Target(PAGE_COUNT)
    with pytest.raises(CheckpointCorrupt, match=f"parts reports: {sentence}"):
        pull(serving.address, ME, PAGE_COUNT, extents_of_mask(SERVED), target.write)
    assert target.pages == []
    assert sentence in serving.status()["trouble"]
    with memory_server(tmp_path, "sub", PAGE_COUNT) as sub, Client(sub) as pager:
        assert pager.fetched(pager.fetch(serving.endpoint, extents_of_mask(SERVED))) == []
        good = extents_of_mask(placement() == 0)
        assert len(pager.fetched(pager.fetch(serving.endpoint, good))) == manifest.main.pages


def test_a_served_checkpoint_cannot_be_deleted(
    serving: Server, stored: tuple[Store, Manifest, bytes]
) -> None:
    store, manifest, _ = stored
    with pytest.raises(Conflict, match="is in use"):
        store.delete(manifest.checkpoint)
    assert store.verify(manifest.checkpoint).ok
    serving.process.terminate()
    serving.process.wait(patience(10))
    store.delete(manifest.checkpoint)


def test_a_part_server_is_found_where_it_was(
    tmp_path: Path, stored: tuple[Store, Manifest, bytes]
) -> None:
    store, manifest, ram = stored
    folder = VmFolder(tmp_path / "run", tmp_path / "mem")
    folder.make()
    daemon = Daemon("dcres.actors.host.part_server", folder, "parts")
    chosen = slice_settings(folder.run, "parts", store, manifest, ("h0", "h1", "h2"))
    path = folder.run / "parts.json"
    settings.save(chosen, path)
    daemon.start()
    try:
        first = daemon.call("status")
        settings.save(replace(chosen, port=first["port"]), path)
        os.kill(first["pid"], 9)
        until(lambda: daemon.restarts == 1, what="it is started again")
        assert daemon.call_patiently("status")["port"] == first["port"]
        with pytest.raises(Conflict):
            store.delete(manifest.checkpoint)
        whole, target = extents_of_mask(placement() != tables.NOWHERE), Target(PAGE_COUNT)
        address = SubAddress("here", "127.0.0.1", first["port"], 0)
        pull(address, ME, PAGE_COUNT, whole, target.write)
        assert bytes(target.data) == ram
    finally:
        daemon.stop()


def test_a_page_is_not_served_from_two_files(
    tmp_path: Path, stored: tuple[Store, Manifest, bytes]
) -> None:
    store, manifest, _ = stored
    chosen = slice_settings(tmp_path, "bad", store, manifest, ("h0", "h0"))
    text = "is in another memory file as well"
    with pytest.raises(AssertionError, match=text), part_server(tmp_path, "bad", chosen):
        pass
    store.delete(manifest.checkpoint)
    with pytest.raises(NotFound), store.pin(manifest.checkpoint):
        pass
