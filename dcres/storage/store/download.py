"""Bringing a copy of a checkpoint into a host's store, as if it had been taken there.

Every byte is compared while it comes: small files with their SHA-256 in the manifest, pages with
their checksums. A part's files are durable one by one, last the one by which a sweep knows that
a part is whole (`Store.sweep`); and the manifest comes after all parts.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path

from dcres.errors import CheckpointCorrupt, Conflict, NotFound
from dcres.linux.files import opened
from dcres.storage import layout
from dcres.storage.atomic import make_private_dirs, replaced
from dcres.storage.digest import FileSum, SummedFile, check_file
from dcres.storage.engine.buffers import Buffers
from dcres.storage.format import host_part, tables
from dcres.storage.format.manifest import HostPart, Manifest, Segment
from dcres.storage.store import copy_layout, marker
from dcres.storage.store.copy_layout import Lengths, Piece
from dcres.storage.store.copy_url import CopyUrl
from dcres.storage.store.folders import Folders
from dcres.storage.store.objects import Objects
from dcres.storage.store.part_files import Carried, carried_of, carried_pack
from dcres.storage.store.pieces import PartCopied, Worker
from dcres.storage.store.pins import Hold, pinned

_TRIES, _AGAIN_S = 5, 0.05


def receive_part(
    root: Path,
    manifest: Manifest,
    host: str,
    url: CopyUrl,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[PartCopied]:
    """Bring the part of `host` into the store `root`; tells how far it is.

    The last that it yields says what it took. Files that are there and whole stay. Raises
    CheckpointCorrupt for what is not as it was saved, StorageError, StoreFull, StoreReadOnly,
    Conflict while the checkpoint is being deleted here.
    """
    objects = Objects(url)
    lengths = copy_layout.read_lengths(objects, manifest)
    part = host_part.find_part(manifest, host)
    with _begun(root, manifest, host) as folder:
        yield from _Receiving(objects, manifest, part, lengths, folder, clock).run()


@contextmanager
def _begun(root: Path, manifest: Manifest, host: str) -> Iterator[Path]:
    """The folder of a part, its checkpoint pinned; that may be published, and lack the part."""
    marker.mark(root)
    folder, hold = Folders(root).part(manifest, host), Hold()
    for tries_left in reversed(range(_TRIES)):
        make_private_dirs(folder.parent)
        try:
            hold.take(manifest.checkpoint, pinned(folder.parent))
            break
        except (Conflict, NotFound):  # somebody sweeps it who came before the pin
            if not tries_left:
                raise
            time.sleep(_AGAIN_S)
    try:
        make_private_dirs(folder)
        yield folder
    finally:
        hold.drop()


class _Receiving:
    """One host's part on its way."""

    def __init__(
        self,
        objects: Objects,
        manifest: Manifest,
        part: HostPart,
        lengths: Lengths,
        folder: Path,
        clock: Callable[[], float],
    ) -> None:
        self._objects = objects
        self._manifest = manifest
        self._part = part
        self._lengths = lengths.of_part(part)
        self._piece_bytes = lengths.piece_bytes
        self._folder = folder
        self._clock = clock
        self._started = clock()
        self._buffers = Buffers(self._piece_bytes)
        self._lock = threading.Lock()
        self._received_bytes = self._there_bytes = 0

    def run(self) -> Iterator[PartCopied]:
        """Tables first, by which memory files are checked; at the end what makes the part whole."""
        segments = self._part.segments
        last = self._part.file(layout.PAGES if segments is None else segments[-1].table)
        assert last is not None, "a part has its tables"
        for file in self._part.files:
            if file != last:
                yield from self._small_file(file)
        if segments is None:
            part = host_part.memory_part(self._folder, self._manifest, self._part)
            for memory in carried_of(part):
                yield from self._memory_file(memory)
            yield from self._small_file(last)
        else:
            yield from self._packs(segments, last)

    def _packs(self, segments: Sequence[Segment], last: FileSum) -> Iterator[PartCopied]:
        """The packs, and then the table of the last, which is read before it has its name."""
        for segment in segments[:-1]:
            yield from self._pack(segment, self._folder / segment.table)
        if _is_whole(self._folder / last.name, last):
            yield from self._pack(segments[-1], self._folder / last.name)
            self._count(there_bytes=last.length_bytes)
        else:
            with replaced(self._folder / last.name) as fd:
                yield from self._fill(fd, last)
                yield from self._pack(segments[-1], Path(f"/proc/self/fd/{fd}"))
        yield self._state()

    def _pack(self, segment: Segment, table: Path) -> Iterator[PartCopied]:
        rows = tables.read_segment(table, self._manifest.page_count)
        yield from self._memory_file(carried_pack(self._folder / segment.pack, rows))

    def _small_file(self, file: FileSum) -> Iterator[PartCopied]:
        path = self._folder / file.name
        if _is_whole(path, file):
            self._count(there_bytes=file.length_bytes)
            yield self._state()
            return
        with replaced(path) as fd:
            yield from self._fill(fd, file)

    def _fill(self, fd: int, file: FileSum) -> Iterator[PartCopied]:
        written = SummedFile(fd)
        for piece in self._pieces(file.name):
            with self._read(piece) as data:
                written.write(data)
            self._count(received_bytes=piece.length_bytes)
            yield self._state()
        if written.sum(file.name) != file:
            what = "it was altered: its SHA-256 is not the manifest's"
            raise copy_layout.damaged(self._objects, self._place_of(file.name), what)

    def _memory_file(self, memory: Carried) -> Iterator[PartCopied]:
        name = memory.path.name
        if memory.length_bytes != self._lengths[name]:
            what = "its index has another number of pages than copy.json says"
            raise copy_layout.damaged(self._objects, self._place_of(name), what)
        if _has_all(memory, self._buffers):  # what is missing or not whole is brought
            self._count(there_bytes=memory.length_bytes)
            yield self._state()
            return
        with replaced(memory.path) as fd:
            os.ftruncate(fd, memory.stored_bytes)
            receive = partial(self._receive, memory, fd)
            with closing(Worker(receive, self._pieces(name), lambda: None).run()) as steps:
                for _ in steps:
                    yield self._state()
        yield self._state()

    def _receive(self, memory: Carried, fd: int, piece: Piece) -> None:
        with self._read(piece) as data:
            page = memory.damage(data, piece.offset_bytes)
            if page is not None:
                what = f"page {page} was altered: its checksum differs"
                raise copy_layout.damaged(self._objects, piece.path, what)
            memory.write(fd, data, piece.offset_bytes)
        self._count(received_bytes=piece.length_bytes)

    @contextmanager
    def _read(self, piece: Piece) -> Iterator[memoryview]:
        with self._buffers.lent() as whole:
            data = whole[: piece.length_bytes]
            if not self._objects.read_into(piece.path, data):
                what = f"it is missing, or has not {piece.length_bytes} bytes"
                raise copy_layout.damaged(self._objects, piece.path, what)
            yield data

    def _pieces(self, name: str) -> Iterator[Piece]:
        place = self._place_of(name)
        return copy_layout.pieces_of(place, self._lengths[name], self._piece_bytes)

    def _place_of(self, name: str) -> str:
        return copy_layout.place_of(self._manifest, self._part.host, name)

    def _state(self) -> PartCopied:
        return PartCopied(
            host=self._part.host,
            files=len(self._lengths),
            total_bytes=sum(self._lengths.values()),
            sent_bytes=self._received_bytes,
            there_bytes=self._there_bytes,
            seconds=self._clock() - self._started,
            memory_bytes=self._lengths[self._part.memory_file],
        )

    def _count(self, *, received_bytes: int = 0, there_bytes: int = 0) -> None:
        with self._lock:
            self._received_bytes += received_bytes
            self._there_bytes += there_bytes


def _has_all(memory: Carried, buffers: Buffers) -> bool:
    """Whether a memory file is there, and as it was saved."""
    try:
        with opened(memory.path, os.O_RDONLY) as fd, buffers.lent() as whole:
            memory.require_length(fd)
            read = memory.reader(fd)
            for offset in range(0, memory.length_bytes, len(whole)):
                read(whole[: memory.length_bytes - offset], offset)
    except (OSError, CheckpointCorrupt):
        return False
    return True


def _is_whole(path: Path, file: FileSum) -> bool:
    with suppress(CheckpointCorrupt):
        check_file(path, file)
        return True
    return False
