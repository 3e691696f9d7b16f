"""KVM or TCG, decided by running something.

``/dev/kvm`` being there proves little: nested or restricted KVMs exist that run firmware and
real-mode code and then hang in a 64-bit kernel. So a small guest is booted up to user mode:
Linux with an init that prints one line. It takes under a second where KVM works.
"""

from __future__ import annotations

import hashlib
import json
import os
import selectors
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dcres.config import Accel
from dcres.errors import UnsupportedHost
from dcres.vm.command import QEMU
from dcres.vm.guest import initramfs

KVM_DEVICE = Path("/dev/kvm")
PROBE_TIMEOUT_S = 8.0
_MEMORY_MIB = 192
_GREETING = b"dcres: user mode runs\n"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_LOAD_ADDRESS = 0x400000


@dataclass(frozen=True, slots=True)
class Probe:
    """Whether KVM runs a 64-bit Linux guest here, and a sentence that says how we know."""

    works: bool
    reason: str


def greeting_program() -> bytes:
    """A static x86-64 ELF of one page that writes `_GREETING` to descriptor 1 and exits.

    Made here so that the probe needs neither a compiler nor busybox. Layout by elf(5): file
    header (64 bytes), one program header (56), code, text.
    """
    code_at = _LOAD_ADDRESS + 64 + 56
    code_length = 34
    code = (
        b"\xb8" + struct.pack("<I", 1)  # mov eax, SYS_write
        + b"\xbf" + struct.pack("<I", 1)  # mov edi, 1
        + b"\xbe" + struct.pack("<I", code_at + code_length)  # mov esi, text
        + b"\xba" + struct.pack("<I", len(_GREETING))  # mov edx, length
        + b"\x0f\x05"  # syscall
        + b"\xb8" + struct.pack("<I", 60)  # mov eax, SYS_exit
        + b"\xbf" + struct.pack("<I", 0)  # mov edi, 0
        + b"\x0f\x05"  # syscall
    )  # fmt: skip
    length = 64 + 56 + len(code) + len(_GREETING)
    header = struct.pack(
        "<4s5B7xHHIQQQIHHHHHH",
        *(b"\x7fELF", 2, 1, 1, 0, 0),  # 64-bit, little-endian, version 1, System V
        *(2, 62, 1, code_at, 64, 0, 0),  # executable, x86-64, entry, program headers at 64
        *(64, 56, 1, 0, 0, 0),
    )
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, _LOAD_ADDRESS, _LOAD_ADDRESS, length, length, 4096)
    return header + segment + code + _GREETING


def probe_command(kernel: Path, initrd: Path, accel: Accel, qemu: str = QEMU) -> list[str]:
    """The command line of the guest that shows whether `accel` works."""
    return [
        *(qemu, "-machine", "q35", "-accel", accel.value, "-m", f"{_MEMORY_MIB}M"),
        *("-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio"),
        *("-no-reboot", "-kernel", str(kernel), "-initrd", str(initrd)),
        *("-append", "console=ttyS0 quiet panic=-1"),
    ]


