"""What users write: the VM file, the layout, and a host's own settings.

All models are frozen and refuse unknown keys. Sizes are written in binary units
(``512MiB``, ``1.5 GiB``, ``4096``) and held as bytes, always whole pages.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Self, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from dcres.errors import ConfigError
from dcres.model.pages import PAGE_SIZE
from dcres.model.retention import Keep

_UNITS = {"": 1, "B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")
NAME_PATTERN = r"^[a-z0-9]([a-z0-9-]{0,46}[a-z0-9])?$"
MAX_SUBS = 200
_MISSING = "does not exist"

_T = TypeVar("_T")


def parse_size(text: object) -> int:
    """Bytes from ``512MiB``, ``1.5 GiB`` or a plain number; ValueError names what is wrong."""
    match = _SIZE.fullmatch(str(text)) if not isinstance(text, bool) else None
    if match is None:
        raise ValueError(f"{text!r} is not a size; write a number and KiB, MiB, GiB or TiB")
    number, unit = match[1], match[2].upper()
    if unit not in _UNITS:
        raise ValueError(f"unit {match[2]!r} is not known; use KiB, MiB, GiB or TiB")
    size = float(number) * _UNITS[unit] if "." in number else int(number) * _UNITS[unit]
    if size != int(size) or int(size) % PAGE_SIZE:
        raise ValueError(f"{text!r} is not a multiple of {PAGE_SIZE} bytes (one page)")
    return int(size)


def format_size(length_bytes: int) -> str:
    """Bytes as people write them: the largest binary unit that keeps the number ≥ 1."""
    for unit, factor in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if length_bytes >= factor:
            return f"{length_bytes / factor:.4g} {unit}"
    return f"{length_bytes} B"


def listed(values: str | Sequence[_T]) -> list[str | _T]:
    """What is named or sized one by one: a sequence, or one string with commas (``h1,h2``)."""
    if isinstance(values, str):
        return [each.strip() for each in values.split(",") if each.strip()]
    return list(values)


Size = Annotated[int, BeforeValidator(parse_size)]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class Accel(StrEnum):
    """How QEMU runs the guest's code."""

    AUTO = "auto"
    KVM = "kvm"
    TCG = "tcg"


class Disk(_Model):
    """One virtual disk, attached as virtio-blk."""

    path: Path
    format: str = Field(default="qcow2", pattern="^(qcow2)$")
    cache_direct: bool = Field(default=False, alias="cache.direct")


