"""Network namespaces: a second host's network on one machine."""

from __future__ import annotations

import os
from pathlib import Path

from dcres.linux import libc
from dcres.linux.files import opened

_NAMED = Path("/run/netns")  # ip-netns(8)
_CLONE_NEWNET = 0x40000000  # linux/sched.h


def enter(name: str) -> None:
    """Let the calling thread, and no other, make its sockets in the namespace `name`.

    A socket stays where it was made, whoever uses it. Raises OSError.
    """
    with opened(_NAMED / name, os.O_RDONLY) as fd:
        libc.setns(fd, _CLONE_NEWNET)
