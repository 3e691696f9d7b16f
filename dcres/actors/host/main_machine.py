"""The VM's machine on its main host: the orders about QEMU and its pager, and what does them."""

from __future__ import annotations

from dataclasses import replace

from dcres.actors.host.checkpoint_stop import CheckpointStop
from dcres.actors.host.core_load import CoreLoad
from dcres.actors.host.launch import Launch
from dcres.actors.host.main_saver import MainSaver
from dcres.actors.host.name_in_store import NameInStore
from dcres.actors.host.pager import Pager
from dcres.actors.host.qemu import Qemu
from dcres.actors.host.record import write_record
from dcres.actors.host.site import Site
from dcres.actors.host.standing import Standing
from dcres.actors.host.vm_view import VmView
from dcres.actors.messages import Base, ClaimOrder, Finished, Incarnation, RunOrder
from dcres.actors.protocol import MainStatus
from dcres.model.picture import Picture
from dcres.model.record import Record


class MainMachine:
    """See `dcres.actors.protocol.Machine`. What it does to the VM it does at most once per call."""

    def __init__(
        self,
        site: Site,
        qemu: Qemu,
        pager: Pager,
        standing: Standing,
        name: NameInStore,
        launch: Launch,
        core: CoreLoad,
        stop: CheckpointStop,
        saver: MainSaver,
        view: VmView,
    ) -> None:
        self._site = site
        self._qemu = qemu
        self._pager = pager
        self._standing = standing
        self._name = name
        self._launch = launch
        self._core = core
        self._stop = stop
        self._saver = saver
        self._view = view

    def claim(self, order: ClaimOrder) -> int:
        """After `clear`: begin a life, whose name in the store it is from now on; its generation.

        `destroy` releases it. Raises Conflict, see `NameInStore.claim`, and CheckpointCorrupt for a
        record of what is to run that says nothing: it could not be written anew.
        """
        with self._site.life.beginning():
            self.recorded()
            return self._name.claim(order)

    def boot(self, order: RunOrder) -> None:
        """See `Launch.boot`."""
        self._launch.boot(order)

    def run(self, order: RunOrder) -> None:
        """See `Launch.run`."""
        self._launch.run(order)

    def go(self, paused: bool = False) -> None:
        """The VM is up: let the guest run, or leave it as it is. Repeatable.

        Also lets one run that is paused. Raises Conflict where it cannot.
        """
        with self._qemu.monitor() as monitor:
            self._core.settle_disks(monitor)
            if not paused:
                self._standing.run(monitor)
        self._site.state.change(lambda now: replace(now, running=True))

    def pause(self) -> None:
        """Stop the guest until `go`; one that is paused already stays as it is. Repeatable."""
        with self._qemu.monitor() as monitor:
            self._standing.pause(monitor)

    def finish(self, checkpoint: str) -> Finished:
        """See `CheckpointStop.finish`."""
        return self._stop.finish(checkpoint)

    def resume(self, checkpoint: str) -> float:
        """See `CheckpointStop.resume`."""
        return self._stop.resume(checkpoint)

    def publish(self, manifest: str, here: tuple[str, ...]) -> None:
        """See `MainSaver.publish`."""
        self._saver.publish(manifest, here)

    def published(self, checkpoint: str) -> bool:
        """See `MainSaver.published`."""
        return self._saver.published(checkpoint)

    def base(self) -> Base:
        """See `MainSaver.base`."""
        return self._saver.base()

    def status(self) -> MainStatus:
        """See `VmView.status`."""
        return self._view.status()

    def recorded(self) -> Record | None:
        """The record of what is to run, in this host's store. Raises CheckpointCorrupt."""
        return self._site.store.lives(self._site.vm).records.read()

    def record(self, record: Record) -> None:
        """Let `record` replace the one before; see `write_record`, which says what it raises."""
        site, state = self._site, self._site.state.now
        unclaimed = state is not None and bool(state.unclaimed)
        why = write_record(site.store, site.vm, record, unclaimed=unclaimed)
        if state is not None and why != state.unrecorded:
            site.state.change(lambda now: replace(now, unrecorded=why))

    def incarnation(self) -> Incarnation:
        """What a host that joins the VM must know."""
        return self._pager.incarnation(self._site.vm)

    def picture(self, buckets: int) -> Picture:
        """See `VmView.picture`."""
        return self._view.picture(buckets)
