"""What dcres relies on in a place for copies of checkpoints, whatever it is made of."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pytest

from dcres.errors import CheckpointCorrupt, ConfigError, Conflict, NotFound, StorageError
from dcres.linux.files import allocated_bytes, opened
from dcres.model.formats import MemoryFormat
from dcres.model.pages import PAGE_SIZE
from dcres.storage.engine import memory_file
from dcres.storage.format.manifest import Manifest
from dcres.storage.store import copy_list, copy_records, copy_url, download, upload
from dcres.storage.store.copy_list import CopyState
from dcres.storage.store.copy_url import CopyUrl
from dcres.storage.store.pieces import PartCopied
from dcres.storage.store.store import Store
from tests.support import stored
from tests.support.chains import Chain, Change
from tests.support.object_store import (
    PASSWORD,
    Fault,
    ObjectStore,
    Request,
    object_store,
)
from tests.support.stored import HOSTS, NOW, PAGE_COUNT, folder, memory, placement, take

PIECE_BYTES = 8 * PAGE_SIZE  # so a memory file of some 20 pages has several


class Place(Protocol):
    """Somewhere for copies, and a way to its objects past dcres."""

    url: CopyUrl

    def names(self) -> list[str]:
        """Every object there is, relative to the URL."""

    def read(self, name: str) -> bytes: ...

    def write(self, name: str, data: bytes) -> None: ...

    def remove(self, name: str) -> None: ...


class FolderPlace:
    """A folder."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.mkdir()
        self.url = copy_url.parse(f"file://{path}")

    def names(self) -> list[str]:
        files = (path for path in self._path.rglob("*") if path.is_file())
        return sorted(str(path.relative_to(self._path)) for path in files)

    def read(self, name: str) -> bytes:
        return (self._path / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        (self._path / name).write_bytes(data)

    def remove(self, name: str) -> None:
        (self._path / name).unlink()


class BucketPlace:
    """A prefix in a bucket of S3."""

    def __init__(self, server: ObjectStore, prefix: str) -> None:
        self._fs, self._root = server.direct(), f"bucket/{prefix}"
        self.url = copy_url.parse(server.url(prefix))

    def names(self) -> list[str]:
        from pyarrow import fs

        selector = fs.FileSelector(self._root, allow_not_found=True, recursive=True)
        found = (info for info in self._fs.get_file_info(selector) if info.is_file)
        return sorted(info.path.removeprefix(f"{self._root}/") for info in found)

    def read(self, name: str) -> bytes:
        with self._fs.open_input_file(f"{self._root}/{name}") as stream:
            return bytes(stream.read())

    def write(self, name: str, data: bytes) -> None:
        with self._fs.open_output_stream(f"{self._root}/{name}") as stream:
            stream.write(data)

    def remove(self, name: str) -> None:
        self._fs.delete_file(f"{self._root}/{name}")


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectStore]:
    with object_store() as found:
        yield found


