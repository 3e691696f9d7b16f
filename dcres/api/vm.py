"""VMs and their checkpoints, as objects to call; the work is done by the VM's coordinator."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

from dcres.actors.control.choosing import wish_of
from dcres.actors.control.coordinator import Coordinator
from dcres.actors.messages import Foreseen
from dcres.actors.protocol import Presence
from dcres.actors.ray import gateway
from dcres.actors.ray.coordinators import Coordinators
from dcres.actors.ray.fleet import RayFleet
from dcres.api import bringing_up
from dcres.api.checkpoint import Published
from dcres.api.defaults import (
    DEFAULT_DOWNTIME_S,
    DEFAULT_FORMAT,
    DEFAULT_MAX_ROUNDS,
    DEFAULT_MODE,
    require_kind,
)
from dcres.api.operation import Attended, ProgressOption
from dcres.api.placement import Placement
from dcres.api.resizing import DrainPlan, ResizePlan
from dcres.api.session import Session
from dcres.api.status import VmStatus, status_of, with_rates
from dcres.config import Layout, VmSpec, format_size, listed, parse_size
from dcres.errors import (
    ActorGone,
    ClusterError,
    ConfigError,
    DcresError,
    NotFound,
    VmLost,
)
from dcres.linux.machine import caller
from dcres.model.formats import MemoryFormat
from dcres.model.pages import PAGE_SIZE
from dcres.model.phase import VmPhase
from dcres.model.picture import MOST_BUCKETS

P = ParamSpec("P")

_STOP_TIMEOUT_S = 300.0
_WHOLE_TIMEOUT_S = 24 * 3600.0
_POLL_S = 0.25


class Vm:
    """A VM of the cluster. `facts` is what its start or restore told, where this object did it."""

    def __init__(self, session: Session, name: str, facts: dict[str, Any] | None = None) -> None:
        self._session = session
        self.name = name
        self.facts = facts or {}

    def __repr__(self) -> str:
        try:
            return repr(self.status()).replace("<VmStatus", "<Vm", 1)
        except DcresError as error:
            return f"<Vm {self.name}: {error}>"

    def status(self, over_s: float = 0.0) -> VmStatus:
        """The VM as its hosts see it now, with paging rates measured over `over_s` seconds.

        Raises NotFound when there is no such VM.
        """
        first = self._status()
        if over_s <= 0 or not first.answers:
            return first
        began = time.monotonic()
        time.sleep(over_s)
        second = self._status()
        return with_rates(first, second, time.monotonic() - began)

    def _status(self) -> VmStatus:
        return status_of(self._session.existing(self.name).call(Coordinator.status))

    def placement(self, buckets: int = 1024) -> Placement:
        """Which host holds which part of memory, and how hot it is; a notebook draws it.

        Memory is looked at in at most `buckets` stretches of equal length. The VM and its
        paging are not disturbed. Raises NotFound when there is no such VM, Conflict while it
        is being started, VmLost, and ConfigError for too many or too few buckets.
        """
        if not 1 <= buckets <= MOST_BUCKETS:
            raise ConfigError(
                f"memory cannot be shown in {buckets} buckets; give 1 to {MOST_BUCKETS}"
            )
        picture = self._session.existing(self.name).call(Coordinator.placement, buckets)
        return Placement(self.name, datetime.now(UTC), picture)

    def checkpoint(
        self,
        mode: str = DEFAULT_MODE,
        *,
        format: str = DEFAULT_FORMAT,
        downtime_s: float = DEFAULT_DOWNTIME_S,
        max_rounds: int = DEFAULT_MAX_ROUNDS,
        full: bool = False,
        progress: ProgressOption = None,
    ) -> Checkpoint:
        """Save the VM on all its hosts at once: what changed since its last checkpoint.

        That is an increment: whole by itself, it shares with earlier ones what has not changed.
        All is saved if it is to be `full`, or where it is not known what changed;
        ``facts["full_because"]`` says why.

        ``live``: it runs meanwhile, and is paused only for what is left when that fits
        `downtime_s`, or after `max_rounds` rounds. ``stop``: it is paused until all is
        written. `format` is that of the memory files: ``segmented``, which increments need;
        ``packed``, one file a host with pages close together; or ``sparse``, every page at its
        place in memory. `progress` is called with an `OperationProgress` four times a second.

        Ctrl-C cancels it, unless it is being published: KeyboardInterrupt's text has its id then.
        Raises OperationFailed when it failed or was cancelled (the VM goes on, earlier checkpoints
        are as they were), ConfigError for a mode or format that there is not.
        """
        require_kind(mode, format)
        if not (downtime_s > 0 and max_rounds >= 1):
            raise ConfigError(
                f"a downtime of {downtime_s * 1000:g} ms in {max_rounds} rounds is not possible; "
                "give more than 0 ms and at least 1 round"
            )
        attended = self._attended(f"checkpoint of {self.name}", progress)
        order = mode, None, downtime_s, max_rounds, MemoryFormat(format), full
        facts = attended.run(Coordinator.checkpoint, *order)
        return Checkpoint(self._session, facts)

    def cancel(self) -> bool:
        """Cancel the checkpoint, start, restore or change of shares under way, if there is one."""
        return bool(self._session.existing(self.name).call(Coordinator.cancel))

    def wait_until_whole(self, timeout_s: float = _WHOLE_TIMEOUT_S) -> VmStatus:
        """Wait until a lazy restore has brought every page to where it belongs; the status then.

        Returns at once if there is nothing to wait for. Raises VmLost when the VM is lost
        meanwhile, ClusterError when the time is over.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            status = self._status()
            if status.phase in (VmPhase.LOST, VmPhase.OFF):
                raise VmLost(f"VM {self.name} is {status.phase}: {status.why}")
            if not status.bringing_in and status.phase != VmPhase.UNKNOWN:
                return status
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"after {timeout_s:.3g} s {format_size(status.pages_to_bring * PAGE_SIZE)} of "
                    f"VM {self.name} are still in its checkpoint ({status.why or 'it runs'})"
                )
            time.sleep(_POLL_S)

    def resize(
        self,
        main: int | str | None = None,
        subs: str | Sequence[int | str] | None = None,
        *,
        progress: ProgressOption = None,
    ) -> VmStatus:
        """Change how much the main host and the sub hosts keep, while the VM runs.

        `subs` are sizes, as in ``["1GiB", "1GiB"]`` or ``"1GiB,1GiB"``. Pages move to where
        there is room, which can take minutes. Of more `subs` than there are, the last ones join
        on hosts with room; with fewer the last sub hosts are emptied and leave. Ctrl-C cancels,
        and the VM runs on. Raises ConfigError when the shares would be too small, NoRoom,
        and Conflict while a lazy restore brings pages in.
        """
        shares = self._shares(main, subs)
        attended = self._attended(f"resize of {self.name}", progress)
        return status_of(attended.run(Coordinator.resize, *shares))

    def plan_resize(
        self,
        main: int | str | None = None,
        subs: str | Sequence[int | str] | None = None,
    ) -> ResizePlan:
        """What `resize` with the same arguments would do, as things are now; changes nothing.

        What it would refuse is among the plan's problems, in the same words. Nothing is reserved:
        another caller may have the memory by the time of the `resize`. Raises NotFound, and
        ConfigError for what is no size.
        """
        shares = self._shares(main, subs)
        foreseen = self._foresee(Coordinator.plan_resize, *shares)
        return ResizePlan.of(self.name, foreseen)

    def _shares(
        self, main: int | str | None, subs: str | Sequence[int | str] | None
    ) -> tuple[int | None, list[int] | None]:
        if main is None and subs is None:
            raise ConfigError(f"no new share for VM {self.name}; give main, subs or both")
        return (
            None if main is None else _share(main),
            None if subs is None else [_share(each) for each in listed(subs)],
        )

    def drain(self, host: str, *, progress: ProgressOption = None) -> VmStatus:
        """Empty a sub host while the VM runs, and leave it; the other hosts take its pages.

        Ctrl-C cancels, and the VM runs on. Raises NotFound when it is no sub host of the
        VM, ConfigError or NoRoom when the others cannot take its pages, and Conflict while a
        lazy restore brings pages in.
        """
        attended = self._attended(f"drain of {host} from {self.name}", progress)
        return status_of(attended.run(Coordinator.drain, host))

    def plan_drain(self, host: str) -> DrainPlan:
        """What `drain` would move where, as things are now; changes nothing. Raises NotFound."""
        return DrainPlan.of(self.name, host, self._foresee(Coordinator.plan_drain, host))

    def _foresee(
        self, order: Callable[Concatenate[Any, P], Foreseen], *args: P.args, **kwargs: P.kwargs
    ) -> Foreseen:
        """A refusal to begin is a problem as well. Raises NotFound."""
        try:
            return self._session.existing(self.name).call(order, *args, **kwargs)
        except NotFound:
            raise
        except DcresError as error:
            return Foreseen((), problem=str(error))

    def _attended(self, title: str, progress: ProgressOption) -> Attended:
        return Attended(self._session.existing(self.name), title, progress)

    def pause(self) -> VmStatus:
        """Pause the guest until `resume`, also through checkpoints and restarts of its control.

        Its pages may go on moving. Repeatable. Raises Conflict while something else is done to the
        VM, VmLost.
        """
        return status_of(self._session.existing(self.name).call(Coordinator.pause))

    def resume(self) -> VmStatus:
        """Let the guest run again, after a pause or a disk error.

        Repeatable. Raises Conflict where it cannot run any more (`VmStatus.advice` says what can be
        done then) or while something else is done to the VM, VmLost.
        """
        return status_of(self._session.existing(self.name).call(Coordinator.resume))

    def stop(self) -> None:
        """End the VM and give back all it used; a checkpoint under way is cancelled first."""
        self._session.existing(self.name).within(_STOP_TIMEOUT_S).call(Coordinator.stop, caller())
        Coordinators().retire(self.name)

    def kill(self) -> None:
        """End the VM like a power failure, whatever is under way; its checkpoints stay."""
        coordinator = self._session.existing(self.name)
        coordinator.call(Coordinator.cancel)
        for port in RayFleet().find(self.name):
            with suppress(ActorGone):
                port.submit(Presence.destroy)
        coordinator.within(_STOP_TIMEOUT_S).call(Coordinator.stop, caller())
        Coordinators().retire(self.name)

    def console(self) -> str:
        """All that the guest has written to its serial console since it was started here."""
        return self.console_from(0).decode(errors="replace")

    def console_from(self, offset_bytes: int) -> bytes:
        """The console from an offset on; also that of a guest that has shut down.

        Raises NotFound or VmLost when the VM does not run.
        """
        status = self.status()
        if not status.console or not status.hosts[0].answers:
            lost = status.phase in (VmPhase.LOST, VmPhase.UNKNOWN)
            raise (VmLost if lost else NotFound)(
                f"VM {self.name} is {status.phase}{': ' if status.why else ''}{status.why}"
            )
        host, path = status.hosts[0].host, Path(status.console)
        if self._session.local is not None:
            return read_from(path, offset_bytes)
        return gateway.run_on(host, read_from, path, offset_bytes)

    def checkpoints(self) -> list[Checkpoint]:
        """The VM's readable checkpoints, oldest first."""
        listing = self._session.catalogue.list(self.name)
        return [
            Checkpoint(self._session, entry.manifest)
            for entry in listing
            if entry.manifest is not None
        ]


