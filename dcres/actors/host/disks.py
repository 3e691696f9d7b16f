"""The disks of a VM on its main host: looked at before they are used, put back after a failure."""

from __future__ import annotations

import logging
from pathlib import Path

from dcres.actors.host.state import state_in
from dcres.actors.host.vm_folder import VmFolder
from dcres.config import VmSpec
from dcres.errors import DcresError
from dcres.linux.machine import boot_id
from dcres.storage.format.manifest import Manifest
from dcres.vm import disk
from dcres.vm.reverting import require_settled

log = logging.getLogger("dcres.host")


def require_disks(spec: VmSpec, manifest: Manifest | None) -> None:
    """All disks are as a start wants them, or the restore of `manifest`.

    Of what an interrupted restore left nothing is there afterwards. Raises ConfigError,
    CheckpointCorrupt; no disk is another then.
    """
    if manifest is None:
        images = disk.require_usable([each.path for each in spec.disks])
    else:
        images = disk.require_usable([Path(each.path) for each in manifest.disks])
        for image, saved in zip(images, manifest.disks, strict=True):
            image.require_snapshot(saved.snapshot)
    require_settled(images)


def has_its_disks(folder: VmFolder) -> bool:
    """Whether the VM's QEMU is there, so that nothing else has used its disks since it began.

    Ask before it is ended. Where it is not, a restore may have been interrupted long ago, as by a
    power failure, and its disks been used by others since; to put them back would undo their work.
    """
    state = state_in(folder)
    return state is not None and state.qemu is not None and state.qemu.alive


def put_disks_back(folder: VmFolder) -> None:
    """Before the state file goes: undo what a restore that did not come to its end did to disks.

    No QEMU of the VM runs any more. What cannot be undone now is told, and by the next start, too.
    What was begun before this machine was started again stays: others may have used the disks.
    """
    state = state_in(folder)
    if state is not None and state.reverting is not None and state.reverting.boot == boot_id():
        try:
            state.reverting.reverting.undo()
        except DcresError as error:
            log.error("%s", error)
