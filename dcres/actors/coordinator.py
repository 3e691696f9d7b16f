"""The coordinator of one VM: the driver of its start, checkpoints, restores and end.

A detached, named actor. It keeps nothing that the hosts do not know as well: started again
after its process died, it asks them, and ends what was half-done: a stopped VM runs again, a
start or restore that was not finished is taken down.

Every method runs where Ray put the coordinator (the head node). One operation at a time:
a second one is refused with Conflict.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

from dcres.actors.asking import ask_all, ask_progress, describe
from dcres.actors.bringing_up import BringingUp
from dcres.actors.checkpointing import Checkpointing, Subject, checkpoint_facts
from dcres.actors.fleet import RayFleet
from dcres.actors.following import Follower
from dcres.actors.messages import Status
from dcres.actors.ports import Fleet, Port
from dcres.actors.replacing import Replacing, settle_shape
from dcres.actors.restoring import Restoring, spec_for
from dcres.actors.taking_down import take_down
from dcres.config import Layout, VmSpec, vm_spec
from dcres.errors import (
    ActorGone,
    Conflict,
    DcresError,
    NotFound,
    VmLost,
)
from dcres.linux import priority
from dcres.model.formats import DEFAULT_FORMAT, MemoryFormat
from dcres.model.live import DOWNTIME_S, FIXED_S, MAX_ROUNDS, Judgement, Target
from dcres.model.pages import pages_of
from dcres.model.picture import Picture
from dcres.storage.manifest import Mode, loads
from dcres.storage.store import Store

log = logging.getLogger("dcres.coordinator")

_T = TypeVar("_T")
_ASK_TIMEOUT_S = 10.0
_CANCEL_TIMEOUT_S = 45.0
_RESUME_TIMEOUT_S = 180.0  # it waits for a stop that is under way


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


class Coordinator:
    """One VM's driver; see the module."""

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
        self._recovered = self._taken_down = False
        self._recover()

    @contextmanager
    def _exclusively(self, phase: VmPhase, wait_s: float = 0.0) -> Iterator[None]:
        """One operation at a time; if it fails, the VM is what it was before, or was taken down."""
        if not self._operation.acquire(timeout=wait_s):
            raise Conflict(f"VM {self._vm} is {self._phase}; wait until that is done")
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

    def _ports(self) -> dict[str, Port]:
        """The hosts' ports by host name, the main host first."""
        return dict(zip(self._hosts, self._fleet.find(self._vm), strict=False))

    def _main(self) -> Port:
        ports = self._fleet.find(self._vm)
        if not ports:
            raise NotFound(f"VM {self._vm} does not run; start it or restore a checkpoint")
        return ports[0]

    # After a restart of this actor

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
        descriptions = [describe(port) for port in ports]
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
        checkpoint = descriptions[0]["checkpoint"]
        if checkpoint is not None:
            log.warning("VM %s: giving up checkpoint %s", self._vm, checkpoint)
            self._give_up(checkpoint, ports)
        self._phase, self._why = VmPhase.RUNNING, ""
        if descriptions[0]["moving"]:
            self._follow(ports[0], self._ports(), lambda: self._end_servers(ports))

    def _reshaped(self, main: Status) -> bool:
        """Whether shares were being changed; if so that is brought to an end."""
        if not main["reshaping"] and tuple(main["hosts"]) == self._hosts:
            return False
        log.warning("VM %s: giving up a change of shares", self._vm)
        self._hosts = settle_shape(self._vm, self._fleet)
        return True

    def _give_up(self, checkpoint: str, ports: Sequence[Port]) -> None:
        """As `Checkpointing` does it: the VM waits for a host that saves, so that ends first."""
        main, *subs = ports
        main.call("halt", checkpoint, timeout_s=_RESUME_TIMEOUT_S)
        main.call("resume", checkpoint, timeout_s=_RESUME_TIMEOUT_S)
        if main.call("published", checkpoint):
            return
        for port in subs:
            port.call("halt", checkpoint)
        for port in ports:
            port.call("abandon", checkpoint)

    # Start

    def start(self, values: dict[str, Any], hosts: Sequence[str] | None = None) -> Status:
        """Boot a VM over the hosts of its layout. Raises Conflict, NoRoom and what hosts raise."""
        spec = vm_spec(values)
        with self._exclusively(VmPhase.STARTING):
            self._require_absent()
            self._bring_up(spec, hosts, BringingUp.start)
            self._phase = VmPhase.RUNNING
        return self.status()

    def _require_absent(self) -> None:
        if self._fleet.find(self._vm) and not self._is_lost():
            raise Conflict(
                f"VM {self._vm} runs already; stop it first with `dcres stop {self._vm}`"
            )
        self._take_down()

    def _is_lost(self) -> bool:
        """Whether the VM is gone for good; a pager that is being started again is no reason."""
        try:
            self._ask_all()
        except VmLost:
            return True
        except DcresError:
            return False
        return False

    def _bring_up(
        self, spec: VmSpec, hosts: Sequence[str] | None, begin: Callable[[BringingUp], _T]
    ) -> _T:
        """Reserve, and `begin`; or undo all."""
        self._unwanted = threading.Event()
        bringing_up = BringingUp(self._vm, self._fleet, spec, self._require_wanted)
        try:
            self._hosts = bringing_up.reserve(hosts)
            return begin(bringing_up)
        except BaseException:
            self._take_down()
            self._require_wanted()
            raise
        finally:
            self._unwanted = None

    def _follow(self, main: Port, servers: Mapping[str, Port], done: Callable[[], None]) -> None:
        self._follower = Follower(self._vm, main, servers, done)

    def _end_servers(self, ports: Sequence[Port]) -> None:
        """As `Restoring.end`, when nobody remembers which hosts serve parts."""
        for port in ports:
            with suppress(DcresError):
                port.call("end_serving_parts")
        self._fleet.leave(self._vm)

    def _require_wanted(self) -> None:
        if self._unwanted is not None and self._unwanted.is_set():
            raise Conflict(f"the start of VM {self._vm} was cancelled")

    # Checkpoint

    def checkpoint(
        self,
        mode: str = "live",
        checkpoint: str | None = None,
        downtime_s: float = DOWNTIME_S,
        max_rounds: int = MAX_ROUNDS,
        memory_format: MemoryFormat = DEFAULT_FORMAT,
    ) -> dict[str, Any]:
        """Take a checkpoint; its manifest's facts as `dcres checkpoint --json` prints them.

        `downtime_s` is what a live checkpoint aims at, in at most `max_rounds` rounds; then the
        VM is stopped all the same, and ``verdict`` says why. Raises OperationFailed when it was
        given up: the VM then goes on.
        """
        with self._exclusively(VmPhase.CHECKPOINTING):
            ports = self._ports()
            if not ports:
                raise NotFound(f"VM {self._vm} does not run; start it or restore a checkpoint")
            began = time.monotonic()
            now = datetime.now(UTC)
            # The four digits tell checkpoints of one second apart, and put them in order.
            name = checkpoint or Store.new_id(self._vm, now, f"{now.microsecond // 16:04x}")
            target = Target(downtime_s, max_rounds, self._fixed_s)
            running = Checkpointing(
                self._subject(ports), name, Mode(mode), target, memory_format, now
            )
            self._checkpointing = running
            try:
                manifest = running.run()
            finally:
                self._checkpointing = None
                self._recovered = not running.vm_stands  # else the next look lets it go on
            self._phase = VmPhase.RUNNING
            self._last = checkpoint_facts(manifest, time.monotonic() - began)
            self._last["downtime_parts_seconds"] = running.downtime_parts_s
            if running.judgement is not None:
                self._learn(running.judgement, manifest.downtime_seconds)
                self._last["verdict"] = str(running.judgement.verdict)
            return self._last

    def _learn(self, judgement: Judgement, downtime_s: float) -> None:
        """The fixed part of the next downtime is what this one had beyond its staging."""
        staging_s = judgement.estimated_downtime_s - self._fixed_s
        self._fixed_s = max(0.5 * (self._fixed_s + downtime_s - staging_s), 0.005)

    def _subject(self, ports: dict[str, Port]) -> Subject:
        main = ports[self._hosts[0]].call("describe")
        return Subject(
            vm=self._vm,
            generation=main["generation"],
            spec=VmSpec.model_validate(main["spec"]),
            accel=main["accel"],
            qemu_version=main["qemu_version"],
            machine=main["machine"],
            hosts=self._hosts,
            ports=ports,
        )

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

    # Restore

    def restore(
        self,
        manifest_text: str,
        layout: Layout | None = None,
        hosts: Sequence[str] | None = None,
        lazy: bool = False,
    ) -> dict[str, Any]:
        """Bring the VM back from a checkpoint; facts as `dcres restore --json` prints them.

        `layout` None is the checkpoint's own. With `lazy` the guest runs at once, and its
        memory follows. Raises Conflict when the VM runs or is being restored,
        CheckpointCorrupt, NoRoom, NotFound for a part that is nowhere; on an error nothing of
        the VM is left running and the checkpoint is as it was.
        """
        manifest = loads(manifest_text, Path("manifest.json"))
        spec = spec_for(manifest, layout)

        def begin(bringing_up: BringingUp) -> tuple[Restoring, dict[str, float]]:
            return bringing_up.restore(manifest, lazy), bringing_up.laps.seconds

        with self._exclusively(VmPhase.RESTORING):
            self._require_absent()
            restoring, laps = self._bring_up(spec, hosts, begin)
            self._phase = VmPhase.RUNNING
            if lazy:
                self._follow(self._main(), restoring.server_ports, restoring.end)
            else:
                restoring.end()
        return {
            "vm": self._vm,
            "checkpoint": manifest.checkpoint,
            "seconds": sum(laps.values()),
            "parts_seconds": laps,
            "lazy": lazy,
            **restoring.facts(spec.layout.shares),
        }

    # Everything else

    def resize(
        self, main_bytes: int | None = None, subs_bytes: Sequence[int] | None = None
    ) -> Status:
        """Change how much the hosts keep, while the VM runs.

        More sub hosts than there are join on hosts with room; with fewer the last ones are
        emptied and leave. Raises ConfigError, NoRoom.
        """
        with self._exclusively(VmPhase.RESIZING):
            spec = self._running_spec()
            subs = spec.layout.subs if subs_bytes is None else tuple(subs_bytes)
            now = len(spec.layout.subs)
            wanted = [*subs[:now], *[0] * (now - len(subs))]
            self._reshape(spec, main_bytes or spec.layout.main, wanted, subs[now:])
        return self.status()

    def drain(self, host: str) -> Status:
        """Empty one sub host while the VM runs, then leave it. Raises NotFound, NoRoom."""
        with self._exclusively(VmPhase.RESIZING):
            spec = self._running_spec()
            wanted = self._without(host, spec)
            self._reshape(spec, spec.layout.main, list(wanted.values()), ())
        return self.status()

    def plan_drain(self, host: str) -> dict[str, int]:
        """How many pages `drain` would bring to each other host, as things are now.

        Raises what `drain` raises before it begins.
        """
        spec = self._running_spec()
        wanted = self._without(host, spec)
        layout = Layout(main=spec.layout.main, subs=tuple(filter(None, wanted.values())))
        layout.require_room_for(spec.memory)
        capacities = {name: pages_of(share) for name, share in wanted.items()}
        moves: dict[str, int] = self._main().call("plan_moves", capacities)
        return moves

    def _without(self, host: str, spec: VmSpec) -> dict[str, int]:
        """Every sub host's share, but none for `host`. Raises NotFound."""
        shares = dict(zip(self._hosts[1:], spec.layout.subs, strict=True))
        if host not in shares:
            raise NotFound(
                f"{host} is no sub host of VM {self._vm}; it has {', '.join(shares) or 'none'}"
            )
        return {**shares, host: 0}

    def _running_spec(self) -> VmSpec:
        description = self._main().call("describe")
        if description["moving"]:
            raise Conflict(f"VM {self._vm} is still being restored; wait until its pages are there")
        return VmSpec.model_validate(description["spec"])

    def _reshape(
        self, spec: VmSpec, main_bytes: int, wanted: Sequence[int], added: Sequence[int]
    ) -> None:
        stopped = self._moves_unwanted = threading.Event()

        def require_wanted() -> None:
            if stopped.is_set():
                raise Conflict(f"moving the pages of VM {self._vm} was cancelled; it runs on")

        replacing = Replacing(
            self._vm, self._fleet, spec, self._hosts, main_bytes, wanted, added, require_wanted
        )
        try:
            self._hosts = replacing.run()
        except BaseException:
            self._hosts = settle_shape(self._vm, self._fleet)
            raise
        finally:
            self._moves_unwanted = None
        self._phase = VmPhase.RUNNING

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
            raise Conflict(f"VM {self._vm} is {self._phase}; wait until that is done")
        picture: Picture = self._main().call("picture", buckets)
        return picture

    def _ask_all(self) -> list[Status]:
        ports = self._ports()
        if not ports:
            raise NotFound(f"VM {self._vm} does not run")
        return ask_all(self._vm, ports)

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

    def stop(self) -> None:
        """End the VM and give back all it used; its checkpoints stay. Repeatable."""
        self.cancel()
        with self._exclusively(VmPhase.STOPPING, _CANCEL_TIMEOUT_S):
            self._take_down()
            self._phase, self._why = VmPhase.ABSENT, ""

    def retire(self) -> bool:
        """Take no more orders, if there is no VM; whoever asked then ends this actor."""
        if not self._operation.acquire(blocking=False):
            return False
        if self._fleet.find(self._vm):
            self._operation.release()
            return False
        self._phase = VmPhase.STOPPING  # and the lock is kept: later orders meet a Conflict
        return True

    def _take_down(self) -> None:
        """End everything of the VM on every host that is still there; release the hosts."""
        if self._follower is not None:
            self._follower.stop()
            self._follower = None
        take_down(self._vm, self._fleet)
        self._hosts, self._taken_down = (), True
