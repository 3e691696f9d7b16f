"""Compaction on a host: what is under way, what ends it, and that nothing waits for it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from dcres.actors.host.compactor import Compactor
from dcres.actors.host.site import Site
from dcres.actors.host.state import StateFile
from dcres.actors.host.vm_folder import VmFolder
from dcres.actors.messages import Role
from dcres.config import HostSettings
from dcres.errors import Conflict
from dcres.storage.engine.transfer import Progress
from dcres.storage.format.manifest import Manifest, dumps
from dcres.storage.format.merged import Merged
from dcres.storage.layout import MERGE_SEGMENTS
from dcres.storage.store.continuing import LocalContinuing
from dcres.storage.store.folders import Folders
from dcres.storage.store.store import Store
from tests.support.chains import Chain, Change
from tests.support.wait import until


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    """As many checkpoints as are merged, less one."""
    made = Chain(tmp_path, hosts=2)
    made.change(Change("write", 0, 40))
    for number in range(MERGE_SEGMENTS - 1):
        made.change(Change("write", number, number + 1))
        made.take()
    return made


class Gate(Store):
    """Merging waits until it is let go, and notices then that it was cancelled."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.begun: list[str] = []
        self.open = threading.Event()
        self.continuing = Held(self)


class Held(LocalContinuing):
    """What waits at the gate."""

    def __init__(self, gate: Gate) -> None:
        super().__init__(Folders(gate.root))
        object.__setattr__(self, "gate", gate)

    gate: Gate

    def merge_part(
        self, manifest: Manifest, host: str, threads: int, progress: Progress | None = None
    ) -> Merged:
        self.gate.begun.append(manifest.checkpoint)
        assert self.gate.open.wait(30)
        return super().merge_part(manifest, host, threads, progress)


@pytest.fixture
def gate(chain: Chain) -> Gate:
    return Gate(chain.store.root)


@pytest.fixture
def compactor(gate: Gate, tmp_path: Path) -> Iterator[Compactor]:
    settings = HostSettings(name="h0", run=tmp_path, ram=tmp_path, store=gate.root)
    folder = VmFolder(tmp_path / "run", tmp_path / "run")
    made = Compactor(Site("vm", settings, folder, gate, StateFile(folder, Role.MAIN)))
    yield made
    gate.open.set()
    made.end()


def merged(gate: Gate, manifest: Manifest) -> str:
    """The checkpoint that has the newest."""
    found = gate.continuing.merged_part(manifest, "h0")
    return "" if found is None else found.segment.checkpoint


def settle(compactor: Compactor) -> None:
    """All that was ordered has ended."""
    latest = compactor._latest
    assert latest is not None
    until(lambda: not latest._thread.is_alive())


def left(chain: Chain) -> list[str]:
    return sorted(path.name for path in chain.store.root.rglob("*.merged.*"))


def test_segments_are_merged_once_there_are_enough(
    chain: Chain, gate: Gate, compactor: Compactor
) -> None:
    compactor.compact(dumps(chain.taken[-1]))
    settle(compactor)
    assert gate.begun == []
    last = chain.take()
    compactor.compact(dumps(last))
    until(lambda: gate.begun)
    assert merged(gate, last) == "", "nobody waits for it"
    gate.open.set()
    settle(compactor)
    assert merged(gate, last) == last.checkpoint
    assert gate.verify(last.checkpoint).ok
    compactor.compact(dumps(last))
    settle(compactor)
    assert gate.begun == [last.checkpoint]
    assert [len(part.segments or ()) for part in chain.take().hosts] == [2, MERGE_SEGMENTS + 1]


def test_what_is_under_way_goes_on_for_the_same_chain(
    chain: Chain, gate: Gate, compactor: Compactor
) -> None:
    last = chain.take()
    compactor.compact(dumps(last))
    until(lambda: gate.begun)
    later = chain.take()
    compactor.compact(dumps(later))
    gate.open.set()
    settle(compactor)
    assert gate.begun == [last.checkpoint]
    assert merged(gate, later) == last.checkpoint
    compactor.compact(dumps(later))
    settle(compactor)
    assert gate.begun == [last.checkpoint], "the next one has that, and is short"


def test_what_another_chain_has_no_use_for_ends(
    chain: Chain, gate: Gate, compactor: Compactor
) -> None:
    last = chain.take()
    compactor.compact(dumps(last))
    until(lambda: gate.begun)
    compactor.compact(dumps(chain.taken[0]))
    gate.open.set()
    settle(compactor)
    assert left(chain) == []
    assert gate.begun == [last.checkpoint]


@pytest.mark.parametrize("end", [Compactor.cancel, Compactor.end])
def test_what_is_cancelled_leaves_nothing_and_the_next_goes_on(
    chain: Chain, gate: Gate, compactor: Compactor, end: object, caplog: pytest.LogCaptureFixture
) -> None:
    last = chain.take()
    compactor.compact(dumps(last))
    until(lambda: gate.begun)
    with caplog.at_level(logging.INFO):
        if end is Compactor.cancel:
            compactor.cancel()
            gate.open.set()
        else:
            threading.Timer(0.1, gate.open.set).start()
            compactor.end()
        settle(compactor)
    assert "stay as they are: merging was cancelled" in caplog.text
    assert left(chain) == []
    gate.delete(last.checkpoint)
    if end is Compactor.end:
        with pytest.raises(Conflict, match="has ended on h0"):
            compactor.compact(dumps(last))
        return
    later = chain.taken[-2]
    assert later.most_segments < MERGE_SEGMENTS
    chain.taken.pop()
    compactor.compact(dumps(chain.take()))
    settle(compactor)
    assert merged(gate, chain.taken[-1]) == chain.taken[-1].checkpoint


def test_a_store_without_room_is_left_alone(
    chain: Chain,
    gate: Gate,
    compactor: Compactor,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("dcres.actors.host.room.free_in", lambda folder: 40 * 4096 - 1)
    compactor.compact(dumps(chain.take()))
    settle(compactor)
    assert gate.begun == left(chain) == []
    assert "stay as they are" in caplog.text


def test_a_host_without_a_part_has_nothing_to_merge(
    chain: Chain, gate: Gate, compactor: Compactor
) -> None:
    last = chain.take()
    without = last.model_copy(update={"hosts": (last.hosts[0].model_copy(update={"host": "h9"}),)})
    compactor.compact(dumps(without))
    settle(compactor)
    assert gate.begun == []
