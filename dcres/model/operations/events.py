"""Events that every operation knows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from dcres.errors import HostFailure

I_co = TypeVar("I_co", covariant=True)  # an instruction


@dataclass(frozen=True, slots=True)
class Done(Generic[I_co]):
    """An instruction has been carried out, and that is all there is to say."""

    instruction: I_co


@dataclass(frozen=True, slots=True)
class Failed(Generic[I_co]):
    """An instruction could not be carried out, or nobody knows whether it was."""

    instruction: I_co
    failure: HostFailure


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The operation is not wanted any more."""

    why: str
