"""How much of the processors a thread gets when others want them, too (nice(2)).

Ray runs its workers at nice 15, which leaves an actor some 3 % of a processor that a guest keeps
busy: orders take a minute then that otherwise take a second, and a VM that is stopped for a
checkpoint waits for them. So actors take the normal priority, and only what need not be ready
soon goes on in the background.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_NORMAL = 0
_BACKGROUND = 15


def take_normal() -> None:
    """This process and all its threads run at normal priority, if it may have that (root may)."""
    for name in os.listdir("/proc/self/task"):
        with suppress(PermissionError, ProcessLookupError):  # a thread may end meanwhile
            if os.getpriority(os.PRIO_PROCESS, int(name)) > _NORMAL:
                os.setpriority(os.PRIO_PROCESS, int(name), _NORMAL)


@contextmanager
def background() -> Iterator[None]:
    """This thread, and threads that it starts meanwhile, leave the processors to others.

    Nothing changes for who could not come back: raising a priority takes CAP_SYS_NICE.
    """
    before = os.getpriority(os.PRIO_PROCESS, 0)  # 0 is the calling thread
    if before >= _BACKGROUND or os.geteuid() != 0:
        yield
        return
    os.setpriority(os.PRIO_PROCESS, 0, _BACKGROUND)
    try:
        yield
    finally:
        os.setpriority(os.PRIO_PROCESS, 0, before)
