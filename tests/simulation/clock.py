"""Time and tasks of a simulated cluster: one task runs at a time, and time is a number.

Every task has a thread, but only the one that holds the baton runs. When it waits, the baton goes
to whatever is next on the clock; what is ready at the same time goes in an order that the seed
decides. So a run depends on its seed alone, and a second run of it does the same.

A task belongs to a `Process` of the simulated cluster. When that is killed its tasks end where they
wait, and whatever they try on their way out ends them again: they change nothing any more.
"""

from __future__ import annotations

import heapq
import random
import threading
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import ClassVar, Generic, TypeVar

T = TypeVar("T")

_EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
_MOST_EVENTS = 400_000  # more means that something goes round and round


class Killed(BaseException):
    """The process that this task belongs to was killed."""


class Stuck(AssertionError):
    """Nothing is left that could happen, or too much happens."""


class Process:
    """What is killed as one: the tasks of an actor, of a coordinator, of a client."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.killed = False
        self.tasks: dict[_Task, None] = {}  # in the order in which they began


class _Worker:
    """A thread that runs one task after the other."""

    _idle: ClassVar[deque[_Worker]] = deque()

    def __init__(self) -> None:
        self.baton = threading.Lock()
        self.baton.acquire()
        self.work: Callable[[], None] = lambda: None
        self.thread = threading.Thread(target=self._serve, name="simulated", daemon=True)
        self.thread.start()

    @classmethod
    def take(cls, work: Callable[[], None]) -> _Worker:
        """One that begins `work` when it gets the baton."""
        worker = cls._idle.pop() if cls._idle else cls()
        worker.work = work
        return worker

    def _serve(self) -> None:
        while True:
            self.baton.acquire()
            self.work()

    def release(self) -> None:
        """It has nothing more to do; it gets the baton again with its next task."""
        self._idle.append(self)


class _Task:
    """See `dcres.actors.control.concurrency.Task`."""

    def __init__(self, clock: Simulated, process: Process, name: str) -> None:
        self.clock = clock
        self.process = process
        self.name = name
        self.waits = 0  # the number of its wait, so that a wake-up that comes late is none
        self.woken = False
        self.ended = Signal(clock)
        self.worker: _Worker | None = None
        self.label = ""  # the operation that it belongs to; tasks that it begins inherit it

    def join(self, timeout_s: float | None = None) -> bool:
        return self.ended.wait(timeout_s)


class Simulated:
    """A `Concurrency` on a virtual clock; see the module."""

    def __init__(self, seed: int, most_events: int = _MOST_EVENTS) -> None:
        self._most_events = most_events
        self.random = random.Random(seed)
        self.trace: list[str] = []
        self.errors: list[BaseException] = []
        self._now_s = 0.0
        self._events: list[tuple[float, float, int, _Task | Callable[[], None], int, bool]] = []
        self._count = 0
        self._current: _Task | None = None
        self._last: _Task | None = None  # whose end is the run's
        self._over = threading.Lock()
        self._stuck: Stuck | None = None
        self._processes: list[Process] = []
        self._closing = False

    # What `Concurrency` promises

    def now_s(self) -> float:
        """Seconds since the run began."""
        return self._now_s

    def utc(self) -> datetime:
        """The same as a time of day."""
        return _EPOCH + timedelta(seconds=self._now_s)

    def sleep(self, seconds: float) -> None:
        """Let others run for so long."""
        self.suspend(max(seconds, 0.0))

    def spawn(self, work: Callable[[], None], name: str) -> _Task:
        """A task of the same process."""
        self.require_process()
        return self.spawn_in(self.current.process, work, name, self.current.label)

    def signal(self) -> Signal:
        return Signal(self)

    def mailbox(self) -> Mailbox[T]:
        return Mailbox(self)

    def lock(self) -> Lock:
        return Lock(self)

    # What the simulated cluster needs besides

    @property
    def current(self) -> _Task:
        """The task that runs."""
        task = self._current
        if (
            task is None
            or task.worker is None
            or task.worker.thread is not threading.current_thread()
        ):
            raise Stuck(f"{threading.current_thread().name} is no thread of the simulation")
        return task

    @property
    def events(self) -> int:
        """How many there have been."""
        return self._count

    def note(self, what: str) -> None:
        """A line of the trace, with the time."""
        self.trace.append(f"{self._now_s:10.4f}  {what}")

    def require_process(self) -> None:
        """Killed in a task whose process is: it changes nothing any more."""
        if self.current.process.killed:
            raise Killed

    def spawn_in(
        self, process: Process, work: Callable[[], None], name: str, label: str = ""
    ) -> _Task:
        """A task of `process`."""
        task = _Task(self, process, name)
        task.label = label
        if not process.tasks:
            self._processes.append(process)
        process.tasks[task] = None
        task.worker = _Worker.take(lambda: self._run(task, work))
        self._push(self._now_s, task, task.waits, True)
        return task

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        """Call something that does not wait, later."""
        self._push(self._now_s + seconds, call, 0, True)

    def kill(self, process: Process) -> None:
        """End its tasks where they wait. Repeatable."""
        process.killed = True
        for task in process.tasks:
            if task is not self._current:
                self._push(self._now_s, task, task.waits, False)

    def wake(self, task: _Task, wait: int) -> None:
        """Let a task go on that has suspended itself."""
        self._push(self._now_s, task, wait, True)

    def suspend(self, timeout_s: float | None) -> bool:
        """Let others run until `wake` is called, or for so long; whether it was called."""
        task = self.current
        self.require_process()
        if timeout_s is not None:
            self._push(self._now_s + timeout_s, task, task.waits, False)
        self._pass_on(task)
        self.require_process()
        return task.woken

    def run(self, main: Callable[[], None]) -> None:
        """Run `main` as a task, and what it begins, until it has ended; then end all else.

        Raises what a task has raised, and Stuck.
        """
        self._over.acquire()
        task = self.spawn_in(Process("main"), main, "main")
        self._last = task
        self._next(None)
        self._over.acquire()
        self._over.release()
        if self.errors:  # which may be why nothing came to an end
            raise self.errors[0]
        if self._stuck is not None:
            raise self._stuck

    def _close(self, stuck: str = "") -> None:
        """Nothing more happens but that tasks end."""
        self._closing = True
        if stuck:
            self._stuck = Stuck(stuck)
        for process in self._processes:
            self.kill(process)

    def _push(self, at_s: float, what: _Task | Callable[[], None], wait: int, woken: bool) -> None:
        self._count += 1
        order = self.random.random()
        heapq.heappush(self._events, (at_s, order, self._count, what, wait, woken))

    def _run(self, task: _Task, work: Callable[[], None]) -> None:
        try:
            if not task.process.killed:
                work()
        except Killed:
            pass
        except BaseException as error:
            self.errors.append(error)
        finally:
            del task.process.tasks[task]
            task.ended.set()
            if task is self._last:
                self._close()
            worker, task.worker = task.worker, None
            if worker is not None:
                worker.release()
            self._next(task)

    def _pass_on(self, task: _Task) -> None:
        """Give the baton to whatever is next, and wait until it comes back."""
        worker = task.worker
        assert worker is not None
        if self._next(task) is not task:
            worker.baton.acquire()

    def _next(self, before: _Task | None) -> _Task | None:
        """Find the next task on the clock, and give it the baton unless it has it."""
        while True:
            if not self._events and not self._closing:
                self._close("nothing is left that could happen")
            if not self._events:
                break
            at_s, _, count, what, wait, woken = heapq.heappop(self._events)
            if count > self._most_events and not self._closing:
                self._close(f"{count} events in {self._now_s:.0f} s")
            self._now_s = max(self._now_s, at_s)
            if not isinstance(what, _Task):
                if not self._closing:
                    what()
                continue
            if what.worker is None or wait != what.waits:
                continue
            what.waits += 1
            what.woken = woken
            self._current = what
            if what is not before:
                what.worker.baton.release()
            return what
        self._over.release()
        return None


class Signal:
    """See `dcres.actors.control.concurrency.Signal`."""

    def __init__(self, clock: Simulated) -> None:
        self._clock = clock
        self._set = False
        self._waiting: list[tuple[_Task, int]] = []

    def set(self) -> None:
        self._set = True
        waiting, self._waiting = self._waiting, []
        for task, wait in waiting:
            self._clock.wake(task, wait)

    def is_set(self) -> bool:
        return self._set

    def wait(self, timeout_s: float | None = None) -> bool:
        if not self._set:
            task = self._clock.current
            self._waiting.append((task, task.waits))
            self._clock.suspend(timeout_s)
        return self._set


class Mailbox(Generic[T]):
    """See `dcres.actors.control.concurrency.Mailbox`."""

    def __init__(self, clock: Simulated) -> None:
        self._clock = clock
        self._values: deque[T] = deque()
        self._come = Signal(clock)

    def put(self, value: T) -> None:
        self._values.append(value)
        self._come.set()

    def get(self, timeout_s: float | None = None) -> T | None:
        deadline_s = None if timeout_s is None else self._clock.now_s() + timeout_s
        while not self._values:
            self._come = Signal(self._clock)
            left_s = None if deadline_s is None else deadline_s - self._clock.now_s()
            if not self._come.wait(left_s):
                return None
        return self._values.popleft()


class Lock:
    """See `dcres.actors.control.concurrency.Lock`."""

    def __init__(self, clock: Simulated) -> None:
        self._clock = clock
        self._held = False
        self._free = Signal(clock)

    def acquire(self, timeout_s: float | None = 0.0) -> bool:
        deadline_s = None if timeout_s is None else self._clock.now_s() + timeout_s
        while self._held:
            left_s = None if deadline_s is None else deadline_s - self._clock.now_s()
            if left_s is not None and left_s <= 0:
                return False
            self._free.wait(left_s)
        self._held = True
        return True

    def release(self) -> None:
        self._held = False
        free, self._free = self._free, Signal(self._clock)
        free.set()

    def locked(self) -> bool:
        return self._held

    def __enter__(self) -> Lock:
        self.acquire(None)
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