def boot(kernel: Path, accel: Accel, timeout_s: float | None = None, qemu: str = QEMU) -> Probe:
    """Boot `kernel` under `accel` until its user mode prints, or `timeout_s` has passed.

    By default that is 8 s, and more as more want the processors: what is found is remembered.
    """
    if timeout_s is None:
        timeout_s = PROBE_TIMEOUT_S * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
    with tempfile.TemporaryDirectory(prefix="dcres-probe-") as folder:
        initrd = Path(folder) / "initrd.gz"
        initrd.write_bytes(initramfs(greeting_program()))
        try:
            guest = subprocess.Popen(
                probe_command(kernel, initrd, accel, qemu),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        except FileNotFoundError:
            raise UnsupportedHost(f"{qemu} is not installed; run scripts/setup") from None
        with guest:
            try:
                return _judge(guest, accel, timeout_s)
            finally:
                guest.kill()


def _judge(guest: subprocess.Popen[bytes], accel: Accel, timeout_s: float) -> Probe:
    assert guest.stdout is not None
    said, started = b"", time.monotonic()
    with selectors.DefaultSelector() as selector:
        selector.register(guest.stdout, selectors.EVENT_READ)
        while (left_s := started + timeout_s - time.monotonic()) > 0:
            if not selector.select(left_s):
                continue
            piece = os.read(guest.stdout.fileno(), 65536)
            said += piece
            if _GREETING.strip() in said:
                return Probe(True, f"a Linux guest ran under {accel.value.upper()}")
            if not piece:
                words = said.decode(errors="replace").strip().splitlines()[-1:] or ["no output"]
                return Probe(False, f"the {accel.value.upper()} probe guest ended: {words[0]}")
    return Probe(
        False,
        f"a Linux guest did not reach user mode under {accel.value.upper()} in {timeout_s:g} s",
    )


def _key(kernel: Path, qemu: str) -> str:
    """What a cached answer depends on: this boot of the host, QEMU and the kernel."""
    try:
        version = subprocess.run([qemu, "--version"], capture_output=True, check=True).stdout
    except FileNotFoundError:
        raise UnsupportedHost(f"{qemu} is not installed; run scripts/setup") from None
    with kernel.open("rb") as file:
        kernel_hash = hashlib.file_digest(file, "sha256").digest()
    return hashlib.sha256(_BOOT_ID.read_bytes() + version + kernel_hash).hexdigest()


def probe_kvm(
    kernel: Path,
    cache_dir: Path,
    qemu: str = QEMU,
    device: Path = KVM_DEVICE,
    run: Callable[[Path, Accel], Probe] = boot,
) -> Probe:
    """Whether KVM runs `kernel` here; the answer is kept in `cache_dir` until the next boot."""
    if not os.access(device, os.R_OK | os.W_OK):
        why = "may not be opened by this user" if device.exists() else "does not exist"
        return Probe(False, f"{device} {why}")
    key, cache = _key(kernel, qemu), cache_dir / "kvm-probe.json"
    known = _read_cache(cache)
    if known is not None and known[0] == key:
        return known[1]
    probe = run(kernel, Accel.KVM)
    cache_dir.mkdir(parents=True, exist_ok=True)
    fresh = cache.with_name(f".{cache.name}-{os.getpid()}")
    fresh.write_text(json.dumps({"key": key, "works": probe.works, "reason": probe.reason}))
    fresh.replace(cache)
    return probe


def _read_cache(cache: Path) -> tuple[str, Probe] | None:
    try:
        known = json.loads(cache.read_text())
        return str(known["key"]), Probe(bool(known["works"]), str(known["reason"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def host_kernel() -> Path | None:
    """This host's own kernel, where distributions keep it: as good as any to try KVM with."""
    kernel = Path("/boot") / f"vmlinuz-{os.uname().release}"
    return kernel if os.access(kernel, os.R_OK) else None


def choose(accel: Accel, kernel: Path | None, cache_dir: Path) -> tuple[Accel, str]:
    """The accelerator to use, never ``auto``, and a sentence that says why.

    `kernel` is any 64-bit Linux kernel to try; without one, this host's own. With none at all
    there is no KVM. Raises UnsupportedHost when ``kvm`` was asked for and did not run a guest.
    """
    if accel is Accel.TCG:
        return Accel.TCG, "TCG, as the VM file asks"
    kernel = kernel or host_kernel()
    if kernel is None:
        if accel is Accel.KVM:
            raise UnsupportedHost(
                "accel: kvm was not tried on this host: there is no kernel to try it with; "
                "install one in /boot, or use accel: tcg"
            )
        return Accel.TCG, "TCG, which is slower: there is no kernel to try KVM with"
    probe = probe_kvm(kernel, cache_dir)
    if probe.works:
        return Accel.KVM, f"KVM: {probe.reason}"
    if accel is Accel.KVM:
        raise UnsupportedHost(
            f"accel: kvm does not work on this host: {probe.reason}; use accel: tcg or auto"
        )
    return Accel.TCG, f"TCG, which is slower: {probe.reason}"
