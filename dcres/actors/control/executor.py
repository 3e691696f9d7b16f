"""Carries out what the machines of `dcres.model.operations` say, whichever operation it is.

::

    machine ──instructions──▶ executor ──orders, side by side──▶ hosts, fleet
       ▲                         │
       └────────events───────────┘

Here, and for all operations alike, orders are repeated when an actor dies in them, waiting ends
when it has taken too long, an operation is cancelled, and what it does is written to its journal.
All time and all threads are those of a `Concurrency`.

No order of a later step is given before every one of an earlier step is: ports go by names, and an
order that comes late would reach the next life of a VM.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, Self, TypeVar

from dcres.actors.control.asking import await_ready
from dcres.actors.control.concurrency import Concurrency, Mailbox, Signal
from dcres.actors.control.journal import Journal
from dcres.actors.ports import Pending, Port
from dcres.errors import ActorGone, ClusterError, DcresError, HostFailure
from dcres.model.operations.events import Cancelled, Failed

log = logging.getLogger("dcres.coordinator")

P = ParamSpec("P")
R = TypeVar("R")
I_co = TypeVar("I_co", covariant=True)
I_contra = TypeVar("I_contra", contravariant=True)


class Operation(Protocol[I_co]):
    """The state of a machine."""

    @property
    def ended(self) -> bool:
        """Whether no further event matters."""

    def step(self, event: Any) -> tuple[Self, Sequence[I_co]]:
        """What `event` changes, and what is to be done about it."""


Op = TypeVar("Op", bound=Operation[Any])


@dataclass(frozen=True, slots=True)
class Patience:
    """For an order that may be repeated: an actor that died in it is back in a moment.

    It is waited for, at most `ready_s` before every try and as long as its host is `alive`.
    """

    ready_s: float
    alive: Callable[[], bool]
    tries: int = 3
    outlasts_cancel: bool = True  # it is repeated though the operation was cancelled


@dataclass(frozen=True, slots=True)
class Order(Generic[R]):
    """An order to a host: `give` begins it, `told` makes an event of the answer.

    The answer may take as long as the order says, or `within_s`.
    """

    host: str
    port: Port
    give: Callable[[Port], Pending[R]]
    told: Callable[[R], object]
    after_s: float = 0.0
    within_s: float | None = None
    patience: Patience | None = None

    def then(self, told: Callable[[R], object]) -> Order[R]:
        """The same, with what makes an event of the answer."""
        return replace(self, told=told)

    def after(self, seconds: float) -> Order[R]:
        """The same, given so much later."""
        return replace(self, after_s=seconds)

    def within(self, seconds: float) -> Order[R]:
        """The same, whose answer may take so long."""
        return replace(self, within_s=seconds)

    def repeated(self, patience: Patience) -> Order[R]:
        """The same, which may be repeated."""
        return replace(self, patience=patience)


def order(
    host: str,
    port: Port,
    what: Callable[Concatenate[Any, P], R],
    /,
    *args: P.args,
    **kwargs: P.kwargs,
) -> Order[R]:
    """An order of `dcres.actors.protocol` to a host; `Order.then` says what its answer means."""
    return Order(host, port, lambda port: port.submit(what, *args, **kwargs), lambda _: None)


@dataclass(frozen=True, slots=True)
class Errand:
    """Something else that takes time, as a call of the fleet: `run`, which makes an event."""

    run: Callable[[], object]


Doing = Order[Any] | Errand


class Hands(Protocol[I_contra]):
    """How one kind of operation is carried out."""

    def doing(self, instruction: I_contra) -> Doing:
        """What `instruction` means."""


class Executor:
    """Runs one operation; `cancel` may be called from any thread meanwhile."""

    def __init__(self, journal: Journal, concurrency: Concurrency) -> None:
        self.journal = journal
        self._concurrency = concurrency
        self._mailbox: Mailbox[object] = concurrency.mailbox()
        self._lock = concurrency.lock()  # held while a step is made: none is cancelled half-way
        self._giving: list[Signal] = []
        self._cancelled: Cancelled | None = None
        self._is_told = self._is_over = False

    def cancel(self, why: str) -> bool:
        """Tell the machine; whether it had not ended. Repeatable."""
        with self._lock:
            if not self._is_over and self._cancelled is None:
                self._cancelled = Cancelled(why)
                self._mailbox.put(self._cancelled)
            return not self._is_over

    def run(
        self,
        hands: Hands[Any],
        begun: tuple[Op, Sequence[object]],
        watch: Callable[[Op], None] = lambda _: None,
    ) -> Op:
        """Bring the operation to its end. `watch` is told every state before it is acted on."""
        operation, instructions = begun
        while True:
            watch(operation)
            self._carry_out(hands, instructions)
            if operation.ended:
                self._is_over = True
                return operation
            operation, instructions = self._after(operation, self._mailbox.get())

    def _after(self, operation: Op, event: object) -> tuple[Op, list[object]]:
        said: list[object] = []
        with self._lock:
            for each in self._heard(event):
                self.journal.event(each)
                operation, more = operation.step(each)
                said += more
            self._is_over = operation.ended
        return operation, said

    def _heard(self, event: object) -> list[object]:
        """A cancel overtakes what came before it and was not acted on yet."""
        heard = [] if event is self._cancelled else [event]
        if self._cancelled is None or self._is_told:
            return heard
        self._is_told = True
        return [self._cancelled, *heard]

    def _carry_out(self, hands: Hands[Any], instructions: Sequence[object]) -> None:
        if not instructions:
            return
        for signal in self._giving:
            signal.wait()
        self._giving = [self._begin(hands, each) for each in instructions]

    def _begin(self, hands: Hands[Any], instruction: object) -> Signal:
        given = self._concurrency.signal()
        self.journal.instruction(instruction)

        def work() -> None:
            host = str(getattr(instruction, "host", ""))
            try:
                doing = hands.doing(instruction)
                host = doing.host if isinstance(doing, Order) else host
                event = self._done(doing, given)
            except DcresError as error:
                event = Failed(instruction, HostFailure.of(host, error))
            except Exception as error:
                log.exception("%s: %s", self.journal.name, instruction)
                event = Failed(instruction, HostFailure.of(host, error))
            finally:
                given.set()
            self._mailbox.put(event)

        self._concurrency.spawn(work, f"{self.journal.name}-{type(instruction).__name__}")
        return given

    def _done(self, doing: Doing, given: Signal) -> object:
        match doing:
            case Errand(run=run):
                given.set()
                return run()
            case Order(patience=Patience() as patience):
                given.set()
                return doing.told(self._persist(doing, patience))
            case Order():
                if doing.after_s:
                    self._concurrency.sleep(doing.after_s)
                pending = doing.give(_timed(doing))
                given.set()
                return doing.told(pending.result())

    def _persist(self, order: Order[R], patience: Patience) -> R:
        """Give an order that may be repeated. Raises ActorGone when its actor is not back."""
        for tries_left in reversed(range(patience.tries)):
            try:
                await_ready(order.port, patience.alive, patience.ready_s, self._concurrency)
            except ClusterError as error:
                raise ActorGone(f"it does not answer any more ({error})") from None
            if self._cancelled and not patience.outlasts_cancel:
                raise ActorGone("it was not told any more, as the operation was cancelled")
            try:
                return order.give(_timed(order)).result()
            except ActorGone:
                if not tries_left:
                    raise
        raise AssertionError("unreachable")


def _timed(order: Order[Any]) -> Port:
    return order.port if order.within_s is None else order.port.within(order.within_s)
