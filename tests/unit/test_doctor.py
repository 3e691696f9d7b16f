"""What the doctor says about hosts of every kind, most of them made up."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dcres import doctor
from dcres.config import HostSettings
from dcres.doctor import Check, Facts, Status, as_json, evaluate
from dcres.doctor.checks import version_of
from dcres.doctor.facts import not_compiled
from dcres.linux.tmpfs import Mount
from dcres.vm.accel import Probe

GOOD = Facts(
    machine="x86_64",
    kernel="6.12.9-amd64",
    userfaultfd_error=None,
    write_tracking_error=None,
    injection_error=None,
    root=True,
    cap_sys_ptrace=True,
    yama=1,
    qemu="QEMU emulator version 7.2.22 (Debian)",
    qemu_img="qemu-img version 7.2.22",
    kvm=Probe(True, "a Linux guest ran under KVM"),
    ram=Path("/dev/shm/dcres"),
    ram_mount=Mount("/dev/shm", "tmpfs"),
    ram_total_bytes=24 << 30,
    ram_free_bytes=23 << 30,
    shmem_thp="never",
    store=Path("/var/lib/dcres/store"),
    store_free_bytes=70 << 30,
    direct_io_error=None,
    busybox_error=None,
    guest_kernel=True,
    python=(3, 11, 7),
    not_compiled=(),
    ray="2.60.0",
)

HUGE = Mount("/dev/shm", "tmpfs", "always")


def check(facts: Facts, name: str) -> Check:
    (found,) = [each for each in evaluate(facts) if each.name == name]
    return found


def test_a_good_host() -> None:
    checks = evaluate(GOOD)
    assert {each.status for each in checks} == {Status.OK}
    assert not any(each.remedy for each in checks)
    assert len({each.name for each in checks}) == len(checks)


@pytest.mark.parametrize(
    ("facts", "name", "status", "remedy"),
    [
        (replace(GOOD, machine="aarch64"), "machine", "fail", "x86-64"),
        (replace(GOOD, kernel="6.1.0-42-amd64"), "kernel", "fail", "boot Linux 6.7 or newer"),
        (replace(GOOD, kernel="6.7.0"), "kernel", "ok", ""),
        (replace(GOOD, kernel="5.15.0-101-generic"), "kernel", "fail", "boot Linux 6.7"),
        (replace(GOOD, userfaultfd_error="not implemented"), "userfaultfd", "fail", "run as root"),
        (
            replace(GOOD, kernel="6.1.0", userfaultfd_error="lacks WP_ASYNC"),
            "userfaultfd",
            "fail",
            "boot Linux 6.7",
        ),
        (replace(GOOD, write_tracking_error="ENOTTY"), "write tracking", "fail", "run as root"),
        (replace(GOOD, injection_error="EPERM"), "privileges", "fail", "CAP_SYS_PTRACE"),
        (replace(GOOD, injection_error="EPERM", yama=3), "privileges", "fail", "ptrace_scope"),
        (replace(GOOD, qemu=None), "qemu", "fail", "apt install qemu-system-x86"),
        (replace(GOOD, qemu="QEMU emulator version 6.2.0"), "qemu", "fail", "7.2 or newer"),
        (replace(GOOD, qemu="QEMU emulator version 10.0.2"), "qemu", "ok", ""),
        (replace(GOOD, qemu_img=None), "qemu-img", "fail", "qemu-utils"),
        (replace(GOOD, kvm=None), "kvm", "warn", "scripts/setup"),
        (replace(GOOD, kvm=Probe(False, "it hung")), "kvm", "warn", "virtualisation"),
        (replace(GOOD, ram_mount=Mount("/", "ext4")), "ram folder", "fail", "DCRES_RAM"),
        (replace(GOOD, ram_total_bytes=64 << 20), "ram size", "warn", "--shm-size"),
        (replace(GOOD, ram_mount=HUGE), "huge pages", "fail", "huge=never"),
        (replace(GOOD, ram_mount=replace(HUGE, huge="advise")), "huge pages", "fail", "huge=never"),
        (replace(GOOD, ram_mount=HUGE, shmem_thp="deny"), "huge pages", "ok", ""),
        (replace(GOOD, shmem_thp="force"), "huge pages", "fail", "shmem_enabled"),
        (replace(GOOD, shmem_thp="advise"), "huge pages", "ok", ""),
        (replace(GOOD, direct_io_error="EINVAL"), "store", "fail", "DCRES_STORE"),
        (replace(GOOD, store_free_bytes=1 << 20), "store size", "warn", "free some"),
        (replace(GOOD, busybox_error="no busybox"), "busybox", "warn", "busybox-static"),
        (replace(GOOD, guest_kernel=False), "guest", "warn", "scripts/setup"),
        (replace(GOOD, python=(3, 10, 1)), "python", "fail", "3.11"),
        (
            replace(GOOD, not_compiled=("dcres.storage.engine._bulk",)),
            "modules in C",
            "warn",
            "gcc libc6-dev python3-dev libxxhash-dev, then install dcres again",
        ),
        (replace(GOOD, ray=None), "ray", "fail", "pip install"),
    ],
)
def test_what_is_wrong_names_its_remedy(facts: Facts, name: str, status: str, remedy: str) -> None:
    found = check(facts, name)
    assert found.status == status, found
    assert remedy in found.remedy
    others = [each for each in evaluate(facts) if each.name != name]
    if facts.kernel == GOOD.kernel:
        assert {each.status for each in others} == {Status.OK}


def test_json_is_plain_and_a_warning_is_no_failure() -> None:
    warned = as_json(evaluate(replace(GOOD, kvm=None)))
    assert json.loads(json.dumps(warned)) == warned
    assert warned["ok"]
    assert set(warned["checks"][0]) == {"name", "status", "detail", "remedy"}
    assert not as_json(evaluate(replace(GOOD, qemu=None)))["ok"]


def test_modules_in_c_that_were_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    both = ("dcres.paging._hot", "dcres.storage.engine._bulk")
    for name in both:
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not there
    assert not_compiled() == both
    detail = check(replace(GOOD, not_compiled=both), "modules in C").detail
    assert "page-in takes about twice as long without dcres.paging._hot" in detail
    monkeypatch.setitem(sys.modules, both[0], sys)
    assert not_compiled() == both[1:]


@pytest.mark.parametrize(
    ("text", "version"), [("6.18.44-fc", (6, 18)), ("QEMU 10.0.2 (x)", (10, 0)), ("none", (0, 0))]
)
def test_version_of(text: str, version: tuple[int, int]) -> None:
    assert version_of(text) == version


@pytest.mark.linux
def test_this_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DCRES_HOME", str(tmp_path))
    settings = HostSettings.from_environ({"DCRES_STORE": str(tmp_path / "not" / "made" / "yet")})
    facts = doctor.gather(settings)
    assert facts.userfaultfd_error is None
    assert facts.write_tracking_error is None
    assert facts.injection_error is None
    assert facts.kvm is None, "an empty DCRES_HOME has no guest to try"
    assert not (tmp_path / "not").exists()
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"
