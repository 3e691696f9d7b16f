"""Fake hosts: what each has of a VM is kept in a `World`, and orders only change that.

They take the orders of `dcres.actors.protocol` and refuse what a real host refuses:
tests/contracts/test_host_contract.py holds both to the same. As with a real host, what an actor
keeps in mind is lost with it: which part it saves, and which checkpoints were halted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from dcres.actors.messages import (
    ChangeId,
    Description,
    LoadOrder,
    MainPart,
    PartsOrder,
    Placed,
    Planned,
    PlanOrder,
    Prepared,
    Progress,
    Role,
    Saved,
    ServeOrder,
)
from dcres.actors.protocol import (
    Parts,
    Presence,
    Saving,
    Serving,
    SubStatus,
)
from dcres.errors import BaseUnusable, Conflict, NotFound, PagingError
from dcres.model.formats import MemoryFormat
from dcres.model.live import HostRound
from dcres.paging.settings import SubAddress
from dcres.storage.format.manifest import Manifest, Segment, loads
from dcres.storage.format.merged import Merged, after, is_to_be_merged
from tests.support.world import Memory, Part, World, digest_of

NOT_ON_A_HOST = 255


def parsed(manifest: str) -> Manifest:
    """The manifest that came in an order."""
    return loads(manifest, Path("manifest.json"))


def packed(pages: set[int]) -> bytes:
    """A set of pages as it goes from host to host; that of none is not empty."""
    return b"=" + bytes(sorted(pages))


def unpacked(pages: bytes) -> set[int] | None:
    """The set again; None for all."""
    return set(pages[1:]) if pages else None


@dataclass
class Saver:
    """One host's part of one checkpoint, as an actor has it in hand."""

    checkpoint: str
    base: Manifest | None = None
    segmented: bool = False
    pages: Memory = field(default_factory=dict)
    began: bool = False
    changed: set[int] | None = None  # since the base; None: all


