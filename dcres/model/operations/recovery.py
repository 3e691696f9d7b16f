"""What a coordinator does about a VM that one before it left.

::

    (no hosts) ──▶ Release ──▶ ABSENT

    Describe main ──runs──▶ Halt, Resume if a checkpoint is under way ──▶ Describe subs
         │                  LookAtGuest, Resume if it is held                 │
         └──(its start was not finished)──▶ Describe subs ──▶ TakeDown ──▶ ABSENT
                                                                              ▼
    RUNNING ◀── EndServing … ◀── Halt, LookForManifest, Halt …, Discard … ◀── Settle, if shares
                unless pages     unless it was published                      were being changed
                still come

    A failure ends it as OFF, LOST or UNKNOWN, and it is tried again. So does a host that has
    nothing of the VM any more: LOST.

The guest may wait for the main host alone, so that comes before sub hosts are asked, which may take
long. A publishing under way ends before it is looked for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias, assert_never

from dcres.errors import ClusterError, HostFailure, VmLost, VmOff
from dcres.model.operations.events import Cancelled, Done, Failed
from dcres.model.phase import VmPhase


@dataclass(frozen=True, slots=True)
class Release:
    """Give back what a start may have reserved."""


@dataclass(frozen=True, slots=True)
class Describe:
    """The host of that index, 0 for the main host: what do you know of the VM?"""

    index: int


@dataclass(frozen=True, slots=True)
class Halt:
    """The host of that index: stop saving; `briefly`, as its disk may hang, and the guest waits."""

    index: int
    checkpoint: str
    briefly: bool = False


@dataclass(frozen=True, slots=True)
class Resume:
    """The main host: leave the VM as the checkpoint found it, or an earlier one if it is empty."""

    checkpoint: str


@dataclass(frozen=True, slots=True)
class LookAtGuest:
    """The main host: is the VM paused for a checkpoint that is over?"""


@dataclass(frozen=True, slots=True)
class LookForManifest:
    """The main host: was it published?"""

    checkpoint: str


@dataclass(frozen=True, slots=True)
class Discard:
    """The host of that index: remove what is left of the checkpoint."""

    index: int
    checkpoint: str


@dataclass(frozen=True, slots=True)
class TakeDown:
    """End a start that was not finished."""


@dataclass(frozen=True, slots=True)
class Settle:
    """End a change of shares that was not finished."""


@dataclass(frozen=True, slots=True)
class EndServing:
    """End the part servers of a restore; nobody remembers which hosts have some."""


@dataclass(frozen=True, slots=True)
class MainIs:
    """What the main host knows."""

    host: str
    present: bool
    running: bool
    reshaping: bool
    moving: bool
    checkpoint: str | None
    hosts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SubIs:
    """What a sub host knows."""

    index: int
    host: str
    present: bool


@dataclass(frozen=True, slots=True)
class GuestIs:
    """Whether it is held by a checkpoint that is over."""

    held: bool


@dataclass(frozen=True, slots=True)
class Looked:
    """Whether the manifest is there."""

    there: bool


@dataclass(frozen=True, slots=True)
class Settled:
    """The VM has its shares in full; its hosts have these indices now."""

    indices: tuple[int, ...]


ToHost: TypeAlias = Describe | Halt | Resume | LookAtGuest | LookForManifest | Discard
Calling: TypeAlias = Release | TakeDown | Settle | EndServing
Instruction: TypeAlias = ToHost | Calling
Event: TypeAlias = (
    MainIs
    | SubIs
    | GuestIs
    | Looked
    | Settled
    | Done[Instruction]
    | Failed[Instruction]
    | Cancelled
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the VM is, and why; with `settled` nothing is left to be done about it."""

    phase: VmPhase
    why: str = ""
    settled: bool = True
    moving: bool = False  # a lazy restore is bringing in pages, and has to be followed


