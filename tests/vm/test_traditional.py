"""QEMU's own way, as benchmarks use it: all of memory is in the file, and comes back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dcres.bench.traditional import Image
from dcres.errors import MonitorError
from dcres.vm.command import VmFiles
from tests.support.guest import folders, guest, witness_spec

pytestmark = pytest.mark.vm

FILL_MIB = 32


@pytest.fixture
def files() -> Iterator[VmFiles]:
    with folders() as made:
        yield made


def test_a_vm_is_saved_and_goes_on_from_the_file(files: VmFiles, tmp_path: Path) -> None:
    image = Image(tmp_path / "image")
    with guest(witness_spec(fill_mib=FILL_MIB), files) as vm:
        vm.monitor.cont()
        vm.await_checks()
        with pytest.raises(MonitorError, match="it left memory out"):
            image.save(vm.monitor, least_bytes=1 << 40)
        vm.monitor.cont()
        # As a checkpoint of dcres leaves it, whose VM cores are without memory.
        ignore_shared = {"capability": "x-ignore-shared", "state": True}
        vm.monitor.execute("migrate-set-capabilities", {"capabilities": [ignore_shared]})
        assert image.save(vm.monitor, least_bytes=FILL_MIB << 20) > 0
        checks = vm.report().checks
    assert [path.name for path in tmp_path.iterdir()] == ["image"]
    files.ram.unlink()
    with guest(witness_spec(fill_mib=FILL_MIB), files, incoming=True) as vm:
        image.load(vm.monitor)
        vm.await_checks()
        assert vm.report().checks > checks
        assert vm.report().failures == 0


def test_a_file_that_cannot_be_written(files: VmFiles, tmp_path: Path) -> None:
    with guest(witness_spec(fill_mib="off"), files) as vm:
        vm.monitor.cont()
        with pytest.raises(MonitorError, match=r"dd ended with 1: .*No such file or directory"):
            Image(tmp_path / "no" / "image").save(vm.monitor, least_bytes=1)
