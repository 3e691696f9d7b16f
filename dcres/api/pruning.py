"""Removing the checkpoints of a VM that its rules do not keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Any

from dcres.api.catalogue import Catalogue
from dcres.errors import ConfigError, DcresError, NotFound, OperationFailed
from dcres.model.retention import Keep, reasons_to_keep
from dcres.storage.format.manifest import Manifest
from dcres.storage.store.protocols import Listed

_UNREADABLE = "its manifest cannot be read; `dcres delete` removes it"


@dataclass(frozen=True, slots=True)
class Fate:
    """What becomes of one checkpoint.

    `reasons` says why it stays, and is empty for one that goes; `problem` why it did not go, or
    not with all of its files.
    """

    checkpoint: str
    created: str | None
    size_bytes: int
    reasons: tuple[str, ...] = ()
    removed: bool = False
    problem: str = ""

    @property
    def goes(self) -> bool:
        """Whether no rule keeps it."""
        return not self.reasons


@dataclass(frozen=True, slots=True)
class Pruning:
    """All checkpoints of a VM, the newest first, and what becomes of them."""

    vm: str
    keep: Keep
    fates: tuple[Fate, ...]

    @property
    def going(self) -> tuple[Fate, ...]:
        """Those that no rule keeps."""
        return tuple(each for each in self.fates if each.goes)

    @property
    def problems(self) -> tuple[str, ...]:
        """Why some are there still."""
        return tuple(f"{each.checkpoint}: {each.problem}" for each in self.fates if each.problem)

    def to_dict(self) -> dict[str, Any]:
        """As ``dcres prune --json`` prints it."""
        fates = [{**asdict(each), "keep": not each.goes} for each in self.fates]
        return {
            "vm": self.vm,
            "keep": asdict(self.keep),
            "checkpoints": fates,
            "removed": [each.checkpoint for each in self.fates if each.removed],
            "freed_bytes": sum(each.size_bytes for each in self.fates if each.removed),
        }


def plan_pruning(catalogue: Catalogue, vm: str, keep: Keep | str | None = None) -> Pruning:
    """What would stay by `keep`, or by the VM file of the newest checkpoint; changes nothing.

    A checkpoint whose manifest cannot be read, or that lacks a part, counts for no rule and stays:
    none that can be restored is to go for its sake. Raises NotFound for a VM without checkpoints,
    ConfigError without rules.
    """
    listing = catalogue.list(vm)
    if not listing:
        raise NotFound(f"VM {vm} has no checkpoint here; `dcres checkpoints` lists all there are")
    read = [each.manifest for each in listing if each.manifest is not None]
    rules = _rules_of(vm, read) if keep is None else _checked(keep)
    lacking = {each.checkpoint: catalogue.lacking(each) for each in read}
    whole = [each for each in read if not lacking[each.checkpoint]]
    taken = [(each.checkpoint, datetime.fromisoformat(each.created)) for each in whole]
    reasons = reasons_to_keep(rules, taken)
    for checkpoint, hosts in lacking.items():
        if hosts:
            reasons[checkpoint] = (f"its part on {', '.join(hosts)} is not to be found",)
    fates = [_fate(each, reasons) for each in reversed(listing)]
    return Pruning(vm, rules, tuple(fates))


def _checked(keep: object) -> Keep:
    try:
        return Keep.of(keep)
    except ValueError as error:
        raise ConfigError(f"keep: {error}") from None


def _rules_of(vm: str, manifests: Sequence[Manifest]) -> Keep:
    protect = manifests[-1].vm_spec.get("protect") if manifests else None
    keep = protect.get("keep") if isinstance(protect, dict) else None
    if keep is None:
        raise ConfigError(
            f"nothing says which checkpoints of VM {vm} to keep: its VM file has no protect.keep; "
            "give --keep, such as --keep last=3,daily=7"
        )
    return _checked(keep)


def _fate(entry: Listed, reasons: dict[str, tuple[str, ...]]) -> Fate:
    manifest = entry.manifest
    if manifest is None:
        return Fate(entry.checkpoint, None, 0, (_UNREADABLE,))
    size = sum(part.file_bytes_allocated for part in manifest.hosts)
    return Fate(entry.checkpoint, manifest.created, size, reasons[entry.checkpoint])


def prune(catalogue: Catalogue, planned: Pruning) -> Pruning:
    """Remove those that go, the oldest first, as `plan_pruning` has them; what became of each.

    One that is being read stays, and one that fails does not keep the others.
    """
    fates = {each.checkpoint: each for each in planned.fates}
    for fate in reversed(planned.going):
        fates[fate.checkpoint] = _remove(catalogue, fate)
    return replace(planned, fates=tuple(fates.values()))


def _remove(catalogue: Catalogue, fate: Fate) -> Fate:
    try:
        catalogue.delete(fate.checkpoint)
    except NotFound:
        return replace(fate, removed=True)  # somebody else was quicker
    except OperationFailed as error:  # of files that are left
        return replace(fate, removed=True, problem=str(error))
    except DcresError as error:
        return replace(fate, problem=str(error))
    return replace(fate, removed=True)
