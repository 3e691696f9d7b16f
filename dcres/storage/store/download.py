"""Bringing a copy of a checkpoint into a host's store, as if it had been taken there.

Every byte is compared while it comes: small files with their SHA-256 in the manifest, pages with
their checksums. A part's files are durable one by one, its page table last, by which a sweep knows
that a part is whole (`Store.sweep`); and the manifest comes after all parts.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path

from dcres.errors import CheckpointCorrupt, Conflict, NotFound
from dcres.model.pages import PAGE_SIZE
from dcres.storage import layout
from dcres.storage.atomic import make_private_dirs, replaced
from dcres.storage.digest import FileSum, SummedFile, check_file
from dcres.storage.engine import memory_file
from dcres.storage.engine.buffers import Buffers
from dcres.storage.format import host_part
from dcres.storage.format.manifest import HostPart, Manifest
from dcres.storage.store import copy_layout, marker
from dcres.storage.store.copy_layout import Lengths, Piece
from dcres.storage.store.copy_url import CopyUrl
from dcres.storage.store.folders import Folders
from dcres.storage.store.objects import Objects
from dcres.storage.store.part_files import ReceivedMemory, stored_pages
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
        """Tables first, by which the memory file is checked; the page table at the end."""
        last = host_part.listed(self._manifest, self._part, layout.PAGES)
        for file in self._part.files:
            if file != last:
                yield from self._small_file(file)
        yield from self._memory_file()
        yield from self._small_file(last)

    def _small_file(self, file: FileSum) -> Iterator[PartCopied]:
        path = self._folder / file.name
        if _is_whole(path, file):
            self._count(there_bytes=file.length_bytes)
            yield self._state()
            return
        with replaced(path) as fd:
            written = SummedFile(fd)
            for piece in self._pieces(file.name):
                with self._read(piece) as data:
                    written.write(data)
                self._count(received_bytes=piece.length_bytes)
                yield self._state()
            if written.sum(file.name) != file:
                path_there = f"{self._objects_folder}/{file.name}"
                what = "it was altered: its SHA-256 is not the manifest's"
                raise copy_layout.damaged(self._objects, path_there, what)

    def _memory_file(self) -> Iterator[PartCopied]:
        memory = host_part.memory_part(self._folder, self._manifest, self._part).read()
        name = self._part.memory_file
        if len(stored_pages(memory)) * PAGE_SIZE != self._lengths[name]:
            what = "its index has another number of pages than copy.json says"
            raise copy_layout.damaged(self._objects, f"{self._objects_folder}/{name}", what)
        with suppress(CheckpointCorrupt):  # what is missing or not whole is brought
            memory_file.verify(memory)
            self._count(there_bytes=self._lengths[name])
            yield self._state()
            return
        with replaced(memory.path) as fd:
            received = ReceivedMemory.begun(memory, self._manifest, fd)
            pieces = Worker(partial(self._receive, received), self._pieces(name), lambda: None)
            with closing(pieces.run()) as steps:
                for _ in steps:
                    yield self._state()
        yield self._state()

    def _receive(self, received: ReceivedMemory, piece: Piece) -> None:
        with self._read(piece) as data:
            page = received.damage(data, piece.offset_bytes)
            if page is not None:
                what = f"page {page} was altered: its checksum differs"
                raise copy_layout.damaged(self._objects, piece.path, what)
            received.write(data, piece.offset_bytes)
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
        folder = self._objects_folder
        return copy_layout.pieces_of(folder, name, self._lengths[name], self._piece_bytes)

    @property
    def _objects_folder(self) -> str:
        return copy_layout.part_folder(self._manifest, self._part.host)

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


def _is_whole(path: Path, file: FileSum) -> bool:
    with suppress(CheckpointCorrupt):
        check_file(path, file)
        return True
    return False
