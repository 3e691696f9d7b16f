"""What is to run: a record of a VM that outlives whoever wrote it.

A record is replaced as a whole, and only by a writer who has read the one before: its version is
that one's and 1 more. So two who decide at the same time cannot both be right, and one who slept
meanwhile is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any


class Desired(StrEnum):
    """What is wanted of a VM."""

    RUNNING = "running"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class Record:
    """What is wanted of a VM, since when, and of which of its lives that was said.

    `spec` is the VM file with which that life began, `by` who said it, empty if that is not known.
    """

    version: int  # 1 for a VM's first
    generation: int
    cluster: str  # whose life it is
    desired: Desired
    spec: Mapping[str, Any]
    since: str
    by: str = ""

    def stopped(self, since: str, by: str) -> Record:
        """The record that is to replace this one when the VM is to run no more."""
        version = self.version + 1
        return replace(self, version=version, desired=Desired.STOPPED, since=since, by=by)


def refusal(vm: str, before: Record | None, record: Record) -> str:
    """Why `record` may not replace `before`; empty if it may."""
    latest = 0 if before is None else before.version
    if before is not None and record.generation < before.generation:
        return (
            f"the record of VM {vm} is about generation {before.generation}, and generation "
            f"{record.generation} is over"
        )
    if record.version != latest + 1:
        return (
            f"the record of VM {vm} was changed meanwhile: it has version {latest}, and version "
            f"{record.version} was to replace the one before; look at it and decide again"
        )
    return ""
