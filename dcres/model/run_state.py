"""What QEMU says it is doing, what a checkpoint makes of that, and what people are told of it.

A checkpoint stops a VM and leaves it as it was. It writes down the run state in which it *found*
the VM before it stops it, so that whoever lets go of the VM, the same actor or its successor, can
tell a VM that a checkpoint stopped from one that somebody paused, or that waits for its disk.

Facts about QEMU 7.2 that make this more than ``stop`` and ``cont``, all tried:

- Saving the VM core leaves QEMU in ``postmigrate``, whatever it was in before, with its disks
  inactive. The one way out is ``cont``, which runs the guest. So a VM that is not to run stays
  there, and what it was found in is told in its place.
- ``migrate`` is refused in ``postmigrate``. Nothing has run since, so the core that was saved is
  the core still; and inactive disks are not locked, so that qemu-img takes their snapshots.
- ``stop`` changes nothing in a QEMU that does not run: ``io-error`` stays that.
"""

from __future__ import annotations

from enum import StrEnum
from typing import assert_never


class RunState(StrEnum):
    """QEMU's run states (qapi/run-state.json)."""

    COLO = "colo"
    DEBUG = "debug"
    FINISH_MIGRATE = "finish-migrate"
    GUEST_PANICKED = "guest-panicked"
    INMIGRATE = "inmigrate"
    INTERNAL_ERROR = "internal-error"
    IO_ERROR = "io-error"
    PAUSED = "paused"
    POSTMIGRATE = "postmigrate"
    PRELAUNCH = "prelaunch"
    RESTORE_VM = "restore-vm"
    RUNNING = "running"
    SAVE_VM = "save-vm"
    SHUTDOWN = "shutdown"
    SUSPENDED = "suspended"
    WATCHDOG = "watchdog"


# In which a checkpoint leaves a VM that ran: the last two from when its core is being saved.
HELD = (RunState.PAUSED, RunState.FINISH_MIGRATE, RunState.POSTMIGRATE)
# In which QEMU does not tell what it was before its core was saved.
SAVED = (RunState.FINISH_MIGRATE, RunState.POSTMIGRATE)


def told(now: RunState, found: RunState | None) -> RunState:
    """The VM's run state for people, with QEMU in `now` after a checkpoint found it in `found`."""
    if now in SAVED and found is not None and found is not RunState.RUNNING:
        return found
    return now


def is_held(now: RunState, found: RunState | None) -> bool:
    """Whether a checkpoint stopped a VM that ran, and has not let it go on."""
    return found is RunState.RUNNING and now in HELD


def kept(now: RunState, found: RunState | None) -> RunState | None:
    """What is to be kept of `found` once a checkpoint lets go, where QEMU is in `now` and stays.

    None: QEMU says itself what it is in.
    """
    return None if told(now, found) is now else found


def runs_restored(saved: RunState) -> bool:
    """Whether a VM that was saved in this state runs once it is restored.

    A disk that failed is tried again. What was paused because somebody wanted it to be, or
    because the guest is at its end, stays paused.
    """
    return saved in (RunState.RUNNING, RunState.IO_ERROR)


def is_trouble(state: RunState) -> bool:
    """Whether the guest is stopped although nobody wanted it to be, and needs somebody's help."""
    return state in (
        RunState.GUEST_PANICKED,
        RunState.INTERNAL_ERROR,
        RunState.IO_ERROR,
        RunState.WATCHDOG,
    )


def no_save(vm: str, state: RunState) -> str:
    """Why a VM in this state cannot be saved and left as it is; empty if it can."""
    match state:
        case (
            RunState.RUNNING
            | RunState.PAUSED
            | RunState.PRELAUNCH
            | RunState.IO_ERROR
            | RunState.GUEST_PANICKED
            | RunState.WATCHDOG
        ):
            return ""
        case RunState.SUSPENDED:
            # QEMU wakes a guest that sleeps before it saves it.
            return f"the guest of VM {vm} sleeps; wake it first with `dcres resume {vm}`"
        case RunState.SHUTDOWN:
            return f"VM {vm} is off: its guest has shut down; start it again with `dcres start`"
        case RunState.INTERNAL_ERROR:
            return f"VM {vm} cannot go on ({state}), so there is nothing to save; {_BACK}"
        case (
            RunState.COLO
            | RunState.DEBUG
            | RunState.FINISH_MIGRATE
            | RunState.INMIGRATE
            | RunState.POSTMIGRATE
            | RunState.RESTORE_VM
            | RunState.SAVE_VM
        ):
            return (
                f"another monitor has put VM {vm} into QEMU's run state {state}; "
                f"`dcres resume {vm}` lets it run, then try again"
            )
        case _:
            assert_never(state)


def no_run(vm: str, state: RunState) -> str:
    """Why a VM in this state cannot be let run; empty if it can (tried: QEMU refuses ``cont``)."""
    match state:
        case RunState.SHUTDOWN:
            return f"VM {vm} is off: its guest has shut down; start it again with `dcres start`"
        case RunState.INTERNAL_ERROR:
            return f"VM {vm} cannot go on ({state}); {_BACK}"
        case RunState.INMIGRATE | RunState.FINISH_MIGRATE | RunState.SAVE_VM | RunState.RESTORE_VM:
            return f"VM {vm} is being saved or loaded ({state}); try again when that is done"
        case (
            RunState.COLO
            | RunState.DEBUG
            | RunState.GUEST_PANICKED
            | RunState.IO_ERROR
            | RunState.PAUSED
            | RunState.POSTMIGRATE
            | RunState.PRELAUNCH
            | RunState.RUNNING
            | RunState.SUSPENDED
            | RunState.WATCHDOG
        ):
            return ""
        case _:
            assert_never(state)


def advice(vm: str, state: RunState) -> str:
    """What to do about a VM in this state, as a sentence; empty where nothing is to be done."""
    match state:
        case RunState.RUNNING | RunState.COLO:
            return ""
        case RunState.PAUSED | RunState.PRELAUNCH | RunState.POSTMIGRATE | RunState.DEBUG:
            return f"`dcres resume {vm}` lets it run"
        case RunState.IO_ERROR:
            return (
                "a disk failed and the guest waits for it: make room where the disk is, or mend "
                f"what its log names, then `dcres resume {vm}` tries again; nothing is lost"
            )
        case RunState.INTERNAL_ERROR:
            return f"QEMU cannot go on with this guest, and its log says why; {_BACK}"
        case RunState.GUEST_PANICKED:
            return f"the guest's kernel has crashed (`dcres console {vm}`); {_BACK}"
        case RunState.WATCHDOG:
            return (
                f"the guest's watchdog has expired (`dcres console {vm}`); `dcres resume {vm}` "
                "lets it run all the same"
            )
        case RunState.SUSPENDED:
            return f"the guest sleeps; `dcres resume {vm}` wakes it"
        case RunState.SHUTDOWN:
            return (
                f"its guest has shut down; `dcres start` boots it again, `dcres stop {vm}` gives "
                "its memory back"
            )
        case RunState.FINISH_MIGRATE | RunState.INMIGRATE | RunState.RESTORE_VM | RunState.SAVE_VM:
            return "it is being saved or loaded"
        case _:
            assert_never(state)


_BACK = "`dcres start` boots it, `dcres restore` takes it back to a checkpoint"
