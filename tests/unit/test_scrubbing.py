"""Scrubbing real stores: every file once, damage with its checkpoints, and what is remembered."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dcres.actors.ray import gateway
from dcres.api import catalogue
from dcres.api.beside import WorkHere
from dcres.api.catalogue import StoreHere, StoresOfHosts
from dcres.api.operation import OperationProgress
from dcres.api.scrubbing import Scrubbing, scrub
from dcres.cli import main
from dcres.errors import ConfigError, Conflict, NotFound, StoreReadOnly
from dcres.linux.interrupt import OperationInterrupted
from dcres.linux.removal import StoreFile
from dcres.model.formats import MemoryFormat
from dcres.model.pages import PAGE_SIZE
from dcres.model.rate import age_s
from dcres.storage import digest, layout
from dcres.storage.engine import memory_file
from dcres.storage.engine.expected import MemoryFile
from dcres.storage.format import tables
from dcres.storage.format.manifest import Manifest
from dcres.storage.store import marker, scrub_record, scrubbing
from dcres.storage.store.pins import unpinned
from dcres.storage.store.scrub_record import Known, ScrubRecord
from dcres.storage.store.scrubbed import Damage, Scrubbed
from dcres.storage.store.store import Store
from tests.support.chains import Chain, Change
from tests.support.stored import HOSTS, NOW, PAGE_COUNT, memory, placement, republish, rewritten
from tests.support.stored import folder as folder_of
from tests.support.stored import take as take_whole

CHAIN_FILES = 3 * (3 * 2 + 2 + 1)  # of 3 checkpoints: pack and table a host, 2 tables, VM core


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    """Three checkpoints of VM vm, each with pages that those before do not have."""
    made = Chain(tmp_path)
    for first in (0, 16, 32):
        for host in range(3):
            made.change(Change("write", first + 4 * host, first + 4 * host + 4, host))
        made.take()
    return made


@pytest.fixture
def store(chain: Chain) -> Store:
    return chain.store


@pytest.fixture
def whole(store: Store, tmp_path: Path) -> list[Manifest]:
    """Checkpoints of VM demo in formats 1 and 2."""
    ram = memory(tmp_path / "whole", np.ones(PAGE_COUNT, dtype=bool))
    made = [
        take_whole(store, ram, now=NOW + timedelta(hours=hours), memory_format=memory_format)
        for hours, memory_format in enumerate((MemoryFormat.SPARSE, MemoryFormat.PACKED))
    ]
    for manifest in made:
        store.publish(manifest)
    return made


class Reads:
    """Notes which file each reading is of, small ones and those of pages."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        self.inodes: list[int] = []
        self.before: Callable[[Path], None] = lambda path: None
        check, verify = digest.check_file, memory_file.verify

        def check_noted(path: Path, expected: object) -> None:
            self._note(path)
            check(path, expected)  # type: ignore[arg-type]

        def verify_noted(found: MemoryFile, *rest: object) -> int:
            self._note(found.path)
            return verify(found, *rest)  # type: ignore[arg-type]

        monkeypatch.setattr(scrubbing, "check_file", check_noted)
        monkeypatch.setattr(memory_file, "verify", verify_noted)

    def _note(self, path: Path) -> None:
        self.before(path)
        self.names.append(path.name)
        if path.exists():
            self.inodes.append(path.stat().st_ino)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads(monkeypatch)


def scrubbed(store: Store, vm: str | None = None, older: str | None = None) -> Scrubbing:
    return scrub(StoreHere(store.root), vm, None, older, False)


def ids(chain: Chain) -> tuple[str, ...]:
    return tuple(each.checkpoint for each in chain.taken)


def shared(chain: Chain, origin: int, name: str, at: int, host: str = "h1") -> Path:
    """A file that one checkpoint wrote, as another has it."""
    by_origin = layout.by_origin(chain.taken[origin].checkpoint, name)
    return chain.folder(chain.taken[at], host) / by_origin


def pack_name(chain: Chain, origin: int) -> str:
    return layout.by_origin(chain.taken[origin].checkpoint, layout.SEGMENT_PACK)


