"""The record of what is to run, ``STORE/VM/record.json``, in the store of the VM's main host."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dcres.errors import CheckpointCorrupt, Conflict
from dcres.linux.files import locked
from dcres.model.record import Desired, Record, refusal
from dcres.storage import layout
from dcres.storage.atomic import make_private_dirs, store_written, write_durably
from dcres.storage.store import marker

FORMAT_VERSION = 1


class Records:
    """The record of one VM in the store `root`."""

    def __init__(self, root: Path, vm: str) -> None:
        self._root = root
        self._vm = layout.checked_vm(vm)
        self._path = root / vm / layout.RECORD

    def read(self) -> Record | None:
        """The record; None if there is none. Raises CheckpointCorrupt for one that says nothing."""
        with suppress(FileNotFoundError):
            return self._decoded(self._path.read_bytes())
        return None

    def write(self, record: Record) -> None:
        """Let it replace the one before; durable.

        Writers in other processes wait for each other (flock). Raises Conflict for a version or
        generation that has been overtaken, StoreFull, StoreReadOnly, CheckpointCorrupt.
        """
        marker.mark(self._root)
        make_private_dirs(self._path.parent)
        lock = self._path.with_name(layout.GENERATION_LOCK)
        with store_written(lock), locked(lock):
            if why := refusal(self._vm, self.read(), record):
                raise Conflict(why)
            values = {"format_version": FORMAT_VERSION, **asdict(record)}
            text = json.dumps(values, sort_keys=True) + "\n"
            write_durably(self._path, text.encode("ascii"))

    def _decoded(self, data: bytes) -> Record:
        try:
            values = json.loads(data)
            read = _READERS.get(values.pop("format_version"))
            if read is not None:
                return read(values)
            why = "a later dcres wrote it; use that one"
        except (ValueError, TypeError, KeyError, AttributeError):
            why = "it is damaged; remove it, and start the VM again"
        raise CheckpointCorrupt(f"{self._path} says nothing of what is to run: {why}")


def _read_1(values: dict[str, Any]) -> Record:
    desired = Desired(values.pop("desired"))
    record = Record(desired=desired, **values)
    numbers = record.version, record.generation
    words = record.cluster, record.since, record.by
    if not (all(type(each) is int for each in numbers) and isinstance(record.spec, dict)):
        raise TypeError("a number or the VM file is none")
    if not all(isinstance(each, str) for each in words):
        raise TypeError("a word is none")
    return record


_READERS: dict[Any, Callable[[dict[str, Any]], Record]] = {1: _read_1}
