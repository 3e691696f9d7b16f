"""Asking hosts that are slow, gone, or there and silent."""

from __future__ import annotations

from typing import Any

import pytest

from dcres.actors.asking import ask_all, await_ready
from dcres.actors.ports import Pending
from dcres.errors import ActorGone, ClusterError, DcresError, VmLost


class SlowPort:
    """An actor whose first answers fail."""

    def __init__(self, *failures: DcresError) -> None:
        self.failures = list(failures)

    def wait_ready(self, timeout_s: float) -> None:
        if self.failures:
            raise self.failures.pop(0)

    def call(self, method: str, *args: Any, timeout_s: float = 60.0) -> Any:
        self.wait_ready(timeout_s)
        return {"state": "running"}

    def submit(self, method: str, *args: Any) -> Pending:
        raise NotImplementedError


def always() -> bool:
    return True


def never() -> bool:
    return False


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

    def ask(alive: bool, *failures: DcresError) -> None:
        port = AnswersStatusWith(*failures)
        ask_all("vm", {"h1": port}, lambda host: alive)

    with pytest.raises(ClusterError, match="host h1 of VM vm does not answer") as caught:
        ask(True, SILENT)
    assert not isinstance(caught.value, ActorGone)
    with pytest.raises(VmLost, match="host h1 of VM vm is gone"):
        ask(False, SILENT)
    with pytest.raises(VmLost, match="host h1 of VM vm is gone"):
        ask(True, GONE)


class AnswersStatusWith(SlowPort):
    """It is ready, and then does not answer."""

    def wait_ready(self, timeout_s: float) -> None:
        return

    def call(self, method: str, *args: Any, timeout_s: float = 60.0) -> Any:
        raise self.failures[0]
