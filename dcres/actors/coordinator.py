"""The coordinator of one VM: the driver of its start, checkpoints, restores and end.

A detached, named actor. It keeps nothing that the hosts do not know as well: started again
after its process died, it asks them, and ends what was half-done: a stopped VM runs again, a
start or restore that was not finished is taken down.

Every method runs where Ray put the coordinator (the head node). One operation at a time:
a second one is refused with Conflict.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from dcres.actors.checkpointing import Checkpointing, Subject
from dcres.actors.fleet import RayFleet
from dcres.actors.messages import Incarnation, LoadOrder, RunOrder, ServeOrder, Status
from dcres.actors.ports import Fleet, Pending, Port
from dcres.config import Layout, VmSpec, format_size, vm_spec
from dcres.errors import (
    ActorGone,
    ClusterError,
    ConfigError,
    Conflict,
    DcresError,
    NotFound,
    OperationFailed,
    VmLost,
)
from dcres.model.live import DOWNTIME_S, FIXED_S, MAX_ROUNDS, Judgement, Target
from dcres.model.pages import PAGE_SIZE, pages_of
from dcres.paging.settings import SubAddress
from dcres.storage.manifest import Manifest, Mode, dumps, loads
from dcres.storage.store import Store

log = logging.getLogger("dcres.coordinator")

_START_TIMEOUT_S = 24 * 3600.0  # loading a large part takes what it takes
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
        self._vm = vm
        self._fleet: Fleet = fleet or RayFleet()
        self._phase = VmPhase.ABSENT
        self._why = ""
        self._hosts: tuple[str, ...] = ()
        self._operation = threading.Lock()
        self._checkpointing: Checkpointing | None = None
        self._unwanted: threading.Event | None = None  # while a start or restore is under way
        self._last: dict[str, Any] = {}
        self._fixed_s = FIXED_S
        self._recover()

    @contextmanager
    def _exclusively(self, phase: VmPhase, wait_s: float = 0.0) -> Iterator[None]:
        """One operation at a time; the phase before is back if the operation fails."""
        if not self._operation.acquire(timeout=wait_s):
            raise Conflict(f"VM {self._vm} is {self._phase}; wait until that is done")
        before, self._phase = self._phase, phase
        try:
            yield
        except BaseException:
            if self._phase is phase:
                self._phase = before
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
        ports = self._fleet.find(self._vm)
        if not ports:
            self._fleet.release(self._vm)  # a start may have come as far as its reservation
            return
        try:
            descriptions = [self._describe(port) for port in ports]
        except DcresError as error:
            self._phase, self._why = VmPhase.LOST, str(error)
            return
        self._hosts = tuple(each["host"] for each in descriptions)
        if not all(each["present"] for each in descriptions):
            log.warning("VM %s: taking down a start that was not finished", self._vm)
            self._take_down()
            return
        self._phase = VmPhase.RUNNING
        checkpoint = descriptions[0]["checkpoint"]
        try:
            if checkpoint is not None:
                log.warning("VM %s: giving up checkpoint %s", self._vm, checkpoint)
                self._give_up(checkpoint, ports)
            if not descriptions[0]["running"]:
                self._take_down()
        except DcresError as error:
            self._phase, self._why = VmPhase.LOST, str(error)

    def _describe(self, port: Port) -> Status:
        port.wait_ready(_ASK_TIMEOUT_S)
        description: Status = port.call("describe", timeout_s=_ASK_TIMEOUT_S)
        return description

    def _give_up(self, checkpoint: str, ports: Sequence[Port]) -> None:
        ports[0].call("resume", timeout_s=_RESUME_TIMEOUT_S)
        if ports[0].call("published", checkpoint):
            return
        for step in ("halt", "abandon"):
            for port in ports:
                port.call(step, checkpoint)

    # Start

    def start(self, values: dict[str, Any], hosts: Sequence[str] | None = None) -> Status:
        """Boot a VM over the hosts of its layout. Raises Conflict, NoRoom and what hosts raise."""
        spec = vm_spec(values)
        with self._exclusively(VmPhase.STARTING):
            self._require_absent()
            self._bring_up(spec, hosts, None)
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
        self, spec: VmSpec, hosts: Sequence[str] | None, manifest: Manifest | None
    ) -> None:
        """Reserve, start sub hosts, then the main host, then let the guest run; or undo all."""
        shares = spec.layout.shares
        self._unwanted = threading.Event()
        try:
            self._hosts = tuple(self._fleet.reserve(self._vm, shares, hosts))
            self._require_wanted()
            ports = self._ports()
            main = ports[self._hosts[0]]
            incarnation = Incarnation(self._vm, main.call("next_generation"), secrets.token_hex(32))
            loads = _load_orders(manifest, len(shares))
            order = RunOrder(incarnation, spec, self._hosts, (), loads[0])
            booting = main.submit("boot", order)  # every host loads its part at the same time
            subs = self._serve(spec, incarnation, ports, loads[1:])
            booting.result(_START_TIMEOUT_S)
            self._require_wanted()
            main.call("run", replace(order, subs=subs), timeout_s=_START_TIMEOUT_S)
            self._require_wanted()
            main.call("go")
        except BaseException:
            self._take_down()
            self._require_wanted()
            raise
        finally:
            self._unwanted = None

    def _require_wanted(self) -> None:
        if self._unwanted is not None and self._unwanted.is_set():
            raise Conflict(f"the start of VM {self._vm} was cancelled")

    def _serve(
        self,
        spec: VmSpec,
        incarnation: Incarnation,
        ports: dict[str, Port],
        loads: Sequence[LoadOrder | None],
    ) -> tuple[SubAddress, ...]:
        page_count = pages_of(spec.memory)
        pending: dict[str, Pending] = {}
        for host, share, load in zip(self._hosts[1:], spec.layout.subs, loads, strict=True):
            order = ServeOrder(incarnation, page_count, pages_of(share), load)
            pending[host] = ports[host].submit("serve", order)
        return tuple(
            _result(host, each, _START_TIMEOUT_S, "the start was given up")
            for host, each in pending.items()
        )

    # Checkpoint

    def checkpoint(
        self,
        mode: str = "live",
        checkpoint: str | None = None,
        downtime_s: float = DOWNTIME_S,
        max_rounds: int = MAX_ROUNDS,
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
            running = Checkpointing(self._subject(ports), name, Mode(mode), target, now)
            self._checkpointing = running
            try:
                manifest = running.run()
            finally:
                self._checkpointing = None
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
        """Give up the checkpoint, start or restore under way; False when there is none.

        A start's hosts are told to end what they have, so that long loading ends at once.
        """
        checkpointing, unwanted = self._checkpointing, self._unwanted
        if checkpointing is not None:
            checkpointing.cancel("cancelled by the user")
        elif unwanted is not None:
            unwanted.set()
            for port in self._fleet.find(self._vm):
                with suppress(ActorGone):
                    port.submit("destroy")
        return checkpointing is not None or unwanted is not None

    # Restore

    def restore(
        self, manifest_text: str, layout: Layout | None = None, hosts: Sequence[str] | None = None
    ) -> dict[str, Any]:
        """Bring the VM back from a checkpoint; facts as `dcres restore --json` prints them.

        `layout` None is the checkpoint's own. Raises Conflict when the VM runs or is being
        restored, CheckpointCorrupt, NoRoom; on an error nothing of the VM is left running and
        the checkpoint is as it was.
        """
        manifest = loads(manifest_text, Path("manifest.json"))
        spec = spec_for(manifest, layout)
        with self._exclusively(VmPhase.RESTORING):
            self._require_absent()
            began = time.monotonic()
            self._bring_up(spec, hosts, manifest)
            self._phase = VmPhase.RUNNING
            seconds = time.monotonic() - began
        return {
            "vm": self._vm,
            "checkpoint": manifest.checkpoint,
            "seconds": seconds,
            "layout": self._layout_facts(spec, manifest),
            "pages_moved": 0,
            "bytes_moved": 0,
        }

    def _layout_facts(self, spec: VmSpec, manifest: Manifest) -> list[dict[str, Any]]:
        pages = [part.pages for part in manifest.hosts]
        if len(self._hosts) == 1:
            pages = [manifest.pages]
        return [
            {
                "host": host,
                "role": "main" if index == 0 else "sub",
                "memory_bytes": spec.layout.shares[index],
                "pages": pages[index],
            }
            for index, host in enumerate(self._hosts)
        ]

    # Everything else

    def resize(self, main_bytes: int) -> Status:
        """Change how much the main host keeps. Raises ConfigError, NoRoom."""
        with self._exclusively(VmPhase.RESIZING):
            main = self._main()
            spec = VmSpec.model_validate(main.call("describe")["spec"])
            layout = Layout(main=main_bytes, subs=spec.layout.subs)
            layout.require_room_for(spec.memory)
            reserved = int(main.call("describe")["reserved"])
            self._fleet.extend(self._vm, reserved, max(0, main_bytes - reserved))
            main.call("resize", main_bytes // PAGE_SIZE)
            self._phase = VmPhase.RUNNING
        return self.status()

    def status(self) -> Status:
        """The VM as its hosts see it; a host that is gone makes it lost, and says so."""
        status: Status = {"vm": self._vm, "phase": str(self._phase), "why": self._why, "hosts": []}
        if self._phase in (VmPhase.STARTING, VmPhase.RESTORING, VmPhase.STOPPING):
            return status
        try:
            status["hosts"] = self._ask_all()
            self._why = ""
            if self._phase is VmPhase.LOST:
                self._phase = VmPhase.RUNNING
        except NotFound:
            if self._phase is not VmPhase.LOST:
                self._phase = VmPhase.ABSENT
        except DcresError as error:
            self._why = str(error)
            if self._phase is VmPhase.RUNNING and isinstance(error, VmLost):
                self._phase = VmPhase.LOST
        status["phase"], status["why"] = str(self._phase), self._why
        status["last_checkpoint"] = self._last or None
        return status

    def _ask_all(self) -> list[Status]:
        ports = self._ports()
        if not ports:
            raise NotFound(f"VM {self._vm} does not run")
        answers = []
        for host, port in ports.items():
            try:
                port.wait_ready(_ASK_TIMEOUT_S)
                answers.append(port.call("status", timeout_s=_ASK_TIMEOUT_S))
            except (ActorGone, ClusterError) as error:
                raise VmLost(
                    f"host {host} of VM {self._vm} is gone ({error}); restore a checkpoint"
                ) from None
            except NotFound:
                # Ray moves the actors of a dead host to a new one, where nothing of the VM is.
                raise VmLost(
                    f"host {host} of VM {self._vm} is gone; restore a checkpoint"
                ) from None
            if answers[-1].get("state") == "lost":
                raise VmLost(f"VM {self._vm} is lost: {answers[-1]['lost_why']}")
        return answers

    def progress(self) -> dict[str, Any]:
        """How far the operation under way is: its phase, and bytes per host."""
        checkpointing = self._checkpointing
        phase = str(checkpointing.phase if checkpointing else self._phase)
        hosts = []
        for host, port in self._ports().items():
            try:
                hosts.append({"host": host, **asdict(port.call("progress", timeout_s=5.0))})
            except DcresError:
                hosts.append({"host": host, "what": "", "done_bytes": 0, "total_bytes": 0})
        facts: dict[str, Any] = {"vm": self._vm, "phase": phase, "hosts": hosts}
        if checkpointing is not None and checkpointing.judgement is not None:
            facts["round"] = len(checkpointing.rounds)
            facts["estimated_downtime_seconds"] = checkpointing.judgement.estimated_downtime_s
            facts["pages_left"] = checkpointing.pages_left
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
        """End everything of the VM on every host that still answers; release the hosts."""
        for port in self._fleet.find(self._vm):
            try:
                port.wait_ready(_ASK_TIMEOUT_S)
                port.call("destroy")
            except DcresError as error:
                log.warning("VM %s: %s", self._vm, error)
        self._fleet.release(self._vm)
        self._hosts = ()


def _result(host: str, pending: Pending, timeout_s: float, message: str) -> Any:
    """A host's result; its failure keeps its type and gets the host's name where it can."""
    try:
        return pending.result(timeout_s)
    except ClusterError as error:
        raise OperationFailed(message, {host: str(error)}) from None


def _load_orders(manifest: Manifest | None, hosts: int) -> list[LoadOrder | None]:
    """Which parts each host loads: its own, or all of them on a single host."""
    if manifest is None:
        return [None] * hosts
    text = dumps(manifest)
    if hosts == 1:
        return [LoadOrder(text, tuple(part.host for part in manifest.hosts))]
    return [LoadOrder(text, (part.host,)) for part in manifest.hosts]


def spec_for(manifest: Manifest, layout: Layout | None) -> VmSpec:
    """The VM file of a checkpoint with another layout. Raises ConfigError if it cannot hold it."""
    spec = VmSpec.model_validate(manifest.vm_spec)
    layout = layout or spec.layout
    layout.require_room_for(spec.memory)
    parts = manifest.hosts
    if len(layout.shares) == 1:
        return spec.model_copy(update={"layout": layout})
    if len(layout.shares) != len(parts):
        raise ConfigError(
            f"checkpoint {manifest.checkpoint} has {len(parts)} parts and the layout "
            f"{len(layout.shares)} hosts; restore on {len(parts)} hosts, or on one with --single"
        )
    for share, part in zip(layout.shares, parts, strict=True):
        if share < part.pages * PAGE_SIZE:
            raise ConfigError(
                f"{part.host} saved {format_size(part.pages * PAGE_SIZE)}, more than the "
                f"{format_size(share)} of its new host; give that host more"
            )
    return spec.model_copy(update={"layout": layout})


def checkpoint_facts(manifest: Manifest, seconds: float | None = None) -> dict[str, Any]:
    """A checkpoint as `dcres checkpoint --json` prints it."""
    return {
        "checkpoint": manifest.checkpoint,
        "vm": manifest.vm,
        "mode": str(manifest.mode),
        "format": manifest.memory_format,
        "seconds": manifest.seconds if seconds is None else seconds,
        "downtime_seconds": manifest.downtime_seconds,
        "pages": manifest.pages,
        "hosts": [
            {
                "host": part.host,
                "role": str(part.role),
                "pages": part.pages,
                "bytes_written": part.bytes_written,
                "file_bytes_allocated": part.file_bytes_allocated,
                "seconds": part.seconds,
            }
            for part in manifest.hosts
        ],
        "paging_during": {
            "pages_in": manifest.paging_during.pages_in,
            "pages_out": manifest.paging_during.pages_out,
        },
        "pages_moved_for_checkpoint": manifest.pages_moved_for_checkpoint,
        "rounds": manifest.rounds,
    }
