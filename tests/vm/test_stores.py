"""A VM and its store: what else is done there meanwhile, whose name it is, and one to read only."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest

from dcres.actors.control.coordinator import Coordinator
from dcres.actors.host.agent import HostAgent
from dcres.api.status import status_of
from dcres.errors import Conflict, NameTaken, OperationFailed, StoreReadOnly
from dcres.linux.marks import MARK
from dcres.linux.process import ProcessId
from dcres.storage import layout
from dcres.storage.format.manifest import Manifest, dumps
from dcres.storage.store.store import Store
from tests.support.fleet import LocalFleet, real_hosts
from tests.support.vm import Rig, await_checks, restart_main, rig, spec_of
from tests.support.wait import until

pytestmark = pytest.mark.vm

SPEC = spec_of(fill=8)


class Disturbed(HostAgent):
    """A main host in whose store somebody does something before it publishes."""

    disturb: ClassVar[Callable[[Path], object] | None] = None

    def perform(
        self, group: str, order: str, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        if order == "publish" and Disturbed.disturb is not None:
            disturb, Disturbed.disturb = Disturbed.disturb, None
            disturb(self.site.store.root / "vm" / str(self.site.state.require().checkpoint))
        return super().perform(group, order, args, kwargs)


@pytest.fixture(scope="module")
def vm() -> Iterator[Rig]:
    with rig(main=Disturbed) as made:
        made.boot(SPEC)
        yield made


@pytest.fixture(scope="module")
def taken(vm: Rig) -> Manifest:
    return vm.checkpoint()


@contextmanager
def another_cluster(
    vm: Rig, store: Path, shared: str = ""
) -> Iterator[tuple[LocalFleet, Coordinator]]:
    """Hosts of another one, whose checkpoints go to `store`; host `shared` has the VM's folders."""
    settings = {
        name: each.model_copy(
            update={
                "run": vm.folder / "another" / name,
                "ram": vm.ram / f"another-{name}",
                "store": store,
            }
        )
        if name != shared
        else each
        for name, each in vm.settings.items()
    }
    fleet = real_hosts(settings)
    fleet.name = "another"
    coordinator = Coordinator("vm", fleet)
    try:
        yield fleet, coordinator
    finally:
        coordinator.stop()


def test_nobody_takes_the_files_of_a_checkpoint_under_way(vm: Rig) -> None:
    disturbed = []

    def disturb(folder: Path) -> None:
        disturbed.append(folder)
        other = Store(vm.store.root)
        assert other.sweep("vm") == other.sweep("vm", whole_parts=False) == []
        with pytest.raises(Conflict, match="in use"):
            other.discard("vm", folder.name)

    Disturbed.disturb = disturb
    manifest = vm.checkpoint()
    assert [folder.name for folder in disturbed] == [manifest.checkpoint]
    assert vm.store.verify(manifest.checkpoint).ok
    vm.store.delete(manifest.checkpoint)  # it is pinned no longer


@pytest.mark.parametrize("lost", ["h0/{}.pack", "h1/{}.pack", "h2"])
def test_what_lost_a_file_after_the_votes_is_not_published(vm: Rig, lost: str) -> None:
    before = vm.listed()

    def disturb(folder: Path) -> None:
        path = folder / lost.format(folder.name.removeprefix("vm-"))
        path.rename(folder.with_name("aside"))

    Disturbed.disturb = disturb
    with pytest.raises(OperationFailed, match="is not published") as caught:
        vm.coordinator.checkpoint()
    assert lost.partition("{}")[2] in str(caught.value)
    assert "the VM goes on" in str(caught.value)
    assert vm.listed() == before
    subprocess.run(["rm", "-r", vm.store.root / "vm" / "aside"], check=True)
    await_checks(vm.console)
    assert vm.store.verify(vm.checkpoint().checkpoint).ok


def test_a_name_is_one_cluster_s(vm: Rig, taken: Manifest) -> None:
    """As long as its QEMU runs, whatever becomes of the actors."""
    with another_cluster(vm, vm.store.root) as (fleet, other):
        with pytest.raises(NameTaken, match=r"another cluster, which runs on host h0"):
            other.restore(dumps(taken), take_over=True)
        assert fleet.reserved == {}
        restart_main(vm)
        # A new VM does without the name, and says so, until the other has ended.
        (main, *_) = other.start(SPEC, take_over=True)["hosts"]
        words = r"no checkpoint: .*another cluster, which runs on host h0"
        assert re.search(words, main["unclaimed"])
        with pytest.raises(OperationFailed, match="another cluster"):
            other.checkpoint()
        assert vm.store.verify(vm.checkpoint().checkpoint).ok
        qemu = ProcessId.of(vm.coordinator.status()["hosts"][0]["qemu_pid"])
        assert qemu is not None
        qemu.kill()
        assert qemu.wait_gone(20)
        assert vm.store.verify(other.checkpoint()["checkpoint"]).ok
        assert other.status()["hosts"][0]["unclaimed"] == ""
        with pytest.raises(Conflict, match="runs on host h0"):
            vm.restore(taken)
        other.stop()
    vm.restore(taken)
    await_checks(vm.console)