def spoil(path: Path, offset_bytes: int = -9) -> None:
    data = bytearray(path.read_bytes())
    data[offset_bytes] ^= 1
    with path.open("r+b") as file:
        file.write(data)


def only(found: Scrubbing) -> Damage:
    (damage,) = found.damaged
    return damage


def record(store: Store, vm: str = "vm") -> Path:
    return store.root / vm / layout.SCRUBBED


# What is read


def test_every_file_is_read_once(chain: Chain, store: Store, reads: Reads) -> None:
    found = scrubbed(store)
    assert found.ok
    assert len(reads.inodes) == len({*reads.inodes}) == CHAIN_FILES
    values = found.to_dict()
    assert (values["files"], values["skipped"], values["changed"]) == (CHAIN_FILES, 0, [])
    files = [path for path in store.root.rglob("*") if path.is_file()]
    names = (layout.MANIFEST, layout.SCRUBBED, layout.MARKER)
    unique = {path.stat().st_ino: path.stat().st_size for path in files if path.name not in names}
    assert values["bytes"] == sum(unique.values())
    assert len(unique) == CHAIN_FILES


def test_all_formats(chain: Chain, whole: list[Manifest], store: Store) -> None:
    found = scrubbed(store)
    assert found.ok
    ours, others = found.stores["store"].vms
    assert (ours.vm, others.vm) == ("demo", "vm")
    assert ours.files == 2 * (3 * 3 + 2) + 3, "memory, sums, pages; core and history; indexes"
    assert ours.oldest is not None
    assert record(store, "demo").exists()
    assert scrubbed(store, "demo").stores["store"].vms[0].vm == "demo"
    with pytest.raises(NotFound, match="VM nix has no checkpoint"):
        scrubbed(store, "nix")


def test_an_empty_store(tmp_path: Path) -> None:
    found = scrubbed(Store(tmp_path / "none"))
    assert (found.ok, found.to_dict()["files"]) == (True, 0)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", [layout.SEGMENT_PACK, layout.SEGMENT])
def test_a_damaged_segment_names_its_checkpoints(chain: Chain, store: Store, name: str) -> None:
    spoil(path := shared(chain, 1, name, 2))
    damage = only(scrubbed(store))
    assert (damage.host, damage.name, damage.state) == ("h1", path.name, "corrupt")
    assert damage.checkpoints == ids(chain)[1:]
    assert damage.problem.startswith(str(store.root))


@pytest.mark.parametrize("name", [layout.PAGES, layout.HISTORY])
def test_a_damaged_table_of_the_main_host(chain: Chain, store: Store, name: str) -> None:
    spoil(path := shared(chain, 0, name, 1, "h0"))
    damage = only(scrubbed(store))
    assert (damage.host, damage.name, damage.checkpoints) == ("h0", path.name, ids(chain))


def test_a_merged_segment_names_its_checkpoints(chain: Chain, store: Store) -> None:
    """It is a file of those alone that were taken upon it."""
    for host in ("h0", "h1", "h2"):
        store.continuing.merge_part(chain.taken[2], host, 1)
    chain.change(Change("write", 1, 3))
    new = chain.take()
    assert scrubbed(store).ok
    (pack,) = chain.folder(new, "h1").glob("*.merged.pack")
    spoil(pack)
    damage = only(scrubbed(store))
    assert (damage.name, damage.checkpoints) == (pack.name, (new.checkpoint,))
    assert chain.store.verify(ids(chain)[2]).ok


def test_a_missing_file_is_missing_there_alone(chain: Chain, store: Store) -> None:
    shared(chain, 0, layout.SEGMENT_PACK, 0).unlink()
    damage = only(scrubbed(store))
    assert (damage.state, damage.checkpoints) == ("missing", ids(chain)[:1])
    assert "it is missing" in damage.problem


