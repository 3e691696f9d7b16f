"""Serving parts of a checkpoint, as far as no process is needed for it."""

from __future__ import annotations

import errno
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from dcres.actors.host.agent import HostAgent
from dcres.actors.host.daemon import Daemon
from dcres.actors.host.roles import MainRole
from dcres.actors.host.vm_folder import VmFolder
from dcres.actors.messages import ClaimOrder, Incarnation, PartsOrder, Role, RunOrder
from dcres.config import HostSettings, vm_spec
from dcres.errors import Conflict, QemuFailed
from dcres.paging import settings as paging_settings
from dcres.storage import layout
from dcres.storage.format import tables
from dcres.storage.format.manifest import Manifest, dumps
from dcres.storage.store.store import Store
from dcres.vm import accel
from tests.support.servers import slice_settings
from tests.support.stored import folder, memory, placement, take
from tests.support.wait import until

SHARES = {"main": "384KiB"}


@pytest.fixture
def settings(tmp_path: Path) -> HostSettings:
    return HostSettings(
        name="h0", run=tmp_path / "run", ram=tmp_path / "ram", store=tmp_path / "store"
    )


@pytest.fixture
def stored(settings: HostSettings, tmp_path: Path) -> Manifest:
    manifest = take(
        Store(settings.store), memory(tmp_path / "memory", placement() != tables.NOWHERE)
    )
    Store(settings.store).publish(manifest)
    return manifest


def main_role(settings: HostSettings) -> MainRole:
    main = HostAgent("demo", Role.MAIN, environ=settings.environ()).composed
    assert isinstance(main, MainRole)
    return main


def is_kept(store: Store, manifest: Manifest) -> bool:
    try:
        store.require_unpinned(manifest.checkpoint)
    except Conflict:
        return True
    return False


def test_parts_are_not_served_after_the_end(settings: HostSettings, stored: Manifest) -> None:
    """An order that is overtaken by the end must leave nothing running."""
    host = HostAgent("vm", Role.PARTS, environ=settings.environ()).parts
    host.end_serving_parts()
    with pytest.raises(Conflict, match="ended before its parts were served"):
        host.serve_parts(PartsOrder(Incarnation("vm", 1, "5e" * 32), dumps(stored), ("h0",)))
    assert not settings.run.exists()


def test_a_checkpoint_that_is_asked_for_is_kept_to_the_end(
    settings: HostSettings, stored: Manifest
) -> None:
    store = Store(settings.store)
    host = HostAgent("vm", Role.PARTS, environ=settings.environ()).parts
    assert "h0" in host.parts_here(dumps(stored))
    host.read_main_part(dumps(stored))
    assert is_kept(store, stored)
    host.end_serving_parts()
    assert not is_kept(store, stored)
    with pytest.raises(Conflict, match="was ended before"):
        host.read_main_part(dumps(stored))


def test_an_actor_that_is_started_again_keeps_the_checkpoint(
    settings: HostSettings, stored: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its part server may be dead, and the guest still needs what it will serve."""
    monkeypatch.setattr(Daemon, "adopt", lambda daemon: None)
    store, folder = Store(settings.store), VmFolder.of(settings, "vm.parts")
    folder.make()
    chosen = slice_settings(folder.run, "parts", store, stored, ("h0",))
    paging_settings.save(chosen, folder.run / "parts.json")
    host = HostAgent("vm", Role.PARTS, environ=settings.environ()).parts
    until(lambda: is_kept(store, stored), 10, "it is pinned")
    host.end_serving_parts()
    assert not is_kept(store, stored)


def test_what_an_earlier_life_kept_is_let_go_of(settings: HostSettings, stored: Manifest) -> None:
    store = Store(settings.store)
    agent = HostAgent("vm", Role.SUB, environ=settings.environ())
    host = agent.parts
    assert host.parts_here(dumps(stored))
    assert is_kept(store, stored)
    agent.perform("presence", "clear", (False,), {})
    assert not is_kept(store, stored)
    assert host.parts_here(dumps(stored)), "and the next may be kept"
    assert is_kept(store, stored)
    host.end_serving_parts()


def test_a_manifest_that_is_not_durable_is_not_told_as_published(
    settings: HostSettings, stored: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = main_role(settings).saving
    assert host.published(stored.checkpoint)

    def refused(path: Path) -> None:
        raise OSError(errno.EIO, "of the disk", str(path))

    monkeypatch.setattr("dcres.storage.store.store.sync_folder", refused)
    with pytest.raises(OSError, match="of the disk"):
        host.published(stored.checkpoint)


def test_a_start_sweeps_nothing_that_may_be_published(
    settings: HostSettings, stored: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On network storage the manifest of another host may not be seen here yet."""
    store = Store(settings.store)
    (folder(store, stored) / layout.MANIFEST).unlink()
    half = folder(store, stored).with_name("demo-20260301-130000-0000")
    (half / "h0").mkdir(parents=True)

    def nothing_more(*_: object) -> None:
        raise QemuFailed("that was all")

    monkeypatch.setattr(accel, "choose", nothing_more)
    kernel = settings.store / "kernel"
    kernel.write_bytes(b"")
    spec = vm_spec({"name": "demo", "memory": "384KiB", "kernel": str(kernel), "layout": SHARES})
    with TemporaryDirectory(prefix="dcres-t-", dir="/dev/shm") as ram:
        own = settings.model_copy(update={"ram": Path(ram)})
        host = main_role(own)
        incarnation = Incarnation("demo", host.machine.claim(ClaimOrder("test")), "5e" * 32)
        order = RunOrder(incarnation, spec, ("h0",), (), None)
        with pytest.raises(QemuFailed, match="that was all"):
            host.machine.boot(order)
        host.presence.destroy()
    assert folder(store, stored).is_dir()
    assert not half.exists()
