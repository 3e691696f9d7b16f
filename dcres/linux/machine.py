"""Which machine this is, and which life of its kernel."""

from __future__ import annotations

import getpass
import os
import socket
from contextlib import suppress
from pathlib import Path


def machine_id() -> str:
    """A name of this machine that outlives a boot; empty if it has none.

    machine-id(5) comes with an image of a disk or container as often as not, so the firmware's
    number stands beside it where that can be read.
    """
    found = _text("/etc/machine-id")
    return f"{found}/{_text('/sys/class/dmi/id/product_uuid')}" if found else ""


def boot_id() -> str:
    """The kernel's name for its life: random(4). All containers of a machine have the same."""
    return _text("/proc/sys/kernel/random/boot_id")


def caller() -> str:
    """Who runs this process, ``user@machine``, for people."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user without a name, as in many containers
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def _text(path: str) -> str:
    with suppress(OSError):
        return Path(path).read_text(errors="replace").strip()
    return ""


def pid_namespace() -> str:
    """Which processes can be seen from here: each container has a namespace of its own."""
    with suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""
