"""The executor: orders repeated, cancelled, kept in order, and written down."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from dcres.actors.control.concurrency import THREADS, Task, Threads
from dcres.actors.control.executor import Doing, Errand, Executor, Order, Patience, order
from dcres.actors.control.journal import MOST_ENTRIES, Journal
from dcres.actors.protocol import Presence
from dcres.errors import ActorGone, DcresError, HostFailure, NoRoom
from dcres.model.operations.events import Cancelled, Done, Failed
from tests.support.ports import ScriptedPort
from tests.support.speed import patience


@dataclass(frozen=True)
class Step:
    """An instruction of the machine below."""

    host: str
    number: int = 0
    secret: bytes = b""


@dataclass(frozen=True)
class Line:
    """A machine whose steps come one after the other, whatever was answered; it keeps events."""

    left: tuple[Step, ...]
    heard: tuple[object, ...] = ()
    stops: bool = True  # at a cancel

    @property
    def ended(self) -> bool:
        return not self.left

    def step(self, event: object) -> tuple[Line, Sequence[Step]]:
        if self.ended:
            return self, []
        after = replace(self, heard=(*self.heard, event))
        if isinstance(event, Cancelled):
            return (replace(after, left=()) if self.stops else after), []
        after = replace(after, left=self.left[1:])
        return after, after.left[:1]


@dataclass
class Hands:
    """Every step is what `make` makes of it."""

    make: Callable[[Step], Doing]

    def doing(self, instruction: Step) -> Doing:
        return self.make(instruction)


@dataclass
class Host(ScriptedPort):
    """Answers with what it has, the first first."""

    answers: list[Any] = field(default_factory=list)

    def answer(self, order: str, *args: Any) -> Any:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def run(line: Line, make: Callable[[Step], Doing]) -> tuple[Line, Executor]:
    executor = Executor(Journal("a test", THREADS), THREADS)
    return executor.run(Hands(make), (line, line.left[:1])), executor


def to(host: Host, ready: Patience | None = None) -> Callable[[Step], Order[Any]]:
    def make(step: Step) -> Order[Any]:
        made = order(step.host, host, Presence.destroy).then(lambda answer: Done((step, answer)))
        return made if ready is None else made.repeated(ready)

    return make


def patient(*, tries: int = 3, alive: bool = True, outlasts_cancel: bool = True) -> Patience:
    return Patience(0.01, lambda: alive, tries, outlasts_cancel)


GONE = ActorGone("it has died")
ONE = Step("h1")


def test_an_answer_is_an_event() -> None:
    ended, _ = run(Line((ONE,)), to(Host(["well"])))
    assert ended.heard == (Done((ONE, "well")),)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (NoRoom("no room"), "NoRoom", "no room"),
        (KeyError("name"), "ClusterError", "destroy failed: KeyError: 'name'"),
    ],
)
def test_a_failure_keeps_host_and_class(error: Exception, kind: str, message: str) -> None:
    ended, _ = run(Line((ONE,)), to(Host([error])))
    assert ended.heard == (Failed(ONE, HostFailure("h1", kind, message)),)


def test_what_may_be_repeated_is_repeated_when_its_actor_dies() -> None:
    ended, _ = run(Line((ONE,)), to(Host([GONE, GONE, "well"]), patient()))
    assert ended.heard == (Done((ONE, "well")),)
    ended, _ = run(Line((ONE,)), to(Host([GONE, GONE, "well"]), patient(tries=2)))
    assert isinstance(ended.heard[0], Failed)


def test_what_may_not_be_repeated_is_not() -> None:
    host = Host([GONE, "well"])
    ended, _ = run(Line((ONE,)), to(host))
    assert ended.heard == (Failed(ONE, HostFailure("h1", "ActorGone", "it has died")),)
    assert host.answers == ["well"]


def test_another_failure_is_not_tried_again() -> None:
    host = Host([NoRoom("no room"), "well"])
    run(Line((ONE,)), to(host, patient()))
    assert host.answers == ["well"]


class Away(Host):
    """An actor that is not there."""

    def wait_ready(self, timeout_s: float) -> None:
        raise GONE


def test_an_actor_that_does_not_come_back_is_gone() -> None:
    ended, _ = run(Line((ONE,)), to(Away(), patient(alive=False)))
    (failed,) = ended.heard
    assert isinstance(failed, Failed)
    assert (failed.failure.kind, failed.failure.host) == ("ActorGone", "h1")
    assert failed.failure.message == "it does not answer any more (it has died)"


class AtOnce(Threads):
    """What is begun is done before anything else."""

    def spawn(self, work: Callable[[], None], name: str) -> Task:
        work()
        return super().spawn(lambda: None, name)


def test_a_cancel_overtakes_what_was_not_acted_on_yet() -> None:
    """Whoever cancelled may be gone by now, and would not stop what came of it."""
    executor = Executor(Journal("a test", THREADS), AtOnce())

    def do(step: Step) -> object:
        if step.host == "h2":  # the answer of h1 has come before
            assert executor.cancel("^C")
            assert executor.cancel("^C"), "repeatable"
        return Done(step)

    line = Line((ONE, Step("h2")))
    ended = executor.run(Hands(lambda step: Errand(lambda: do(step))), (line, line.left))
    assert ended.heard == (Cancelled("^C"),)
    assert not executor.cancel("^C"), "it is over"


def test_a_machine_that_goes_on_is_told_once_that_it_was_cancelled() -> None:
    steps = (ONE, Step("h2"), Step("h3"))
    executor = Executor(Journal("a test", THREADS), THREADS)

    def work(step: Step) -> object:
        executor.cancel("^C")
        return Done(step)

    line = Line(steps, stops=False)
    ended = executor.run(Hands(lambda step: Errand(lambda: work(step))), (line, line.left[:1]))
    assert ended.heard == (Cancelled("^C"), *map(Done, steps))


def test_an_order_that_does_not_outlast_a_cancel_is_not_repeated_after_it() -> None:
    for outlasts in (True, False):
        executor = Executor(Journal("a test", THREADS), THREADS)

        class Cancelling(Host):
            def answer(self, order: str, *args: Any) -> Any:
                executor.cancel("^C")  # noqa: B023 - called before the next one is made
                return super().answer(order, *args)

        host = Cancelling([GONE, "well"])
        line = Line((ONE,), stops=False)
        made = to(host, patient(outlasts_cancel=outlasts))
        ended = executor.run(Hands(made), (line, line.left))
        assert isinstance(ended.heard[1], Done if outlasts else Failed)


def test_no_order_overtakes_one_of_an_earlier_step() -> None:
    """Ports go by names: an order that comes late would reach the next life of a VM."""
    said: list[str] = []
    go_on = threading.Event()

    @dataclass(frozen=True)
    class Fork(Line):
        """Both first steps at once; the last when one of them has been answered."""

        def step(self, event: object) -> tuple[Fork, Sequence[Step]]:
            said.append("heard")
            return replace(self, left=self.left[1:]), [Step("last")] if len(self.left) == 2 else []

    class Slow(Host):
        def answer(self, order: str, *args: Any) -> Any:
            go_on.wait(patience(10))
            said.append("slow")

    class Last(Host):
        def answer(self, order: str, *args: Any) -> Any:
            said.append("last")

    def make(step: Step) -> Doing:
        if step.host == "quick":
            return Errand(lambda: Done(step))
        host = Slow() if step.host == "slow" else Last()
        return order(step.host, host, Presence.destroy).then(lambda _: Done(step))

    line = Fork((ONE, ONE))
    executor = Executor(Journal("a test", THREADS), THREADS)
    threading.Timer(0.1, go_on.set).start()
    executor.run(Hands(make), (line, [Step("quick"), Step("slow")]))
    assert said.index("slow") < (said.index("last") if "last" in said else len(said))


# The journal


def test_the_journal_has_instructions_and_events_with_times() -> None:
    _, executor = run(Line((Step("h1", 7, b"secret"),)), to(Host([NoRoom("no room")])))
    first, second = executor.journal.entries
    assert (first["instruction"], first["host"], first["number"]) == ("Step", "h1", 7)
    assert second["event"] == "Failed"
    assert (second["of"], second["host"]) == ("Step", "h1")
    assert second["failure"] == {"host": "h1", "type": "NoRoom", "message": "no room"}
    assert 0.0 <= first["at_s"] <= second["at_s"]
    assert first["secret"] == "bytes", "what kind of thing it is, and no more"


def test_the_journal_is_bounded() -> None:
    journal = Journal("a test", THREADS)
    for number in range(MOST_ENTRIES + 5):
        journal.instruction(Step("h1", number))
    assert [each["number"] for each in journal.entries][:2] == [5, 6]
    assert journal.to_dict()["left_out"] == 5
    journal.event(Failed(ONE, HostFailure("h1", "NoRoom", "x" * 10_000)))
    assert len(journal.entries[-1]["failure"]["message"]) < 1000
    journal.instruction(Step("x" * 10_000))
    assert len(journal.entries[-1]["host"]) < 1000


def test_what_is_asked_again_and_again_is_one_entry() -> None:
    journal = Journal("a test", THREADS)
    for _ in range(50):
        journal.instruction(ONE)
        journal.event(Done(ONE))
    assert [each["times"] for each in journal.entries] == [50, 50]


def test_errors_of_the_hands_themselves_are_events() -> None:
    for error, kind, message in (
        (DcresError("no such host"), "DcresError", "no such host"),
        (KeyError("h1"), "ClusterError", "KeyError: 'h1'"),
    ):

        def make(step: Step) -> Doing:
            raise error  # noqa: B023 - called before the next one is made

        ended, _ = run(Line((ONE,)), make)
        assert ended.heard == (Failed(ONE, HostFailure("h1", kind, message)),)
