"""One operation at a time, and where the VM stands meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from dcres.actors.control.concurrency import Concurrency
from dcres.actors.control.executor import Executor
from dcres.actors.control.journal import Journal
from dcres.errors import ClusterError, Conflict, DcresError, VmLost, VmOff
from dcres.model.phase import VmPhase
from dcres.model.situation import Situation

Recover = Callable[[Executor], Situation]


class Turn:
    """Whose turn it is. `recover` ends what an earlier coordinator left, and says what came of it.

    With a host that does not answer yet nobody knows; it is tried again before the next
    operation and when somebody asks for the status.
    """

    def __init__(self, vm: str, concurrency: Concurrency, recover: Recover) -> None:
        self._vm = vm
        self._concurrency = concurrency
        self._recover_now = recover
        self._lock = concurrency.lock()
        self._situation = Situation()
        self._executor: Executor | None = None
        self._journal: Journal | None = None
        self._latest: Journal | None = None

    @property
    def situation(self) -> Situation:
        """Where the VM stands."""
        return self._situation

    def become(self, situation: Situation) -> None:
        """The VM stands there from now on: the only place that says so."""
        self._situation = situation

    def unsettle(self) -> None:
        """An operation has left something; `recover` ends it before the next one begins."""
        self.become(self._situation.unsettled())

    def recover(self) -> None:
        """Once more, by whoever has the turn. What cannot be asked for now is not known yet."""
        journal = Journal("recovery", self._concurrency)
        self._latest = self._latest or journal
        try:
            found = self._recover_now(Executor(journal, self._concurrency))
        except DcresError as error:
            found = Situation(VmPhase.UNKNOWN, str(error))
        self.become(found)

    def recover_if_due(self) -> None:
        """Unless it is somebody's turn."""
        if not self._situation.settled and self._lock.acquire():
            try:
                self.recover()
            finally:
                self._lock.release()

    @contextmanager
    def taken(
        self, phase: VmPhase, wait_s: float = 0.0, *, settled: bool = False
    ) -> Iterator[None]:
        """An operation, which takes the VM to `phase`. Raises Conflict while there is another.

        With `settled` it raises VmLost, VmOff or ClusterError where something is left of what was
        done before. An error that ends the operation gets its journal.
        """
        if not self._lock.acquire(wait_s):
            raise self.busy()
        try:
            if not self._situation.settled:
                self.recover()
            before = self._situation
            if settled:
                self._require_settled()
            self.become(before.begun(phase))
            try:
                yield
            except BaseException as error:
                if isinstance(error, DcresError) and self._journal is not None:
                    error.journal = self._journal.entries
                self.become(self._situation.given_up(phase, before))
                raise
        finally:
            if self._journal is not None and self._journal.entries:
                self._latest = self._journal
            self._journal = self._executor = None
            self._lock.release()

    def _require_settled(self) -> None:
        found = self._situation
        if not found.settled:
            errors: dict[VmPhase, type[DcresError]] = {VmPhase.LOST: VmLost, VmPhase.OFF: VmOff}
            raise errors.get(found.phase, ClusterError)(
                f"VM {self._vm} is {found.phase}: {found.why}"
            )

    def journal(self, name: str) -> Journal:
        """Of the operation that has the turn."""
        self._journal = Journal(name, self._concurrency)
        return self._journal

    def executor(self, name: str) -> Executor:
        """For the operation that has the turn, so that it can be cancelled from now on."""
        self._executor = Executor(self.journal(name), self._concurrency)
        return self._executor

    def cancel(self, why: str) -> bool:
        """Give up what is under way; whether there was something."""
        executor = self._executor
        return executor is not None and executor.cancel(why)

    def busy(self) -> Conflict:
        """Why nothing else can be done now."""
        return Conflict(self._situation.busy(self._vm))

    def require_idle(self) -> None:
        """Conflict where an operation would meet one, without being one."""
        self.recover_if_due()
        if self._lock.locked():
            raise self.busy()

    def found(self, before: Situation, phase: VmPhase, why: str) -> None:
        """What a look at the hosts showed, unless an operation has begun or ended meanwhile."""
        if self._lock.acquire():
            try:
                self.become(self._situation.found(before, phase, why))
            finally:
                self._lock.release()

    def retire(self, has_hosts: Callable[[], bool]) -> bool:
        """Keep the turn for good if there is no VM: later orders meet a Conflict. Repeatable."""
        if self._situation.retired:
            return True
        if not self._lock.acquire():
            return False
        if has_hosts():
            self._lock.release()
            return False
        self.become(self._situation.gone())
        return True

    def operations(self) -> dict[str, Any]:
        """The journals of the operation under way and of the last one."""
        now, latest = self._journal, self._latest
        return {
            "operation": None if now is None else now.to_dict(),
            "last_operation": None if latest is None else latest.to_dict(),
        }
