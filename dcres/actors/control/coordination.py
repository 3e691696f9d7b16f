"""What is being done to a VM, one thing at a time; and what a coordinator before this one left.

`dcres.actors.control.coordinator` has the operations themselves.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from dcres.actors.control import recovering
from dcres.actors.control.asking import Heard, Roll, ask_progress, describe, why_of
from dcres.actors.control.checkpointing import Checkpointing
from dcres.actors.control.concurrency import THREADS, Concurrency
from dcres.actors.control.executor import Executor
from dcres.actors.control.following import Follower
from dcres.actors.control.journal import Journal
from dcres.actors.control.recording import catch_up, record_stopped
from dcres.actors.control.replacing import settle_shape
from dcres.actors.control.taking_down import take_down
from dcres.actors.messages import Description
from dcres.actors.ports import Fleet, Port
from dcres.actors.protocol import Machine
from dcres.actors.ray.fleet import RayFleet
from dcres.errors import Conflict, DcresError, NotFound, VmLost, VmOff
from dcres.linux import priority
from dcres.model.live import FIXED_S
from dcres.model.phase import HostState, VmPhase, is_at_rest, judged
from dcres.model.picture import Picture

log = logging.getLogger("dcres.coordinator")

VmFacts = dict[str, Any]  # a VM as its coordinator tells of it, for people

_CANCEL_TIMEOUT_S = 45.0


class Coordination:
    """A VM's phase, hosts and operation under way, as its coordinator knows them."""

    def __init__(
        self, vm: str, fleet: Fleet | None = None, concurrency: Concurrency = THREADS
    ) -> None:
        priority.take_normal()
        self._concurrency = concurrency
        self._vm = vm
        self._fleet: Fleet = fleet or RayFleet()
        self._phase = VmPhase.ABSENT
        self._why = ""
        self._hosts: tuple[str, ...] = ()
        self._roll = Roll(vm, self._fleet.alive)
        self._operation = threading.Lock()
        self._checkpointing: Checkpointing | None = None
        self._executor: Executor | None = None  # of the start or restore under way
        self._moves_unwanted: threading.Event | None = None  # while shares are changed
        self._last: dict[str, Any] = {}
        self._fixed_s = FIXED_S
        self._follower: Follower | None = None
        self._recovered = self._taken_down = self._retired = False
        self._recover()

    @contextmanager
    def _exclusively(self, phase: VmPhase, wait_s: float = 0.0) -> Iterator[None]:
        """One operation at a time; if it fails, the VM is what it was before, or was taken down."""
        if not self._operation.acquire(timeout=wait_s):
            raise self._busy()
        try:
            if not self._recovered:
                self._recover()
            before, self._phase, self._taken_down = self._phase, phase, False
            try:
                yield
            except BaseException:
                if self._phase is phase:
                    self._phase = VmPhase.ABSENT if self._taken_down else before
                raise
        finally:
            self._operation.release()

    def _busy(self) -> Conflict:
        # In a phase of rest nothing takes long: it is paused, resumed or looked after.
        doing = "just being looked after" if is_at_rest(self._phase) else self._phase
        return Conflict(f"VM {self._vm} is {doing}; wait until that is done")

    def _require_idle(self) -> None:
        """Conflict where an operation would meet one, without being one."""
        self._recover_if_due()
        if self._operation.locked():
            raise self._busy()

    def _ports(self) -> dict[str, Port]:
        """The hosts' ports by host name, the main host first."""
        return dict(zip(self._hosts, self._fleet.find(self._vm), strict=False))

    def _main(self) -> Port:
        ports = self._fleet.find(self._vm)
        if not ports:
            raise NotFound(f"VM {self._vm} does not run; start it or restore a checkpoint")
        return ports[0]

    def _recover(self) -> None:
        """Find out what a coordinator before this one left, and bring it to an end.

        With a host that does not answer yet nobody knows; it is tried again before the next
        operation and when somebody asks for the status.
        """
        ports = self._fleet.find(self._vm)
        if not ports:
            self._fleet.release(self._vm)  # a start may have come as far as its reservation
            self._phase, self._why, self._recovered = VmPhase.ABSENT, "", True
            return
        self._hosts = self._hosts or recovering.hosts_known(self._vm, self._fleet)
        try:
            self._settle_what_is_there(ports)
        except VmOff as error:
            self._phase, self._why = VmPhase.OFF, str(error)
        except VmLost as error:
            self._phase, self._why = VmPhase.LOST, str(error)
        except DcresError as error:
            self._phase, self._why = VmPhase.UNKNOWN, str(error)
        else:
            self._recovered = True

    def _settle_what_is_there(self, ports: Sequence[Port]) -> None:
        main = describe(ports[0])
        if main.running:
            self._hosts = main.hosts
            # Before the sub hosts are asked, which may take long: the guest waits for this alone.
            recovering.let_go(self._vm, ports[0], main.checkpoint)
        descriptions = [main, *map(describe, ports[1:])]
        self._hosts = tuple(each.host for each in descriptions)
        if not descriptions[0].running:
            log.warning("VM %s: taking down a start that was not finished", self._vm)
            self._take_down()
            self._phase, self._why = VmPhase.ABSENT, ""
            return
        if self._reshaped(descriptions[0]):
            ports = self._fleet.find(self._vm)
            descriptions = [describe(port) for port in ports]
        gone = [each.host for each in descriptions if not each.present]
        if gone:
            # Ray moves the actors of a dead host to a new one, where nothing of the VM is.
            raise VmLost(f"a host of VM {self._vm} is gone ({', '.join(gone)} has nothing of it)")
        if main.checkpoint is not None:
            recovering.discard(main.checkpoint, ports)
        self._phase, self._why = VmPhase.RUNNING, ""
        catch_up(self._vm, ports[0], main, self._fleet.cluster())
        if descriptions[0].moving:
            self._follow(ports[0], self._ports(), lambda: self._end_servers(ports))
        else:
            self._end_servers(ports)  # of a restore that had come as far as the guest

    def _reshaped(self, main: Description) -> bool:
        """Whether shares were being changed; if so that is brought to an end."""
        if self._is_settled(main):
            return False
        log.warning("VM %s: giving up a change of shares", self._vm)
        self._hosts = settle_shape(self._vm, self._fleet)
        return True

    def _is_settled(self, main: Description) -> bool:
        return not main.reshaping and main.hosts == self._hosts

    def _settle_shares(self) -> None:
        """Bring a change of shares to an end that could not be undone when it failed."""
        self._reshaped(describe(self._main()))

    def _follow(self, main: Port, servers: Mapping[str, Port], done: Callable[[], None]) -> None:
        self._follower = Follower(self._vm, main, servers, done)

    def _end_servers(self, ports: Sequence[Port]) -> None:
        recovering.end_servers(self._vm, self._fleet, ports)

    def status(self) -> VmFacts:
        """The VM as its hosts see it: what is proven of it, and who does not answer."""
        self._recover_if_due()
        before, why = self._phase, self._why
        heard = self._hear(before)
        phase = before
        if is_at_rest(before):
            phase, why = self._judge(before, heard)
        elif heard:
            why = "; ".join(each.why for each in heard if each.why)
        self._found(before, phase, why)
        return {
            "vm": self._vm,
            "phase": str(phase),
            "why": why,
            "generation": max((each.generation for each in heard), default=0) or None,
            "hosts": [each.to_dict() for each in heard],
            "last_checkpoint": self._last or None,
        }

    def _hear(self, phase: VmPhase) -> list[Heard]:
        """What all hosts say, except while they come or go."""
        ports = self._ports()
        if phase in (VmPhase.STARTING, VmPhase.RESTORING, VmPhase.STOPPING):
            return self._roll.named(self._hosts)
        return self._roll.call(ports)

    def _judge(self, before: VmPhase, heard: Sequence[Heard]) -> tuple[VmPhase, str]:
        """The phase of a VM at rest, and why."""
        if not heard:
            # Its last host may have gone with its reservation: that is for who knew it.
            return (VmPhase.ABSENT if before is VmPhase.RUNNING else before), self._why
        match judged([each.state for each in heard]):
            case VmPhase.OFF:
                return VmPhase.OFF, heard[0].why
            case VmPhase.LOST:
                return VmPhase.LOST, why_of(heard, HostState.LOST)
            case VmPhase.UNKNOWN:
                return VmPhase.UNKNOWN, why_of(heard, HostState.SILENT)
            case phase if self._recovered:
                trouble = "" if self._follower is None else self._follower.trouble
                return phase, "; ".join(filter(None, [why_of(heard, HostState.TROUBLED), trouble]))
            case _:
                return before, self._why

    def _found(self, before: VmPhase, phase: VmPhase, why: str) -> None:
        """What a look at the hosts showed, unless an operation has begun or ended meanwhile."""
        if self._operation.acquire(blocking=False):
            try:
                if self._phase is before:
                    self._phase, self._why = phase, why
            finally:
                self._operation.release()

    def _recover_if_due(self) -> None:
        if not self._recovered and self._operation.acquire(blocking=False):
            try:
                self._recover()
            finally:
                self._operation.release()

    def placement(self, buckets: int) -> Picture:
        """Where memory is, as `Machine.picture` has it. Raises NotFound, Conflict, VmLost."""
        if self._phase in (VmPhase.STARTING, VmPhase.RESTORING, VmPhase.STOPPING):
            raise self._busy()
        return self._main().call(Machine.picture, buckets)

    def progress(self) -> dict[str, Any]:
        """How far the operation under way is: its phase, and bytes, rate and rest per host."""
        checkpointing = self._checkpointing
        phase = str(checkpointing.phase if checkpointing else self._phase)
        forecasts = checkpointing.forecasts() if checkpointing else {}
        hosts = [
            {**each, **forecasts.get(each["host"], {})} for each in ask_progress(self._ports())
        ]
        facts: dict[str, Any] = {"vm": self._vm, "phase": phase, "hosts": hosts}
        if checkpointing is not None and checkpointing.judgement is not None:
            facts["round"] = checkpointing.rounds
            facts["estimated_downtime_seconds"] = checkpointing.judgement.estimated_downtime_s
            facts["pages_left"] = checkpointing.pages_left
        if self._phase is VmPhase.RESIZING:
            with suppress(DcresError):
                facts["pages_to_move"] = self._main().call(Machine.status)["pages_to_move"]
        return facts

    def cancel(self) -> bool:
        """Give up the checkpoint, start, restore or change of shares under way, if there is one.

        A start's hosts are told to end what they have, so that long loading ends at once.
        """
        checkpointing, executor = self._checkpointing, self._executor
        moves_unwanted = self._moves_unwanted
        if checkpointing is not None:
            return checkpointing.cancel("cancelled by the user")
        if executor is not None:
            return executor.cancel("cancelled by the user")
        if moves_unwanted is not None:
            moves_unwanted.set()
        return moves_unwanted is not None

    def _operation_named(self, name: str) -> Executor:
        return Executor(Journal(name, self._concurrency), self._concurrency)

    def stop(self, by: str = "") -> None:
        """End the VM and give back all it used; its checkpoints stay. Repeatable.

        First of all it is put on record that `by` wants it stopped, so that nobody brings it back.
        Raises StoreFull where that cannot be; the VM runs on then.
        """
        self.cancel()
        with self._exclusively(VmPhase.STOPPING, _CANCEL_TIMEOUT_S):
            record_stopped(self._vm, self._fleet, self._hosts, by)
            self._take_down()
            self._phase, self._why = VmPhase.ABSENT, ""

    def retire(self) -> bool:
        """Take no more orders if there is no VM, and whoever asked ends this actor. Repeatable."""
        if self._retired:
            return True
        if not self._operation.acquire(blocking=False):
            return False
        if self._fleet.find(self._vm):
            self._operation.release()
            return False
        self._phase = VmPhase.STOPPING  # and the lock is kept: later orders meet a Conflict
        self._retired = True
        return True

    def _take_down(self, journal: Journal | None = None) -> None:
        """End everything of the VM on every host that is still there; release the hosts."""
        if self._follower is not None:
            self._follower.stop()
            self._follower = None
        journal = journal or Journal("stop", self._concurrency)
        take_down(self._vm, self._fleet, self._hosts, journal, self._concurrency)
        self._roll.forget()
        self._hosts, self._taken_down = (), True
