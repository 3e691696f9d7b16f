"""The manifest of a checkpoint that all hosts have saved, and the facts that people are told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from dcres.actors.messages import Finished, PagingCounters, Saved
from dcres.actors.ports import Port
from dcres.config import VmSpec
from dcres.errors import OperationFailed
from dcres.model.formats import MemoryFormat
from dcres.model.run_state import RunState
from dcres.storage.digest import FileSum
from dcres.storage.format.manifest import (
    RUN_STATE,
    STOPPED,
    TIME_FORMAT,
    DiskSnapshot,
    HostPart,
    Manifest,
    Mode,
    PagingDuring,
    Role,
    Segment,
    chain_upon,
)
from dcres.storage.layout import VMCORE, memory_file


@dataclass(frozen=True, slots=True)
class Subject:
    """What is checkpointed: a VM, and where it runs."""

    vm: str
    generation: int
    spec: VmSpec
    accel: str
    qemu_version: str
    machine: str
    hosts: tuple[str, ...]  # the main host first
    ports: Mapping[str, Port]
    alive: Callable[[str], bool] = lambda host: True  # whether a host is there at all
    run_state: RunState = RunState.RUNNING  # before anything was done to it

    @property
    def main(self) -> str:
        """The main host's name."""
        return self.hosts[0]

    @property
    def subs(self) -> tuple[str, ...]:
        """The sub hosts, in the order of the main host's page table."""
        return tuple(host for host in self.hosts if host != self.main)


@dataclass(frozen=True, slots=True)
class Taken:
    """What the hosts have told of a checkpoint; all of them have voted."""

    checkpoint: str
    created: datetime
    mode: Mode
    memory_format: MemoryFormat
    paging_before: PagingCounters  # when it began
    finished: Finished
    saved: Mapping[str, Saved]  # by host
    rounds: int
    seconds: float
    downtime_s: float
    base: Manifest | None = None  # of an increment


def manifest_of(subject: Subject, taken: Taken) -> Manifest:
    """The manifest. Raises OperationFailed if the parts do not fit together."""
    _require_agreement(subject, taken)
    finished, before = taken.finished, taken.paging_before
    return Manifest(
        **_increment(taken),
        checkpoint=taken.checkpoint,
        vm=subject.vm,
        created=taken.created.strftime(TIME_FORMAT),
        mode=taken.mode,
        memory_format=taken.memory_format,
        memory_bytes=subject.spec.memory,
        generation=subject.generation,
        vm_spec=subject.spec.model_dump(mode="json", by_alias=True),
        qemu_version=subject.qemu_version,
        accel=subject.accel,
        machine={
            "type": subject.machine,
            RUN_STATE: str(finished.run_state),
            STOPPED: finished.stopped.strftime(TIME_FORMAT),
        },
        tick=finished.tick,
        hosts=tuple(_slice(subject, taken, index) for index in range(len(subject.hosts))),
        vmcore=_core_sum(taken.saved[subject.main]),
        rounds=taken.rounds,
        disks=tuple(
            DiskSnapshot(path=str(each.path), format=each.format, snapshot=taken.checkpoint)
            for each in subject.spec.disks
        ),
        seconds=taken.seconds,
        downtime_seconds=taken.downtime_s,
        pages_moved_for_checkpoint=finished.moved,
        paging_during=PagingDuring(
            # A pager that was started again meanwhile counts from 0.
            pages_in=max(0, finished.pages_in - before.pages_in),
            pages_out=max(0, finished.pages_out - before.pages_out),
        ),
    )


def _require_agreement(subject: Subject, taken: Taken) -> None:
    """Existence on every sub host and placement on the main host name the same pages."""
    placed = taken.saved[subject.main].placed
    for host, expected in zip(subject.subs, placed, strict=True):
        saved = taken.saved[host]
        if (saved.pages, saved.digest) != (expected.pages, expected.digest):
            raise OperationFailed(
                f"{host} saved {saved.pages} pages, not the {expected.pages} pages that the "
                "network page table places there",
                {},
            )


def _core_sum(saved: Saved) -> FileSum:
    files = [FileSum(**each) for each in saved.files]
    return next(each for each in files if each.name == VMCORE)


def _slice(subject: Subject, taken: Taken, index: int) -> HostPart:
    host = subject.hosts[index]
    saved = taken.saved[host]
    return HostPart(
        host=host,
        role=Role.MAIN if host == subject.main else Role.SUB,
        share_bytes=subject.spec.layout.shares[index],
        pages=saved.pages,
        bytes_written=saved.bytes_written,
        file_bytes_allocated=saved.allocated_bytes,
        seconds=saved.seconds,
        memory_file=memory_file(taken.memory_format, taken.checkpoint),
        segments=tuple(Segment(**each) for each in saved.segments) or None,
        files=tuple(FileSum(**each) for each in saved.files),
    )


def _increment(taken: Taken) -> dict[str, Any]:
    """What only the manifests of segmented checkpoints say."""
    if taken.memory_format is not MemoryFormat.SEGMENTED:
        return {}
    base, saved = taken.base, taken.saved.values()
    named = {segment["checkpoint"] for each in saved for segment in each.segments}
    return {
        "base": None if base is None else base.checkpoint,
        "chain": chain_upon(base, taken.checkpoint, named),
        "pages_changed": sum(each.pages_changed for each in saved),
        "pages_saved": sum(each.pages_saved for each in saved),
    }


def checkpoint_facts(manifest: Manifest, seconds: float | None = None) -> dict[str, Any]:
    """A checkpoint as `dcres checkpoint --json` prints it."""
    return {
        "checkpoint": manifest.checkpoint,
        "vm": manifest.vm,
        "mode": str(manifest.mode),
        "format": str(manifest.memory_format),
        "seconds": manifest.seconds if seconds is None else seconds,
        "downtime_seconds": manifest.downtime_seconds,
        "pages": manifest.pages,
        "base": manifest.base,
        "pages_changed": manifest.pages_changed,
        "pages_saved": manifest.pages_saved,
        "hosts": [
            {
                "host": part.host,
                "role": str(part.role),
                "pages": part.pages,
                "bytes_written": part.bytes_written,
                "file_bytes_allocated": part.file_bytes_allocated,
                "seconds": part.seconds,
            }
            for part in manifest.hosts
        ],
        "paging_during": {
            "pages_in": manifest.paging_during.pages_in,
            "pages_out": manifest.paging_during.pages_out,
        },
        "pages_moved_for_checkpoint": manifest.pages_moved_for_checkpoint,
        "rounds": manifest.rounds,
        "run_state": str(manifest.run_state),
    }