def marks_held(pid: int) -> list[str]:
    """The marks of folders that a process has open, as it inherited them."""
    opened = [os.readlink(each) for each in Path(f"/proc/{pid}/fd").iterdir()]
    return [each for each in opened if Path(each).name == MARK]


@pytest.mark.parametrize(
    ("shared", "hosts"),
    [
        pytest.param("h0", ("h0", "h1", "h2"), id="main-main"),
        pytest.param("h0", ("h1", "h0", "h2"), id="main-sub"),
        pytest.param("h1", ("h1", "h0", "h2"), id="sub-main"),
        pytest.param("h1", ("h0", "h1", "h2"), id="sub-sub"),
    ],
)
def test_the_folders_of_a_vm_are_one_cluster_s(
    vm: Rig, taken: Manifest, shared: str, hosts: tuple[str, ...]
) -> None:
    """One host has the same DCRES_RUN in both clusters: nothing there is ended, nor elsewhere."""
    running = vm.running()
    assert [len(marks_held(pid)) for pid in running] == [2] * 4, "QEMU, pager, two memory servers"
    place = re.escape(str(vm.settings[shared].run / "vm"))
    words = rf"VM vm of another cluster .* host {shared} .*{place} .*DCRES_RUN.*`dcres stop vm`"
    with another_cluster(vm, vm.store.root, shared) as (fleet, other):
        for take_over in (False, True):
            with pytest.raises(Conflict, match=words):
                other.start(SPEC, hosts, take_over=take_over)
            with pytest.raises(Conflict, match=words):
                other.restore(dumps(taken), hosts=hosts, take_over=take_over)
        assert fleet.reserved == {}
        fleet.sweep("vm", shared)
        other.stop()
        assert vm.running() == running
        restart_main(vm)  # its own actors take it up, as ever
        assert vm.agent(0).site.folder.held
        for index in range(1, 3):
            vm.sub(index).server.daemon._wanted = False
            vm.fleet.actor("vm", index).restart()
        with pytest.raises(Conflict, match=words):
            other.start(SPEC, hosts)
    await_checks(vm.console)
    assert vm.store.verify(vm.checkpoint().checkpoint).ok
    assert vm.running() == running


def test_a_former_life_takes_no_checkpoint(vm: Rig) -> None:
    """Another one has begun, on storage whose locks do not show that this one runs."""
    counter = vm.store.root / "vm" / layout.GENERATION
    known, before = counter.read_text(), vm.listed()
    counter.write_text("1000\n")
    try:
        with pytest.raises(OperationFailed, match="is over: generation 1000 has begun"):
            vm.coordinator.checkpoint()
    finally:
        counter.write_text(known)
    assert vm.listed() == before
    Disturbed.disturb = lambda folder: counter.write_text("1000\n")
    try:
        with pytest.raises(OperationFailed, match="is over"):
            vm.coordinator.checkpoint()
    finally:
        counter.write_text(known)
    assert vm.listed() == before
    vm.checkpoint()


@contextmanager
def read_only(store: Path, at: Path) -> Iterator[Path]:
    at.mkdir()
    subprocess.run(["mount", "--bind", store, at], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", at], check=True)
        yield at
    finally:
        umount = ["umount", str(at)]
        until(lambda: subprocess.run(umount).returncode == 0, 30, "nobody has files there")


@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
def test_a_restore_from_a_store_to_read_only(
    vm: Rig, taken: Manifest, tmp_path: Path, lazy: bool
) -> None:
    vm.coordinator.stop()
    tree = sorted(path for path in vm.store.root.rglob("*"))
    with (
        read_only(vm.store.root, tmp_path / "store") as store,
        another_cluster(vm, store) as (_, other),
    ):
        with pytest.raises(StoreReadOnly, match=r"manifest\.json cannot be written"):
            Store(store).delete(taken.checkpoint)
        generations: list[int] = []
        for _ in range(2):
            other.restore(dumps(taken), lazy=lazy)
            generations.append(other.status()["generation"])
            console = Path(other.status()["hosts"][0]["console"])
            await_checks(console)
            assert "no checkpoint: " in (why := status_of(other.status()).why)
            assert why.startswith("no record says that it is to be running; ")
            assert why.endswith("(Read-only file system); make the store writable")
            with pytest.raises(OperationFailed, match="Read-only file system") as caught:
                other.checkpoint()
            assert "make the store writable" in str(caught.value)
            assert "the VM goes on" in str(caught.value)
            if len(generations) < 2:
                other.stop()
        assert taken.generation < generations[0] < generations[1]
        assert sorted(path for path in vm.store.root.rglob("*")) == tree
        subprocess.run(["mount", "-o", "remount,bind,rw", store], check=True)
        until(lambda: not other.status()["hosts"][0]["bringing_in"], 60, "all pages are there")
        saved = other.checkpoint()["checkpoint"]
        assert vm.store.verify(saved).ok
        assert vm.store.get(saved).generation == generations[1]
        assert status_of(other.status()).why == ""
        with pytest.raises(Conflict, match="another cluster"):
            vm.restore(taken)
    vm.restore(taken)
