"""How the devices of a VM differ from those of its start."""

from __future__ import annotations

from dcres.vm.devices import changes

START = {
    "device /machine/peripheral/rp1": "pcie-root-port at /machine/q35/pcie.0 at 04.0",
    "block node disk0": "qcow2, /d/a.qcow2, writable",
    "network net0": "user",
}


def test_nothing_differs() -> None:
    assert changes(START, dict(reversed(START.items()))) == []


def test_what_is_new_gone_or_another_is_named() -> None:
    now = START | {
        "block node disk0": "qcow2, /d/a.qcow2, read-only",
        "device /machine/peripheral/r1": "virtio-rng-pci at rp1 at 00.0",
    }
    del now["network net0"]
    assert changes(START, now) == [
        "block node disk0 was qcow2, /d/a.qcow2, writable at the start and is qcow2, "
        "/d/a.qcow2, read-only",
        "device /machine/peripheral/r1 (virtio-rng-pci at rp1 at 00.0) was added since the start",
        "network net0 (user) was removed since the start",
    ]
