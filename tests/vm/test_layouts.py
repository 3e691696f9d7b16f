"""A checkpoint restored on other hosts than its own: more of them, fewer, eagerly and lazily."""

from __future__ import annotations

import os
import shutil
import signal
import threading

import pytest

from dcres.actors.control import asking
from dcres.actors.host.roles import SubRole
from dcres.config import Layout
from dcres.errors import Conflict, DcresError, NotFound
from dcres.linux.process import find_marked
from dcres.storage.format.manifest import Manifest
from dcres.storage.store.store import Store
from tests.support.speed import patience
from tests.support.vm import (
    PAGE_BYTES,
    Rig,
    await_checks,
    keeps_checking,
    rig,
    spec_of,
    total_bytes,
)
from tests.support.wait import until

pytestmark = [pytest.mark.vm, pytest.mark.linux]

MIB = 1 << 20


def layout_of(main: str, *subs: str) -> Layout:
    return Layout.model_validate({"main": main, "subs": subs})


def whole(vm: Rig) -> bool:
    return not vm.coordinator.status()["hosts"][0]["moving"]


def shares_kept(vm: Rig, layout: Layout) -> bool:
    """No host has more than it may, but for what the pager's slack allows."""
    hosts = vm.coordinator.status()["hosts"]
    held = [hosts[0]["pages"][0], *(each["held_pages"] for each in hosts[1:])]
    pairs = zip(held, layout.shares, strict=True)
    return all(pages * PAGE_BYTES <= share + MIB for pages, share in pairs)


def require_shares_kept(vm: Rig, layout: Layout) -> None:
    until(lambda: shares_kept(vm, layout), 30, "no host has more than its share")


def restored(vm: Rig, manifest: Manifest, layout: Layout, hosts: list[str], lazy: bool) -> None:
    """Restore, and see the witness go on; then every page is where the layout wants it."""
    vm.coordinator.stop()
    facts = vm.restore(manifest, layout=layout, hosts=hosts, lazy=lazy)
    assert [each["host"] for each in facts["layout"]] == hosts
    assert sum(each["pages"] for each in facts["layout"]) == manifest.pages
    assert facts["pages_moved"] > 0
    await_checks(vm.console, 3)
    until(lambda: whole(vm), 60, "every page is with its host")
    require_shares_kept(vm, layout)
    keeps_checking(vm.console, 1)


@pytest.fixture(scope="module")
def saved() -> object:
    """A VM over three hosts with stores of their own, and its checkpoint."""
    with rig(hosts=4, private=True) as vm:
        vm.boot(spec_of(fill=96, pause_s=0.1))
        yield vm, vm.checkpoint()


CASES = {
    "3 to 3": (layout_of("96MiB", "64MiB", "64MiB"), ["h3", "h0", "h1"]),
    "3 to 2": (layout_of("128MiB", "96MiB"), ["h1", "h3"]),
    "3 to 1": (layout_of("192MiB"), ["h3"]),
    "3 to 4": (layout_of("56MiB", "24MiB", "96MiB", "40MiB"), ["h2", "h3", "h0", "h1"]),
}


@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
@pytest.mark.parametrize("case", CASES)
def test_a_restore_into_another_layout(saved: tuple[Rig, Manifest], case: str, lazy: bool) -> None:
    vm, manifest = saved
    layout, hosts = CASES[case]
    restored(vm, manifest, layout, hosts, lazy)


def test_a_lazily_restored_guest_is_checkpointed_before_all_its_pages_are_there(
    saved: tuple[Rig, Manifest],
) -> None:
    vm, manifest = saved
    vm.coordinator.stop()
    layout = layout_of("64MiB", "64MiB", "96MiB")
    vm.restore(manifest, layout=layout, hosts=["h3", "h1", "h0"], lazy=True)
    text = saved_on(vm, "h3")
    vm.coordinator.stop()
    vm.coordinator.restore(text)
    keeps_checking(vm.console, 1)


def test_what_a_lazy_restore_reads_from_cannot_be_deleted(saved: tuple[Rig, Manifest]) -> None:
    vm, manifest = saved
    vm.coordinator.stop()
    layout = layout_of("64MiB", "128MiB")
    vm.restore(manifest, layout=layout, hosts=["h3", "h1"], lazy=True)
    with pytest.raises(Conflict, match="in use"):
        vm.store.delete(manifest.checkpoint)
    until(lambda: whole(vm), 60, "every page is with its host")
    await_checks(vm.console, 2)
    assert manifest.checkpoint in vm.listed()


@pytest.mark.parametrize("victim", ["part server", "pager"])
def test_what_dies_while_pages_come_is_started_again(
    saved: tuple[Rig, Manifest], victim: str
) -> None:
    vm, manifest = saved
    vm.coordinator.stop()
    layout = layout_of("64MiB", "64MiB", "64MiB")
    vm.restore(manifest, layout=layout, hosts=["h3", "h1", "h0"], lazy=True)
    pager = vm.coordinator.status()["hosts"][0]["pid"]
    for process in [pager] if victim == "pager" else part_servers(vm):
        os.kill(process, signal.SIGKILL)
    until(lambda: whole(vm), 60, "every page is with its host")
    require_shares_kept(vm, layout)
    keeps_checking(vm.console, 1)


