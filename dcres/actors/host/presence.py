"""What is there of a VM on a host, and its end, in each role; see `protocol.Presence`.

`clear` and `destroy` end what is there whatever of it an actor before this one has written down.
"""

from __future__ import annotations

from dcres.actors.host.daemon import Daemon
from dcres.actors.host.disks import has_its_disks, put_disks_back
from dcres.actors.host.host_saver import HostSaver
from dcres.actors.host.memory_server import MemoryServer
from dcres.actors.host.name_in_store import NameInStore
from dcres.actors.host.part_service import PartService
from dcres.actors.host.qemu import Qemu
from dcres.actors.host.site import Site
from dcres.actors.host.vm_folder import end_leftovers
from dcres.actors.host.vm_view import VmView
from dcres.actors.messages import Description, Progress, Role
from dcres.actors.protocol import HostStatus, MainStatus, SubStatus
from dcres.errors import NotFound


def _clear(site: Site, parts: PartService, daemon: Daemon | None, *, take_over: bool) -> None:
    """End and remove what an earlier life left; `daemon` is the one that would start it anew.

    A QEMU that nothing ended would run on over this life's memory and disks. Raises Conflict, see
    `VmFolder.take`.
    """
    with site.life.beginning():
        site.folder.take(take_over=take_over)
        undo = has_its_disks(site.folder)
        if daemon is not None:
            daemon.stop()
        parts.stop()
        end_leftovers(site.folder)
        if undo:
            put_disks_back(site.folder)
        site.state.forget()
        site.folder.remove()


def _hurry(site: Site, daemon: Daemon) -> None:
    """Make a start under way fail."""
    site.meter.cancel()
    daemon.stop()
    end_leftovers(site.folder)


class MainPresence:
    """On the main host: QEMU, its pager, and the VM's name in the store."""

    def __init__(
        self,
        site: Site,
        parts: PartService,
        qemu: Qemu,
        pager: Daemon,
        saver: HostSaver,
        name: NameInStore,
        view: VmView,
    ) -> None:
        self._site = site
        self._parts = parts
        self._qemu = qemu
        self._pager = pager
        self._saver = saver
        self._name = name
        self._view = view

    def describe(self) -> Description:
        """See `VmView.describe`."""
        return self._view.describe()

    def status(self) -> MainStatus:
        """See `VmView.status`."""
        return self._view.status()

    def progress(self) -> Progress:
        """How far a long operation here is."""
        return self._site.meter.progress

    def require_free(self, take_over: bool) -> None:
        """Conflict where `clear` would refuse. Changes nothing."""
        self._site.folder.require_free(take_over=take_over)

    def clear(self, take_over: bool = False) -> None:
        """Before `boot`: end and remove what an earlier life of the VM left. Repeatable."""
        _clear(self._site, self._parts, self._pager, take_over=take_over)

    def destroy(self) -> None:
        """End QEMU and the pager, give all memory back. Repeatable; nothing starts here again."""
        site = self._site
        with site.life.ending(lambda: _hurry(site, self._pager)):
            self._saver.end_for_good()
            self._qemu.end()
            self._parts.end_serving_parts()
            self._pager.stop()  # once more: a start under way may have prepared another
            end_leftovers(site.folder)
            put_disks_back(site.folder)
            ended = site.state.forget()
            site.folder.remove()
            self._name.release_last()
            if ended is not None:  # by an actor before this one
                self._name.release(ended.cluster, ended.generation)
            site.folder.release()


class SubPresence:
    """On a sub host: a memory server."""

    def __init__(
        self, site: Site, parts: PartService, server: MemoryServer, saver: HostSaver
    ) -> None:
        self._site = site
        self._parts = parts
        self._server = server
        self._saver = saver

    def describe(self) -> Description:
        """What this host is, and whether it serves."""
        state = self._site.state.now
        if state is None:
            return Description(self._site.host, Role.SUB, present=False)
        return Description(
            self._site.host, Role.SUB, True, generation=state.generation, reserved=state.reserved
        )

    def status(self) -> SubStatus:
        """See `MemoryServer.status`."""
        return self._server.status()

    def progress(self) -> Progress:
        """How far a long operation here is."""
        return self._site.meter.progress

    def require_free(self, take_over: bool) -> None:
        """Conflict where `clear` would refuse. Changes nothing."""
        self._site.folder.require_free(take_over=take_over)

    def clear(self, take_over: bool = False) -> None:
        """Before `serve`: end and remove what an earlier life of the VM left. Repeatable."""
        _clear(self._site, self._parts, self._server.daemon, take_over=take_over)

    def destroy(self) -> None:
        """End the memory server and give its memory back. Repeatable; it is final."""
        site, daemon = self._site, self._server.daemon
        with site.life.ending(lambda: _hurry(site, daemon)):
            self._saver.end_for_good()
            site.state.forget()
            self._parts.end_serving_parts()
            daemon.stop()  # once more: a start under way may have prepared another
            end_leftovers(site.folder)
            site.folder.remove()
            site.folder.release()


class PartsPresence:
    """On a host that is none of the VM's and has parts of its checkpoint: a part server."""

    def __init__(self, site: Site, parts: PartService) -> None:
        self._site = site
        self._parts = parts

    def describe(self) -> Description:
        """What this host is."""
        return Description(self._site.host, Role.PARTS, present=self._parts.is_serving)

    def status(self) -> HostStatus:
        """There is nothing of the VM here: NotFound."""
        raise NotFound(f"host {self._site.host} is none of VM {self._site.vm}'s")

    def progress(self) -> Progress:
        """How far a long operation here is."""
        return self._site.meter.progress

    def require_free(self, take_over: bool) -> None:
        """Conflict where `clear` would refuse. Changes nothing."""
        self._site.folder.require_free(take_over=take_over)

    def clear(self, take_over: bool = False) -> None:
        """End and remove what an earlier life left. Repeatable."""
        _clear(self._site, self._parts, None, take_over=take_over)

    def destroy(self) -> None:
        """End the part server and leave nothing. Repeatable."""
        self._parts.end_serving_parts()
        end_leftovers(self._site.folder)
        self._site.folder.remove()
        self._site.folder.release()
