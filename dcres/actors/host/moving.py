"""Pages that move while the VM runs: after a lazy restore, and when shares change."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from dcres.actors.host.picturing import owners_in
from dcres.actors.host.reshaping import Shape, foresee, moves_into
from dcres.actors.host.starting import StartingHost
from dcres.actors.messages import PageFlow
from dcres.model.live import HostRound
from dcres.model.moves import NO_MOVES
from dcres.model.pages import pages_of
from dcres.model.placement import MAIN, codes_of
from dcres.paging import moves as paging_moves
from dcres.paging.pager.table import PageTable
from dcres.paging.settings import SubAddress

_MOVES_POLL_S = 0.05


class MovingHost(StartingHost):
    """The part of the main host's actor that has pages moved."""

    def settle_moves(self) -> None:
        """The pages of a lazy restore are all here: the slice servers are not needed any more."""
        paging_moves.save(self._moves_path, NO_MOVES)
        self._repage(sources=())
        self._remember(sources=[])

    def stop_moves(self) -> None:
        """Leave every page where it is."""
        paging_moves.save(self._moves_path, NO_MOVES)
        self._repage()

    def begin_reshape(self) -> None:
        """Shares are being changed until `set_layout` is called; a later coordinator will see.

        Raises VmLost when QEMU has ended.
        """
        self._require_qemu()
        self._remember(reshaping=True)

    def reshape(self, hosts: tuple[str, ...], subs: tuple[SubAddress, ...]) -> None:
        """Page with these sub hosts from now on.

        A sub host that was there keeps its code. Raises PagingError if one that is left out
        still has pages.
        """
        known, codes = self._state["hosts"][1:], self._codes_of(hosts[1:])
        coded = tuple(replace(sub, code=code) for sub, code in zip(subs, codes, strict=True))
        # A host that may have pages is always in the state file: what is not there is ended.
        joined = {"hosts": list(hosts), "codes": codes} if set(known) <= set(hosts) else {}
        self._remember(**joined)
        self._repage(subs=coded)
        self._remember(hosts=list(hosts), codes=codes)
        self._await_links()

    def _codes_of(self, subs: Sequence[str]) -> list[int]:
        """The owner codes of sub hosts; those that join get free ones. Raises NoRoom."""
        known = dict(zip(self._state["hosts"][1:], self._state["codes"], strict=True))
        return codes_of(subs, known)

    def _by_code(self, capacities: Mapping[str, int]) -> dict[int, int]:
        return dict(zip(self._codes_of(list(capacities)), capacities.values(), strict=True))

    def _table(self) -> PageTable:
        return PageTable(self._folder.ram / "table", pages_of(self._spec.memory), writable=False)

    def plan_moves(
        self, capacities: Mapping[str, int], limit_pages: int, replaced: bool
    ) -> tuple[PageFlow, ...]:
        """Which pages would go where if shares became these, as things are now; see `foresee`.

        `capacities` are pages by sub host, also of those that would join, 0 for one that would
        leave; `replaced` says whether they are others than now. Changes nothing. Raises NoRoom as
        `reshape` and `move_into` do, VmLost when QEMU has ended.
        """
        self._require_qemu()
        by_code = self._by_code(capacities)
        shape, table = Shape(by_code, limit_pages, replaced), self._table()
        owners = owners_in(table, self._ram, only_main=not self._state["codes"])
        hosts = {MAIN: self._host, **dict(zip(by_code, capacities, strict=True))}
        flow = foresee(owners, table.ticks, table.limit_pages, shape)
        return tuple(PageFlow(hosts[a], hosts[b], pages) for (a, b), pages in flow.items())

    def move_into(self, capacities: Mapping[str, int]) -> int:
        """Begin to move pages so that no sub host has more than this many; how many move.

        `capacities` are pages by sub host, all of them. Raises NoRoom.
        """
        table, by_code = self._table(), self._by_code(capacities)
        now = int(table.ticks.max(initial=0))
        rows = moves_into(table.owners.copy(), table.ticks, now, by_code, table.limit_pages)
        paging_moves.save(self._moves_path, rows)
        self._repage()
        return int((rows[:, 1] - rows[:, 0]).sum())

    def _await_moves(self, checkpoint: str) -> None:
        """Until a lazy restore has brought all pages: a checkpoint holds what its hosts have.

        Raises Conflict when the checkpoint is given up meanwhile.
        """
        while self._state.get("sources"):
            status = self._pager.call_patiently("status")
            if not status["moving"]:
                return
            self._require_wanted(checkpoint)
            time.sleep(_MOVES_POLL_S)

    def copy(self, checkpoint: str) -> HostRound:
        """As on every host; the first round of a lazily restored VM lasts until all is here."""
        done = super().copy(checkpoint)
        self._await_moves(checkpoint)
        return done

    def synchronise(self, checkpoint: str, once_more: bool, most_pages: int) -> HostRound | None:
        """As on every host."""
        self._await_moves(checkpoint)
        return super().synchronise(checkpoint, once_more, most_pages)
