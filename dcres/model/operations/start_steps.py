"""What a start or a restore says and hears: its instructions and events."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from dcres.model.operations.events import Cancelled, Done, Failed
from dcres.model.parts import Names
from dcres.model.phase import HostState


@dataclass(frozen=True, slots=True)
class LookAround:
    """What is there of a VM of that name?"""


@dataclass(frozen=True, slots=True)
class RequireRoom:
    """Is there room once what is left of it is given back?"""


@dataclass(frozen=True, slots=True)
class MakeWay:
    """End what is left of it."""


@dataclass(frozen=True, slots=True)
class Reserve:
    """Set memory aside, and start an actor on every host."""


@dataclass(frozen=True, slots=True)
class FindHolders:
    """Which hosts of the cluster have parts?"""


@dataclass(frozen=True, slots=True)
class TakeDown:
    """End everything of the VM on every host."""


@dataclass(frozen=True, slots=True)
class OnHost:
    """Something to be done on a host."""

    host: str


class RequireFree(OnHost):
    """May a start clear what is here? Changes nothing."""


class Clear(OnHost):
    """End and remove what an earlier life left."""


class Claim(OnHost):
    """The main host: begin a life of the VM."""


class FindParts(OnHost):
    """Which parts are here? They are kept from now on."""


class Visit(OnHost):
    """A host outside the VM that has parts: start an actor there."""


class KeepParts(OnHost):
    """A host outside the VM: keep the parts that are here."""


class Plan(OnHost):
    """Where does every page go?"""


class ReadMainPart(OnHost):
    """What another main host needs of the main host's part."""


@dataclass(frozen=True, slots=True)
class ServeParts(OnHost):
    """Start a part server for these."""

    parts: Names


class Boot(OnHost):
    """The main host: start QEMU, and load pages."""


class Serve(OnHost):
    """A sub host: load pages, and start the memory server."""


class Run(OnHost):
    """The main host: start the pager, then load the VM core."""


class Go(OnHost):
    """The main host: the VM is up. May be repeated."""


@dataclass(frozen=True, slots=True)
class Looked:
    """What the hosts of a VM of that name are, the main host first; none if there is nothing."""

    states: tuple[HostState, ...]


@dataclass(frozen=True, slots=True)
class Reserved:
    """The VM has these hosts."""

    main: str
    subs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Found:
    """A host has these parts."""

    host: str
    parts: Names


@dataclass(frozen=True, slots=True)
class FoundHolders:
    """Hosts that have parts, wherever they are."""

    parts: tuple[tuple[str, Names], ...]


@dataclass(frozen=True, slots=True)
class Planned:
    """Pages per part and host of the VM."""

    host: str
    flow: tuple[tuple[int, ...], ...]


Calling: TypeAlias = LookAround | RequireRoom | MakeWay | Reserve | TakeDown
Finding: TypeAlias = FindParts | FindHolders | Visit | KeepParts | Plan | ReadMainPart | ServeParts
Bringing: TypeAlias = RequireFree | Clear | Claim | Boot | Serve | Run | Go
Instruction: TypeAlias = Calling | Finding | Bringing
Event: TypeAlias = (
    Looked
    | Reserved
    | Found
    | FoundHolders
    | Planned
    | Done[Instruction]
    | Failed[Instruction]
    | Cancelled
)