class Layout(_Model):
    """How much of the VM's memory each host may keep: one main host, any number of sub hosts."""

    main: Size
    subs: tuple[Size, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.main == 0 or 0 in self.subs:
            raise ValueError("a host's share cannot be 0")
        if len(self.subs) > MAX_SUBS:
            raise ValueError(f"{len(self.subs)} sub hosts; at most {MAX_SUBS} are supported")
        return self

    @property
    def shares(self) -> tuple[int, ...]:
        """Bytes per host, the main host first."""
        return (self.main, *self.subs)

    def require_room_for(self, memory: int) -> None:
        """ConfigError unless the shares together hold `memory` bytes."""
        total = sum(self.shares)
        if total < memory:
            raise ConfigError(
                f"the layout holds {format_size(total)} and the VM has {format_size(memory)}; "
                f"give the hosts {format_size(memory - total)} more"
            )


class Protect(_Model):
    """How a VM's checkpoints are looked after. `keep` says which of them `dcres prune` leaves."""

    keep: Annotated[Keep, BeforeValidator(Keep.of)] | None = None


class VmSpec(_Model):
    """A VM file; docs/operators.md has every key."""

    name: str = Field(pattern=NAME_PATTERN)
    memory: Size = Field(gt=0)
    vcpus: int = Field(default=1, ge=1, le=255)
    kernel: Path | None = None
    initrd: Path | None = None
    append: str = "console=ttyS0"
    disks: tuple[Disk, ...] = ()
    accel: Accel = Accel.AUTO
    layout: Layout
    extra_args: tuple[str, ...] = ()
    protect: Protect | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kernel is None and not self.disks:
            raise ValueError("nothing to boot: give a kernel or a disk")
        if self.initrd is not None and self.kernel is None:
            raise ValueError("an initrd needs a kernel")
        self.layout.require_room_for(self.memory)
        return self

    def require_files(self) -> None:
        """ConfigError for a kernel, initrd or disk that is not there, or cannot be used safely."""
        for what, path in (("kernel", self.kernel), ("initrd", self.initrd)):
            if path is not None and not path.is_file():
                raise ConfigError(f"the {what} {path} of VM {self.name} {_MISSING}")
        for disk in self.disks:
            if not (disk.path.is_file() or disk.path.is_block_device()):
                why = "is neither a file nor a block device" if disk.path.exists() else _MISSING
                raise ConfigError(f"the disk {disk.path} of VM {self.name} {why}")
            if disk.cache_direct:
                raise ConfigError(
                    f"disk {disk.path} has cache.direct=on: its I/O writes guest memory behind "
                    "the page table; remove cache.direct"
                )


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    what = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        what = "unknown key"
    return f"{where}: {what}" if where else what


def vm_spec(values: object, source: str = "the VM file", base: Path | None = None) -> VmSpec:
    """A checked `VmSpec` from plain values; relative paths are taken from `base`.

    Raises ConfigError that names `source` and the first thing wrong in it.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{source}: expected keys such as name, memory and layout")
    try:
        spec = VmSpec.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError(f"{source}: {_first_problem(error)}") from None
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    root = (base or Path.cwd()).absolute()

    def absolute(path: Path | None) -> Path | None:
        return None if path is None else root / path

    disks = tuple(disk.model_copy(update={"path": root / disk.path}) for disk in spec.disks)
    return spec.model_copy(
        update={
            "kernel": absolute(spec.kernel),
            "initrd": absolute(spec.initrd),
            "disks": disks,
        }
    )


def _read_yaml(path: Path) -> object:
    try:
        return yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None


def load_vm_spec(path: Path) -> VmSpec:
    """Read a VM file. Raises ConfigError."""
    return vm_spec(_read_yaml(path), source=str(path), base=path.parent)


def layout_of(main: int, subs: Sequence[int]) -> Layout:
    """The layout with these shares in bytes. Raises ConfigError."""
    try:
        return Layout(main=main, subs=tuple(subs))
    except ValidationError as error:
        raise ConfigError(_first_problem(error)) from None


def load_layout(path: Path) -> Layout:
    """Read a layout file: the ``layout`` part of a VM file, by itself. Raises ConfigError."""
    try:
        return Layout.model_validate(_read_yaml(path))
    except ValidationError as error:
        raise ConfigError(f"{path}: {_first_problem(error)}") from None


def folder_of_environ(variable: str, environ: Mapping[str, str] = os.environ) -> Path | None:
    """The folder that a variable names, ``~`` expanded; None if it is unset or empty.

    Raises ConfigError for a relative one: that is another folder for each process that reads it.
    """
    text = environ.get(variable, "").strip()
    if not text:
        return None
    path = _at_home(text, variable)
    if not path.is_absolute():
        raise ConfigError(
            f"{variable} is {text!r}, a relative path, which is another folder for each process; "
            f"write its whole path, such as {path.absolute()}"
        )
    return path


def named_folder(path: str | Path, what: str = "a folder") -> Path:
    """The folder that a caller names, ``~`` expanded, as seen from where it runs.

    Raises ConfigError for an empty name.
    """
    if not str(path).strip():
        raise ConfigError(f"the name of {what} is empty; write its path, or leave it out")
    return _at_home(str(path), what).absolute()


def _at_home(text: str, what: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ConfigError(
            f"{what} is {text!r}, and there is no such user; write its whole path"
        ) from None


def default_home() -> Path:
    """Where dcres keeps its state on this machine: $DCRES_HOME, or the usual place."""
    return folder_of_environ("DCRES_HOME") or _usual("/var/lib", "XDG_STATE_HOME", ".local/state")


def store_of_environ() -> Path | None:
    """What $DCRES_STORE names; with ``{host}`` in it, for `dcres up`, a store for each host."""
    return folder_of_environ("DCRES_STORE")


def default_cache() -> Path:
    """Where dcres keeps what it can make again: $DCRES_CACHE, or the usual place."""
    return folder_of_environ("DCRES_CACHE") or _usual("/var/cache", "XDG_CACHE_HOME", ".cache")


def _usual(for_root: str, variable: str, below_home: str) -> Path:
    """Basedir specification: what is not absolute counts as not set."""
    if os.geteuid() == 0:
        return Path(for_root) / "dcres"
    named = Path(os.environ.get(variable, ""))
    return (named if named.is_absolute() else Path.home() / below_home) / "dcres"


class HostSettings(_Model):
    """What a host tells dcres about itself, through the environment of its raylet.

    ``DCRES_HOST`` (name), ``DCRES_RUN`` (sockets, tables, logs), ``DCRES_RAM`` (a folder on
    tmpfs for guest memory), ``DCRES_STORE`` (checkpoints) and ``DCRES_ADDRESS`` (where the
    memory server listens).
    """

    name: str
    run: Path
    ram: Path
    store: Path
    address: str = "127.0.0.1"

    @classmethod
    def from_environ(cls, environ: Mapping[str, str], address: str = "127.0.0.1") -> HostSettings:
        """This host's settings; what is unset or empty gets its default. Raises ConfigError."""
        home = folder_of_environ("DCRES_HOME", environ) or default_home()
        return cls(
            name=environ.get("DCRES_HOST") or socket.gethostname(),
            run=folder_of_environ("DCRES_RUN", environ) or home / "run",
            ram=folder_of_environ("DCRES_RAM", environ) or Path("/dev/shm/dcres"),
            store=folder_of_environ("DCRES_STORE", environ) or home / "store",
            address=environ.get("DCRES_ADDRESS") or address,
        )

    def environ(self) -> dict[str, str]:
        """The environment that `from_environ` reads back."""
        return {
            "DCRES_HOST": self.name,
            "DCRES_RUN": str(self.run),
            "DCRES_RAM": str(self.ram),
            "DCRES_STORE": str(self.store),
            "DCRES_ADDRESS": self.address,
        }
