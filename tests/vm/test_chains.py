"""Increments of a real guest: what is restored from any of a chain goes on as if nothing had been.

And what is saved in full, and why, when the base is not to be had.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from dcres.model.formats import MemoryFormat
from dcres.storage.format.manifest import Manifest
from tests.support.vm import Rig, await_checks, restart_main, rig, spec_of
from tests.support.wait import until

pytestmark = pytest.mark.vm

SPEC = spec_of(main="64MiB", subs=["72MiB", "72MiB"], fill=48)
CHAIN, RESTORED = 10, 4


@pytest.fixture(scope="module")
def vm() -> Iterator[Rig]:
    with rig() as made:
        made.boot(SPEC)
        yield made


def take(vm: Rig, mode: str = "live", **more: Any) -> tuple[Manifest, str]:
    """A checkpoint, and why it is a full one if it is."""
    facts = vm.coordinator.checkpoint(mode, **more)
    return vm.store.get(facts["checkpoint"]), facts["full_because"]


def test_any_of_a_chain_goes_on(vm: Rig) -> None:
    """Also where those before it are deleted, and a pager was killed on the way."""
    chain = [take(vm)[0]]
    for number in range(1, CHAIN):
        await_checks(vm.console, 1)
        if number == CHAIN // 2:
            restart_pager(vm)
        chain.append(take(vm, "stop" if number % 4 == 3 else "live")[0])
    assert [each.base for each in chain[1:]] == [each.checkpoint for each in chain[:-1]]
    assert min(each.pages_saved for each in chain[1:]) < chain[0].pages_saved // 2
    chosen = [*sorted(random.Random(3).sample(range(CHAIN - 1), RESTORED - 1)), CHAIN - 1]
    for number in range(CHAIN):
        if number not in chosen:
            vm.store.delete(chain[number].checkpoint)
    vm.coordinator.stop()
    for number in chosen:
        assert vm.store.verify(chain[number].checkpoint, strict=True).ok
        vm.restore(chain[number], lazy=number == chosen[0])
        await_checks(vm.console, 2)
        upon, _ = take(vm)
        assert upon.base == chain[number].checkpoint, "memory is as in the checkpoint"
        assert upon.pages_saved < upon.pages
        if number != chosen[-1]:
            vm.coordinator.stop()


def restart_pager(vm: Rig) -> None:
    pager = vm.main().pager
    before = pager.control.status()["pid"]
    os.kill(before, signal.SIGKILL)
    until(lambda: pager.patient.status()["pid"] != before, 60, "another pager")


def test_a_base_that_was_deleted(vm: Rig) -> None:
    base, _ = take(vm, full=True)
    vm.store.delete(base.checkpoint)
    taken, why = take(vm)
    assert taken.base is None
    assert f"{base.checkpoint}, the last checkpoint, is not there any more" in why


@pytest.mark.parametrize("host", ["h0", "h1"])
def test_a_base_whose_part_is_damaged(vm: Rig, host: str) -> None:
    """The host that finds it is told, and nothing is left of the attempt."""
    base, _ = take(vm, full=True)
    table = next((vm.store.root / "vm" / base.checkpoint / host).glob("*.segment.arrow"))
    table.write_bytes(table.read_bytes()[:-1] + b"x")
    taken, why = take(vm)
    assert taken.base is None
    assert why.startswith(f"{host}: no increment upon {base.checkpoint}: ")
    folders = {path.name for path in (vm.store.root / "vm").iterdir() if path.is_dir()}
    assert folders == set(vm.listed()) == {*vm.listed(), taken.checkpoint}
    vm.store.delete(base.checkpoint)
    assert take(vm)[0].base == taken.checkpoint


def test_formats_that_have_all_pages(vm: Rig) -> None:
    """They are no base, and leave the one that there is."""
    base, _ = take(vm, full=True)
    for memory_format in (MemoryFormat.PACKED, MemoryFormat.SPARSE):
        taken, why = take(vm, memory_format=memory_format)
        assert (taken.base, why) == (None, f"{memory_format} checkpoints are")
    assert take(vm)[0].base == base.checkpoint


def test_one_that_was_given_up_loses_no_change(vm: Rig) -> None:
    base, _ = take(vm, full=True)
    vm.main().saving.abandon(base.checkpoint)  # too late: it is published
    name = "vm-20260101-000000-0001"
    vm.main().saving.prepare(name, MemoryFormat.SEGMENTED)
    vm.main().machine.finish(name)
    vm.main().saving.halt(name)
    vm.main().machine.resume(name)
    vm.main().saving.abandon(name)
    await_checks(vm.console, 1)
    upon, _ = take(vm)
    assert upon.base == base.checkpoint
    vm.coordinator.stop()
    vm.restore(upon)
    await_checks(vm.console, 2)


def test_an_actor_that_is_started_again_goes_on(vm: Rig) -> None:
    base, _ = take(vm, full=True)
    restart_main(vm)
    assert take(vm)[0].base == base.checkpoint


def test_a_chain_over_other_shares(vm: Rig) -> None:
    """Pages move to other hosts, and their bytes are where they were saved."""
    first, _ = take(vm, full=True)
    vm.coordinator.resize(48 << 20)
    until(lambda: vm.coordinator.status()["hosts"][0]["pages"][0] <= (48 << 20) // 4096, 60, "out")
    second, _ = take(vm)
    assert second.base == first.checkpoint
    assert second.pages_saved < second.pages // 2
    main = second.hosts[0]
    assert main.pages * 4096 > 48 << 20, "what has left unchanged is still in its part"
    vm.coordinator.stop()
    vm.restore(second)
    await_checks(vm.console, 2)


def test_files_are_counted_once(vm: Rig) -> None:
    base, _ = take(vm, full=True)
    alone = used_kib(vm)
    upon, _ = take(vm)
    assert used_kib(vm) - alone < used_kib(vm) // 2
    assert upon.base == base.checkpoint
    for path in (vm.store.root / "vm" / upon.checkpoint).glob("*/*.pack"):
        assert path.stat().st_nlink == (1 if upon.checkpoint.endswith(path.name[:20]) else 2)


def used_kib(vm: Rig) -> int:
    done = subprocess.run(["du", "-sk", vm.store.root], check=True, capture_output=True, text=True)
    return int(done.stdout.split()[0])
