"""What an operation did: its instructions and events, with times since its beginning.

Plain values, bounded in number and size. Instructions and events name hosts, counts and sentences
of errors; no page of a guest is in them, and no secret.
"""

from __future__ import annotations

from collections import deque
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

from dcres.actors.control.concurrency import Concurrency
from dcres.model.operations.events import Done, Failed

MOST_ENTRIES = 400
_MOST_VALUES = 16
_MOST_CHARACTERS = 500

_TIMES = ("at_s", "times", "last_at_s")

Entry = dict[str, Any]


class Journal:
    """Of one operation, which has a `name`; entries beyond `MOST_ENTRIES` push out the first.

    What is asked again and again, and answered alike, is one entry that counts the `times`.
    """

    def __init__(self, name: str, concurrency: Concurrency) -> None:
        self.name = name
        self._concurrency = concurrency
        self._began_s = concurrency.now_s()
        self._began = concurrency.utc()
        self._lock = concurrency.lock()
        self._entries: deque[Entry] = deque(maxlen=MOST_ENTRIES)
        self._count = 0

    def instruction(self, instruction: object) -> None:
        """It is to be carried out now."""
        self._enter("instruction", instruction)

    def event(self, event: object) -> None:
        """It has been heard of, and is acted on now."""
        self._enter("event", event)

    def _enter(self, kind: str, what: object) -> None:
        at_s = round(self._concurrency.now_s() - self._began_s, 6)
        said = {kind: type(what).__name__, **_values_of(what)}
        with self._lock:
            for before in list(self._entries)[-2:]:
                if {key: before[key] for key in before if key not in _TIMES} == said:
                    before.update(times=before.get("times", 1) + 1, last_at_s=at_s)
                    return
            self._count += 1
            self._entries.append({**said, "at_s": at_s})

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The latest ones, in order."""
        with self._lock:
            return tuple(dict(each) for each in self._entries)

    def to_dict(self) -> dict[str, Any]:
        """As ``dcres status --json`` prints it."""
        entries = self.entries
        return {
            "operation": self.name,
            "began": self._began.isoformat(timespec="milliseconds"),
            "left_out": self._count - len(entries),
            "entries": list(entries),
        }


def _values_of(value: object) -> dict[str, Any]:
    match value:
        case Done(instruction):
            return {"of": type(instruction).__name__, **_values_of(instruction)}
        case Failed(instruction, failure):
            of = {"of": type(instruction).__name__, **_values_of(instruction)}
            return {**of, "failure": {key: _plain(at) for key, at in failure.to_dict().items()}}
        case _ if is_dataclass(value):
            return {each.name: _plain(getattr(value, each.name)) for each in fields(value)}
        case _:
            return {}


def _plain(value: object) -> object:
    match value:
        case None | bool() | int() | float():
            return value
        case Enum():
            return str(value)
        case str():
            return value if len(value) <= _MOST_CHARACTERS else f"{value[:_MOST_CHARACTERS]}…"
        case tuple() if len(value) <= _MOST_VALUES:
            return [_plain(each) for each in value]
        case tuple():
            return f"{len(value)} values"
        case _ if is_dataclass(value):
            return _values_of(value)
        case _:
            return type(value).__name__
