"""What a paging process is told at its start: a private JSON file, read by `load`."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from dcres.model.wire import Identity

T = TypeVar("T", "PagerSettings", "ServerSettings")


@dataclass(frozen=True, slots=True)
class SubAddress:
    """Where a sub host's memory server listens, and what it may hold."""

    host: str
    address: str
    port: int
    capacity_pages: int


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """A memory server's settings. Port 0 lets the kernel choose at the first start."""

    vm: str
    generation: int
    secret: str
    page_count: int
    capacity_pages: int
    address: str
    port: int
    store: str
    control: str

    @property
    def identity(self) -> Identity:
        """What a pager must prove to be."""
        return Identity(bytes.fromhex(self.vm), self.generation, bytes.fromhex(self.secret))


@dataclass(frozen=True, slots=True)
class PagerSettings:
    """A pager's settings. With no sub hosts it only tracks writes."""

    vm: str
    generation: int
    secret: str
    page_count: int
    limit_pages: int
    qemu_pid: int
    ram: str
    outbox: str
    table: str
    control: str
    subs: tuple[SubAddress, ...]

    @property
    def identity(self) -> Identity:
        """What the pager proves to memory servers."""
        return Identity(bytes.fromhex(self.vm), self.generation, bytes.fromhex(self.secret))


def save(settings: PagerSettings | ServerSettings, path: Path) -> None:
    """Write `settings` (mode 0600, by rename: a process that starts never sees half of it)."""
    fresh = path.with_suffix(".new")
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w") as file:
        json.dump(asdict(settings), file)
    fresh.rename(path)


def load(kind: type[T], path: Path) -> T:
    """Read settings of `kind` back."""
    values: dict[str, Any] = json.loads(path.read_text())
    if "subs" in values:
        values["subs"] = tuple(SubAddress(**sub) for sub in values["subs"])
    return kind(**values)