def test_damage_of_each_kind_in_whole_checkpoints(whole: list[Manifest], store: Store) -> None:
    sparse, packed = (folder_of(store, each) for each in whole)
    spoil(packed / "h1" / layout.PACK)
    spoil(packed / "h0" / layout.VMCORE)
    spoil(sparse / "h2" / layout.SUMS)
    (sparse / "h1" / layout.MEMORY).unlink()
    found = {(each.host, each.name, str(each.state)) for each in scrubbed(store, "demo").damaged}
    assert found == {
        ("h1", layout.PACK, "corrupt"),
        ("h0", layout.VMCORE, "corrupt"),
        ("h2", layout.SUMS, "corrupt"),
        ("h1", layout.MEMORY, "missing"),
    }


def test_parts_that_are_whole_and_do_not_fit(whole: list[Manifest], store: Store) -> None:
    where = placement()
    page = int(np.flatnonzero(where == 1)[0])
    where[page] = 2
    forged = rewritten(
        store, whole[1], 0, **{layout.PAGES: lambda p: tables.write_placement(p, where, HOSTS)}
    )
    republish(store, forged)
    found = scrubbed(store, "demo").damaged
    assert {(each.host, each.name, each.checkpoints) for each in found} == {
        ("h0", layout.PAGES, (forged.checkpoint,))
    }
    assert any("h1 saved other pages than it says" in each.problem for each in found)


def test_a_part_that_is_nowhere(chain: Chain, store: Store) -> None:
    shutil.rmtree(chain.folder(chain.taken[2], "h2"))
    damage = only(scrubbed(store))
    assert (damage.host, damage.state, damage.checkpoints) == ("h2", "missing", ids(chain)[2:])
    assert "in no store that answers" in damage.problem


def test_a_manifest_that_cannot_be_read(chain: Chain, store: Store) -> None:
    (store.root / "vm" / ids(chain)[1] / layout.MANIFEST).write_text("{")
    damage = only(scrubbed(store))
    assert (damage.name, damage.checkpoints) == (layout.MANIFEST, ids(chain)[1:2])


# What is remembered


def test_what_was_read_lately_is_left_out(chain: Chain, store: Store, reads: Reads) -> None:
    scrubbed(store)
    chain.change(Change("write", 1, 3))
    new = chain.take()
    reads.names.clear()
    found = scrubbed(store, older="1h")
    stamp = layout.by_origin(new.checkpoint, "")
    assert {name for name in reads.names if name != layout.VMCORE} == {
        f"{stamp}{name}"
        for name in (layout.PAGES, layout.HISTORY, layout.SEGMENT, layout.SEGMENT_PACK)
    }
    values = found.to_dict()
    assert (values["files"], values["skipped"]) == (9, CHAIN_FILES)
    assert scrubbed(store, older="1h").to_dict()["files"] == 0
    assert scrubbed(store, older="0s").to_dict()["skipped"] == 0
    assert scrubbed(store).to_dict()["skipped"] == 0


def test_the_longest_unread_comes_first(chain: Chain, store: Store, reads: Reads) -> None:
    scrubbed(store)
    values = json.loads(record(store).read_text())
    packs = [each for each in values["files"] if each["name"].endswith(layout.SEGMENT_PACK)]
    wanted = packs[::-1]
    for days, each in enumerate(wanted):
        each["read"] = f"2026-01-{days + 1:02}T00:00:00Z"
    record(store).write_text(json.dumps(values))
    reads.names.clear()
    reads.inodes.clear()
    scrubbed(store)
    order = [i for i in reads.inodes if i in {each["inode"] for each in packs}]
    assert order == [each["inode"] for each in wanted]


def test_damage_is_told_every_time(chain: Chain, store: Store) -> None:
    scrubbed(store)
    spoil(shared(chain, 1, layout.SEGMENT_PACK, 2))
    assert scrubbed(store, older="7d").ok, "it was read lately"
    for older in (None, "7d", "7d"):
        found = scrubbed(store, older=older)
        assert only(found).checkpoints == ids(chain)[1:]
        assert found.to_dict()["stores"][0]["vms"][0]["oldest_read"] is None


def test_damage_of_what_is_left_out_is_its_own(chain: Chain, store: Store) -> None:
    """A table that was read lately is looked at all the same, and no other one is blamed for it."""
    scrubbed(store)
    spoil(table := shared(chain, 0, layout.SEGMENT, 2))
    for _ in range(2):
        damage = only(scrubbed(store, older="7d"))
        assert (damage.name, damage.checkpoints) == (table.name, ids(chain))


