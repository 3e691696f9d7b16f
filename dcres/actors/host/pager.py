"""The pager on a main host: its process, its orders, and the files that it goes by."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from dcres.actors.host.beginning import Beginning
from dcres.actors.host.daemon import Daemon
from dcres.actors.host.page_loader import parse
from dcres.actors.host.vm_folder import VmFolder
from dcres.actors.messages import Incarnation, Resumption, RunOrder
from dcres.errors import PagingError
from dcres.model.formats import MemoryFormat
from dcres.model.moves import NO_MOVES, Moves
from dcres.model.pages import pages_of
from dcres.paging import moves as paging_moves
from dcres.paging import settings as paging_settings
from dcres.paging.control import PagerControl
from dcres.paging.pager.table import PageTable
from dcres.paging.settings import PagerSettings, SubAddress

_DRAIN_TIMEOUT_S = 60.0
_LINKS_TIMEOUT_S = 60.0
_LINKS_POLL_S = 0.01


class Pager:
    """One VM's pager; there is something for it to do as long as `needed` says so.

    `control` gives it orders, `patient` those that may be repeated, through a restart if need be,
    and `draining` those that wait for pages on their way.
    """

    def __init__(self, folder: VmFolder, needed: Callable[[], bool]) -> None:
        self.daemon = Daemon("dcres.paging.pager", folder, "pager", needed)
        self.control = PagerControl(self.daemon.call)
        self.patient = PagerControl(self.daemon.call_patiently)
        self.draining = PagerControl(partial(self.daemon.call, timeout_s=_DRAIN_TIMEOUT_S))
        self._settings_path = folder.run / "pager.json"
        self._outbox = folder.ram / "outbox.ram"
        self._moves_path = folder.ram / "moves"
        self.table_path = folder.ram / "table"

    def table(self, page_count: int) -> PageTable:
        """The network page table, to look at. Raises PagingError."""
        return PageTable(self.table_path, page_count, writable=False)

    def begin(self, beginning: Beginning, limit_pages: int) -> None:
        """Write the network page table as a restore has it, before the pager looks."""
        table = PageTable.create(self.table_path, beginning.owners, limit_pages)
        table.ticks[:] = beginning.ticks
        paging_moves.save(self._moves_path, beginning.moves)

    def start(
        self,
        order: RunOrder,
        codes: Sequence[int],
        sources: tuple[SubAddress, ...],
        qemu_pid: int,
        ram: Path,
    ) -> None:
        """Start it for a QEMU that has run nothing yet. Raises PagingError."""
        settings = PagerSettings(
            vm=order.incarnation.identity,
            generation=order.incarnation.generation,
            secret=order.incarnation.secret,
            page_count=pages_of(order.spec.memory),
            limit_pages=pages_of(order.spec.layout.main),
            qemu_pid=qemu_pid,
            ram=str(ram),
            outbox=str(self._outbox),
            table=str(self.table_path),
            control=str(self.daemon.control),
            subs=tuple(
                replace(sub, code=code) for sub, code in zip(order.subs, codes, strict=True)
            ),
            moves=str(self._moves_path),
            sources=sources,
            base=_base_of(order.resumption),
        )
        paging_settings.save(settings, self._settings_path)
        self.daemon.start()

    def await_links(self) -> None:
        """Until it is connected to every memory server. Raises PagingError."""
        deadline = time.monotonic() + _LINKS_TIMEOUT_S
        while True:
            status = self.control.status()
            if status["state"] == "lost":
                raise PagingError(status["lost_why"])
            waiting = {h: link for h, link in status["links"].items() if link["state"] != "ready"}
            if not waiting:
                return
            if time.monotonic() > deadline:
                whys = ", ".join(f"{host} ({link['trouble']})" for host, link in waiting.items())
                raise PagingError(f"no connection to the memory servers of {whys}")
            time.sleep(_LINKS_POLL_S)

    def use_subs(self, subs: tuple[SubAddress, ...]) -> None:
        """Page with these sub hosts from now on. Raises PagingError, and then nothing changes."""
        self._reload(replace(self._settings, subs=subs))

    def move(self, moves: Moves) -> None:
        """Carry out these moves, and none that it was given before."""
        paging_moves.save(self._moves_path, moves)
        self._reload(self._settings)

    def leave_sources(self) -> None:
        """Page without part servers from now on."""
        paging_moves.save(self._moves_path, NO_MOVES)
        self._reload(replace(self._settings, sources=()))

    def _reload(self, settings: PagerSettings) -> None:
        """What it refuses is taken back: another pager would have to start with it."""
        before = self._settings
        paging_settings.save(settings, self._settings_path)
        try:
            self.patient.reload()
        except PagingError:
            paging_settings.save(before, self._settings_path)
            raise

    @property
    def _settings(self) -> PagerSettings:
        return paging_settings.load(PagerSettings, self._settings_path)

    def incarnation(self, vm: str) -> Incarnation:
        """The life that it serves."""
        settings = self._settings
        return Incarnation(vm, settings.generation, settings.secret)


def _base_of(resumption: Resumption | None) -> str:
    """The checkpoint that a VM begins with, if increments can be made upon it."""
    if resumption is None:
        return ""
    manifest = parse(resumption.manifest)
    return manifest.checkpoint if manifest.memory_format is MemoryFormat.SEGMENTED else ""
