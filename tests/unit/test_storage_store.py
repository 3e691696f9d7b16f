"""The store: a checkpoint exists if and only if its manifest does."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pytest

from dcres.errors import (
    CheckpointCorrupt,
    Conflict,
    DcresError,
    HostError,
    NotFound,
    StorageError,
)
from dcres.linux import removal
from dcres.linux.files import opened
from dcres.linux.removal import CheckpointFolder
from dcres.model.formats import WHOLE_FORMATS, MemoryFormat
from dcres.model.ownership import Claimant
from dcres.model.pages import PAGE_SIZE, extents_of_mask
from dcres.storage import layout
from dcres.storage.engine.memory_file import SavedMemory
from dcres.storage.engine.page_reader import PageReader
from dcres.storage.format import tables
from dcres.storage.format.host_part import write_main_files, write_memory_tables
from dcres.storage.format.manifest import Manifest
from dcres.storage.store import marker
from dcres.storage.store.pins import Hold, unpinned
from dcres.storage.store.store import Store
from tests.support.stored import (
    HOSTS,
    NOW,
    PAGE_COUNT,
    folder,
    memory,
    placement,
    republish,
    rewritten,
    take,
)

ME = Claimant("here", "h0", "machine", "boot")


@pytest.fixture
def ram(tmp_path: Path) -> Path:
    return memory(tmp_path / "ram", placement() != tables.NOWHERE)


@pytest.fixture
def root(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture(params=list(MemoryFormat))
def published(root: Store, ram: Path, request: pytest.FixtureRequest) -> Manifest:
    manifest = take(root, ram, memory_format=request.param)
    root.publish(manifest)
    return manifest


@pytest.fixture(params=WHOLE_FORMATS)
def whole(root: Store, ram: Path, request: pytest.FixtureRequest) -> Manifest:
    """The same, with one table for all pages of everything that is known of them."""
    manifest = take(root, ram, memory_format=request.param)
    root.publish(manifest)
    return manifest


def files_of(root: Store, manifest: Manifest) -> list[Path]:
    paths = folder(root, manifest).rglob("*")
    return sorted(path for path in paths if path.is_file())


def test_ids_are_utc() -> None:
    now = datetime(2026, 1, 2, 1, 0, 0, tzinfo=timezone(timedelta(hours=9)))
    assert layout.checkpoint_id("a-b", now, "00ff") == "a-b-20260101-160000-00ff"
    assert layout.vm_of("a-b-20260101-160000-00ff") == "a-b"


def test_a_checkpoint_belongs_to_its_vm(root: Store) -> None:
    with pytest.raises(NotFound, match="not one of VM b"):
        root.begin("b", "a-20260101-160000-00ff", Hold())


def test_folders_and_files_are_private(root: Store, published: Manifest) -> None:
    for path in [root.root, *root.root.rglob("*")]:
        wanted = 0o700 if path.is_dir() else 0o600
        if path.name != layout.VMCORE:
            assert stat.S_IMODE(path.stat().st_mode) == wanted, path


def test_confirmed_is_durable(
    root: Store, published: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A manifest whose name is there, and whose folder could not be made durable."""

    def refused(path: Path) -> None:
        raise OSError(errno.EIO, "of the disk", str(path))

    assert root.confirm(published.checkpoint)
    monkeypatch.setattr("dcres.storage.store.store.sync_folder", refused)
    assert root.is_published(published.checkpoint)
    with pytest.raises(OSError, match="of the disk"):
        root.confirm(published.checkpoint)


def test_without_manifest_it_is_not_there_and_swept(root: Store, ram: Path) -> None:
    manifest = take(root, ram)
    assert root.list() == []
    with pytest.raises(NotFound):
        root.get(manifest.checkpoint)
    assert root.sweep("demo", keep=frozenset({manifest.checkpoint})) == []
    assert root.sweep("demo") == [manifest.checkpoint]
    assert not folder(root, manifest).exists()
    with pytest.raises(NotFound, match="was discarded"):
        root.publish(manifest)


