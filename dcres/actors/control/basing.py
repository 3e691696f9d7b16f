"""Whether the next checkpoint of a VM is an increment, and upon which one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dcres.actors.control.vm_handle import VmHandle
from dcres.actors.protocol import Machine
from dcres.errors import BaseUnusable, OperationFailed
from dcres.model.formats import MemoryFormat
from dcres.storage.format.manifest import Manifest, loads


@dataclass(frozen=True, slots=True)
class Upon:
    """What a checkpoint is made upon; without a base all is saved, and `why_full` says why."""

    base: Manifest | None = None
    why_full: str = ""

    def after(self, failed: OperationFailed) -> Upon:
        """What to make it upon now that it has failed. Raises `failed` where that is no remedy."""
        for failure in failed.failed_on:
            if self.base is not None and failure.is_a(BaseUnusable):
                return Upon(why_full=f"{failure.host}: {failure.message}")
        raise failed


def choose_base(vm: VmHandle, memory_format: MemoryFormat, *, full: bool) -> Upon:
    """The VM's last published checkpoint, if what has changed since is known and it can be read."""
    if full:
        return Upon(why_full="it was asked for")
    if memory_format is not MemoryFormat.SEGMENTED:
        return Upon(why_full=f"{memory_format} checkpoints are")
    found = vm.main.call(Machine.base)
    if not found.manifest:
        return Upon(why_full=found.why_none)
    return Upon(loads(found.manifest, Path("the base of the next checkpoint")))
