"""A checkpoint beside the VM's memory as it stood, which is read by plain means at the stop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from dcres.actors.host.agent import HostAgent
from dcres.actors.host.qemu import Qemu
from dcres.storage.format import tables
from dcres.storage.format.manifest import Manifest
from tests.support.vm import PAGE_BYTES, PlainMemory, Rig, rig

ZEROS = bytes(PAGE_BYTES)


class Watched(HostAgent):
    """A main host that has the VM's memory read by plain means before it lets the VM go on."""

    rams: ClassVar[dict[str, Path]] = {}
    seen: ClassVar[list[PlainMemory]] = []

    def perform(
        self, group: str, order: str, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        if order == "resume" and self.site.state.require().checkpoint is not None:
            self.seen.append(self._read_all())
        return super().perform(group, order, args, kwargs)

    def _read_all(self) -> PlainMemory:
        spec = self.site.state.require().spec
        assert spec is not None
        memory = PlainMemory(spec.memory)
        for host, folder in self.rams.items():
            name = "guest.ram" if host == "h0" else "store.ram"
            memory.add(folder / "vm" / name, host)
        assert memory.add(self.rams["h0"] / "vm" / "outbox.ram", "outbox") == 0
        return memory


def ask(qemu: Qemu, command: str, **arguments: Any) -> Any:
    with qemu.monitor() as monitor:
        return monitor.execute(command, arguments)


@contextmanager
def watched() -> Iterator[Rig]:
    """A rig whose checkpoints are watched: see `Watched.seen`."""
    with rig(main=Watched) as made:
        Watched.rams = {host: each.ram for host, each in made.settings.items()}
        Watched.seen = []
        yield made


def require_same(found: PlainMemory, expected: PlainMemory, *, moved: bool = False) -> None:
    """The same pages on the same hosts, with the same contents.

    Of a page that has only `moved` since the base, an increment has the bytes where it was then.
    """
    assert found.owner.keys() == expected.owner.keys()
    assert moved or found.owner == expected.owner
    differing = [number for number in expected.pages if found.at(number) != expected.at(number)]
    assert not differing, f"{len(differing)} pages differ, the first is {differing[0]}"


def saved_memory(store: Rig, manifest: Manifest) -> PlainMemory:
    """The union of a checkpoint's memory files; no page is in two of them."""
    memory = PlainMemory(manifest.memory_bytes)
    for part in manifest.hosts:
        folder = store.store.root / "vm" / manifest.checkpoint / part.host
        assert memory.add_saved(folder, part.host) == part.pages
        if manifest.base is not None:
            continue  # its own memory file has what changed
        # Pages of zeros need no place; of the others, within 1 % for the file system's own.
        written = sum(memory.at(number) != ZEROS for number in memory.owned_by(part.host))
        blocks_bytes = (folder / part.memory_file).stat().st_blocks * 512
        assert written * PAGE_BYTES <= blocks_bytes <= written * PAGE_BYTES * 1.01
    return memory


def require_tables_agree(store: Rig, manifest: Manifest, memory: PlainMemory) -> None:
    """Page placement and page existence files say what the memory files hold."""
    placement = store.store.read_main_tables(manifest).placement
    for index, part in enumerate(manifest.hosts):
        pages = memory.owned_by(part.host)
        assert set((placement == index).nonzero()[0].tolist()) == pages
        if index and part.segments is None:
            path = store.store.root / "vm" / manifest.checkpoint / part.host / "pages.arrow"
            here = tables.read_existence(path, manifest.page_count)
            assert set(here.nonzero()[0].tolist()) == pages
    assert int((placement != tables.NOWHERE).sum()) == len(memory.pages)