@dataclass(frozen=True, slots=True)
class Recovery:
    """The state of one recovery; `step` makes the next one."""

    vm: str
    indices: tuple[int, ...]
    now: tuple[Instruction, ...] = ()  # what is under way
    main: MainIs | None = None
    subs: tuple[SubIs, ...] = ()
    was_settled: bool = False  # shares were, by this recovery
    outcome: Outcome | None = None

    @classmethod
    def begin(cls, vm: str, indices: tuple[int, ...]) -> Step:
        """Of a VM with actors on the hosts of these indices."""
        made = cls(vm, indices)
        return made._do(Describe(0)) if indices else made._do(Release())

    @property
    def ended(self) -> bool:
        """Whether no further event matters."""
        return self.outcome is not None

    @property
    def hosts(self) -> tuple[str, ...]:
        """The VM's hosts, as far as they are known for sure; the main host first."""
        if self.main is None or self.outcome == Outcome(VmPhase.ABSENT):
            return ()
        if len(self.subs) == len(self.indices) - 1:
            return (self.main.host, *(each.host for each in self.subs))
        return self.main.hosts if self.main.running else ()

    def step(self, event: Event) -> Step:
        """What `event` changes and what is to be done about it."""
        if self.ended:
            return self, []
        match event:
            case MainIs() if Describe(0) in self.now:
                return replace(self, main=event)._main_is(event)
            case SubIs(index=index) if Describe(index) in self.now:
                subs = tuple(sorted((*self.subs, event), key=lambda each: each.index))
                return replace(self, subs=subs)._without(Describe(index))
            case GuestIs(held) if LookAtGuest() in self.now:
                return self._do(Resume("")) if held else self._ask_subs()
            case Looked(there) if any(isinstance(each, LookForManifest) for each in self.now):
                return self._finish() if there else self._halt_subs()
            case Settled(indices) if Settle() in self.now:
                after = replace(self, indices=indices, main=None, subs=(), was_settled=True)
                return after._do(Describe(0))
            case Done(instruction) if instruction in self.now:
                return self._without(instruction)
            case Failed(Halt(briefly=True) as halt, failure) if halt in self.now:
                if failure.is_a(ClusterError):
                    return self._without(halt)
                return self._fail(failure)
            case Failed(instruction, failure) if instruction in self.now:
                return self._fail(failure)
            case (
                MainIs() | SubIs() | GuestIs() | Looked() | Settled() | Done() | Failed()
            ) | Cancelled():
                return self, []
            case _:
                assert_never(event)

    def _do(self, *instructions: Instruction) -> Step:
        return replace(self, now=instructions), [*instructions]

    def _end(self, outcome: Outcome) -> Step:
        return replace(self, now=(), outcome=outcome), []

    def _without(self, done: Instruction) -> Step:
        after = replace(self, now=tuple(each for each in self.now if each != done))
        return (after, []) if after.now else after._after(done)

    def _after(self, done: Instruction) -> Step:
        """The last of a kind is done."""
        match done:
            case Release() | TakeDown():
                return self._end(Outcome(VmPhase.ABSENT))
            case Describe():
                return self._described()
            case Halt(0, checkpoint, briefly=True):
                return self._do(Resume(checkpoint))
            case Halt(0, checkpoint):
                return self._do(LookForManifest(checkpoint))
            case Halt(_, checkpoint):
                return self._discard(checkpoint)
            case Resume():
                return self._ask_subs()
            case Discard():
                return self._finish()
            case EndServing():
                return self._end(Outcome(VmPhase.RUNNING))
            case LookAtGuest() | LookForManifest() | Settle():
                return self, []  # answered by events of their own
            case _:
                assert_never(done)

    def _main_is(self, main: MainIs) -> Step:
        if not main.running or self.was_settled:
            return self._ask_subs()
        if main.checkpoint is not None:
            return self._do(Halt(0, main.checkpoint, briefly=True))
        return self._do(LookAtGuest())

    def _ask_subs(self) -> Step:
        asks = [Describe(index) for index in self.indices[1:]]
        return self._do(*asks) if asks else self._described()

    def _described(self) -> Step:
        main = self.main
        if main is None or not main.running:
            return self._do(TakeDown())
        if not self.was_settled and (main.reshaping or main.hosts != self.hosts):
            return self._do(Settle())
        every: list[MainIs | SubIs] = [main, *self.subs]
        gone = [each.host for each in every if not each.present]
        if gone:
            # Ray moves the actors of a dead host to a new one, where nothing of the VM is.
            what = f"a host of VM {self.vm} is gone ({', '.join(gone)} has nothing of it)"
            return self._end(Outcome(VmPhase.LOST, what, settled=False))
        if main.checkpoint is not None:
            return self._do(Halt(0, main.checkpoint))
        return self._finish()

    def _halt_subs(self) -> Step:
        assert self.main is not None
        checkpoint = self.main.checkpoint or ""
        halts = [Halt(index, checkpoint) for index in self.indices[1:]]
        return self._do(*halts) if halts else self._discard(checkpoint)

    def _discard(self, checkpoint: str) -> Step:
        return self._do(*(Discard(index, checkpoint) for index in self.indices))

    def _finish(self) -> Step:
        if self.main is not None and self.main.moving:
            return self._end(Outcome(VmPhase.RUNNING, moving=True))
        return self._do(EndServing())  # of a restore that had come as far as the guest

    def _fail(self, failure: HostFailure) -> Step:
        phase = VmPhase.UNKNOWN
        if failure.is_a(VmLost):
            phase = VmPhase.OFF if failure.is_a(VmOff) else VmPhase.LOST
        return self._end(Outcome(phase, failure.message, settled=False))


Step: TypeAlias = tuple[Recovery, list[Instruction]]
