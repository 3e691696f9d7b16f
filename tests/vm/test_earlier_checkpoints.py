"""Checkpoints that an earlier dcres took are read, verified and restored, for good.

`tests/fixtures/README.md` says what they are. A VM file has whole paths, so the guest's kernel has
to lie where it lay when they were taken.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from dcres.actors.control.coordinator import Coordinator
from dcres.storage.format.manifest import dumps
from dcres.vm import witness
from tests.support.earlier import FIXTURES, PAGES, VERSIONS, unpacked
from tests.support.vm import Rig, await_checks, rig

pytestmark = pytest.mark.vm

KERNEL = Path("/tmp/dcres-fixture/kernel")


@pytest.fixture
def kernel() -> Iterator[Path]:
    KERNEL.parent.mkdir(exist_ok=True)  # a run that was killed may have left it
    try:
        shutil.copy(FIXTURES / "guest.elf", KERNEL)
        yield KERNEL
    finally:
        shutil.rmtree(KERNEL.parent)


@pytest.fixture
def hosts(kernel: Path) -> Iterator[Rig]:
    with rig() as made:
        yield made


@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
@pytest.mark.parametrize("version", VERSIONS)
def test_it_is_read_verified_and_restored(hosts: Rig, version: int, lazy: bool) -> None:
    manifest = unpacked(hosts.store, version)
    assert manifest.format_version == version
    assert tuple(part.pages for part in manifest.hosts) == PAGES
    report = hosts.store.verify(manifest.checkpoint)
    assert (report.ok, report.pages) == (True, 373)
    coordinator = Coordinator("kept", hosts.fleet)
    try:
        facts = coordinator.restore(dumps(manifest), lazy=lazy)
        assert facts["run_state"] == "running", "as all that do not say what they were in"
        console = Path(coordinator.status()["hosts"][0]["console"])
        await_checks(console, 200)
        assert witness.read(console).tick > 10_000, "it counts on from where it was saved"
        taken = hosts.store.get(coordinator.checkpoint()["checkpoint"])
        assert taken.generation > manifest.generation
    finally:
        coordinator.stop()