def test_a_crash_before_the_rename_announces_nothing(
    root: Store, ram: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = take(root, ram)

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", crash)
    with pytest.raises(KeyboardInterrupt):
        root.publish(manifest)
    monkeypatch.undo()
    assert root.list() == []
    assert root.sweep("demo") == [manifest.checkpoint]


def test_sweep_leaves_the_rest_alone(root: Store, published: Manifest) -> None:
    os.close(root.lives("demo").claim(ME, 0, "now").lock)
    (root.root / "demo" / "mine").mkdir()
    assert root.sweep("demo") == []
    assert root.get(published.checkpoint) == published
    assert (root.root / "demo" / "mine").exists()
    assert root.sweep("other") == []


def test_a_sub_host_sweeps_nothing_that_may_be_published(root: Store, ram: Path) -> None:
    manifest = take(root, ram)
    assert root.sweep("demo", whole_parts=False) == []
    for host in HOSTS:
        (folder(root, manifest) / host / layout.SUMS).unlink()
    assert root.sweep("demo", whole_parts=False) == [manifest.checkpoint]


@pytest.mark.parametrize("renames", range(5))
@pytest.mark.parametrize("memory_first", [True, False])
def test_a_main_host_that_dies_among_its_tables_leaves_nothing_that_passes_for_whole(
    root: Store, ram: Path, renames: int, memory_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its memory tables and the others are written side by side, so either may be done first."""
    manifest = take(root, ram, memory_format=MemoryFormat.PACKED)
    part = folder(root, manifest) / HOSTS[0]
    memory_file = root.read_part(manifest, HOSTS[0]).memory
    saved = SavedMemory(memory_file, 1, 1, 1, 1.0)
    for path in (*folder(root, manifest).glob("h[12]/*"), *part.glob("*.arrow")):
        path.unlink()
    for host in HOSTS[1:]:
        (folder(root, manifest) / host).rmdir()
    history = np.zeros(PAGE_COUNT, dtype=np.uint32), 7
    rename = os.rename
    done: list[Path] = []

    def write_tables() -> None:
        if memory_first:
            write_memory_tables(part, saved)
        write_main_files(part, b"core", history, placement(), HOSTS)
        if not memory_first:
            write_memory_tables(part, saved)

    def rename_or_die(source: Path, target: Path) -> None:
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(target)
        rename(source, target)

    monkeypatch.setattr(os, "rename", rename_or_die)
    with pytest.raises(KeyboardInterrupt):
        write_tables()
    monkeypatch.undo()
    assert len(done) == renames
    assert root.sweep("demo") == [manifest.checkpoint]


def test_publish_may_be_repeated_but_not_changed(root: Store, published: Manifest) -> None:
    root.publish(published)
    with pytest.raises(Conflict, match="other content"):
        root.publish(published.model_copy(update={"tick": 8}))
    with pytest.raises(Conflict, match="published already"):
        root.begin(published.vm, published.checkpoint, Hold())
    with pytest.raises(Conflict, match="delete it"):
        root.discard(published.vm, published.checkpoint)
    assert root.get(published.checkpoint) == published


@pytest.mark.parametrize("change", ["missing", "shorter", "longer", "folder"])
def test_nothing_is_published_that_lacks_a_byte(
    root: Store, ram: Path, change: str, tmp_path: Path
) -> None:
    """Whatever happened to a file after its host had voted; the last checkpoint stays good."""
    for memory_format in MemoryFormat:
        manifest = take(root, ram, memory_format=memory_format)
        for path in files_of(root, manifest):
            aside = tmp_path / "aside"
            if change == "folder":
                path.parent.rename(aside)
            else:
                path.rename(aside)
            if change in ("shorter", "longer"):
                whole = aside.read_bytes()
                path.write_bytes(whole[:-1] if change == "shorter" else whole + b"1")
            with pytest.raises(StorageError, match="is not published") as told:
                root.publish(manifest)
            assert path.parent.name in str(told.value)
            assert root.list() == []
            if change == "folder":
                aside.rename(path.parent)
            else:
                aside.replace(path)
        root.publish(manifest)
        assert root.verify(manifest.checkpoint).ok
        root.delete(manifest.checkpoint)


def test_parts_in_other_stores_are_their_hosts_affair(root: Store, ram: Path) -> None:
    manifest = take(root, ram)
    shutil.rmtree(folder(root, manifest) / HOSTS[1])
    with pytest.raises(StorageError, match="h1"):
        root.publish(manifest, HOSTS[:2])
    root.publish(manifest, (HOSTS[0], HOSTS[2]))


def test_what_is_being_taken_is_not_swept_by_anybody(root: Store) -> None:
    """Neither by its own cluster nor by another's, nor discarded; and it is there in the end."""
    checkpoint, hold = layout.checkpoint_id("demo", NOW, "0001"), Hold()
    root.begin("demo", checkpoint, hold)
    part = root.host_folder("demo", checkpoint, "h0")
    (part / layout.MEMORY).write_bytes(b"page")
    for other in (root, Store(root.root)):
        assert other.sweep("demo") == []
        assert other.sweep("demo", whole_parts=False) == []
        with pytest.raises(Conflict, match="is being taken"):
            other.discard("demo", checkpoint)
        with pytest.raises(NotFound):
            other.delete(checkpoint)
    assert (part / layout.MEMORY).read_bytes() == b"page"
    hold.let_go(checkpoint)
    assert root.sweep("demo") == [checkpoint]


def test_nothing_makes_anew_what_was_swept(root: Store, ram: Path) -> None:
    manifest = take(root, ram)
    shutil.rmtree(folder(root, manifest))
    with pytest.raises(NotFound, match="was discarded"):
        root.host_folder("demo", manifest.checkpoint, HOSTS[0])
    with pytest.raises(NotFound, match="was discarded"):
        root.publish(manifest)
    assert not folder(root, manifest).exists()


def test_a_checkpoint_that_is_published_while_a_sweep_looks_stays(
    root: Store, ram: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sweep has seen no manifest, and then it has the folder to itself."""
    manifest = take(root, ram)

    @contextmanager
    def published_before(path: Path) -> Iterator[None]:
        root.publish(manifest)
        with unpinned(path):
            yield

    monkeypatch.setattr("dcres.storage.store.store.unpinned", published_before)
    assert root.sweep("demo") == []
    (folder(root, manifest) / layout.MANIFEST).unlink()
    with pytest.raises(Conflict, match="published already"):
        root.discard("demo", manifest.checkpoint)
    assert root.verify(manifest.checkpoint).ok


def test_a_store_has_one_mark_for_all_who_write_to_it(root: Store) -> None:
    assert root.identity() == ""
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(marker.mark(root.root))) for _ in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(found) == {root.identity()}
    assert [path.name for path in root.root.iterdir()] == [layout.MARKER]
    assert Store(root.root.with_name("other")).identity() == ""


def test_a_mark_where_there_are_no_links(root: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no links")

    monkeypatch.setattr(os, "link", refused)
    assert marker.mark(root.root) == root.identity() != ""
    assert [path.name for path in root.root.iterdir()] == [layout.MARKER]


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff"])
def test_a_damaged_mark_is_told(root: Store, content: bytes) -> None:
    """Two stores with such marks would pass for one."""
    root.root.mkdir()
    (root.root / layout.MARKER).write_bytes(content)
    assert root.identity() == ""
    with pytest.raises(StorageError, match="is damaged; remove it"):
        root.begin("demo", layout.checkpoint_id("demo", NOW, "0001"), Hold())
    assert (root.root / layout.MARKER).read_bytes() == content


def test_delete_removes_the_manifest_first(
    root: Store, published: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(folder: CheckpointFolder) -> None:
        assert not (folder.path / layout.MANIFEST).exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(CheckpointFolder, "remove", crash)
    with pytest.raises(KeyboardInterrupt):
        root.delete(published.checkpoint)
    monkeypatch.undo()
    assert root.list() == []
    assert root.sweep("demo") == [published.checkpoint]
    with pytest.raises(NotFound):
        root.delete(published.checkpoint)


def test_newest_last_over_vms(root: Store, ram: Path) -> None:
    late, early, other = (
        take(root, ram, now=NOW + timedelta(hours=1), token="0000"),
        take(root, ram, now=NOW, token="ffff"),
        take(root, ram, vm="abc", now=NOW + timedelta(minutes=1)),
    )
    same_second = take(root, ram, now=NOW, token="0001", generation=2)
    for manifest in (late, early, other, same_second):
        root.publish(manifest)
    assert [entry.manifest for entry in root.list()] == [early, same_second, other, late]
    assert [entry.manifest for entry in root.list("abc")] == [other]


def test_a_corrupt_manifest_is_listed_with_its_error(
    root: Store, published: Manifest, ram: Path
) -> None:
    good = take(root, ram, token="1111")
    root.publish(good)
    path = folder(root, published) / layout.MANIFEST
    for content in (b"", b"{}", b"\xff\xfe", path.read_bytes()[:-40]):
        path.write_bytes(content)
        by_id = {entry.checkpoint: entry for entry in root.list()}
        assert by_id[good.checkpoint].manifest == good
        assert str(path) in (by_id[published.checkpoint].error or "")
        with pytest.raises(CheckpointCorrupt, match=r"manifest\.json"):
            root.verify(published.checkpoint)
    root.delete(published.checkpoint)
    assert [entry.manifest for entry in root.list()] == [good]


def test_a_manifest_in_another_folder_is_refused(root: Store, published: Manifest) -> None:
    moved = "demo-20260301-120000-ffff"
    folder(root, published).rename(root.root / "demo" / moved)
    with pytest.raises(CheckpointCorrupt, match=f"belongs to checkpoint {published.checkpoint}"):
        root.get(moved)


def test_similar_ids_are_named(root: Store, published: Manifest) -> None:
    with pytest.raises(NotFound, match=f"did you mean {published.checkpoint}"):
        root.get(published.checkpoint[:-1] + "c")
    with pytest.raises(NotFound, match="did you mean"):
        root.get(published.checkpoint[:-7])
    with pytest.raises(NotFound, match="see `dcres checkpoints`"):
        root.get("zzz")


def test_verify_reports_every_file(root: Store, published: Manifest) -> None:
    done: list[int] = []
    report = root.verify(published.checkpoint, done.append)
    assert report.ok
    assert report.pages == sum(done) == published.pages
    stored = [path for path in files_of(root, published) if path.name != layout.MANIFEST]
    assert sorted((file.host, file.name) for file in report.files) == [
        (path.parent.name, path.name) for path in stored
    ]


def test_a_flipped_bit_in_any_file_is_named(root: Store, published: Manifest) -> None:
    for path in files_of(root, published):
        whole = path.stat()
        with opened(path, os.O_RDWR) as fd:
            offset = first_data(fd)
            byte = os.pread(fd, 1, offset)
            os.pwrite(fd, bytes([byte[0] ^ 1]), offset)
            assert_named(root, published, path)
            os.pwrite(fd, byte, offset)
        assert path.stat().st_size == whole.st_size
        assert root.verify(published.checkpoint).ok


def first_data(fd: int) -> int:
    return os.lseek(fd, 0, os.SEEK_DATA) + 5


def test_a_truncated_or_missing_file_is_named(root: Store, published: Manifest) -> None:
    for path in files_of(root, published):
        data, aside = path.read_bytes(), path.with_suffix(".aside")
        path.rename(aside)
        if path.name != layout.MANIFEST:
            assert_named(root, published, path)
        path.write_bytes(data[:-1])
        assert_named(root, published, path)
        aside.rename(path)
    assert root.verify(published.checkpoint).ok


def assert_named(root: Store, manifest: Manifest, path: Path) -> None:
    with pytest.raises(CheckpointCorrupt) as caught:
        root.verify(manifest.checkpoint, strict=True)
    assert str(path) in str(caught.value)
    if path.name != layout.MANIFEST:
        bad = [file for file in root.verify(manifest.checkpoint).files if not file.ok]
        assert (path.parent.name, path.name) in [(file.host, file.name) for file in bad]
        assert not root.verify_part(manifest, path.parent.name).report.ok


def problems(root: Store, manifest: Manifest) -> list[str]:
    republish(root, manifest)
    report = root.verify(manifest.checkpoint)
    assert not report.ok
    with pytest.raises(DcresError):
        root.verify(manifest.checkpoint, strict=True)
    return [file.problem for file in report.files if file.problem]


def test_existence_must_agree_with_the_memory_file(root: Store, whole: Manifest) -> None:
    here = placement() == 1
    page = int(np.flatnonzero(here)[4])
    here[page] = False
    forged = rewritten(
        root, whole, 1, **{layout.PAGES: lambda path: tables.write_existence(path, here)}
    )
    assert f"page {page} was saved by h1 and does not belong to it" in problems(root, forged)[0]
    with pytest.raises(CheckpointCorrupt, match=f"page {page}"):
        root.read_part(forged, "h1")


def test_placement_must_agree_with_every_host(root: Store, whole: Manifest) -> None:
    where = placement()
    page = int(np.flatnonzero(where == 1)[0])
    where[page] = 2
    forged = rewritten(
        root,
        whole,
        0,
        **{layout.PAGES: lambda path: tables.write_placement(path, where, HOSTS)},
    )
    (problem,) = problems(root, forged)
    assert f"page {page} was saved by h1 and does not belong to it" in problem
    where[page] = 1
    lost = int(np.flatnonzero(where == tables.NOWHERE)[0])
    where[lost] = 2
    forged = rewritten(
        root, forged, 0, **{layout.PAGES: lambda path: tables.write_placement(path, where, HOSTS)}
    )
    (problem,) = problems(root, forged)
    assert f"page {lost} belongs to h2 and was not saved there" in problem


def test_placement_must_name_the_manifests_hosts(root: Store, whole: Manifest) -> None:
    others = ("h0", "h2", "h1")
    forged = rewritten(
        root,
        whole,
        0,
        **{layout.PAGES: lambda path: tables.write_placement(path, placement(), others)},
    )
    assert "h0, h2, h1 are not the manifest's" in problems(root, forged)[0]


def test_a_table_that_the_manifest_does_not_list(root: Store, published: Manifest) -> None:
    part = published.hosts[1]
    bare = part.model_copy(update={"files": ()})
    forged = published.model_copy(update={"hosts": (published.main, bare, published.hosts[2])})
    assert "does not list it" in problems(root, forged)[0]


def test_a_history_that_the_manifest_does_not_list(root: Store, published: Manifest) -> None:
    files = tuple(file for file in published.main.files if layout.HISTORY not in file.name)
    main = published.main.model_copy(update={"files": files})
    forged = published.model_copy(update={"hosts": (main, *published.hosts[1:])})
    assert "does not list it" in problems(root, forged)[0]


def test_unknown_hosts(root: Store, published: Manifest) -> None:
    with pytest.raises(NotFound, match="its hosts are h0, h1, h2"):
        root.read_part(published, "h9")


def test_a_pinned_checkpoint_stays(root: Store, published: Manifest) -> None:
    with root.pin(published.checkpoint), root.pin(published.checkpoint):
        for attempt in (root.delete, root.require_unpinned):
            with pytest.raises(Conflict, match=f"{published.checkpoint} is in use"):
                attempt(published.checkpoint)
        assert root.verify(published.checkpoint).ok
    root.require_unpinned(published.checkpoint)
    root.delete(published.checkpoint)
    root.require_unpinned(published.checkpoint)
    with pytest.raises(NotFound, match="nothing of checkpoint"), root.pin(published.checkpoint):
        pass


def test_a_part_without_a_manifest_can_be_pinned(root: Store, published: Manifest) -> None:
    """As on a host that has a store of its own."""
    (folder(root, published) / layout.MANIFEST).unlink()
    with root.pin(published.checkpoint):
        with pytest.raises(Conflict, match="is in use"):
            root.discard(published.vm, published.checkpoint)
        assert root.sweep(published.vm) == []
        assert folder(root, published).exists()
    assert root.sweep(published.vm) == [published.checkpoint]


def test_a_pin_waits_for_no_deletion(
    root: Store, published: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def while_deleting(path: Path) -> None:
        with pytest.raises(Conflict, match="being deleted"), root.pin(published.checkpoint):
            pass

    monkeypatch.setattr(shutil, "rmtree", while_deleting)
    root.delete(published.checkpoint)


def test_a_pin_that_comes_as_the_folder_goes(
    root: Store, published: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = fcntl.flock

    def deleted_first(fd: int, how: int) -> None:
        monkeypatch.undo()
        root.delete(published.checkpoint)
        honest(fd, how)

    monkeypatch.setattr(fcntl, "flock", deleted_first)
    with pytest.raises(NotFound, match="nothing of checkpoint"), root.pin(published.checkpoint):
        pass


def test_a_pin_ends_with_its_process(root: Store, published: Manifest) -> None:
    pid = os.fork()
    if pid == 0:
        with root.pin(published.checkpoint):
            os._exit(0)
    os.waitpid(pid, 0)
    root.delete(published.checkpoint)


def test_an_error_under_a_pin_is_itself(root: Store, published: Manifest) -> None:
    with pytest.raises(FileNotFoundError), root.pin(published.checkpoint):
        raise FileNotFoundError


def test_parts_here(root: Store, published: Manifest) -> None:
    assert root.parts_here(published) == HOSTS
    place = folder(root, published)
    shutil.rmtree(place / "h1")
    assert root.parts_here(published) == ("h0", "h2")
    shutil.rmtree(place)
    assert root.parts_here(published) == ()


def test_single_pages_are_read_and_verified(root: Store, published: Manifest, ram: Path) -> None:
    data = ram.read_bytes()
    # The fourth page of the part, and its place; a packed file of pages in order is as this one.
    page, place = int(np.flatnonzero(placement() == 1)[3]), 3
    if published.memory_format is MemoryFormat.SPARSE:
        place = page
    path = folder(root, published) / "h1" / published.hosts[1].memory_file
    length_bytes = path.stat().st_size
    memory = root.memory_part(published, "h1").read()
    with PageReader(memory) as reader:
        assert np.array_equal(reader.mask, placement() == 1)
        for first, stop in extents_of_mask(reader.mask).tolist():
            assert reader.read(first, stop) == data[first * PAGE_SIZE : stop * PAGE_SIZE]
        with opened(path, os.O_RDWR) as fd:
            byte = os.pread(fd, 1, place * PAGE_SIZE)
            os.pwrite(fd, bytes([byte[0] ^ 1]), place * PAGE_SIZE)
        with pytest.raises(CheckpointCorrupt, match=f"{path}: page {page} was altered"):
            reader.read(page, page + 1)
        os.truncate(path, place * PAGE_SIZE)
        with pytest.raises(CheckpointCorrupt, match=f"it ends at or after page {page}"):
            reader.read(page, page + 1)
    with pytest.raises(CheckpointCorrupt, match=f"instead of {length_bytes}"):
        PageReader(memory)
    path.unlink()
    with pytest.raises(CheckpointCorrupt, match="it is missing"):
        PageReader(memory)
    with pytest.raises(NotFound, match="its hosts are h0, h1, h2"):
        root.memory_part(published, "h9")


def test_a_checkpoint_that_cannot_be_removed_whole_is_not_deleted(
    root: Store, published: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts = tmp_path / "mountinfo"
    point = folder(root, published) / "h1"
    mounts.write_text(f"36 35 98:0 / {point} rw - ext4 /dev/sdb rw\n")
    monkeypatch.setattr(removal, "_MOUNTS", mounts)
    with pytest.raises(HostError, match="h1 is mounted below"):
        root.delete(published.checkpoint)
    assert root.verify(published.checkpoint).ok
    mounts.write_text("")
    root.delete(published.checkpoint)
    assert not folder(root, published).exists()


def test_a_store_that_is_a_copy_of_another_is_told_from_one_that_is_shared(
    root: Store, ram: Path, tmp_path: Path
) -> None:
    """As on machines made from one image: they have one mark, and not each other's parts."""
    taken = take(root, ram)
    (folder(root, taken) / "h1").rename(tmp_path / "h1")
    with pytest.raises(
        StorageError, match=r"store of host h1 is a copy .* remove \.dcres-store th"
    ):
        root.publish(taken)
    assert root.list() == []
    (tmp_path / "h1").rename(folder(root, taken) / "h1")
    (folder(root, taken) / "h1" / layout.SUMS).rename(tmp_path / "sums")
    with pytest.raises(StorageError, match="published; find out what else changes files"):
        root.publish(taken)