def part_servers(vm: Rig) -> list[int]:
    """Processes that serve parts, on any host."""
    return [pid for pid, command in vm.running().items() if "part_server" in command]


def shape(vm: Rig) -> object:
    """Who has how much, and what is set aside for it."""
    status = vm.coordinator.status()
    main, *subs = status["hosts"]
    capacities = [each["capacity_pages"] for each in subs]
    reserved = dict(vm.fleet.reserved["vm"]), dict(vm.fleet.extra)
    return status["phase"], main["limit_pages"], capacities, main["moving"], reserved


def test_sub_hosts_join_grow_and_leave_while_the_guest_runs(saved: tuple[Rig, Manifest]) -> None:
    vm, manifest = saved
    vm.coordinator.stop()
    vm.restore(manifest, layout=layout_of("64MiB", "64MiB", "64MiB"), hosts=["h0", "h1", "h2"])
    await_checks(vm.console)
    shares = [total_bytes(size) for size in ("48MiB", "80MiB", "96MiB")]
    before = shape(vm)
    foreseen = vm.coordinator.plan_resize(None, shares)
    assert shape(vm) == before, "it was only asked"
    assert foreseen.problem == ""
    assert [host for host, *_ in foreseen.hosts] == ["h0", "h1", "h2", "h3"]
    status = vm.coordinator.resize(None, shares)
    assert [each["host"] for each in status["hosts"]] == ["h0", "h1", "h2", "h3"]
    keeps_checking(vm.console, 1)
    status = vm.coordinator.drain("h1")
    assert [each["host"] for each in status["hosts"]] == ["h0", "h2", "h3"]
    require_shares_kept(vm, layout_of("64MiB", "80MiB", "96MiB"))
    keeps_checking(vm.console, 1)
    text = saved_on(vm, "h0")
    vm.coordinator.stop()
    vm.coordinator.restore(text)
    keeps_checking(vm.console, 1)


def test_all_sub_hosts_leave(saved: tuple[Rig, Manifest]) -> None:
    vm, manifest = saved
    vm.coordinator.stop()
    vm.restore(manifest, layout=layout_of("96MiB", "64MiB", "64MiB"), hosts=["h0", "h1", "h2"])
    foreseen = vm.coordinator.plan_resize(total_bytes("192MiB"), [])
    held = sum(each["held_pages"] for each in vm.coordinator.status()["hosts"][1:])
    assert {each.target for each in foreseen.flows} == {"h0"}
    moving = sum(each.pages for each in foreseen.flows)
    assert abs(moving - held) < held // 4, "the guest goes on meanwhile"
    status = vm.coordinator.resize(total_bytes("192MiB"), [])
    assert [each["host"] for each in status["hosts"]] == ["h0"]
    keeps_checking(vm.console, 1)


def test_a_sub_host_that_the_others_have_no_room_for_stays(saved: tuple[Rig, Manifest]) -> None:
    vm, manifest = saved
    vm.coordinator.stop()
    vm.restore(manifest, layout=layout_of("64MiB", "64MiB", "64MiB"), hosts=["h0", "h1", "h2"])
    with pytest.raises(DcresError, match="64 MiB more") as refused:
        vm.coordinator.drain("h1")
    assert vm.coordinator.plan_drain("h1").problem == str(refused.value)
    with pytest.raises(NotFound, match="no sub host"):
        vm.coordinator.drain("h0")
    keeps_checking(vm.console, 1)


def test_an_ordinary_vm_gets_sub_hosts_while_it_runs(saved: tuple[Rig, Manifest]) -> None:
    vm, manifest = saved
    vm.coordinator.stop()
    vm.restore(manifest, layout=layout_of("192MiB"), hosts=["h3"])
    await_checks(vm.console)
    shares = (total_bytes("64MiB"), [total_bytes("80MiB")] * 2)
    foreseen = vm.coordinator.plan_resize(*shares)
    (here,) = vm.coordinator.status()["hosts"][0]["pages"]
    status = vm.coordinator.resize(*shares)
    assert [each["host"] for each in status["hosts"]] == [host for host, *_ in foreseen.hosts]
    assert [each.target for each in foreseen.flows] == ["h0", "h1"]
    left = here - sum(each.pages for each in foreseen.flows)
    assert 60 * MIB < left * PAGE_BYTES <= 64 * MIB, "as much as it keeps of its share"
    layout = layout_of("64MiB", "80MiB", "80MiB")
    until(lambda: shares_kept(vm, layout), 30, "page-out has come to rest")
    keeps_checking(vm.console, 3)
    os.kill(vm.coordinator.status()["hosts"][0]["pid"], signal.SIGKILL)
    keeps_checking(vm.console, 1)


