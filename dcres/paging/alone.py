"""Only one pager for a VM, and only one memory server for a store file.

Two of them would write one page table, one journal and one pipe, and the guest's pages would be
lost. An actor that is killed between starting a process and writing its pid down has a successor
that starts another, so the processes themselves see to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from dcres.errors import Conflict
from dcres.linux import files

PATIENCE_S = 1.0  # a predecessor that is being killed is gone by then


@contextmanager
def alone(path: Path, who: str) -> Iterator[None]:
    """Hold the lock on `path`, which is created; `who` names what may run but once.

    Raises Conflict when another process has it and does not end within `PATIENCE_S`.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(files.held(path, PATIENCE_S))
        except BlockingIOError:
            raise Conflict(
                f"{who} is running already and holds {path}; end it first, or leave it its work"
            ) from None
        yield
