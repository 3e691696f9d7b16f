"""What is being done to a VM, one thing at a time; and what a coordinator before this one left.

`dcres.actors.coordinator` has the operations themselves.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from enum import StrEnum
from typing import Any

from dcres.actors.asking import ask_all, ask_progress, describe
from dcres.actors.checkpointing import HALT_TIMEOUT_S, Checkpointing
from dcres.actors.fleet import RayFleet
from dcres.actors.following import Follower
from dcres.actors.messages import Status
from dcres.actors.ports import Fleet, Port
from dcres.actors.replacing import settle_shape
from dcres.actors.taking_down import take_down
from dcres.errors import (
    ActorGone,
    ClusterError,
    Conflict,
    DcresError,
    NotFound,
    VmLost,
)
from dcres.linux import priority
from dcres.model.live import FIXED_S
from dcres.model.picture import Picture

log = logging.getLogger("dcres.coordinator")

_CANCEL_TIMEOUT_S = 45.0
_RESUME_TIMEOUT_S = 180.0  # it waits for a stop that is under way
# QEMU's run states in which a checkpoint leaves it: the last from when its core is being saved.
_HELD = ("paused", "finish-migrate", "postmigrate")


class VmPhase(StrEnum):
    """What a VM is doing, as far as its coordinator is concerned."""

    ABSENT = "absent"
    STARTING = "starting"
    RUNNING = "running"
    CHECKPOINTING = "checkpointing"
    RESTORING = "restoring"
    RESIZING = "resizing"
    STOPPING = "stopping"
    LOST = "lost"


class Coordination:
    """A VM's phase, hosts and operation under way, as its coordinator knows them."""

    def __init__(self, vm: str, fleet: Fleet | None = None) -> None:
        priority.take_normal()
        self._vm = vm
        self._fleet: Fleet = fleet or RayFleet()
        self._phase = VmPhase.ABSENT
        self._why = ""
        self._hosts: tuple[str, ...] = ()
        self._operation = threading.Lock()
        self._checkpointing: Checkpointing | None = None
        self._unwanted: threading.Event | None = None  # while a start or restore is under way
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
        return Conflict(f"VM {self._vm} is {self._phase}; wait until that is done")

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

        A host that does not answer yet makes the VM lost for now; it is tried again before the
        next operation and when somebody asks for the status.
        """
        ports = self._fleet.find(self._vm)
        if not ports:
            self._fleet.release(self._vm)  # a start may have come as far as its reservation
            self._phase, self._why, self._recovered = VmPhase.ABSENT, "", True
            return
        try:
            self._settle_what_is_there(ports)
        except DcresError as error:
            self._phase, self._why = VmPhase.LOST, str(error)
        else:
            self._recovered = True

    def _settle_what_is_there(self, ports: Sequence[Port]) -> None:
        main = describe(ports[0])
        if main["running"]:
            self._hosts = tuple(main["hosts"])
            # Before the sub hosts are asked, which may take long: the guest waits for this alone.
            self._let_go_on(ports[0], main["checkpoint"])
        descriptions = [main, *map(describe, ports[1:])]
        self._hosts = tuple(each["host"] for each in descriptions)
        if not descriptions[0]["running"]:
            log.warning("VM %s: taking down a start that was not finished", self._vm)
            self._take_down()
            self._phase, self._why = VmPhase.ABSENT, ""
            return
        if self._reshaped(descriptions[0]):
            ports = self._fleet.find(self._vm)
            descriptions = [describe(port) for port in ports]
        gone = [each["host"] for each in descriptions if not each["present"]]
        if gone:
            # Ray moves the actors of a dead host to a new one, where nothing of the VM is.
            raise VmLost(f"a host of VM {self._vm} is gone ({', '.join(gone)} has nothing of it)")
        if main["checkpoint"] is not None:
            self._discard(main["checkpoint"], ports)
        self._phase, self._why = VmPhase.RUNNING, ""
        if descriptions[0]["moving"]:
            self._follow(ports[0], self._ports(), lambda: self._end_servers(ports))
        else:
            self._end_servers(ports)  # of a restore that had come as far as the guest

    def _reshaped(self, main: Status) -> bool:
        """Whether shares were being changed; if so that is brought to an end."""
        if self._is_settled(main):
            return False
        log.warning("VM %s: giving up a change of shares", self._vm)
        self._hosts = settle_shape(self._vm, self._fleet)
        return True

    def _is_settled(self, main: Status) -> bool:
        hosts: tuple[str, ...] = tuple(main["hosts"])
        return not main["reshaping"] and hosts == self._hosts

    def _settle_shares(self) -> None:
        """Bring a change of shares to an end that could not be undone when it failed."""
        self._reshaped(describe(self._main()))

    def _let_go_on(self, main: Port, checkpoint: str | None) -> None:
        """A VM that `checkpoint` has stopped or may stop, or that an earlier one left standing.

        As `Checkpointing` does it: the VM waits for a host that saves, so that ends first.
        """
        if checkpoint is not None:
            log.warning("VM %s: giving up checkpoint %s", self._vm, checkpoint)
            with suppress(ClusterError):  # its disk hangs: the guest goes on first
                main.call("halt", checkpoint, timeout_s=HALT_TIMEOUT_S)
            main.call("resume", checkpoint, timeout_s=_RESUME_TIMEOUT_S)
            return
        status = main.call("status")
        if status["run_state"] in _HELD or status["state"] in ("quiet", "frozen"):
            log.warning("VM %s stands still; it goes on", self._vm)
            main.call("resume", "", timeout_s=_RESUME_TIMEOUT_S)

    def _discard(self, checkpoint: str, ports: Sequence[Port]) -> None:
        """What is left of a checkpoint, unless it was published.

        Which is certain once the main host has halted it: a publishing under way ends first.
        """
        main, *subs = ports
        main.call("halt", checkpoint, timeout_s=_RESUME_TIMEOUT_S)
        if main.call("published", checkpoint):
            return
        for port in subs:
            port.call("halt", checkpoint)
        for port in ports:
            port.call("abandon", checkpoint)

    def _follow(self, main: Port, servers: Mapping[str, Port], done: Callable[[], None]) -> None:
        self._follower = Follower(self._vm, main, servers, done)

    def _end_servers(self, ports: Sequence[Port]) -> None:
        """As `Restoring.end`, when nobody remembers which hosts serve parts."""
        for port in ports:
            with suppress(DcresError):
                port.call("end_serving_parts")
        self._fleet.leave(self._vm)

    def status(self) -> Status:
        """The VM as its hosts see it; a host that is gone makes it lost, and says so."""
        self._recover_if_due()
        before = self._phase
        status: Status = {"vm": self._vm, "phase": str(before), "why": self._why, "hosts": []}
        if before in (VmPhase.STARTING, VmPhase.RESTORING, VmPhase.STOPPING):
            return status
        phase, why = before, self._why
        try:
            status["hosts"] = self._ask_all()
            if self._recovered:
                why = "" if self._follower is None else self._follower.trouble
                phase = VmPhase.RUNNING if before is VmPhase.LOST else before
        except NotFound:
            phase = before if before is VmPhase.LOST else VmPhase.ABSENT
        except DcresError as error:
            why = str(error)
            lost = before is VmPhase.RUNNING and isinstance(error, VmLost)
            phase = VmPhase.LOST if lost else before
        self._found(before, phase, why)
        status["phase"], status["why"] = str(phase), why
        status["last_checkpoint"] = self._last or None
        return status

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
        """Where memory is, as `MainHost.picture` has it. Raises NotFound, Conflict, VmLost."""
        if self._phase in (VmPhase.STARTING, VmPhase.RESTORING, VmPhase.STOPPING):
            raise self._busy()
        picture: Picture = self._main().call("picture", buckets)
        return picture

    def _ask_all(self) -> list[Status]:
        ports = self._ports()
        if not ports:
            raise NotFound(f"VM {self._vm} does not run")
        return ask_all(self._vm, ports, self._fleet.alive)

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
            facts["round"] = len(checkpointing.rounds)
            facts["estimated_downtime_seconds"] = checkpointing.judgement.estimated_downtime_s
            facts["pages_left"] = checkpointing.pages_left
        if self._phase is VmPhase.RESIZING:
            with suppress(DcresError):
                facts["pages_to_move"] = self._main().call("status")["pages_to_move"]
        return facts

    def cancel(self) -> bool:
        """Give up the checkpoint, start, restore or change of shares under way, if there is one.

        A start's hosts are told to end what they have, so that long loading ends at once.
        """
        checkpointing, unwanted = self._checkpointing, self._unwanted
        moves_unwanted = self._moves_unwanted
        if checkpointing is not None:
            checkpointing.cancel("cancelled by the user")
        elif unwanted is not None:
            unwanted.set()
            for port in self._fleet.find(self._vm):
                with suppress(ActorGone):
                    port.submit("destroy")
        elif moves_unwanted is not None:
            moves_unwanted.set()
        return any(each is not None for each in (checkpointing, unwanted, moves_unwanted))

    def stop(self) -> None:
        """End the VM and give back all it used; its checkpoints stay. Repeatable."""
        self.cancel()
        with self._exclusively(VmPhase.STOPPING, _CANCEL_TIMEOUT_S):
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

    def _take_down(self) -> None:
        """End everything of the VM on every host that is still there; release the hosts."""
        if self._follower is not None:
            self._follower.stop()
            self._follower = None
        take_down(self._vm, self._fleet, self._hosts)
        self._hosts, self._taken_down = (), True