def saved_on(vm: Rig, main: str) -> str:
    """The manifest of a live checkpoint of what runs there."""
    checkpoint = vm.coordinator.checkpoint("live")["checkpoint"]
    return (vm.settings[main].store / "vm" / checkpoint / "manifest.json").read_text()


MORE_HOSTS = {
    "1 to 3": (layout_of("192MiB"), layout_of("64MiB", "48MiB", "80MiB")),
    "2 to 4": (layout_of("64MiB", "128MiB"), layout_of("56MiB", "24MiB", "96MiB", "40MiB")),
}


@pytest.mark.parametrize("case", MORE_HOSTS)
def test_a_restore_over_more_hosts(saved: tuple[Rig, Manifest], case: str) -> None:
    vm, manifest = saved
    few, many = MORE_HOSTS[case]
    vm.coordinator.stop()
    vm.restore(manifest, layout=few, hosts=["h3", "h1"][: len(few.shares)])
    await_checks(vm.console)
    text = saved_on(vm, "h3")
    for lazy in (False, True):
        vm.coordinator.stop()
        hosts = ["h0", "h3", "h2", "h1"][: len(many.shares)]
        facts = vm.coordinator.restore(text, many, hosts, lazy)
        assert facts["pages_moved"] > 0
        until(lambda: whole(vm), 60, "every page is with its host")
        require_shares_kept(vm, many)
        keeps_checking(vm.console, 1)


def power_off(vm: Rig, host: str, index: int | None) -> None:
    """The host is gone with all that ran there and its memory; its disk is left."""
    actor = f"parts/vm/{host}" if index is None else vm.fleet.actor_name("vm", index)
    if actor in vm.fleet.actors:
        # Its threads are ours, and would start again what is ended here.
        agent = vm.fleet.actors[actor].object
        agent.parts._server.stop()
        if isinstance(agent.composed, SubRole):
            agent.composed.server.daemon.stop()
        vm.fleet.actors[actor].die()
    vm.fleet.dead.add(host)
    settings = vm.settings[host]
    for folder in ("vm", "vm.parts"):
        for process in find_marked("DCRES_VM_RUN", str(settings.run / folder)):
            process.end(grace_s=0)
        shutil.rmtree(settings.run / folder, ignore_errors=True)
        shutil.rmtree(settings.ram / folder, ignore_errors=True)


def require_intact(vm: Rig, manifest: Manifest) -> None:
    for part in manifest.hosts:
        assert Store(vm.settings[part.host].store).verify_part(manifest, part.host).report.ok


@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
def test_a_sub_host_that_dies_in_a_restore(
    saved: tuple[Rig, Manifest], lazy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of loading, or while its pages still come: told, and tried again elsewhere."""
    monkeypatch.setattr(asking, "_STATUS_TIMEOUT_S", 1.0)
    vm, manifest = saved
    vm.coordinator.stop()
    layout, failures = layout_of("64MiB", "128MiB"), []

    def restore() -> None:
        try:
            vm.restore(manifest, layout=layout, hosts=["h0", "h3"], lazy=lazy)
        except DcresError as error:
            failures.append(str(error))

    thread = threading.Thread(target=restore)
    thread.start()
    if lazy:
        thread.join(patience(60))
        assert not thread.is_alive()
        assert failures == []
        power_off(vm, "h3", 1)
        until(lambda: vm.coordinator.status()["phase"] == "lost", 30, "the VM is lost")
        assert "h3" in vm.coordinator.status()["why"]
    else:
        until(lambda: (vm.settings["h3"].ram / "vm" / "store.ram").exists(), 30, "h3 loads")
        power_off(vm, "h3", 1)
        thread.join(patience(60))
        assert "h3" in failures[0] or "actor" in failures[0]
    require_intact(vm, manifest)
    vm.coordinator.stop()
    vm.restore(manifest, layout=layout_of("96MiB", "96MiB"), hosts=["h1", "h2"])
    await_checks(vm.console, 3)


def test_a_host_with_parts_that_dies_in_a_lazy_restore(saved: tuple[Rig, Manifest]) -> None:
    vm, manifest = saved
    vm.coordinator.stop()
    vm.restore(manifest, layout=layout_of("64MiB", "128MiB"), hosts=["h3", "h0"], lazy=True)
    power_off(vm, "h1", None)
    if not whole(vm):  # else its pages were there by then
        until(lambda: "h1" in vm.coordinator.status()["why"], 30, "it is told who is missing")
    require_intact(vm, manifest)
    vm.coordinator.stop()
    vm.restore(manifest, layout=layout_of("64MiB", "128MiB"), hosts=["h3", "h0"], lazy=True)
    await_checks(vm.console, 3)
    until(lambda: whole(vm), 60, "every page is with its host")
