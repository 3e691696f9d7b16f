"""What a paging process is told at its start: a private JSON file, read by `load`."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Protocol, TypeVar, get_args, get_origin, get_type_hints

from dcres.errors import ConfigError
from dcres.linux.files import open_own
from dcres.model.handshake import Identity

T = TypeVar("T")


class Settings(Protocol):
    """Any dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class SubAddress:
    """Where a memory server or part server listens, and what it may hold.

    `code` is its owner code in the network page table; 0 until the main host gave it one.
    """

    host: str
    address: str
    port: int
    capacity_pages: int = 0
    code: int = 0


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
    moves: str  # where the mover's orders are, if there are any
    sources: tuple[SubAddress, ...] = ()  # part servers of a lazy restore
    base: str = ""  # the checkpoint that all memory is from, if increments can be made upon it

    @property
    def identity(self) -> Identity:
        """What the pager proves to memory servers."""
        return Identity(bytes.fromhex(self.vm), self.generation, bytes.fromhex(self.secret))


def save(settings: Settings, path: Path) -> None:
    """Write `settings` (mode 0600, by rename: a process that starts never sees half of it)."""
    fresh = path.with_suffix(".new")
    fd = open_own(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    with os.fdopen(fd, "w") as file:
        json.dump(asdict(settings), file, default=os.fspath)
    fresh.rename(path)


def load(kind: type[T], path: Path) -> T:
    """Read settings of `kind` back; they may have others, tuples of one type, and paths in them.

    Raises ConfigError for what another version of dcres wrote.
    """
    values = json.loads(path.read_text())
    try:
        made: T = _made(kind, values)
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is not of this version of dcres ({error}); stop the VM and restore it"
        ) from None
    return made


def _made(kind: Any, value: Any) -> Any:
    """A value of type `kind`, which `save` wrote as the JSON `value`.

    pydantic does as much, and to import it would take as long as all else that a pager does.
    """
    if is_dataclass(kind) and isinstance(kind, type):
        kinds = get_type_hints(kind)
        return kind(**{name: _made(kinds[name], each) for name, each in value.items()})
    if get_origin(kind) is tuple:
        return tuple(_made(get_args(kind)[0], each) for each in value)
    if get_origin(kind) is UnionType:  # of something and None
        return None if value is None else _made(get_args(kind)[0], value)
    return Path(value) if kind is Path else value
