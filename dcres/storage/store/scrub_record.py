"""When each file of a VM's checkpoints was last read whole: ``STORE/VM/scrubbed.json``.

It belongs to no checkpoint, and nothing is lost with it: what it does not name is read sooner. A
file is known by its name and its inode, so neither a copy of a store nor a new file that got an
old inode passes for one that was read.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from dcres.errors import StoreFull, StoreReadOnly
from dcres.storage import layout
from dcres.storage.atomic import write_durably
from dcres.storage.format.manifest import TIME_FORMAT
from dcres.storage.store import marker

_KIND, _VERSION = "scrubbed", 1


@dataclass(frozen=True, slots=True, order=True)
class Known:
    """A file: ``HOST/NAME`` where checkpoints share it, else ``CHECKPOINT/HOST/NAME``."""

    name: str
    inode: int


Times = dict[Known, datetime]


class ScrubRecord:
    """The record of one VM in the store `root`; `trouble` is why it cannot be kept, or empty."""

    def __init__(self, root: Path, vm: str) -> None:
        self._root = root
        self._path = root / layout.checked_vm(vm) / layout.SCRUBBED
        self.trouble = ""

    def read(self) -> Times:
        """When what was last read, as far as that is known."""
        if self._path.is_symlink():
            self.trouble = self._foreign("is a symbolic link")
            return {}
        try:
            values = json.loads(self._path.read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError):
            self.trouble = self._foreign("is not what dcres writes there")
            return {}
        if not isinstance(values, dict) or values.get("kind") != _KIND:
            self.trouble = self._foreign("is not what dcres writes there")
            return {}
        if values.get("format_version") != _VERSION:
            self.trouble = f"{self._path} was written by a later dcres; use that one"
            return {}
        return _times(values.get("files"))

    def write(self, times: Times, gone: Collection[Known]) -> None:
        """Have `times` on record, and nothing of what is `gone`; durable unless there is `trouble`.

        What others have put there since stays. Two that write at the same moment may lose what one
        of them has read, which is then read again sooner.
        """
        before = self.read()
        if self.trouble:
            return
        kept = {known: at for known, at in before.items() if known not in gone}
        for known, at in times.items():
            kept[known] = max(at, kept.get(known, at))
        files = [
            {"inode": known.inode, "name": known.name, "read": at.strftime(TIME_FORMAT)}
            for known, at in sorted(kept.items())
        ]
        values = {"files": files, "format_version": _VERSION, "kind": _KIND}
        text = json.dumps(values, sort_keys=True) + "\n"
        try:
            marker.mark(self._root)
            write_durably(self._path, text.encode("ascii"))
        except (StoreReadOnly, StoreFull) as error:
            self.trouble = str(error)

    def _foreign(self, what: str) -> str:
        return f"{self._path} {what}, so it is not replaced; move it away"


def _times(files: object) -> Times:
    """Those entries that can be read: an entry too few costs one reading."""
    found: Times = {}
    for each in files if isinstance(files, list) else ():
        with suppress(ValueError, TypeError, KeyError):
            at = datetime.strptime(each["read"], TIME_FORMAT).replace(tzinfo=UTC)
            found[Known(str(each["name"]), int(each["inode"]))] = at
    return found
