"""Pages that move while the VM runs: after a lazy restore, and when shares change."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from dcres.actors.host.pager import Pager
from dcres.actors.host.qemu import Qemu
from dcres.actors.host.shape import Shape, foresee, moves_into
from dcres.actors.host.site import Site
from dcres.actors.host.vm_picture import owners_in
from dcres.actors.messages import ChangeId, PageFlow
from dcres.config import Layout
from dcres.model.moves import NO_MOVES
from dcres.model.pages import pages_of
from dcres.model.placement import MAIN, codes_of
from dcres.paging.pager.table import PageTable
from dcres.paging.settings import SubAddress


class PageMoves:
    """See `dcres.actors.protocol.Paging`."""

    def __init__(self, site: Site, qemu: Qemu, pager: Pager) -> None:
        self._site = site
        self._state = site.state
        self._qemu = qemu
        self._pager = pager
        self._lock = threading.Lock()

    @contextmanager
    def _obeying(self, change: ChangeId, *, begins: bool = False) -> Iterator[None]:
        """One order at a time, and none of a change that has been overtaken. Raises Conflict."""
        with self._lock:
            self._state.obey(change, begins=begins)
            yield

    def limit(self, change: ChangeId, limit_pages: int) -> None:
        """Change how much the main host keeps; pages move while the guest runs."""
        with self._obeying(change):
            self._pager.control.resize(limit_pages)

    def settle_moves(self) -> None:
        """The pages of a lazy restore are all here: the part servers are not needed any more.

        Once that is so, it does nothing: pages may move for a change of shares by then.
        """
        with self._lock:
            if not self._state.require().sources:
                return
            self._pager.leave_sources()
            self._state.change(lambda now: replace(now, sources=()))

    def stop_moves(self, change: ChangeId) -> None:
        """Leave every page where it is."""
        with self._obeying(change):
            self._pager.move(NO_MOVES)

    def begin_reshape(self, change: ChangeId) -> None:
        """Shares are being changed until `set_layout` is called; a later coordinator will see.

        Raises VmLost when QEMU has ended.
        """
        self._qemu.require_running()
        with self._obeying(change, begins=True):
            self._state.change(lambda now: replace(now, reshaping=True))

    def set_layout(self, change: ChangeId, layout: Layout) -> None:
        """Remember what the hosts may keep from now on."""
        with self._obeying(change):
            spec = self._qemu.spec.model_copy(update={"layout": layout})
            shares = dict(zip(self._state.require().hosts[1:], layout.subs, strict=True))
            self._state.change(lambda now: replace(now, spec=spec, shares=shares, reshaping=False))

    def reshape(
        self, change: ChangeId, hosts: tuple[str, ...], subs: tuple[SubAddress, ...]
    ) -> None:
        """Page with these sub hosts from now on.

        A sub host that was there keeps its code. Raises PagingError if one that is left out
        still has pages.
        """
        with self._obeying(change):
            self._reshape(hosts, subs)

    def _reshape(self, hosts: tuple[str, ...], subs: tuple[SubAddress, ...]) -> None:
        known, codes = self._state.require().hosts[1:], tuple(self._codes_of(hosts[1:]))
        coded = tuple(replace(sub, code=code) for sub, code in zip(subs, codes, strict=True))
        # A host that may have pages is always in the state file: what is not there is ended.
        if set(known) <= set(hosts):
            self._state.change(lambda now: replace(now, hosts=hosts, codes=codes))
        self._pager.use_subs(coded)
        self._state.change(lambda now: replace(now, hosts=hosts, codes=codes))
        self._pager.await_links()

    def _codes_of(self, subs: Sequence[str]) -> list[int]:
        """The owner codes of sub hosts; those that join get free ones. Raises NoRoom."""
        state = self._state.require()
        return codes_of(subs, dict(zip(state.hosts[1:], state.codes, strict=True)))

    def _by_code(self, capacities: Mapping[str, int]) -> dict[int, int]:
        return dict(zip(self._codes_of(list(capacities)), capacities.values(), strict=True))

    def _table(self) -> PageTable:
        return self._pager.table(pages_of(self._qemu.spec.memory))

    def plan_moves(
        self, capacities: Mapping[str, int], limit_pages: int, replaced: bool
    ) -> tuple[PageFlow, ...]:
        """Which pages would go where if shares became these, as things are now; see `foresee`.

        `capacities` are pages by sub host, also of those that would join, 0 for one that would
        leave; `replaced` says whether they are others than now. Changes nothing. Raises NoRoom as
        `reshape` and `move_into` do, VmLost when QEMU has ended.
        """
        self._qemu.require_running()
        by_code = self._by_code(capacities)
        shape, table = Shape(by_code, limit_pages, replaced), self._table()
        alone = not self._state.require().codes
        owners = owners_in(table, self._site.guest_ram, only_main=alone)
        hosts = {MAIN: self._site.host, **dict(zip(by_code, capacities, strict=True))}
        flow = foresee(owners, table.ticks, table.limit_pages, shape)
        return tuple(PageFlow(hosts[a], hosts[b], pages) for (a, b), pages in flow.items())

    def move_into(self, change: ChangeId, capacities: Mapping[str, int]) -> int:
        """Begin to move pages so that no sub host has more than this many; how many move.

        `capacities` are pages by sub host, all of them. Raises NoRoom.
        """
        with self._obeying(change):
            table, by_code = self._table(), self._by_code(capacities)
            now = int(table.ticks.max(initial=0))
            rows = moves_into(table.owners.copy(), table.ticks, now, by_code, table.limit_pages)
            self._pager.move(rows)
        return int((rows[:, 1] - rows[:, 0]).sum())
