"""The event loop: who is called, and in which order, when the hot path does things between."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from dcres.paging.transport.loop import MOST_LOOKS, READ, RECEIVED, Loop

Told = list[tuple[int, Any]]


class Hot:
    """Tells what the test says: for the first turn, then for each look."""

    def __init__(self, *told: Told) -> None:
        self._told = list(told)
        self.forgotten: list[int] = []

    def turn(self, timeout_s: float) -> Told:
        return self._told.pop(0) if self._told else []

    def forget(self, fd: int) -> None:
        self.forgotten.append(fd)


class Always(Hot):
    """A connection on which more comes all the time."""

    def turn(self, timeout_s: float) -> Told:
        return list(self._told[0])


@pytest.fixture
def fds() -> Iterator[list[int]]:
    pipes = [os.pipe() for _ in range(3)]
    yield [read_end for read_end, _ in pipes]
    for pipe in pipes:
        for fd in pipe:
            os.close(fd)


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop()
    yield made
    made.close()


def use(loop: Loop, hot: Hot) -> None:
    loop.hot, loop._poll = hot, hot.turn  # type: ignore[assignment]


def test_faults_that_come_between_two_calls_are_told_of_next(loop: Loop, fds: list[int]) -> None:
    called: Told = []
    for fd in fds:
        loop.add(fd, lambda what, fd=fd: called.append((fd, what)))  # type: ignore[misc]
    uffd, one, other = fds
    use(loop, Hot([(one, 1), (other, 2)], [(uffd, ["fault"]), (one, RECEIVED)]))
    assert loop.turn(0)
    assert called == [(one, 1), (uffd, ["fault"]), (other, 2), (one, RECEIVED)]
    assert not loop.turn(0)


def test_what_is_out_of_a_buffer_comes_before_what_is_behind_it_there(
    loop: Loop, fds: list[int]
) -> None:
    """Whoever reads a socket that was ready gets the frame behind the one that was put in place."""
    called: Told = []
    for fd in fds:
        loop.add(fd, lambda what, fd=fd: called.append((fd, what)))  # type: ignore[misc]
    uffd, one, other = fds
    first, second, rest = (1, 0, 1, 5), (2, 1, 2, 6), b"rest"
    use(
        loop,
        Hot(
            [(other, READ), (one, READ), (one, first)],
            [(uffd, ["fault"]), (one, READ), (one, second), (other, rest)],
        ),
    )
    loop.turn(0)
    assert called[0] == (one, first)
    assert called[1] == (uffd, ["fault"])
    assert called[2:] == [(one, second), (other, rest), (other, READ), (one, READ)]


def test_what_is_merely_ready_is_left_to_the_next_turn(loop: Loop, fds: list[int]) -> None:
    called: Told = []
    one, other, _ = fds
    for fd in (one, other):
        loop.add(fd, lambda what, fd=fd: called.append((fd, what)))  # type: ignore[misc]
    use(loop, Hot([(one, READ), (other, READ)], [(one, READ)], [(one, READ)]))
    loop.turn(0)
    assert called == [(one, READ), (other, READ)]


def test_what_was_told_of_a_connection_that_is_gone_is_dropped(loop: Loop, fds: list[int]) -> None:
    called: Told = []
    one, other, _ = fds

    def end_the_other(_: object) -> None:
        loop.remove(other)
        loop.add(other, lambda what: called.append((other, what)))  # its number is used again

    loop.add(one, end_the_other)
    loop.add(other, lambda what: called.append((other, what)))
    hot = Hot([(one, READ), (other, READ), (other, READ)], [(other, RECEIVED)])
    use(loop, hot)
    loop.turn(0)
    loop.turn(0)
    assert (called, hot.forgotten) == ([(other, RECEIVED)], [other])


def test_a_turn_ends_though_more_is_told_in_every_look(loop: Loop, fds: list[int]) -> None:
    calls = 0

    def call(_: object) -> None:
        nonlocal calls
        calls += 1

    loop.add(fds[0], call)
    use(loop, Always([(fds[0], RECEIVED)] * 2))
    assert loop.turn(0)
    assert calls < 4 * MOST_LOOKS
