"""Guests of 512 bytes: boot sectors that use a disk, or the power button, like any guest does."""

from __future__ import annotations

import subprocess
from pathlib import Path

_ORIGIN = 0x7C00  # where firmware puts a boot sector
_LBA = 0x7DE8  # the place in memory of the number in `_PACKET`
_PACKET_AT = 0x7DE0
_SAY = bytes.fromhex("ba f8 03 ee")  # mov dx, 0x3f8; out dx, al
_STAY = bytes.fromhex("f4 eb fd")  # hlt, again and again


def say(letter: str) -> bytes:
    """Write a letter to the serial port."""
    return b"\xb0" + letter.encode() + _SAY  # mov al, letter


# ACPI's S5, as QEMU's q35 with SeaBIOS has it: 0x2000 into PM1a_CNT at 0x604.
POWER_OFF = bytes.fromhex("b8 00 20 ba 04 06 ef") + _STAY
# A pulse on the reset line, by the keyboard controller.
RESET = bytes.fromhex("b0 fe e6 64") + _STAY


def writer() -> bytes:
    """Write a sector into every 64 KiB of the disk, one after the other, and say ``w`` for each.

    ``!`` if the disk reports an error, which QEMU's default does not let it for a full disk.
    """
    write = bytes.fromhex("be e0 7d b8 00 43 b2 80 cd 13")  # mov si; mov ax; mov dl; int 0x13
    said = say("w")
    step = bytes.fromhex("66 81 06") + _LBA.to_bytes(2, "little") + (128).to_bytes(4, "little")
    body = len(said) + len(step) + 2
    fails = bytes([0x72, body])  # jc past the loop
    back = bytes([0xEB, 256 - (len(write) + len(fails) + body)])  # jmp to its beginning
    return write + fails + said + step + back + say("!") + _STAY


def disk_with(path: Path, program: bytes, size_bytes: int = 16 << 20) -> Path:
    """A QCOW2 disk that boots into `program`."""
    start = bytes.fromhex("31 c0 8e d8 8e c0 8e d0 bc 00 7c")  # segments and stack
    packet = bytes.fromhex("10 00 01 00 00 7c 00 00") + (128).to_bytes(8, "little")
    sector = (start + program).ljust(_PACKET_AT - _ORIGIN, b"\0") + packet
    raw = path.with_suffix(".raw")
    with raw.open("wb") as file:
        file.write(sector.ljust(510, b"\0") + b"\x55\xaa")
        file.truncate(size_bytes)
    convert = ["qemu-img", "convert", "-q", "-f", "raw", "-O", "qcow2", str(raw), str(path)]
    subprocess.run(convert, check=True)
    raw.unlink()
    return path
