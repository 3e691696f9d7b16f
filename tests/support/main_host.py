"""A fake main host; see tests/support/hosts.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from dcres.actors.messages import (
    Base,
    ChangeId,
    ClaimOrder,
    Description,
    Finished,
    Incarnation,
    PageFlow,
    Placed,
    Prepared,
    Resumption,
    Role,
    RunOrder,
    Saved,
)
from dcres.actors.protocol import (
    Machine,
    MainStatus,
    Paging,
    Parts,
    Presence,
    Saving,
)
from dcres.config import Layout, VmSpec
from dcres.errors import ClusterError, Conflict, NotFound, PagingError, StorageError, VmLost
from dcres.model.formats import MemoryFormat
from dcres.model.live import HostRound
from dcres.model.picture import Picture
from dcres.model.record import Record, refusal
from dcres.model.run_state import RunState, is_held, kept, no_run, no_save, told
from dcres.paging.settings import SubAddress
from dcres.storage.layout import MOST_SEGMENTS
from tests.support.hosts import NOT_ON_A_HOST, SavingHost, packed, parsed
from tests.support.world import PAGES, World, digest_of


class FakeMain(SavingHost):
    """Stands for QEMU and its pager."""

    role = Role.MAIN

    def __init__(self, world: World, vm: str, host: str) -> None:
        super().__init__(world, vm, host)
        self._claimed = 0
        self._resumed: list[str] = []
        self._frozen: tuple[Placed, ...] | None = None

    @property
    def _state(self) -> dict[str, object]:
        return self.world.states.get(self.host, {})

    def _require_qemu(self) -> RunState:
        if not self._state:
            raise NotFound(f"host {self.host} does not run VM {self.vm}")
        if self.host not in self.world.qemus:
            raise VmLost(f"QEMU of VM {self.vm} has ended; restore a checkpoint")
        self.world.pass_time()
        return self.world.qemus[self.host]

    def _require_latest(self) -> None:
        if self._state["generation"] != self.world.generation:
            raise Conflict(f"another life of VM {self.vm} has followed this one")

    @property
    def found(self) -> RunState | None:
        found = self._state.get("found")
        return None if found is None else RunState(str(found))

    def describe(self) -> Description:
        self.world.note(self.host, "describe")
        state = self.world.states.get(self.host)
        if state is None:
            return Description(self.host, Role.MAIN, present=False)
        return Description(
            host=self.host, role=Role.MAIN, present=True, accel="tcg", accel_why="TCG",
            qemu_version="7.2.22", machine="pc-q35-7.2", reserved=32 << 20,
            generation=state["generation"], checkpoint=state["checkpoint"],
            running=state["running"], spec=VmSpec.model_validate(state["spec"]),
            moving=self.world.moving or bool(state["sources"]), reshaping=state["reshaping"],
            hosts=tuple(state["hosts"]), shares=state["shares"],
            change=self.world.changes.get(self.host, 0),
        )  # fmt: skip

    def status(self) -> MainStatus:
        self.world.note(self.host, "status")
        now, found = self._require_qemu(), self.found
        moving = self.world.moving or bool(self.world.coming)
        return MainStatus(
            host=self.host, role=Role.MAIN, generation=self.world.states[self.host]["generation"],
            run_state=told(now, found), held=is_held(now, found), failed_disks=[], accel="tcg",
            accel_why="TCG", console="", qemu_pid=1,
            checkpoint=self.world.states[self.host]["checkpoint"], restarts=0,
            bringing_in=bool(self.world.states[self.host]["sources"]), unclaimed="", unrecorded="",
            state="frozen" if self.world.frozen else "running", lost_why="", pid=1, adopted=False,
            tracking=self.host in self.world.marks, native=False,
            limit_pages=self.world.states[self.host].get("limit", 8192), pages=[], leaving=0,
            moving=moving, pages_to_move=len(self.world.coming),
            page_in_median_us=0.0, page_in_p99_us=0.0, links={}, pages_in=0, pages_out=0,
            zero_pages=0, taken_back=0, faults=0,
        )  # fmt: skip

    def recorded(self) -> Record | None:
        self.world.met(f"{self.host}.recorded")
        return self.world.records[-1] if self.world.records else None

    def record(self, record: Record) -> None:
        self.world.met(f"{self.host}.record")
        if why := refusal(self.vm, self.recorded(), record):
            raise Conflict(why)
        self.world.records.append(record)

    def claim(self, order: ClaimOrder) -> int:
        with self._beginning(f"claim {order.take_over}" if order.take_over else "claim"):
            self.world.generation = max(order.above, self.world.generation) + 1
            self._claimed = self.world.generation
        return self._claimed

    def boot(self, order: RunOrder) -> None:
        with self._beginning("boot"):
            if order.incarnation.generation != self._claimed:
                raise Conflict(f"the actor of host {self.host} was started again")
            checkpoint = parsed(order.load.manifest).checkpoint if order.load else ""
            self.world.sweep(checkpoint, whole_parts=False)
            self.world.start_qemu(self.host)
            self.world.memory[self.host] = {}
            self.world.changes.pop(self.host, None)
            self._load(order.load)
            self.world.states[self.host] = {
                "spec": order.spec.model_dump(mode="json", by_alias=True),
                "generation": order.incarnation.generation,
                "secret": order.incarnation.secret,
                "running": False,
                "checkpoint": None,
                "found": None,
                "reshaping": False,
                "sources": [],
                "hosts": list(order.hosts),
                "shares": dict(zip(order.hosts[1:], order.spec.layout.subs, strict=True)),
                "loaded": [(each.part, each.source) for each in order.load.readings]
                if order.load
                else None,
            }

    def run(self, order: RunOrder) -> None:
        with self._beginning("run"):
            self._require_qemu()
            for sub in order.subs:
                if sub.host not in self.world.serving:
                    raise PagingError(f"no connection to the memory server of {sub.host}")
            self.world.states[self.host]["resumption"] = order.resumption
            if order.resumption is None:
                self.world.fill(order.hosts)
            else:
                self._go_on_from(order.resumption, order.hosts)

    def _go_on_from(self, resumption: Resumption, hosts: tuple[str, ...]) -> None:
        checkpoint = parsed(resumption.manifest).checkpoint
        if resumption.sources:
            self.world.states[self.host]["sources"] = list(resumption.sources)
            self.world.coming = {
                page: hosts[to] for page, to in enumerate(resumption.targets) if to != NOT_ON_A_HOST
            }
        self.world.resume_guest(checkpoint)
        self.world.qemus[self.host] = self.world.meant = RunState.PAUSED

    def go(self, paused: bool = False) -> None:
        self.world.note(self.host, "go")
        now = self._require_qemu()
        if not paused:
            if why := no_run(self.vm, now):
                raise Conflict(why)
            self.world.qemus[self.host] = self.world.meant = RunState.RUNNING
            self.world.states[self.host]["found"] = None
        self.world.states[self.host]["running"] = True

    def pause(self) -> None:
        self.world.note(self.host, "pause")
        if self._require_qemu() is RunState.RUNNING:
            self.world.qemus[self.host] = self.world.meant = RunState.PAUSED

    def base(self) -> Base:
        self._require_qemu()
        text = self.world.published.get(self.world.base)
        if text is None:
            return Base(why_none="there is no base")
        base, hosts = parsed(text), self.world.states[self.host]["hosts"]
        if base.most_segments >= MOST_SEGMENTS or base.main.host != hosts[0]:
            return Base(why_none="the chain is over")
        if any(part.host not in hosts for part in base.hosts):
            return Base(why_none="a host is not of the VM any more")
        return Base(text)

    def prepare(self, checkpoint: str, memory_format: MemoryFormat, base: str = "") -> Prepared:
        def require() -> None:
            if why := no_save(self.vm, told(self._require_qemu(), self.found)):
                raise Conflict(why)
            self._require_latest()
            self.world.states[self.host]["checkpoint"] = checkpoint

        self._prepare(checkpoint, memory_format, base, require, whole_parts=True)
        return Prepared(changed=packed(self.world.changed) if base else b"")

    def copy(self, checkpoint: str, changed: bytes = b"") -> HostRound:
        done = super().copy(checkpoint, changed)
        self._await_moves(checkpoint)
        return done

    def synchronise(self, checkpoint: str, once_more: bool, most_pages: int) -> HostRound | None:
        self._await_moves(checkpoint)
        return super().synchronise(checkpoint, once_more, most_pages)

    def _await_moves(self, checkpoint: str) -> None:
        """Until a lazy restore has brought all pages: a checkpoint holds what its hosts have."""
        while self._state.get("sources") and self.world.coming:
            self._require_wanted(checkpoint)
            self.world.spend(self.host, "moves")
            self._require_qemu()

    def finish(self, checkpoint: str) -> Finished:
        self.world.spend(self.host, "finish")
        self._require_wanted(checkpoint)
        if checkpoint in self._resumed:
            raise Conflict(f"checkpoint {checkpoint} of VM {self.vm} comes too late")
        found = told(self._require_qemu(), self.found)
        if why := no_save(self.vm, found):
            raise Conflict(why)
        self.world.states[self.host]["found"] = str(found)
        self.world.reach(self.host, "finish")
        self.world.frozen, self.world.qemus[self.host] = True, RunState.POSTMIGRATE
        self.world.note(self.host, "finish")
        subs = self.world.states[self.host]["hosts"][1:]
        changed = self._cut(checkpoint)
        self._frozen = tuple(self._placed(host, changed) for host in subs)
        self.world.cuts[checkpoint] = dict(self.world.guest)
        return Finished(
            1,
            0,
            0,
            0,
            stopped_at=1.0,
            stopped=self.world.utc(),
            run_state=found,
            changed=b"" if changed is None else packed(changed),
        )

    def _cut(self, checkpoint: str) -> set[int] | None:
        saver = self._current(checkpoint)
        if saver.segmented:
            self.world.cut(checkpoint)
        return None if saver.base is None else set(self.world.changed)

    def _placed(self, host: str, changed: set[int] | None) -> Placed:
        """Whose bytes a checkpoint has from a host: what has changed there, or was saved there."""
        pages, base = self.world.memory.get(host, {}), self._saver and self._saver.base
        if base is None or changed is None:
            return Placed(len(pages), digest_of(pages))
        kept = self.world.kept(base.checkpoint, host, changed)
        found = kept.keys() | (pages.keys() & changed)
        return Placed(len(found), digest_of(found))

    def stage(self, checkpoint: str, most_pages: int, changed: bytes = b"") -> None:
        super().stage(checkpoint, most_pages, changed)
        if not self.world.frozen:
            raise PagingError("the pager was started again while the checkpoint was taken")

    def save(self, checkpoint: str, tick: int) -> Saved:
        self._current(checkpoint)
        if self._frozen is None:
            raise Conflict(f"checkpoint {checkpoint} of VM {self.vm} was not finished")
        files = ["pages.arrow", "sums.arrow", "history.arrow", "vmcore"]
        saved = self._save(checkpoint, files, self._frozen)
        self._frozen = None
        return saved

    def resume(self, checkpoint: str) -> float:
        self.world.note(self.host, "resume")
        now = self._require_qemu()
        self._resumed.append(checkpoint)
        self.world.frozen = False
        self.world.reach(self.host, "resume")
        if is_held(now, self.found):
            self.world.qemus[self.host] = now = RunState.RUNNING
        self.world.states[self.host]["found"] = kept(now, self.found)
        return 1.5

    def publish(self, manifest: str, here: tuple[str, ...]) -> None:
        self.world.note(self.host, "publish")
        self.world.spend(self.host, "publish")
        name = parsed(manifest).checkpoint
        self._require_wanted(name)
        if self._state:
            self._require_latest()
        self.world.looked_at = here
        self._write(name, manifest, here)
        self.world.reach(self.host, "publish")
        self._forget(name)
        if parsed(manifest).memory_format is MemoryFormat.SEGMENTED:
            self.world.rebase(name)
        if f"{self.host}.publish" in self.world.lost_answers:
            raise ClusterError(f"{self.host}.publish did not answer")

    def _write(self, checkpoint: str, manifest: str, here: tuple[str, ...]) -> None:
        before = self.world.published.get(checkpoint)
        if before not in (None, manifest):
            raise Conflict(f"checkpoint {checkpoint} is published with other content")
        if not any(name == checkpoint for name, _ in self.world.parts):
            raise NotFound(f"checkpoint {checkpoint} was discarded; take a new one")
        for host in here:
            part = self.world.parts.get((checkpoint, host))
            if part is None or not part.whole:
                raise StorageError(f"{checkpoint} is not published: {host} has no whole part")
        self.world.published[checkpoint] = manifest

    def published(self, checkpoint: str) -> bool:
        self.world.note(self.host, "published")
        found = checkpoint in self.world.published
        if found:
            self._forget(checkpoint)
        return found

    def _forget(self, checkpoint: str) -> None:
        if self.world.keeping.get(self.host) == checkpoint:
            del self.world.keeping[self.host]
        state = self.world.states.get(self.host)
        if state is not None and state["checkpoint"] == checkpoint:
            state["checkpoint"] = None

    def abandon(self, checkpoint: str) -> None:
        super().abandon(checkpoint)
        self._frozen = None
        self.world.reach(self.host, "abandon")
        self._forget(checkpoint)

    def incarnation(self) -> Incarnation:
        self._require_qemu()
        state = self.world.states[self.host]
        return Incarnation(self.vm, state["generation"], state["secret"])

    def picture(self, buckets: int) -> Picture:
        raise NotImplementedError("no test of the control looks at memory")

    def limit(self, change: ChangeId, limit_pages: int) -> None:
        self.world.note(self.host, f"limit {limit_pages}")
        self._require_qemu()
        self.world.obey(self.host, change)
        self.world.states[self.host]["limit"] = limit_pages

    def begin_reshape(self, change: ChangeId) -> None:
        self._require_qemu()
        self.world.obey(self.host, change, begins=True)
        self.world.states[self.host]["reshaping"] = True

    def reshape(
        self, change: ChangeId, hosts: tuple[str, ...], subs: tuple[SubAddress, ...]
    ) -> None:
        shares = [sub.capacity_pages for sub in subs]
        self.world.note(self.host, f"reshape {' '.join(hosts[1:])} {shares}")
        self._require_qemu()
        self.world.obey(self.host, change)
        state = self.world.states[self.host]
        for left in set(state["hosts"]) - set(hosts):
            if self.world.pages_on(left):
                raise PagingError(f"{left} still has pages")
        state["hosts"] = list(hosts)

    def set_layout(self, change: ChangeId, layout: Layout) -> None:
        self.world.note(self.host, "set_layout")
        self.world.obey(self.host, change)
        state = self.world.states[self.host]
        state["spec"]["layout"] = layout.model_dump(mode="json")
        state["shares"] = dict(zip(state["hosts"][1:], layout.subs, strict=True))
        state["reshaping"] = False

    def plan_moves(
        self, capacities: Mapping[str, int], limit_pages: int, replaced: bool
    ) -> tuple[PageFlow, ...]:
        self.world.note(self.host, f"plan_moves {capacities} {limit_pages} {replaced}")
        self._require_qemu()
        return tuple(PageFlow(self.host, each, PAGES) for each, most in capacities.items() if most)

    def move_into(self, change: ChangeId, capacities: Mapping[str, int]) -> int:
        self.world.note(self.host, f"move_into {list(capacities.values())}")
        self._require_qemu()
        self.world.obey(self.host, change)
        room = [host for host, pages in capacities.items() if pages] or [self.host]
        leaving = [page for host, pages in capacities.items() if not pages
                   for page in self.world.pages_on(host)]  # fmt: skip
        self.world.coming = {page: room[page % len(room)] for page in leaving}
        self.world.pass_time()
        return self.world.to_move.pop() if self.world.to_move else len(self.world.coming)

    def stop_moves(self, change: ChangeId) -> None:
        self.world.note(self.host, "stop_moves")
        self._require_qemu()
        self.world.obey(self.host, change)
        self.world.moving = False
        self.world.coming.clear()

    def settle_moves(self) -> None:
        self.world.note(self.host, "settle_moves")
        self._require_qemu()
        if self.world.coming:
            self.world.wrong.append("pages that had not come are given up")
        self.world.states[self.host]["sources"] = []


class MainAgent(Presence, Parts, Saving, Machine, Paging, Protocol):
    """All that a main host takes."""

    def status(self) -> MainStatus: ...


def main_agent(world: World, vm: str, host: str) -> MainAgent:
    """A fake main host."""
    return FakeMain(world, vm, host)
