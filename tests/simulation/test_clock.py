"""The virtual clock: one task at a time, in an order that the seed decides."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from dcres.actors.control.concurrency import Concurrency, Mailbox
from tests.simulation.clock import Process, Simulated, Stuck

HOUR_S = 3600.0


def concurrency(clock: Simulated) -> Concurrency:
    """That it is one is for mypy to prove."""
    return clock


def ran(work: Callable[[Simulated], None], seed: int = 1) -> Simulated:
    clock = Simulated(seed)
    clock.run(lambda: work(clock))
    return clock


def require(true: bool) -> None:
    assert true


def test_an_hour_takes_no_time() -> None:
    began_s = time.monotonic()
    clock = ran(lambda clock: clock.sleep(HOUR_S))
    assert clock.now_s() == HOUR_S
    assert time.monotonic() - began_s < HOUR_S / 100


def test_tasks_wait_side_by_side() -> None:
    ends: list[tuple[str, float]] = []

    def work(clock: Simulated) -> None:
        def wait(seconds: float) -> None:
            clock.sleep(seconds)
            ends.append((threading.current_thread().name, clock.now_s()))

        tasks = [clock.spawn(lambda each=each: wait(each), "w") for each in (3.0, 1.0, 2.0)]  # type: ignore[misc]
        assert not tasks[0].join(2.5)
        assert all(task.join() for task in tasks)

    ran(work)
    assert [at for _, at in ends] == [1.0, 2.0, 3.0]


def orders(seed: int) -> list[int]:
    found: list[int] = []

    def work(clock: Simulated) -> None:
        for task in [clock.spawn(lambda each=each: found.append(each), "w") for each in range(9)]:  # type: ignore[misc]
            task.join()

    ran(work, seed)
    return found


def test_what_is_ready_at_once_goes_in_an_order_of_the_seed() -> None:
    assert orders(7) == orders(7)
    assert len({tuple(orders(seed)) for seed in range(20)}) > 10


def test_one_task_runs_at_a_time() -> None:
    inside: list[int] = []

    def work(clock: Simulated) -> None:
        def alone() -> None:
            inside.append(1)
            assert len(inside) == 1
            for _ in range(1000):
                pass
            inside.pop()
            clock.sleep(0.0)

        for task in [clock.spawn(alone, f"t{number}") for number in range(50)]:
            task.join()

    ran(work)


def test_signals_mailboxes_and_locks_are_as_those_of_threads() -> None:
    def work(clock: Simulated) -> None:
        signal, lock = clock.signal(), clock.lock()
        box: Mailbox[str] = clock.mailbox()
        assert not signal.wait(5.0)
        assert box.get(5.0) is None
        assert clock.now_s() == 10.0

        def later() -> None:
            with lock:
                clock.sleep(1.0)
                signal.set()
                box.put("first")
                box.put("second")

        clock.spawn(later, "later")
        clock.sleep(0.5)
        assert lock.locked()
        assert not lock.acquire(0.1)
        assert lock.acquire(10.0)
        assert clock.now_s() == pytest.approx(11.0)
        assert signal.wait(0.0)
        assert [box.get(), box.get()] == ["first", "second"]

    ran(work)


def test_a_process_that_is_killed_changes_nothing_any_more() -> None:
    done: list[str] = []

    def work(clock: Simulated) -> None:
        process = Process("victim")

        def live() -> None:
            try:
                clock.sleep(1.0)
                done.append("lived on")
            finally:
                done.append("on its way out")
                clock.sleep(1.0)
                done.append("waited on its way out")

        task = clock.spawn_in(process, live, "live")
        clock.sleep(0.5)
        clock.kill(process)
        assert task.join()
        assert clock.now_s() == 0.5
        assert clock.spawn_in(process, lambda: done.append("began late"), "late").join()

    ran(work)
    assert done == ["on its way out"]


def test_what_waits_for_ever_is_found() -> None:
    with pytest.raises(Stuck, match="nothing is left"):
        ran(lambda clock: require(clock.signal().wait()))


def test_what_goes_round_and_round_is_found() -> None:
    def work(clock: Simulated) -> None:
        while True:
            clock.sleep(0.0)

    clock = Simulated(1, most_events=1000)
    with pytest.raises(Stuck, match="1001 events"):
        clock.run(lambda: work(clock))


def test_what_a_task_raises_fails_the_run() -> None:
    def work(clock: Simulated) -> None:
        def fail() -> None:
            raise KeyError("of a task")

        clock.spawn(fail, "fail").join()

    with pytest.raises(KeyError, match="of a task"):
        ran(work)


def test_nothing_runs_after_the_run() -> None:
    before = threading.active_count()
    for seed in range(50):
        ran(
            lambda clock: require(not clock.spawn(lambda: clock.sleep(HOUR_S), "x").join(0.1)), seed
        )
    assert threading.active_count() <= before + 5, "threads are used again"


def test_a_thread_that_is_none_of_its_own_is_found() -> None:
    def work(clock: Simulated) -> None:
        found: list[str] = []

        def intrude() -> None:
            try:
                clock.sleep(1.0)
            except Stuck as error:
                found.append(str(error))

        intruder = threading.Thread(target=intrude, name="intruder")
        intruder.start()
        intruder.join()
        assert found == ["intruder is no thread of the simulation"]

    ran(work)
