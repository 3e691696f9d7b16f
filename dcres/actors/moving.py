"""Pages that move while the VM runs: after a lazy restore, and when shares change."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace

from dcres.actors.reshaping import moves_into
from dcres.actors.starting import StartingHost
from dcres.model.live import HostRound
from dcres.model.moves import NO_MOVES, Moves
from dcres.model.pages import pages_of
from dcres.model.placement import MAIN, free_codes
from dcres.paging import moves as paging_moves
from dcres.paging.settings import SubAddress
from dcres.paging.table import PageTable

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
        """Shares are being changed until `set_layout` is called; a later coordinator will see."""
        self._remember(reshaping=True)

    def reshape(self, hosts: tuple[str, ...], subs: tuple[SubAddress, ...]) -> None:
        """Page with these sub hosts from now on.

        A sub host that was there keeps its code. Raises PagingError if one that is left out
        still has pages.
        """
        known = dict(zip(self._state["hosts"][1:], self._state["codes"], strict=True))
        fresh = iter(free_codes(list(known.values()), len(subs)))
        codes = [known[host] if host in known else next(fresh) for host in hosts[1:]]
        coded = tuple(replace(sub, code=code) for sub, code in zip(subs, codes, strict=True))
        # A host that may have pages is always in the state file: what is not there is ended.
        joined = {"hosts": list(hosts), "codes": codes} if known.keys() <= set(hosts) else {}
        self._remember(**joined)
        self._repage(subs=coded)
        self._remember(hosts=list(hosts), codes=codes)
        self._await_links()

    def _moves_into(self, capacities: Mapping[str, int]) -> Moves:
        hosts, codes = self._state["hosts"], self._state["codes"]
        by_code = {code: capacities[host] for host, code in zip(hosts[1:], codes, strict=True)}
        table = PageTable(self._folder.ram / "table", pages_of(self._spec.memory), writable=False)
        now = int(table.ticks.max(initial=0))
        return moves_into(table.owners.copy(), table.ticks, now, by_code, table.limit_pages)

    def plan_moves(self, capacities: Mapping[str, int]) -> dict[str, int]:
        """What `move_into` would do: how many pages would go to each host. Raises NoRoom."""
        rows = self._moves_into(capacities)
        lengths = rows[:, 1] - rows[:, 0]
        main, *subs = self._state["hosts"]
        hosts = {MAIN: main, **dict(zip(self._state["codes"], subs, strict=True))}
        pages = {host: int(lengths[rows[:, 3] == code].sum()) for code, host in hosts.items()}
        return {host: count for host, count in pages.items() if count}

    def move_into(self, capacities: Mapping[str, int]) -> int:
        """Begin to move pages so that no sub host has more than this many; how many move.

        `capacities` are pages by sub host, all of them. Raises NoRoom.
        """
        rows = self._moves_into(capacities)
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
