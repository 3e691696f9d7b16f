"""A port whose answers a test writes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Concatenate, ParamSpec, Self, TypeVar, cast

from dcres.actors.host.roles import Duties
from dcres.actors.ports import Pending
from dcres.actors.protocol import group_of
from tests.support.fleet import LocalPending

P = ParamSpec("P")
R = TypeVar("R")


class ScriptedPort:
    """Every order is answered by `answer`, at once."""

    def answer(self, order: str, *args: Any) -> Any:
        raise NotImplementedError(order)

    def submit(
        self, order: Callable[Concatenate[Any, P], R], /, *args: P.args, **kwargs: P.kwargs
    ) -> Pending[R]:
        done: Future[R] = Future()
        try:
            done.set_result(self.call(order, *args, **kwargs))
        except Exception as error:
            done.set_exception(error)
        return LocalPending(order.__name__, done, 0.0)

    def call(
        self, order: Callable[Concatenate[Any, P], R], /, *args: P.args, **kwargs: P.kwargs
    ) -> R:
        answer: R = self.answer(order.__name__, *args, **kwargs)
        return answer

    def within(self, timeout_s: float) -> Self:
        return self

    def wait_ready(self, timeout_s: float) -> None:
        return


class DirectPort(ScriptedPort):
    """A port to parts of a host in this process."""

    def __init__(self, duties: Duties) -> None:
        self._duties = duties

    def call(
        self, order: Callable[Concatenate[Any, P], R], /, *args: P.args, **kwargs: P.kwargs
    ) -> R:
        answer: Any = self._duties.perform(group_of(order), order.__name__, args, kwargs)
        return cast(R, answer)
