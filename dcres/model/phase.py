"""What a VM is doing as a whole, judged by what its hosts say and by their silence."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import assert_never


class VmPhase(StrEnum):
    """What a VM is doing, as far as its coordinator is concerned."""

    ABSENT = "absent"
    STARTING = "starting"
    RUNNING = "running"  # its guest may be paused all the same: see its run state
    CHECKPOINTING = "checkpointing"
    RESTORING = "restoring"
    RESIZING = "resizing"
    STOPPING = "stopping"
    OFF = "off"  # the guest has shut down, or QEMU was told to end
    LOST = "lost"  # it is proven that it cannot go on
    UNKNOWN = "unknown"  # a host does not answer, which proves nothing


class HostState(StrEnum):
    """What came of asking a host of a VM."""

    ANSWERS = "answers"
    OFF = "off"  # the main host: the VM has ended, in order
    TROUBLED = "troubled"  # it answers, and something there does not, for now
    SILENT = "silent"  # no answer: it may be slow, cut off or gone
    LOST = "lost"  # proof that what the VM had there is gone
    UNASKED = "unasked"


def is_at_rest(phase: VmPhase) -> bool:
    """Whether nothing is being done to the VM, so that its hosts' answers say what it is."""
    match phase:
        case VmPhase.RUNNING | VmPhase.OFF | VmPhase.LOST | VmPhase.UNKNOWN:
            return True
        case (
            VmPhase.ABSENT
            | VmPhase.STARTING
            | VmPhase.CHECKPOINTING
            | VmPhase.RESTORING
            | VmPhase.RESIZING
            | VmPhase.STOPPING
        ):
            return False
        case _:
            assert_never(phase)


def judged(states: Sequence[HostState]) -> VmPhase:
    """The phase of a VM at rest. `states` are its hosts', the main host's first.

    A proof outweighs silence: with one host lost it does not matter what the others say. Only a
    guest that has ended needs none of them.
    """
    if HostState.OFF in states[:1]:
        return VmPhase.OFF
    if HostState.LOST in states:
        return VmPhase.LOST
    if HostState.SILENT in states:
        return VmPhase.UNKNOWN
    return VmPhase.RUNNING


def in_the_way(vm: str, phase: VmPhase) -> str:
    """Why a VM in this phase cannot be started or restored, as a sentence; empty if it can."""
    match phase:
        case VmPhase.ABSENT | VmPhase.OFF | VmPhase.LOST:
            return ""
        case VmPhase.RUNNING:
            return f"VM {vm} runs already; stop it first with `dcres stop {vm}`"
        case VmPhase.UNKNOWN:
            return (
                f"no answer from a host of VM {vm}, which may still run; wait, or end what is "
                f"left of it with `dcres stop {vm}`"
            )
        case (
            VmPhase.STARTING
            | VmPhase.CHECKPOINTING
            | VmPhase.RESTORING
            | VmPhase.RESIZING
            | VmPhase.STOPPING
        ):
            return f"VM {vm} is {phase}; wait until that is done, or end it: `dcres stop {vm}`"
        case _:
            assert_never(phase)