class Checkpoint(Published):
    """A published checkpoint. `facts` is what ``dcres checkpoint --json`` prints of it."""

    def restore(
        self,
        layout: Layout | None = None,
        *,
        single: bool = False,
        hosts: int | str | Sequence[str] | None = None,
        lazy: bool = False,
        take_over: bool = False,
        progress: ProgressOption = None,
    ) -> Vm:
        """Bring the VM back: over `layout`, or `single`, as an ordinary VM.

        `hosts` names the hosts, ``["h1", "h2"]`` or ``"h1,h2"``, the main host first, or says
        how many; with as many as the checkpoint has, their shares are as they were if they fit,
        and otherwise even. Without any of these dcres finds hosts with room: those that have
        parts of the checkpoint first, and as few as will do. The facts of the VM say what was
        ``chosen``.

        A VM that was paused when it was saved is paused again, until `Vm.resume`. The guest's clock
        is behind by `guest_clock_behind_seconds` in the facts. What is left of a VM that is off or
        lost is ended, once it is known that there is room.

        Every byte is verified before the guest reads it. With `lazy` the guest runs at once and
        its memory follows (`Vm.wait_until_whole`); otherwise all of it is there first. `take_over`
        the VM's name from another cluster that has ended: see `Cluster.start`.

        Ctrl-C takes down what was brought up. Raises Conflict when the VM runs or is being
        restored, ConfigError, NoRoom, CheckpointCorrupt, and NotFound for a part that is
        nowhere; then nothing of the VM is left running, and the checkpoint is as it was.
        """
        wish = wish_of(self.manifest, layout, single, hosts)
        facts = bringing_up.restore(self.manifest, wish, progress, lazy=lazy, take_over=take_over)
        return Vm(self._session, self.vm, facts)


def start_vm(
    session: Session,
    spec: VmSpec,
    hosts: str | Sequence[str] | None = None,
    progress: ProgressOption = None,
    *,
    take_over: bool = False,
) -> Vm:
    """Boot a VM; see `Cluster.start`."""
    if session.local is not None:
        spec.require_files()  # at once, rather than when the hosts are reserved
    names = None if hosts is None else listed(hosts)
    facts = bringing_up.start(spec, names, progress, take_over=take_over)
    return Vm(session, spec.name, facts)


def _share(text: int | str) -> int:
    """A host's share in bytes. Raises ConfigError."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def read_from(path: Path, offset_bytes: int) -> bytes:
    """A file's bytes from an offset on; runs where the file is."""
    with path.open("rb") as file:
        file.seek(offset_bytes)
        return file.read()
