"""Disks taken back to a checkpoint, so that this can be undone until the guest runs.

::

    keep ────────────▶ take back ─────▶ VM core ──▶ drop the kept states ──▶ the guest runs
    a snapshot of      to the           loaded      of the first disk: from
    each disk          checkpoint's                 here on it is done
         │                  │               │
         └──────────────────┴───────────────┴──▶ undo: back to the kept states, drop them

Each disk's state before is kept as an internal snapshot of its own, whose name says of which
restore, and which of how many it is. Whatever is interrupted, what is left of them tells the rest:

- all there: the guest has not run since, and every disk can go back;
- some missing: either no disk was taken back yet, or all are where they belong. What is left is
  dropped, which changes no disk.

So the kept state of the first disk decides, as a manifest does: by being the first to be dropped.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dcres.errors import ConfigError, DcresError
from dcres.vm import disk
from dcres.vm.disk import Image

_PREFIX = "dcres-before-"
# The second part is a checkpoint's name.
_KEPT = re.compile(_PREFIX + r"([a-z0-9-]+-[0-9]{8}-[0-9]{6}-[0-9a-f]{4})-disk([0-9]+)of([0-9]+)")


@dataclass(frozen=True, slots=True)
class Reverting:
    """The disks of one restore, in the VM file's order."""

    checkpoint: str
    disks: tuple[Path, ...]

    def to_dict(self) -> dict[str, object]:
        """Plain values for a state file; `from_dict` reads them back."""
        return {"checkpoint": self.checkpoint, "disks": [str(each) for each in self.disks]}

    @classmethod
    def from_dict(cls, state: Mapping[str, object]) -> Reverting:
        """What `to_dict` wrote."""
        disks = state["disks"]
        assert isinstance(disks, list)
        return cls(str(state["checkpoint"]), tuple(Path(each) for each in disks))

    @property
    def kept(self) -> list[str]:
        """The names of the snapshots that keep the disks' states, disk by disk."""
        count = len(self.disks)
        return [f"{_PREFIX}{self.checkpoint}-disk{at + 1}of{count}" for at in range(count)]

    def do(self, snapshot: str) -> None:
        """Keep every disk's state, then take all back to `snapshot`.

        The first step writes to every disk and takes its lock, so what refuses does before any is
        taken back. Raises ConfigError; `undo` is for the caller to call then.
        """
        for each, name in zip(self.disks, self.kept, strict=True):
            disk.create(each, name)
        for each in self.disks:
            disk.revert(each, snapshot)

    def undo(self) -> None:
        """Every disk as it was before `do`, however far that or `undo` came. Repeatable.

        Nothing to do once the guest may run. Raises ConfigError, with what is to be done by hand,
        when a disk cannot be taken back; the kept states are still there then.
        """
        left = self._left()
        try:
            if len(left) == len(self.disks):
                for each, name in left.items():
                    disk.revert(each, name)
            for each, name in left.items():
                disk.delete(each, name)
        except DcresError as error:
            raise ConfigError(f"{error}; {_by_hand(left)}") from None

    def _left(self) -> dict[Path, str]:
        pairs = zip(self.disks, self.kept, strict=True)
        return {each: name for each, name in pairs if name in disk.snapshots(each)}

    def settle(self, drop: Callable[[int, str], None]) -> list[str]:
        """Before the guest runs: drop all kept states by `drop(index, name)`.

        The first decides: what that raises is raised, and `undo` takes the disks back. What
        others raise is returned, since a state that stays does no harm.
        """
        troubles = []
        for index, name in enumerate(self.kept):
            try:
                drop(index, name)
            except DcresError as error:
                if index == 0:
                    raise
                troubles.append(str(error))
        return troubles


def _by_hand(left: Mapping[Path, str]) -> str:
    back = "; ".join(f"qemu-img snapshot -a {name} {each}" for each, name in left.items())
    return (
        f"a restore was interrupted; to take every disk back to its state before, run: {back}; "
        "then delete these snapshots with -d (to keep the disks as they are, only delete the "
        "snapshots)"
    )


def require_settled(images: Sequence[Image]) -> None:
    """No restore was interrupted in the middle on these disks, or what is left of it is dropped.

    Where all kept states are there the disks may have been used by others since, so nothing is
    taken back: ConfigError says how. Nothing else of the disks is changed.
    """
    found: dict[tuple[str, int], dict[Path, str]] = {}
    for image in images:
        for name in image.snapshots:
            if (kept := _KEPT.fullmatch(name)) is not None:
                found.setdefault((kept[1], int(kept[3])), {})[image.path] = name
    for (_, count), left in found.items():
        if len(left) == count or len(images) < count:
            raise ConfigError(_by_hand(left))
        for each, name in left.items():
            disk.delete(each, name)
