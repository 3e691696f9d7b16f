"""What outlives the actors of fake hosts: a VM's processes and memory on its hosts, and the store.

Memory is a few numbered pages, each with a version that grows when the guest writes, so that what a
checkpoint holds can be compared with what the guest had at its cut. By itself nothing happens: the
guest does not write, orders take no time and no process dies. The simulation adds all of that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dcres.actors.messages import ChangeId
from dcres.errors import Conflict
from dcres.model.record import Record
from dcres.model.run_state import RunState
from dcres.storage.format.manifest import loads
from dcres.storage.format.merged import Merged

PAGES = 10  # on each host, when a VM starts

Memory = dict[int, int]  # versions by page


def digest_of(pages: Iterable[int]) -> str:
    """A name for a set of pages."""
    return hashlib.sha256(bytes(sorted(pages))).hexdigest()


@dataclass
class Part:
    """What one host has saved of a checkpoint."""

    pages: Memory = field(default_factory=dict)
    whole: bool = False


@dataclass
class World:
    """One VM. What was done, what runs, what lies in the store, and what is to fail."""

    done: list[str] = field(default_factory=list)
    fail: dict[str, Exception] = field(default_factory=dict)  # "h1.save" → error
    hooks: dict[str, Callable[[], object]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)  # what must never happen, and has

    # On hosts, gone with them
    states: dict[str, dict[str, Any]] = field(default_factory=dict)  # main hosts' state files
    qemus: dict[str, RunState] = field(default_factory=dict)
    frozen: bool = False  # paging
    serving: set[str] = field(default_factory=set)  # hosts with a memory server
    capacities: dict[str, int] = field(default_factory=dict)
    memory: dict[str, Memory] = field(default_factory=dict)
    changes: dict[str, int] = field(default_factory=dict)  # of shares, that hosts obeyed last
    torn: dict[str, Memory] = field(default_factory=dict)  # pages whose host is gone, by host
    marks: dict[str, set[int]] = field(default_factory=dict)  # pages that have changed, by host
    serving_parts: set[str] = field(default_factory=set)
    pinning: set[str] = field(default_factory=set)  # hosts that keep the checkpoint of a restore
    keeping: dict[str, str] = field(default_factory=dict)  # the checkpoint that a host saves

    # The guest
    guest: Memory = field(default_factory=dict)  # what it would read
    meant: RunState = RunState.RUNNING  # what somebody has told it to be last
    coming: dict[int, str] = field(default_factory=dict)  # pages under way, and to which host
    cuts: dict[str, Memory] = field(default_factory=dict)  # what it had, by checkpoint

    # The pager's account of contents: of the checkpoint that it is since, and of the last cut
    base: str = ""
    cut_for: str = ""
    changed: set[int] = field(default_factory=set)
    changed_since_cut: set[int] = field(default_factory=set)

    # The store
    published: dict[str, str] = field(default_factory=dict)
    parts: dict[tuple[str, str], Part] = field(default_factory=dict)  # by checkpoint and host
    merged: dict[tuple[str, str], Merged] = field(default_factory=dict)
    generation: int = 0
    records: list[Record] = field(default_factory=list)  # of what is to run, the last one counts

    # What a test wants to see
    moving: bool = False
    to_move: list[int] = field(default_factory=list)  # what move_into answers, last first
    lost_answers: set[str] = field(default_factory=set)  # "h0.publish": done, and nobody hears
    trouble: str = ""
    saved_pages: dict[str, int] = field(default_factory=dict)
    stores: dict[str, tuple[str, ...]] = field(default_factory=dict)  # parts; default: all
    left: list[int] = field(default_factory=list)  # pages after `synchronise`, last first
    looked_at: tuple[str, ...] = ()  # hosts whose files the main host has looked at
    saved_to: dict[str, str] = field(default_factory=dict)  # which store; default: one for all

    def note(self, host: str, what: str) -> None:
        """An order is carried out; it fails here if it is to."""
        self.done.append(f"{host}.{what}")
        self.met(f"{host}.{what}")

    def obey(self, host: str, change: ChangeId, *, begins: bool = False) -> None:
        """An order of a change of shares is carried out, unless another has overtaken it."""
        least = self.changes.get(host, 0) + begins
        if change.generation != self.generation or change.number < least:
            raise Conflict(f"{host} was told too late: that change has been overtaken")
        self.changes[host] = change.number

    def met(self, what: str) -> None:
        """Something that leaves no trace in `done`."""
        if what in self.hooks:
            self.hooks[what]()
        if what in self.fail:
            raise self.fail[what]

    def spend(self, host: str, what: str) -> None:
        """An order takes its time; others are carried out meanwhile."""

    def reach(self, host: str, what: str) -> None:
        """Half of an order has been done, durably; its actor may die here."""

    def utc(self) -> datetime:
        """The time of day."""
        return datetime.now(UTC)

    def pass_time(self) -> None:
        """The guest has run since the last look, and pages have moved: here, they all come."""
        for page, host in self.coming.items():
            self._place(page, host)
        self.coming.clear()

    def count(self, what: str) -> int:
        """How often that was done."""
        return self.done.count(what)

    @property
    def state(self) -> dict[str, Any]:
        """The state file of the VM's main host."""
        return next(iter(self.states.values()), {})

    @property
    def run_state(self) -> RunState:
        """QEMU's."""
        return next(iter(self.qemus.values()), RunState.RUNNING)

    @run_state.setter
    def run_state(self, state: str) -> None:
        self.qemus = dict.fromkeys(self.qemus, RunState(state))

    @property
    def runs(self) -> bool:
        """Whether the guest does."""
        running = any(state.get("running") for state in self.states.values())
        return running and self.run_state is RunState.RUNNING

    @property
    def unfinished(self) -> set[tuple[str, str]]:
        """Parts of checkpoints that are not published."""
        return {key for key in self.parts if key[0] not in self.published}

    # Hosts

    def end(self, host: str) -> None:
        """No process, memory or file of the VM is on that host any more."""
        if self.qemus.pop(host, None) is not None:
            self.frozen = False
            self.coming.clear()
            self.base = self.cut_for = ""
        self.states.pop(host, None)
        self.serving.discard(host)
        self.serving_parts.discard(host)
        self.memory.pop(host, None)
        self.marks.pop(host, None)

    def forget(self, host: str) -> None:
        """An actor begins anew there: what the one before kept in mind or locked is gone."""
        self.keeping.pop(host, None)
        if host not in self.serving_parts:
            self.pinning.discard(host)

    def start_qemu(self, host: str) -> None:
        """There must not be another."""
        if self.qemus:
            self.wrong.append(f"a QEMU on {host} beside one on {', '.join(self.qemus)}")
        self.qemus[host] = RunState.PRELAUNCH
        self.torn.clear()

    # Memory

    def fill(self, hosts: Iterable[str]) -> None:
        """A guest has booted."""
        for index, host in enumerate(hosts):
            self.memory[host] = dict.fromkeys(range(PAGES * index, PAGES * (index + 1)), 0)
        self.guest = {page: 0 for pages in self.memory.values() for page in pages}

    def pages_on(self, host: str) -> Memory:
        """What the page table places there, though the host may be gone."""
        return {**self.torn.get(host, {}), **self.memory.get(host, {})}

    def load(self, host: str, checkpoint: str, part: str, pages: Iterable[int]) -> None:
        """Pages of a part come to a host's memory."""
        saved = self.parts[checkpoint, part].pages
        self.memory.setdefault(host, {}).update({page: saved[page] for page in pages})

    def resume_guest(self, checkpoint: str) -> None:
        """A guest is back: what it would read must be what it had."""
        self.guest = dict(self.cuts.get(checkpoint, {}))
        found = {page: v for pages in self.memory.values() for page, v in pages.items()}
        missing = self.guest.keys() - found.keys() - self.coming.keys()
        if missing or any(self.guest.get(page) != version for page, version in found.items()):
            self.wrong.append(f"restored from {checkpoint}, the guest reads what it had not")

    def _place(self, page: int, host: str) -> None:
        for other, pages in self.memory.items():
            if page in pages:
                del pages[page]
                self.marks.get(other, set()).add(page)
        self.memory.setdefault(host, {})[page] = self.guest[page]
        self.marks.get(host, set()).add(page)

    def move(self, page: int, host: str) -> None:
        """A page comes or goes, as paging does it."""
        self._place(page, host)

    def write(self, page: int, host: str) -> None:
        """The guest writes to a page, which is or comes to `host`."""
        self.guest[page] += 1
        self.changed.add(page)
        self.changed_since_cut.add(page)
        self._place(page, host)

    def placed(self, host: str) -> tuple[int, str]:
        """How many pages the page table places on a host, and which."""
        pages = self.memory.get(host, {})
        return len(pages), digest_of(pages)

    def cut(self, checkpoint: str) -> None:
        """What changes from now on is not in the checkpoint."""
        self.cut_for = checkpoint
        self.changed_since_cut = set()

    def rebase(self, checkpoint: str) -> None:
        """It is published."""
        self.base = checkpoint if self.cut_for == checkpoint else ""
        self.changed = set(self.changed_since_cut)

    def kept(self, base: str, host: str, changed: set[int]) -> Memory:
        """What a host's part of a checkpoint has from its base."""
        part = self.parts.get((base, host), Part())
        return {page: version for page, version in part.pages.items() if page not in changed}

    # The store

    def parts_at(self, host: str, manifest: str) -> tuple[str, ...]:
        """The hosts whose parts of a checkpoint are in that host's store."""
        found = loads(manifest, Path("manifest.json"))
        every = (part.host for part in found.hosts if (found.checkpoint, part.host) in self.parts)
        return self.stores.get(host, tuple(every))

    def remove(self, checkpoint: str) -> None:
        """What is left of a checkpoint, unless it is published or some host keeps it."""
        if checkpoint not in self.published and checkpoint not in self.keeping.values():
            for key in [key for key in self.parts if key[0] == checkpoint]:
                del self.parts[key]

    def sweep(self, keep: str, *, whole_parts: bool) -> None:
        """What is unfinished; without `whole_parts` only where nobody has voted yet."""
        for checkpoint in {name for name, _ in self.unfinished} - {keep}:
            voted = any(each.whole for key, each in self.parts.items() if key[0] == checkpoint)
            if whole_parts or not voted:
                self.remove(checkpoint)

    def flaws(self, checkpoint: str) -> list[str]:
        """Why a published checkpoint is not what the guest had; empty if it is."""
        manifest = loads(self.published[checkpoint], Path("manifest.json"))
        found: Memory = {}
        why = []
        for each in manifest.hosts:
            part = self.parts.get((checkpoint, each.host))
            if part is None or not part.whole:
                why.append(f"{checkpoint} lacks the part of {each.host}")
                continue
            why += [f"{checkpoint} has page {page} twice" for page in part.pages.keys() & found]
            found |= part.pages
        cut = self.cuts[checkpoint]
        pages = [page for page in cut.keys() | found if cut.get(page) != found.get(page)]
        return why + ([f"{checkpoint} has other pages {pages} than the guest had"] if pages else [])
