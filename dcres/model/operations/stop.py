"""The end of a VM on all its hosts, whatever state they are in.

::

    DESTROYING ──every host has answered or will not──▶ RELEASING ──▶ SWEEPING ──▶ DOWN
                                                            │        where none answered
                                                            └── Failed ──▶ NOT_DOWN

A host whose actor does not answer is swept once the actor cannot start anything any more: a QEMU
that was left there would run on over memory and disks of the VM's next life.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TypeAlias, assert_never

from dcres.errors import HostFailure
from dcres.model.operations.events import Cancelled, Done, Failed


class Phase(StrEnum):
    """Where the end of a VM stands."""

    DESTROYING = "destroying"
    RELEASING = "releasing"
    SWEEPING = "sweeping"
    DOWN = "down"
    NOT_DOWN = "not down"


@dataclass(frozen=True, slots=True)
class Destroy:
    """End all of the VM on the host of that index, whose name is `host` if that is known."""

    index: int
    host: str = ""


@dataclass(frozen=True, slots=True)
class Release:
    """End the actors and give the hosts back. The hosts of the `silent` indices are asked for."""

    silent: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Sweep:
    """End what is left of the VM on a host, past its actor."""

    host: str


@dataclass(frozen=True, slots=True)
class Released:
    """The hosts are given back; on these nobody has answered."""

    silent: tuple[str, ...]


Instruction: TypeAlias = Destroy | Release | Sweep
Event: TypeAlias = Done[Destroy | Sweep] | Released | Failed[Instruction] | Cancelled


@dataclass(frozen=True, slots=True)
class Stop:
    """The state of one end; `step` makes the next one. `kept` is what may still be somewhere."""

    waiting: frozenset[Instruction]
    phase: Phase = Phase.DESTROYING
    silent: tuple[int, ...] = ()
    kept: tuple[HostFailure, ...] = ()
    outcome: HostFailure | None = None  # why it is not down

    @classmethod
    def begin(cls, places: Iterable[tuple[int, str]]) -> Step:
        """Of a VM whose hosts are these, by index and name."""
        told = [Destroy(index, host) for index, host in places]
        return (cls(frozenset(told)), [*told]) if told else cls(frozenset())._release()

    @property
    def ended(self) -> bool:
        """Whether no further event matters."""
        return self.phase in (Phase.DOWN, Phase.NOT_DOWN)

    def step(self, event: Event) -> Step:
        """What `event` changes and what is to be done about it."""
        match event:
            case Cancelled():
                return self, []  # nothing is left to be given up
            case Released(silent) if self.phase is Phase.RELEASING:
                sweeps = [Sweep(host) for host in silent]
                after = replace(self, phase=Phase.SWEEPING, waiting=frozenset(sweeps))
                return (after, [*sweeps]) if sweeps else after._down()
            case Released():
                return self, []
            case Done(instruction) | Failed(instruction) if instruction not in self.waiting:
                return self, []
            case Failed(Release(), failure):
                return replace(self, phase=Phase.NOT_DOWN, outcome=failure), []
            case Failed(Destroy(index) as told):
                return replace(self, silent=(*self.silent, index))._without(told)
            case Failed(Sweep() as told, failure):
                return replace(self, kept=(*self.kept, failure))._without(told)
            case Done(instruction):
                return self._without(instruction)
            case Failed():
                return self, []
            case _:
                assert_never(event)

    def _without(self, instruction: Instruction) -> Step:
        after = replace(self, waiting=self.waiting - {instruction})
        if after.waiting:
            return after, []
        return after._release() if self.phase is Phase.DESTROYING else after._down()

    def _release(self) -> Step:
        told = Release(tuple(sorted(self.silent)))
        return replace(self, phase=Phase.RELEASING, waiting=frozenset({told})), [told]

    def _down(self) -> Step:
        return replace(self, phase=Phase.DOWN, waiting=frozenset()), []


Step: TypeAlias = tuple[Stop, list[Instruction]]