def test_a_new_file_with_an_old_name_was_not_read(chain: Chain, store: Store, reads: Reads) -> None:
    scrubbed(store)
    pack = shared(chain, 0, layout.SEGMENT_PACK, 0)
    shutil.copy(pack, pack.with_name(".copy"))
    os.replace(pack.with_name(".copy"), pack)
    reads.names.clear()
    assert scrubbed(store, older="1d").ok
    assert reads.names == [pack.name]


def test_an_interrupted_one_goes_on(chain: Chain, store: Store, reads: Reads) -> None:
    """As Ctrl-C ends it: what was read is remembered, and the rest comes first."""
    packs = 0

    def interrupt(path: Path) -> None:
        nonlocal packs
        packs += path.suffix == ".pack"
        if packs == 4:
            raise KeyboardInterrupt

    reads.before = interrupt
    work = scrubbing.scrub(store, chain.taken, None, None)
    with pytest.raises(KeyboardInterrupt):
        list(work)
    read = [*reads.inodes]
    reads.inodes.clear()
    reads.before = lambda path: None
    found = scrubbed(store, older="1d")
    assert found.ok
    assert not {*reads.inodes} & {*read}
    assert len({*reads.inodes, *read}) == CHAIN_FILES
    assert found.to_dict()["files"] == CHAIN_FILES - len(read) == 6


def test_a_slow_one_ends_when_it_is_closed(chain: Chain, store: Store) -> None:
    """Within what it has begun, however long that would take at its rate."""
    work = scrubbing.scrub(store, chain.taken, 1.0, None)
    assert isinstance(next(work), Scrubbed)
    work.close()
    known = ScrubRecord(store.root, "vm").read()
    assert 0 < len(known) < CHAIN_FILES


def test_ctrl_c_says_that_it_goes_on(chain: Chain, store: Store) -> None:
    def interrupt(progress: OperationProgress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(OperationInterrupted, match="the next time begins with the rest"):
        scrub(StoreHere(store.root), None, "1B/s", None, interrupt)
    assert record(store).exists()


def test_it_is_not_faster_than_its_rate(chain: Chain, store: Store) -> None:
    found = scrub(StoreHere(store.root), None, None, None, False).to_dict()
    rate = found["bytes"] / 0.5
    slow = scrub(StoreHere(store.root), None, rate, None, False).to_dict()
    # The last file is let through before its time has passed, and tables are read again.
    longest = 4 * 4 * PAGE_SIZE
    assert slow["stores"][0]["seconds"] >= 0.5 * (1 - longest / found["bytes"])


def test_a_store_that_cannot_be_written_to(
    chain: Chain, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, data: bytes) -> None:
        raise StoreReadOnly(f"{path} cannot be written (Read-only file system)")

    monkeypatch.setattr(scrub_record, "write_durably", refuse)
    spoil(shared(chain, 1, layout.SEGMENT_PACK, 2))
    found = scrubbed(store)
    assert only(found).checkpoints == ids(chain)[1:]
    (told,) = found.to_dict()["stores"][0]["vms"]
    assert "Read-only file system" in told["not_remembered"]
    assert told["files"] == CHAIN_FILES
    assert not record(store).exists()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("my notes", "is not what dcres writes there"),
        ('{"files": []}', "is not what dcres writes there"),
        ('{"kind": "scrubbed", "format_version": 2}', "was written by a later dcres"),
    ],
)
def test_what_is_foreign_is_not_replaced(
    chain: Chain, store: Store, content: str, why: str
) -> None:
    record(store).write_text(content)
    found = scrubbed(store)
    assert found.ok
    assert why in found.stores["store"].vms[0].trouble
    assert record(store).read_text() == content