class FakeHost:
    """What all hosts do alike."""

    role: Role = Role.PARTS

    def __init__(self, world: World, vm: str, host: str) -> None:
        self.world, self.vm, self.host = world, vm, host
        self._over = self._parts_over = False
        world.forget(host)

    def perform(
        self, group: str, order: str, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """As a host agent is called."""
        return getattr(self, order)(*args, **kwargs)

    def require_free(self, take_over: bool) -> None:
        if f"{self.host}.require_free" in self.world.fail:
            raise self.world.fail[f"{self.host}.require_free"]

    def clear(self, take_over: bool) -> None:
        with self._beginning("clear"):
            self.world.end(self.host)

    @contextmanager
    def _beginning(self, what: str) -> Iterator[None]:
        """Around an order that begins something: the end, if it comes meanwhile, is final."""
        self._require_not_over()
        self.world.note(self.host, what)
        self.world.spend(self.host, what)
        self._require_not_over()
        yield
        if self._over:  # meanwhile
            self.world.end(self.host)
        self._require_not_over()

    def _require_not_over(self) -> None:
        if self._over:
            raise Conflict("this VM was ended before its start was done")

    def parts_here(self, manifest: str) -> tuple[str, ...]:
        found = self.world.parts_at(self.host, manifest)
        if found:
            self._pin()
        return found

    def _pin(self) -> None:
        if self._parts_over:
            raise Conflict("this VM was ended before its parts were served")
        self.world.pinning.add(self.host)

    def plan(self, order: PlanOrder) -> Planned:
        """Part i to host i, as far as there are so many."""
        self._pin()
        self.world.note(self.host, "plan")
        self.world.spend(self.host, "plan")
        manifest, last = parsed(order.manifest), len(order.capacities) - 1
        parts = [self._saved_by(manifest, each.host) for each in manifest.hosts]
        flow = tuple(
            tuple(len(part.pages) * (to == min(index, last)) for to in range(last + 1))
            for index, part in enumerate(parts)
        )
        places = {(i, min(i, last)): bytes(part.pages) for i, part in enumerate(parts)}
        targets = bytearray([NOT_ON_A_HOST]) * 256
        for (_, to), pages in places.items():
            for page in pages:
                targets[page] = to
        return Planned(flow, places if order.masks else {}, bytes(targets))

    def _saved_by(self, manifest: Manifest, host: str) -> Part:
        return self.world.parts[manifest.checkpoint, host]

    def read_main_part(self, manifest: str) -> MainPart:
        self.world.note(self.host, "read_main_part")
        self._pin()
        return MainPart(b"", b"", b"")

    def serve_parts(self, order: PartsOrder) -> SubAddress:
        self.world.note(self.host, f"serve_parts {' '.join(order.parts)}")
        self.world.spend(self.host, "serve_parts")
        self._pin()
        self.world.serving_parts.add(self.host)
        return SubAddress(self.host, "127.0.0.1", 2)

    def parts_trouble(self) -> str:
        return self.world.trouble

    def end_serving_parts(self) -> None:
        self._parts_over = True
        self.world.note(self.host, "end_serving_parts")
        self.world.serving_parts.discard(self.host)
        self.world.pinning.discard(self.host)

    def progress(self) -> Progress:
        return Progress()

    def describe(self) -> Description:
        self.world.note(self.host, "describe")
        return Description(self.host, self.role, self.host in self.world.serving_parts)

    def destroy(self) -> None:
        self._over = True
        self.world.note(self.host, "destroy")
        self.world.keeping.pop(self.host, None)
        self.end_serving_parts()
        self.world.end(self.host)


class FakeVisitor(FakeHost):
    """Stands for a host that has parts and no memory of the VM."""


class SavingHost(FakeHost):
    """What main host and sub hosts do alike: they save, and load."""

    def __init__(self, world: World, vm: str, host: str) -> None:
        super().__init__(world, vm, host)
        self._saver: Saver | None = None
        self._halted: list[str] = []

    def _load(self, load: LoadOrder | None) -> None:
        for each in load.readings if load else ():
            if each.source is not None and each.source.host not in self.world.serving_parts:
                raise PagingError(f"{each.source.host} serves no parts")
            checkpoint = parsed(load.manifest).checkpoint if load else ""
            self.world.load(self.host, checkpoint, each.part, each.pages)

    def _require_wanted(self, checkpoint: str) -> None:
        if checkpoint in self._halted:
            raise Conflict(f"checkpoint {checkpoint} of VM {self.vm} was given up")

    def _current(self, checkpoint: str) -> Saver:
        self.world.pass_time()
        if self._saver is None or self._saver.checkpoint != checkpoint:
            raise Conflict(f"host {self.host} has no checkpoint {checkpoint} under way")
        return self._saver

    def _begin_saving(self, checkpoint: str, memory_format: MemoryFormat, base: str) -> None:
        upon = parsed(base) if base else None
        if upon is not None and not all(
            self.world.parts.get((upon.checkpoint, part.host), Part()).whole
            for part in upon.hosts
            if part.host == self.host
        ):
            raise BaseUnusable(f"the part of {self.host} in {upon.checkpoint} is missing")
        segmented = memory_format is MemoryFormat.SEGMENTED
        self._saver = Saver(checkpoint, upon, segmented)
        self.world.keeping[self.host] = checkpoint
        self.world.marks[self.host] = set()

    def _prepare(
        self,
        checkpoint: str,
        memory_format: MemoryFormat,
        base: str,
        require: Callable[[], None],
        whole_parts: bool,
    ) -> None:
        self.world.spend(self.host, "prepare")
        self._require_wanted(checkpoint)
        require()
        self.world.keeping.pop(self.host, None)
        self.world.sweep(checkpoint, whole_parts=whole_parts)
        self.world.parts[checkpoint, self.host] = Part()
        self.world.note(self.host, "prepare")
        self._begin_saving(checkpoint, memory_format, base)

    def _take(self, saver: Saver, changed: set[int] | None = None) -> None:
        """What is here at first and has changed, then what comes or is written."""
        here, marks = self.world.memory.get(self.host, {}), self.world.marks[self.host]
        for page in marks if saver.began else here:
            if page in here and (saver.began or changed is None or page in changed):
                saver.pages[page] = here[page]
            else:
                saver.pages.pop(page, None)
        if saver.began:
            marks.clear()
        saver.began = True

    def copy(self, checkpoint: str, changed: bytes = b"") -> HostRound:
        self._current(checkpoint)
        self.world.note(self.host, "copy")
        self._take(self._current(checkpoint), unpacked(changed))
        self.world.spend(self.host, "copy")
        self._current(checkpoint)
        return HostRound(len(self.world.marks[self.host]), 0.01, 1e9)

    def synchronise(self, checkpoint: str, once_more: bool, most_pages: int) -> HostRound | None:
        self._current(checkpoint)
        self.world.note(self.host, "synchronise")
        saver = self._current(checkpoint)
        if not once_more:
            return None
        self._take(saver)
        left = self.world.left.pop() if self.world.left else 0
        return HostRound(left, 0.01, 1e9)

    def stage(self, checkpoint: str, most_pages: int, changed: bytes = b"") -> None:
        self._current(checkpoint)
        self.world.note(self.host, "stage")
        self.world.spend(self.host, "stage")
        saver = self._current(checkpoint)
        saver.changed = unpacked(changed)
        self._take(saver, saver.changed)
        if saver.changed is not None:
            for page in saver.pages.keys() - saver.changed:
                del saver.pages[page]

    def _save(self, checkpoint: str, files: list[str], placed: tuple[Placed, ...] = ()) -> Saved:
        self._current(checkpoint)
        self.world.note(self.host, "save")
        self.world.spend(self.host, "save")
        saver = self._current(checkpoint)
        pages = {**self._kept(saver), **saver.pages}
        self.world.parts[checkpoint, self.host] = Part(pages, whole=True)
        self._saver = None
        self.world.marks.pop(self.host, None)
        sums = tuple({"name": name, "length_bytes": 1, "sha256": "0" * 64} for name in files)
        count = self.world.saved_pages.get(self.host, len(pages))
        written, store = len(saver.pages) * 4096, self.world.saved_to.get(self.host, "store")
        return Saved(
            self.host,
            count,
            written,
            written,
            0.1,
            digest_of(pages),
            sums,
            placed,
            store,
            len(saver.pages),
            segments=self._segments(saver),
        )

    def _kept(self, saver: Saver) -> Memory:
        if saver.base is None or saver.changed is None:
            return {}
        return self.world.kept(saver.base.checkpoint, self.host, saver.changed)

    def _segments(self, saver: Saver) -> tuple[dict[str, Any], ...]:
        if not saver.segmented:
            return ()
        parts = () if saver.base is None else saver.base.hosts
        earlier = next((part.segments or () for part in parts if part.host == self.host), ())
        merged = self._merged(earlier)
        if merged is not None:
            earlier = (merged.segment, *after(earlier, merged))
        saved = len(saver.pages)
        own = Segment(checkpoint=saver.checkpoint, pages=saved, gone=0, places=saved)
        return tuple(each.model_dump() for each in (*earlier, own))

    def _merged(self, segments: Sequence[Segment]) -> Merged | None:
        """The newest that takes the place of most of them."""
        for each in reversed(segments):
            if each.merged:
                break
            if found := self.world.merged.get((each.checkpoint, self.host)):
                return found
        return None

    def compact(self, manifest: str) -> None:
        wanted = parsed(manifest)
        self.world.met(f"{self.host}.compact")
        for part in wanted.hosts:
            earlier = part.segments or ()
            if part.host == self.host and is_to_be_merged(
                part.pages, earlier, self._merged(earlier)
            ):
                name = wanted.checkpoint
                segment = Segment(
                    checkpoint=name, pages=part.pages, gone=0, places=part.pages, merged=True
                )
                self.world.merged[name, self.host] = Merged(Path(), segment, ())

    def halt(self, checkpoint: str) -> None:
        self.world.note(self.host, "halt")
        self._halt(checkpoint)

    def _halt(self, checkpoint: str) -> None:
        self._halted.append(checkpoint)
        if self._saver is not None and self._saver.checkpoint == checkpoint:
            self._saver = None
        if self._saver is None:  # also what an actor before this one began
            self.world.marks.pop(self.host, None)
        if self.world.keeping.get(self.host) == checkpoint:
            del self.world.keeping[self.host]

    def abandon(self, checkpoint: str) -> None:
        self.world.note(self.host, "abandon")
        self._halt(checkpoint)
        self.world.remove(checkpoint)

    def destroy(self) -> None:
        self._saver = None
        super().destroy()


class FakeSub(SavingHost):
    """Stands for a memory server."""

    role = Role.SUB

    def _require_serving(self) -> None:
        if self.host not in self.world.serving:
            raise NotFound(f"host {self.host} serves nothing for VM {self.vm}")

    def describe(self) -> Description:
        self.world.note(self.host, "describe")
        present = self.host in self.world.serving
        return Description(self.host, Role.SUB, present, reserved=16 << 20 if present else 0)

    def status(self) -> SubStatus:
        self.world.note(self.host, "status")
        self._require_serving()
        pages, digest = self.world.placed(self.host)
        return SubStatus(
            host=self.host, role=Role.SUB, generation=self.world.generation, restarts=0,
            port=1, pid=1, tracking=self.host in self.world.marks, held_pages=pages,
            capacity_pages=self.world.capacities.get(self.host, 4096), pages_in=0, pages_out=0,
            pages_peeked=0, pages_fetched=0, refused=0, connected=True, readers=0, digest=digest,
        )  # fmt: skip

    def resize(self, change: ChangeId, capacity_pages: int) -> SubAddress:
        self.world.note(self.host, f"resize {capacity_pages}")
        self._require_serving()
        self.world.obey(self.host, change)
        self.world.capacities[self.host] = capacity_pages
        return SubAddress(self.host, "127.0.0.1", 1, capacity_pages)

    def serve(self, order: ServeOrder) -> SubAddress:
        with self._beginning("serve"):
            self.world.memory[self.host] = {}
            self.world.changes.pop(self.host, None)
            self._load(order.load)
            self.world.serving.add(self.host)
            self.world.capacities[self.host] = order.capacity_pages
        return SubAddress(self.host, "127.0.0.1", 1, order.capacity_pages)

    def prepare(self, checkpoint: str, memory_format: MemoryFormat, base: str = "") -> Prepared:
        self._prepare(checkpoint, memory_format, base, self._require_serving, whole_parts=False)
        return Prepared()

    def save(self, checkpoint: str, tick: int) -> Saved:
        saved = self._save(checkpoint, ["pages.arrow", "sums.arrow"])
        self.world.keeping.pop(self.host, None)
        return saved


class SubAgent(Presence, Parts, Saving, Serving, Protocol):
    """All that a sub host takes."""

    def status(self) -> SubStatus: ...


def sub_agent(world: World, vm: str, host: str) -> SubAgent:
    """A fake sub host."""
    return FakeSub(world, vm, host)


def parts_agent(world: World, vm: str, host: str) -> Parts:
    """A fake host that only has parts."""
    return FakeVisitor(world, vm, host)
