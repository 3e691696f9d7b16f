"""Asking hosts that are slow, gone, or there and silent."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from dcres.actors.control.asking import Heard, Roll, await_ready
from dcres.actors.messages import Description, Role
from dcres.errors import (
    ActorGone,
    ClusterError,
    DcresError,
    NotFound,
    PagingError,
    VmLost,
    VmOff,
)
from dcres.model.phase import HostState
from tests.support.ports import ScriptedPort


class SlowPort(ScriptedPort):
    """An actor whose first answers fail."""

    def __init__(self, *failures: DcresError) -> None:
        self.failures = list(failures)

    def wait_ready(self, timeout_s: float) -> None:
        if self.failures:
            raise self.failures.pop(0)

    def answer(self, order: str, *args: Any) -> Any:
        self.wait_ready(0.0)
        return {"state": "running"}


def always() -> bool:
    return True


def never() -> bool:
    return False


def noon() -> datetime:
    return datetime(2026, 3, 1, 12, tzinfo=UTC)


SILENT, GONE = ClusterError("it did not answer within 1 s"), ActorGone("it has died")


@pytest.mark.parametrize("failure", [SILENT, GONE])
def test_an_actor_is_waited_for_as_long_as_its_host_is_there(failure: DcresError) -> None:
    await_ready(SlowPort(failure, failure), always, 30.0)
    with pytest.raises(type(failure)):
        await_ready(SlowPort(failure, failure), never, 30.0)
    with pytest.raises(type(failure)):
        await_ready(SlowPort(failure, failure), always, 0.5)


def test_a_host_that_is_there_and_silent_has_not_lost_its_vm() -> None:
    """Whoever takes it for lost would take a VM down that runs."""

    def ask(alive: bool, failure: DcresError) -> Heard:
        (heard,) = Roll("vm", lambda host: alive, noon).call({"h1": AnswersStatusWith(failure)})
        return heard

    for failure in (SILENT, GONE):
        heard = ask(True, failure)
        assert (heard.state, heard.since) == (HostState.SILENT, noon())
        assert "since 2026-03-01 12:00:00 UTC host h1 of VM vm does not answer" in heard.why
        assert ask(False, failure).state is HostState.LOST
        assert "host h1 of VM vm is gone" in ask(False, failure).why


@pytest.mark.parametrize(
    ("failure", "state"),
    [
        (NotFound("host h2 serves nothing"), HostState.LOST),
        (VmLost("QEMU has ended"), HostState.LOST),
        (VmOff("QEMU was told to end"), HostState.OFF),
        (PagingError("pager.sock does not answer"), HostState.TROUBLED),
    ],
)
def test_what_a_host_says_of_itself_is_believed(failure: DcresError, state: HostState) -> None:
    (heard,) = Roll("vm", lambda host: True).call({"h1": AnswersStatusWith(failure)})
    assert heard.state is state


def test_a_silent_host_is_silent_since_it_first_was_and_its_last_words_are_kept() -> None:
    times = iter([datetime(2026, 3, 1, 12, minute, tzinfo=UTC) for minute in range(9)])
    roll = Roll("vm", lambda host: True, lambda: next(times))
    roll.call({"h1": SlowPort()})
    states = [roll.call({"h1": AnswersStatusWith(SILENT)})[0] for _ in range(2)]
    assert [each.since.minute for each in states if each.since] == [0, 0]
    assert states[0].to_dict()["state"] == "running"
    assert states[0].to_dict()["silent_since"] == "2026-03-01T12:00:00+00:00"
    assert roll.call({"h1": SlowPort()})[0].since is None
    (again,) = roll.call({"h1": AnswersStatusWith(SILENT)})
    assert again.since is not None
    assert again.since.minute > 0
    roll.forget()
    assert roll.named(["h1"])[0].status == {}


def test_a_qemu_that_was_told_to_end_is_in_no_run_state_any_more() -> None:
    roll = Roll("vm", lambda host: True)
    roll.call({"h0": Runs()})
    (heard,) = roll.call({"h0": AnswersStatusWith(VmOff("QEMU was told to end"))})
    assert heard.to_dict()["run_state"] == ""
    assert heard.generation == 3


class Runs(SlowPort):
    def answer(self, order: str, *args: Any) -> Any:
        return {"state": "running", "run_state": "running", "generation": 3}


def test_a_guest_that_has_shut_down_is_off() -> None:
    class Off(SlowPort):
        def answer(self, order: str, *args: Any) -> Any:
            return {"state": "running", "run_state": "shutdown", "generation": 3}

    (heard,) = Roll("vm", lambda host: True).call({"h0": Off()})
    assert (heard.state, heard.generation) == (HostState.OFF, 3)
    assert "its guest has shut down" in heard.why


def test_what_is_left_of_a_vm_tells_its_generation_and_shares() -> None:
    """To a coordinator that has never heard its hosts, as one that was just started again."""

    class Left(AnswersStatusWith):
        def answer(self, order: str, *args: Any) -> Any:
            if order == "describe":
                return Description("h0", Role.MAIN, present=True, generation=3, reserved=8192)
            return super().answer(order)

    for error in (VmLost("QEMU has ended"), VmOff("QEMU was told to end")):
        (heard,) = Roll("vm", lambda host: True).call({"h0": Left(error)})
        assert (heard.generation, heard.status["limit_pages"]) == (3, 2)
    (heard,) = Roll("vm", lambda host: False).call({"h0": Left(GONE)})
    assert (heard.state, heard.status) == (HostState.LOST, {})


class AnswersStatusWith(SlowPort):
    """It is ready, and then does not answer."""

    def wait_ready(self, timeout_s: float) -> None:
        return

    def answer(self, order: str, *args: Any) -> Any:
        raise self.failures[0]
