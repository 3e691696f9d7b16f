"""All ways that an operation can go: every order of answers, failures, and a cancel at any point.

A machine of `dcres.model.operations` is driven from its beginning. At each point any instruction
that is not answered yet may be answered, well or with a failure, or the operation is cancelled.
Ways that lead to the same state are followed once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from dcres.actors.control.executor import Operation
from dcres.errors import HostFailure
from dcres.model.operations.events import Cancelled, Failed

O = TypeVar("O", bound=Operation[Any])  # noqa: E741
Seen = frozenset[str]  # what has happened, as a test sees fit to remember it


@dataclass(frozen=True)
class Way(Generic[O]):
    """Where an operation has come to."""

    operation: O
    open: frozenset[Any]  # instructions that are not answered
    seen: Seen
    failures_left: int
    cancels_left: int


@dataclass(frozen=True)
class Explorer(Generic[O]):
    """`answers` are the good ones to an instruction, `failures` the others.

    `watch` is told of every event with what it led to, asserts what must hold, and says what is
    to be remembered of it.
    """

    answers: Callable[[Any], Iterable[object]]
    watch: Callable[[Seen, object, O, Sequence[Any]], Iterable[str]]
    failures: Callable[[Any], Iterable[HostFailure]]

    def explore(
        self, begun: tuple[O, Sequence[Any]], most_failures: int = 2, most_cancels: int = 1
    ) -> set[Way[O]]:
        """Every way to an end."""
        operation, said = begun
        seen = frozenset(self.watch(frozenset(), None, operation, said))
        fresh = [Way(operation, frozenset(said), seen, most_failures, most_cancels)]
        found = set(fresh)
        ends: set[Way[O]] = set()
        while fresh:
            way = fresh.pop()
            if way.operation.ended:
                self._require_over(way)
                ends.add(way)
                continue
            assert way.open, f"nothing is under way, and it has not ended: {way.operation}"
            after = {*self._after(way)} - found
            found |= after
            fresh += after
        return ends

    def _after(self, way: Way[O]) -> Iterable[Way[O]]:
        for instruction in way.open:
            for event in self.answers(instruction):
                yield self._heard(way, event, instruction)
            if way.failures_left:
                for failure in self.failures(instruction):
                    yield self._heard(way, Failed(instruction, failure), instruction, failed=1)
        if way.cancels_left:
            yield self._heard(way, Cancelled("^C"), cancelled=1)

    def _heard(
        self,
        way: Way[O],
        event: object,
        answered: object = None,
        failed: int = 0,
        cancelled: int = 0,
    ) -> Way[O]:
        operation, said = way.operation.step(event)
        left = way.open - {answered}
        assert not left & frozenset(said), f"told again before it was answered: {said}"
        seen = way.seen | frozenset(self.watch(way.seen, event, operation, said))
        return Way(
            operation,
            left | frozenset(said),
            seen,
            way.failures_left - failed,
            way.cancels_left - cancelled,
        )

    def _require_over(self, way: Way[O]) -> None:
        """Whatever is heard after the end, nothing is begun."""
        late = [answer for each in way.open for answer in self.answers(each)]
        for event in (*late, Cancelled("^C")):
            assert way.operation.step(event) == (way.operation, [])


def usual(begun: tuple[O, Sequence[Any]], answers: Callable[[Any], Iterable[object]]) -> list[Any]:
    """All instructions where every host does what it is told, each answer the first there is."""
    operation, open_ = begun
    said = list(open_)
    for instruction in said:
        operation, more = operation.step(next(iter(answers(instruction))))
        said += more
    assert operation.ended
    return said
