"""KVM or TCG."""

from __future__ import annotations

from pathlib import Path

import pytest

from dcres.config import Accel
from dcres.errors import UnsupportedHost
from dcres.vm import accel
from dcres.vm.accel import Probe, choose, probe_kvm


class Runner:
    """Stands for booting a guest: counts, and says what it was told to say."""

    def __init__(self, probe: Probe) -> None:
        self.probe, self.runs = probe, 0

    def __call__(self, kernel: Path, tried: Accel) -> Probe:
        assert tried is Accel.KVM
        self.runs += 1
        return self.probe


@pytest.fixture
def host(tmp_path: Path) -> dict[str, Path]:
    """A host with a kernel, a device and a QEMU that only knows its version."""
    qemu = tmp_path / "qemu"
    qemu.write_text("#!/bin/sh\necho QEMU emulator version 9.9\n")
    qemu.chmod(0o755)
    for name in ("kernel", "kvm"):
        (tmp_path / name).write_text(name)
    return {"qemu": qemu, "kernel": tmp_path / "kernel", "kvm": tmp_path / "kvm"}


def probe(host: dict[str, Path], cache: Path, run: Runner) -> Probe:
    return probe_kvm(host["kernel"], cache, str(host["qemu"]), host["kvm"], run)


def test_the_answer_is_kept(host: dict[str, Path], tmp_path: Path) -> None:
    run = Runner(Probe(True, "it ran"))
    for _ in range(2):
        assert probe(host, tmp_path / "cache", run) == Probe(True, "it ran")
    assert run.runs == 1


def test_another_kernel_or_qemu_is_tried_anew(host: dict[str, Path], tmp_path: Path) -> None:
    run = Runner(Probe(False, "it hung"))
    probe(host, tmp_path, run)
    host["kernel"].write_text("newer")
    probe(host, tmp_path, run)
    host["qemu"].write_text("#!/bin/sh\necho QEMU emulator version 10\n")
    probe(host, tmp_path, run)
    assert run.runs == 3


def test_a_damaged_cache_is_no_answer(host: dict[str, Path], tmp_path: Path) -> None:
    run = Runner(Probe(True, "it ran"))
    (tmp_path / "kvm-probe.json").write_text("{")
    assert probe(host, tmp_path, run).works
    assert run.runs == 1


def test_no_device_needs_no_guest(host: dict[str, Path], tmp_path: Path) -> None:
    host["kvm"].unlink()
    run = Runner(Probe(True, "it ran"))
    assert "does not exist" in probe(host, tmp_path, run).reason
    assert run.runs == 0


@pytest.mark.parametrize(
    ("works", "asked", "chosen"),
    [(True, "auto", "kvm"), (True, "kvm", "kvm"), (False, "auto", "tcg"), (False, "tcg", "tcg")],
)
def test_choice(
    works: bool, asked: str, chosen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accel, "probe_kvm", lambda *_: Probe(works, "so it was"))
    got, sentence = choose(Accel(asked), tmp_path / "kernel", tmp_path)
    assert got == chosen
    assert ("so it was" in sentence) == (asked != "tcg")


def test_kvm_that_does_not_work_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accel, "probe_kvm", lambda *_: Probe(False, "it hung"))
    with pytest.raises(UnsupportedHost, match="does not work on this host: it hung"):
        choose(Accel.KVM, tmp_path / "kernel", tmp_path)


def test_nothing_to_try_kvm_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accel, "host_kernel", lambda: None)
    assert choose(Accel.AUTO, None, tmp_path)[0] is Accel.TCG
    with pytest.raises(UnsupportedHost, match="no kernel to try it with"):
        choose(Accel.KVM, None, tmp_path)


def test_without_a_kernel_of_its_own_a_vm_has_the_hosts_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Path] = []
    monkeypatch.setattr(accel, "host_kernel", lambda: tmp_path / "own")

    def probe(kernel: Path, _: Path) -> Probe:
        tried.append(kernel)
        return Probe(True, "it ran")

    monkeypatch.setattr(accel, "probe_kvm", probe)
    assert choose(Accel.KVM, None, tmp_path)[0] is Accel.KVM
    assert tried == [tmp_path / "own"]