def test_a_link_is_not_followed(chain: Chain, store: Store, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text('{"kind": "scrubbed", "format_version": 1, "files": []}')
    record(store).symlink_to(tmp_path / "mine")
    assert "is a symbolic link" in scrubbed(store).stores["store"].vms[0].trouble
    assert record(store).is_symlink()


def test_ours_is_replaced_however_damaged(chain: Chain, store: Store) -> None:
    odd = [{"name": "x"}, 7, {"name": "x", "inode": "y", "read": "z"}]
    record(store).write_text(json.dumps({"kind": "scrubbed", "format_version": 1, "files": odd}))
    assert scrubbed(store).stores["store"].vms[0].trouble == ""
    assert len(ScrubRecord(store.root, "vm").read()) == CHAIN_FILES


def test_what_has_gone_is_forgotten_and_what_others_noted_stays(chain: Chain, store: Store) -> None:
    scrubbed(store)
    store.delete(ids(chain)[2])
    other = Known("h9/other.pack", 5)
    at = datetime(2026, 1, 1, tzinfo=UTC)
    mine = ScrubRecord(store.root, "vm")
    scrubbed(store)
    assert len(mine.read()) == CHAIN_FILES - 9
    mine.write({other: at}, ())
    assert mine.read()[other] == at
    mine.write({other: at - timedelta(days=1)}, ())
    assert mine.read()[other] == at, "the later one counts"


def test_it_is_a_file_of_the_store(chain: Chain, store: Store) -> None:
    scrubbed(store)
    StoreFile(record(store)).remove()
    assert not record(store).exists()


# Others at the same time


def test_what_is_read_is_pinned_and_nothing_else(chain: Chain, store: Store, reads: Reads) -> None:
    refused: set[str] = set()

    def look(path: Path) -> None:
        for each in ids(chain):
            try:
                store.require_unpinned(each)
            except Conflict:
                refused.add(each)
                assert each == path.parent.parent.name
            else:
                assert each != path.parent.parent.name

    reads.before = look
    assert scrubbed(store).ok
    assert refused == {*ids(chain)}


def test_a_checkpoint_that_goes_meanwhile_is_not_damaged(
    chain: Chain, store: Store, reads: Reads
) -> None:
    gone = ids(chain)[2]

    def delete(path: Path) -> None:
        if path.parent.parent.name == ids(chain)[0] and store.is_published(gone):
            store.delete(gone)

    reads.before = delete
    found = scrubbed(store)
    assert found.ok
    assert found.changed == (gone,)
    assert found.to_dict()["files"] == CHAIN_FILES - 9


def test_a_deletion_that_ended_in_the_middle_is_not_damage(
    chain: Chain, store: Store, reads: Reads
) -> None:
    """Its manifest is gone, and some of its files."""
    gone = store.root / "vm" / ids(chain)[2]

    def begin_to_delete(path: Path) -> None:
        if path.parent.parent.name == ids(chain)[0] and (gone / layout.MANIFEST).exists():
            (gone / layout.MANIFEST).unlink()
            shutil.rmtree(gone / "h1")

    reads.before = begin_to_delete
    found = scrubbed(store)
    assert (found.ok, found.changed) == (True, ids(chain)[2:])


def test_a_checkpoint_that_goes_before_it_is_looked_at(
    chain: Chain, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = StoreHere.stream

    def late(self: StoreHere, *args: Any) -> Any:
        store.delete(ids(chain)[1])
        return stream(self, *args)

    monkeypatch.setattr(StoreHere, "stream", late)
    found = scrubbed(store)
    assert (found.ok, found.changed) == (True, ids(chain)[1:2])


def test_a_shared_file_is_read_by_another_name(chain: Chain, store: Store, reads: Reads) -> None:
    """Those who made it have gone since it was looked for."""

    def delete(path: Path) -> None:
        if path == shared(chain, 2, layout.SEGMENT, 2, "h2"):  # before those of pages
            for each in ids(chain)[:2]:
                store.delete(each)

    reads.before = delete
    found = scrubbed(store)
    assert found.ok
    assert len({*reads.inodes}) == CHAIN_FILES


def test_one_that_is_being_deleted(chain: Chain, store: Store) -> None:
    with unpinned(store.root / "vm" / ids(chain)[1]):
        found = scrubbed(store)
    assert (found.ok, found.changed) == (True, ids(chain)[1:2])


# Hosts with stores of their own


@pytest.fixture
def apart(chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Store]:
    """Each host has its own parts, the main host the manifests too; and they answer."""
    stores = {host: Store(tmp_path / "disks" / host) for host in ("h0", "h1", "h2")}
    here = threading.local()
    shutil.copytree(chain.store.root, stores["h0"].root, copy_function=os.link)
    for host in ("h1", "h2"):
        for each in ids(chain):
            folder = stores[host].root / "vm" / each
            folder.mkdir(parents=True)
            (stores["h0"].root / "vm" / each / host).rename(folder / host)
        marker.mark(stores[host].root)

    def run_on(host: str, function: Callable[..., Any], *args: Any, timeout_s: float = 0) -> Any:
        here.store = stores[host]
        return function(*args)

    def stream(host: str, function: Callable[..., Any], *args: Any, timeout_s: float) -> Any:
        def each() -> Iterator[Any]:
            here.store = stores[host]
            yield from function(*args)

        return WorkHere(each())

    monkeypatch.setattr(catalogue, "_alive", lambda: list(stores))
    monkeypatch.setattr(catalogue, "_store", lambda: here.store)
    monkeypatch.setattr(gateway, "run_on", run_on)
    monkeypatch.setattr(gateway, "stream_apart", stream)
    return stores


def test_each_host_reads_its_own(chain: Chain, apart: dict[str, Store]) -> None:
    shutil.rmtree(chain.store.root)  # whose links they are
    found = scrub(StoresOfHosts(), None, None, None, False)
    assert found.ok, found.damaged
    assert [*found.stores] == ["h0", "h1", "h2"]
    assert [each.vms[0].files for each in found.stores.values()] == [15, 6, 6]
    for store in apart.values():
        assert record(store).exists()
    spoil(apart["h2"].root / "vm" / ids(chain)[2] / "h2" / pack_name(chain, 0))
    shutil.rmtree(apart["h1"].root / "vm" / ids(chain)[1])
    damaged = scrub(StoresOfHosts(), None, None, None, False).damaged
    assert [(each.host, str(each.state), each.checkpoints) for each in damaged] == [
        ("h2", "corrupt", ids(chain)),
        ("h1", "missing", ids(chain)[1:2]),
    ]


def test_a_store_that_hosts_share_is_read_once(
    chain: Chain, apart: dict[str, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    for host in apart:
        apart[host] = chain.store
    found = scrub(StoresOfHosts(), None, None, None, False)
    assert (found.ok, [*found.stores]) == (True, ["h0"])
    assert found.to_dict()["files"] == CHAIN_FILES


# The command


def test_the_command(
    chain: Chain, whole: list[Manifest], store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--store", str(store.root), "scrub"]
    assert main([*command, "--vm", "vm"]) == 0
    assert "no damage was found" in capsys.readouterr().out
    assert not record(store, "demo").exists()
    spoil(shared(chain, 1, layout.SEGMENT_PACK, 2))
    assert main([*command, "--rate", "none"]) == 1
    shown = capsys.readouterr().out
    assert "never" in shown
    assert all(each in shown for each in ids(chain)[1:])
    assert main([*command, "--older", "7d", "--json"]) == 1
    values = json.loads(capsys.readouterr().out)
    assert values["ok"] is False
    assert values["damaged"][0]["state"] == "corrupt"
    assert values["damaged"][0]["checkpoints"] == [*ids(chain)[1:]]
    assert main([*command, "--rate", "fast"]) == 2
    assert main([*command, "--older", "often"]) == 2
    assert main([*command, "--vm", "nix"]) == 2


@pytest.mark.parametrize("older", ["7", "7 years", "", -1, True])
def test_what_is_no_length_of_time(older: str | int) -> None:
    with pytest.raises(ConfigError, match="is no length of time"):
        age_s(older)


def test_lengths_of_time() -> None:
    assert [age_s(each) for each in ("30s", "1.5m", "2h", "7d", "1w", 9, None)] == [
        30, 90, 7200, 604800, 604800, 9, None
    ]  # fmt: skip