@pytest.fixture
def bucket(
    server: ObjectStore, request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[BucketPlace]:
    server.proxy.seen.clear()
    yield BucketPlace(server, f"{tmp_path.name}/prefix")
    server.proxy.fault = lambda request: None


@pytest.fixture(params=["file", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "file":
        return FolderPlace(tmp_path / "copies")
    found: Place = request.getfixturevalue("bucket")
    return found


@pytest.fixture
def nearby(tmp_path: Path) -> FolderPlace:
    """Where it makes no difference what the place is."""
    return FolderPlace(tmp_path / "copies")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


Take = Callable[..., Manifest]


@pytest.fixture
def taken(store: Store, tmp_path: Path) -> Take:
    """Takes a checkpoint, of pages that are all there, some of them zeros."""
    ram = memory(tmp_path / "ram", np.arange(PAGE_COUNT) % 7 != 0)

    def publish(memory_format: MemoryFormat = MemoryFormat.PACKED) -> Manifest:
        manifest = take(store, ram, memory_format=memory_format)
        store.publish(manifest)
        return manifest

    return publish


def send(store: Store, manifest: Manifest, url: CopyUrl) -> dict[str, PartCopied]:
    """All parts; nothing is published yet."""
    return {host: list(sending(store, manifest, host, url))[-1] for host in HOSTS}


def sending(store: Store, manifest: Manifest, host: str, url: CopyUrl) -> Iterator[PartCopied]:
    return upload.send_part(store, manifest, host, url, piece_bytes=PIECE_BYTES)


def publish(store: Store, manifest: Manifest, url: CopyUrl, sent: dict[str, PartCopied]) -> None:
    lengths = {host: part.memory_bytes for host, part in sent.items()}
    upload.publish(store, manifest, url, lengths, NOW, PIECE_BYTES)


def copy(store: Store, manifest: Manifest, url: CopyUrl) -> dict[str, PartCopied]:
    upload.require_free(url, manifest)
    sent = send(store, manifest, url)
    publish(store, manifest, url, sent)
    return sent


def bring(root: Path, checkpoint: str, url: CopyUrl) -> Store:
    """Into another store, as a restore does first."""
    manifest = copy_list.get_copy(url, checkpoint)
    for host in HOSTS:
        list(download.receive_part(root, manifest, host, url))
    other = Store(root)
    other.publish(manifest)
    return other


def listed(url: CopyUrl) -> list[str]:
    return [entry.checkpoint for entry in copy_list.list_copies(url) if entry.manifest]


def require_same(store: Store, other: Store, manifest: Manifest) -> None:
    """Every file is the same, byte for byte, and no other is there."""
    here, there = folder(store, manifest), folder(other, manifest)
    names = {str(path.relative_to(here)) for path in here.rglob("*")}
    names = {name for name in names if not name.startswith("copy-")}
    assert names == {str(path.relative_to(there)) for path in there.rglob("*")}
    for name in names:
        if (here / name).is_file():
            assert (here / name).read_bytes() == (there / name).read_bytes(), name
            assert (there / name).stat().st_mode & 0o777 == 0o600


def memory_object(place: Place, host: str = "h1", number: int = 1) -> str:
    (name,) = (n for n in place.names() if n.endswith(f"/{host}/memory.pack/{number:06d}"))
    return name


@pytest.mark.parametrize("memory_format", list(MemoryFormat))
def test_a_copy_outlives_the_store(
    place: Place, store: Store, taken: Take, tmp_path: Path, memory_format: MemoryFormat
) -> None:
    manifest = taken(memory_format)
    sent = copy(store, manifest, place.url)
    assert all(part.sent_bytes == part.total_bytes > 0 for part in sent.values())
    kept = tmp_path / "kept"
    shutil.move(store.root, kept)
    assert listed(place.url) == [manifest.checkpoint]
    assert copy_list.look_at(place.url, manifest).state is CopyState.WHOLE
    other = bring(tmp_path / "other", manifest.checkpoint, place.url)
    require_same(Store(kept), other, manifest)
    assert other.verify(manifest.checkpoint).ok
    if memory_format is MemoryFormat.SPARSE:
        for part in manifest.hosts:
            with opened(folder(other, manifest) / part.host / part.memory_file, 0) as fd:
                assert allocated_bytes(fd) == part.file_bytes_allocated, "holes are holes again"


def test_of_an_increment_what_is_new_is_sent(place: Place, tmp_path: Path) -> None:
    """And a copy of it is whole without the copies of those before it."""
    chain = Chain(tmp_path, pages=4 * PAGE_COUNT)
    chain.change(Change("write", 0, 3 * PAGE_COUNT, host=1))
    first = chain.take()
    chain.change(Change("write", 7, 9, host=2))
    chain.change(Change("zero", 20, 22, host=1))
    chain.change(Change("move", 30, 60))
    second = chain.take()
    hosts = [part.host for part in second.hosts]
    all_of = {host: upload_all(chain.store, first, host, place.url) for host in hosts}
    publish(chain.store, first, place.url, all_of)
    sent = {host: upload_all(chain.store, second, host, place.url) for host in hosts}
    publish(chain.store, second, place.url, sent)
    new = sum(part.sent_bytes for part in sent.values())
    assert 0 < new < sum(part.sent_bytes for part in all_of.values()) // 4
    for part in second.hosts:
        assert sent[part.host].done_bytes == sent[part.host].total_bytes
    shutil.rmtree(chain.store.root)
    root = tmp_path / "other"
    for host in hosts:
        list(download.receive_part(root, second, host, place.url))
    other = Store(root)
    other.publish(copy_list.get_copy(place.url, second.checkpoint))
    assert other.verify(second.checkpoint, strict=True).ok
    found = np.zeros_like(chain.ram)
    for host in hosts:
        found |= loaded(other, second, host, tmp_path / "ram-there").reshape(chain.ram.shape)
    assert np.array_equal(found, chain.ram)


def upload_all(store: Store, manifest: Manifest, host: str, url: CopyUrl) -> PartCopied:
    return list(sending(store, manifest, host, url))[-1]


def loaded(store: Store, manifest: Manifest, host: str, path: Path) -> npt.NDArray[np.uint64]:
    with path.open("wb+") as file:
        file.truncate(manifest.memory_bytes)
        memory_file.load(store.read_part(manifest, host).memory, file.fileno())
        return np.fromfile(file, dtype=np.uint64)


def test_nothing_is_a_checkpoint_before_the_manifest(
    place: Place, store: Store, taken: Take
) -> None:
    manifest = taken()
    sent = send(store, manifest, place.url)
    assert len(place.names()) > len(HOSTS)
    assert listed(place.url) == []
    with pytest.raises(NotFound, match="there is no copy of"):
        copy_list.get_copy(place.url, manifest.checkpoint)
    publish(store, manifest, place.url, sent)
    assert listed(place.url) == [manifest.checkpoint]


def test_no_object_is_longer_than_a_piece(nearby: FolderPlace, store: Store, taken: Take) -> None:
    copy(store, taken(), nearby.url)
    data = [name for name in nearby.names() if not name.endswith(".json")]
    assert max(len(nearby.read(name)) for name in data) == PIECE_BYTES
    assert memory_object(nearby, number=2)


def test_what_is_there_is_not_sent_again(place: Place, store: Store, taken: Take) -> None:
    manifest = taken()
    copy(store, manifest, place.url)
    again = copy(store, manifest, place.url)
    assert all(part.sent_bytes == 0 for part in again.values())
    assert all(part.there_bytes == part.total_bytes for part in again.values())


def test_a_copy_goes_on_where_it_was(place: Place, store: Store, taken: Take) -> None:
    manifest = taken()
    send(store, manifest, place.url)
    gone = memory_object(place)
    place.remove(gone)
    again = send(store, manifest, place.url)
    assert again["h1"].sent_bytes == PIECE_BYTES
    assert again["h0"].sent_bytes == again["h2"].sent_bytes == 0


def test_what_a_copy_lost_is_seen_and_mended(
    place: Place, store: Store, taken: Take, tmp_path: Path
) -> None:
    manifest = taken()
    sent = copy(store, manifest, place.url)
    place.remove(memory_object(place))
    found = copy_list.look_at(place.url, manifest)
    assert found.state is CopyState.INCOMPLETE
    assert "1 objects are missing" in found.why
    with pytest.raises(StorageError, match=r"memory.pack/000001 for one, so the copy is not publ"):
        publish(store, manifest, place.url, sent)
    with pytest.raises(CheckpointCorrupt, match=r"memory.pack/000001.*it is missing"):
        bring(tmp_path / "other", manifest.checkpoint, place.url)
    assert not Store(tmp_path / "other").is_published(manifest.checkpoint)
    copy(store, manifest, place.url)
    assert bring(tmp_path / "other", manifest.checkpoint, place.url).verify(manifest.checkpoint).ok


@pytest.mark.parametrize("file", ["memory.pack/000001", "sums.arrow/000000", "vmcore/000000"])
def test_damage_is_found_and_mended(
    place: Place, store: Store, taken: Take, tmp_path: Path, file: str
) -> None:
    """No byte of it gets into a store as a checkpoint, and another copy makes it good."""
    manifest = taken()
    copy(store, manifest, place.url)
    (name,) = (name for name in place.names() if name.endswith(f"h0/{file}"))
    right = place.read(name)
    place.write(name, right[:-9] + bytes([right[-9] ^ 1]) + right[-8:])
    with pytest.raises(CheckpointCorrupt, match=file.partition("/")[0]) as told:
        bring(tmp_path / "other", manifest.checkpoint, place.url)
    assert "was altered" in str(told.value)
    other = Store(tmp_path / "other")
    assert other.list() == []
    assert not (folder(other, manifest) / "h0" / "pages.arrow").exists(), "by that it were whole"
    assert copy(store, manifest, place.url)["h0"].sent_bytes == len(right)
    assert place.read(name) == right


def test_an_object_that_is_longer_is_another(
    nearby: FolderPlace, store: Store, taken: Take, tmp_path: Path
) -> None:
    manifest = taken()
    copy(store, manifest, nearby.url)
    name = memory_object(nearby)
    right = nearby.read(name)
    nearby.write(name, right + right)
    assert copy_list.look_at(nearby.url, manifest).state is CopyState.INCOMPLETE
    with pytest.raises(CheckpointCorrupt, match=f"has not {len(right)} bytes"):
        bring(tmp_path / "other", manifest.checkpoint, nearby.url)
    copy(store, manifest, nearby.url)
    assert nearby.read(name) == right


def test_a_damaged_manifest_is_no_checkpoint(place: Place, store: Store, taken: Take) -> None:
    manifest = taken()
    copy(store, manifest, place.url)
    name = f"demo/{manifest.checkpoint}/manifest.json"
    place.write(name, place.read(name)[:-40])
    (entry,) = copy_list.list_copies(place.url)
    assert entry.manifest is None
    assert "manifest.json" in str(entry.error)
    with pytest.raises(CheckpointCorrupt):
        upload.require_free(place.url, manifest)


def test_another_checkpoint_of_that_name_stays(
    nearby: FolderPlace, store: Store, taken: Take
) -> None:
    manifest = taken()
    copy(store, manifest, nearby.url)
    before = {name: nearby.read(name) for name in nearby.names()}
    other = manifest.model_copy(update={"generation": 9})
    with pytest.raises(Conflict, match="another checkpoint called"):
        upload.require_free(nearby.url, other)
    assert copy_list.look_at(nearby.url, other).state is CopyState.OTHER
    assert before == {name: nearby.read(name) for name in nearby.names()}


def test_a_damaged_file_is_not_copied(nearby: FolderPlace, store: Store, taken: Take) -> None:
    manifest = taken()
    path = folder(store, manifest) / "h2" / "memory.pack"
    data = bytearray(path.read_bytes())
    data[5 * PAGE_SIZE] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointCorrupt, match=r"memory.pack: page \d+ was altered"):
        send(store, manifest, nearby.url)
    assert listed(nearby.url) == []


def test_what_is_being_copied_is_not_deleted(
    nearby: FolderPlace, store: Store, taken: Take
) -> None:
    manifest = taken()
    part = sending(store, manifest, "h0", nearby.url)
    next(part)
    with pytest.raises(Conflict):
        store.delete(manifest.checkpoint)
    list(part)
    store.delete(manifest.checkpoint)
    with pytest.raises(NotFound, match="nothing of checkpoint"):
        list(sending(store, manifest, "h1", nearby.url))
    with pytest.raises(NotFound):
        publish(store, manifest, nearby.url, {})
    assert listed(nearby.url) == []


def test_a_deletion_that_broke_off_counts(nearby: FolderPlace, store: Store, taken: Take) -> None:
    manifest = taken()
    sent = send(store, manifest, nearby.url)
    (folder(store, manifest) / "manifest.json").unlink()
    with pytest.raises(NotFound, match="there is no checkpoint"):
        publish(store, manifest, nearby.url, sent)
    assert listed(nearby.url) == []


def test_one_that_is_given_up_leaves_no_checkpoint(
    nearby: FolderPlace, store: Store, taken: Take
) -> None:
    manifest = taken()
    part = sending(store, manifest, "h0", nearby.url)
    next(part)
    part.close()  # type: ignore[attr-defined]
    assert listed(nearby.url) == []
    store.require_unpinned(manifest.checkpoint)
    copy(store, manifest, nearby.url)


def test_files_that_came_whole_stay(
    nearby: FolderPlace, store: Store, taken: Take, tmp_path: Path
) -> None:
    manifest, other = taken(), tmp_path / "other"
    copy(store, manifest, nearby.url)
    memory_path = other / "demo" / manifest.checkpoint / "h1" / "memory.pack"
    (first,) = list(download.receive_part(other, manifest, "h1", nearby.url))[-1:]
    assert first.sent_bytes == first.total_bytes
    assert (memory_path.parent / "pages.arrow").exists()
    memory_path.write_bytes(memory_path.read_bytes()[:-PAGE_SIZE])
    (again,) = list(download.receive_part(other, manifest, "h1", nearby.url))[-1:]
    assert again.sent_bytes == again.memory_bytes
    assert again.there_bytes == again.total_bytes - again.memory_bytes


def test_a_part_that_a_published_checkpoint_lacks(
    nearby: FolderPlace, store: Store, taken: Take
) -> None:
    manifest = taken()
    copy(store, manifest, nearby.url)
    shutil.rmtree(folder(store, manifest) / "h2")
    list(download.receive_part(store.root, manifest, "h2", nearby.url))
    assert store.verify(manifest.checkpoint).ok


def test_a_host_that_had_no_page(
    nearby: FolderPlace,
    store: Store,
    taken: Take,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    where = placement()
    where[where == 2] = 0
    monkeypatch.setattr(stored, "placement", lambda: where)
    manifest = taken()
    assert manifest.hosts[2].pages == 0
    copy(store, manifest, nearby.url)
    other = bring(tmp_path / "other", manifest.checkpoint, nearby.url)
    require_same(store, other, manifest)


def test_copies_are_on_record(nearby: FolderPlace, store: Store, taken: Take) -> None:
    manifest = taken()
    assert copy_records.read(store, manifest) == []
    copy(store, manifest, nearby.url)
    copy(store, manifest, nearby.url)
    (record,) = copy_records.read(store, manifest)
    assert record.url == nearby.url.shown
    secret = copy_url.parse("s3://AKIAUSER:very%2Fsecret@bucket/x?region=r&token=hidden")
    copy_records.write(store, manifest, secret, NOW)
    assert {each.url for each in copy_records.read(store, manifest)} == {
        nearby.url.shown,
        "s3://bucket/x?region=r",
    }
    store.delete(manifest.checkpoint)
    assert not folder(store, manifest).exists()


def test_a_place_that_is_not_there(place: Place, taken: Take) -> None:
    manifest = taken()
    elsewhere = place.url.whole.replace("copies", "none").replace("bucket", "tekcub")
    url = copy_url.parse(elsewhere)
    with pytest.raises(ConfigError, match="make it, or correct the URL"):
        upload.require_free(url, manifest)
    with pytest.raises(ConfigError, match="make it, or correct the URL"):
        copy_list.list_copies(url)
    assert place.names() == []


def test_a_limit_of_bytes_per_second(nearby: FolderPlace, store: Store, taken: Take) -> None:
    manifest = taken()
    part = upload.send_part(store, manifest, "h0", nearby.url, 400_000.0, PIECE_BYTES)
    *_, last = part
    most = 400_000.0 * last.seconds + PIECE_BYTES
    assert 0 < last.sent_bytes <= most


# Faults between here and an object store


def nth_put(number: int, fault: Fault) -> Callable[[Request], Fault | None]:
    """From that many objects on it happens to all that are put."""
    count = iter(range(10_000))
    return lambda request: fault if request.puts and next(count) >= number else None


def test_an_upload_that_fails_goes_on_later(
    server: ObjectStore,
    bucket: BucketPlace,
    store: Store,
    taken: Take,
    tmp_path: Path,
) -> None:
    manifest = taken()
    server.proxy.fault = nth_put(12, Fault.CUT)
    with pytest.raises(StorageError, match="could not be written") as told:
        copy(store, manifest, bucket.url)
    assert bucket.url.shown.partition("?")[0] in str(told.value)
    assert PASSWORD not in str(told.value)
    assert "repeat the command" in str(told.value)
    assert listed(bucket.url) == []
    server.proxy.fault = lambda request: None
    again = copy(store, manifest, bucket.url)
    assert sum(part.there_bytes for part in again.values()) > 0
    require_same(store, bring(tmp_path / "other", manifest.checkpoint, bucket.url), manifest)


def test_a_fault_that_passes_is_not_felt(
    server: ObjectStore, bucket: BucketPlace, store: Store, taken: Take
) -> None:
    met = iter([*[None] * 10, Fault.FAILED, Fault.CUT])
    server.proxy.fault = lambda request: next(met, None) if request.puts else None
    copy(store, taken(), bucket.url)
    assert next(met, "none is left") == "none is left"
    assert len(listed(bucket.url)) == 1


def test_the_manifest_that_fails_makes_no_checkpoint(
    server: ObjectStore, bucket: BucketPlace, store: Store, taken: Take
) -> None:
    manifest = taken()
    sent = send(store, manifest, bucket.url)
    server.proxy.fault = lambda request: (
        Fault.FAILED if request.puts and "manifest.json" in request.path else None
    )
    with pytest.raises(StorageError, match=r"manifest\.json"):
        publish(store, manifest, bucket.url, sent)
    server.proxy.fault = lambda request: None
    assert listed(bucket.url) == []
    assert copy_records.read(store, manifest) == []
    assert [name for name in bucket.names() if name.endswith("copy.json")], "it comes before"
    publish(store, manifest, bucket.url, sent)
    assert listed(bucket.url) == [manifest.checkpoint]


def test_a_listing_that_lags_hides_nothing(
    server: ObjectStore, bucket: BucketPlace, store: Store, taken: Take, tmp_path: Path
) -> None:
    """It may not be listed yet; whoever knows its name has it, and a repeat changes nothing."""
    manifest = taken()
    server.proxy.fault = lambda request: Fault.LATE if request.lists else None
    copy(store, manifest, bucket.url)
    assert listed(bucket.url) == []
    other = bring(tmp_path / "other", manifest.checkpoint, bucket.url)
    require_same(store, other, manifest)
    assert copy_list.look_at(bucket.url, manifest).state is CopyState.WHOLE
    before = bucket.names()
    copy(store, manifest, bucket.url)
    assert bucket.names() == before
    server.proxy.fault = lambda request: None
    assert listed(bucket.url) == [manifest.checkpoint]


def test_what_is_changed_on_the_way_is_noticed(
    server: ObjectStore, bucket: BucketPlace, store: Store, taken: Take
) -> None:
    manifest = taken()
    server.proxy.fault = lambda request: (
        Fault.CHANGED if request.puts and "memory.pack/000002" in request.path else None
    )
    with pytest.raises(StorageError, match=r"memory.pack/000002.* not what was sent"):
        send(store, manifest, bucket.url)
    server.proxy.fault = lambda request: None
    copy(store, manifest, bucket.url)
    assert listed(bucket.url) == [manifest.checkpoint]
