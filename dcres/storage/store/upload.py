"""Copying a checkpoint to a URL: every host its own part, then the manifest, which makes it one.

An object counts only once it was read back and found to be what was sent. What is there already is
read, too, and sent again only if it differs: so a copy that was interrupted goes on, and one that
was damaged is mended.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from datetime import datetime

from xxhash import xxh3_128_digest

from dcres.errors import Conflict, NotFound, StorageError, StoreReadOnly
from dcres.storage.engine.buffers import Buffers
from dcres.storage.format.manifest import Manifest
from dcres.storage.store import copy_layout, copy_records
from dcres.storage.store.copy_layout import PIECE_BYTES, Lengths, Piece
from dcres.storage.store.copy_url import CopyUrl
from dcres.storage.store.objects import Objects
from dcres.storage.store.part_files import PartFile, open_part
from dcres.storage.store.pieces import Pace, PartCopied, Worker
from dcres.storage.store.protocols import CheckpointStore

Job = tuple[PartFile, Piece]


def require_free(url: CopyUrl, manifest: Manifest) -> None:
    """That the place is there, and has no other checkpoint of that name; nothing is sent.

    Raises ConfigError, StorageError, Conflict.
    """
    objects = Objects(url)
    objects.require_place()
    with suppress(NotFound):
        if copy_layout.read_manifest(objects, manifest.checkpoint) != manifest:
            raise Conflict(
                f"at {url.shown} is another checkpoint called {manifest.checkpoint}; give "
                "another URL"
            )


def send_part(
    store: CheckpointStore,
    manifest: Manifest,
    host: str,
    url: CopyUrl,
    bytes_per_s: float | None = None,
    piece_bytes: int = PIECE_BYTES,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[PartCopied]:
    """Send the files of `host`, which `store` has, and read them back; tells how far it is.

    The last that it yields says what it took. May be repeated, and by several at once: what it
    writes is always the same. At most `bytes_per_s` go each way. Raises NotFound for a checkpoint
    that is gone, CheckpointCorrupt for a file that is not as it was saved, StorageError.
    """
    objects = Objects(url)
    with store.pin(manifest.checkpoint), open_part(store, manifest, host) as files:
        there = copy_layout.lengths_there(objects, manifest)
        known = copy_layout.known_names(objects, manifest, host)
        sending = _Sending(objects, host, files, there, piece_bytes, bytes_per_s, clock)
        sending.pass_over(file for file in files if file.name in known)
        yield from sending.run(_jobs(manifest, host, files, known, piece_bytes))


def _jobs(
    manifest: Manifest,
    host: str,
    files: Sequence[PartFile],
    known: Collection[str],
    piece_bytes: int,
) -> Iterator[Job]:
    for file in files:
        if file.name not in known:
            place = copy_layout.place_of(manifest, host, file.name)
            for piece in copy_layout.pieces_of(place, file.length_bytes, piece_bytes):
                yield file, piece


class _Sending:
    """One host's part on its way; `there` are lengths of objects that may be there already."""

    def __init__(
        self,
        objects: Objects,
        host: str,
        files: Sequence[PartFile],
        there: Mapping[str, int],
        piece_bytes: int,
        bytes_per_s: float | None,
        clock: Callable[[], float],
    ) -> None:
        self._objects = objects
        self._host = host
        self._files = files
        self._there = there
        self._buffers = Buffers(piece_bytes)
        self._clock = clock
        self._started = clock()
        self._up, self._down = Pace(bytes_per_s, clock), Pace(bytes_per_s, clock)
        self._lock = threading.Lock()
        self._sent_bytes = self._there_bytes = 0

    def run(self, jobs: Iterable[Job]) -> Iterator[PartCopied]:
        """Do all of `jobs`, and tell how far it is."""
        with closing(Worker(self._send, jobs, self._stop).run()) as steps:
            for _ in steps:
                yield self._state()
        yield self._state()

    def pass_over(self, files: Iterable[PartFile]) -> None:
        """These are there, in a copy that exists."""
        self._count(there_bytes=sum(file.length_bytes for file in files))

    def _stop(self) -> None:
        self._up.stop()
        self._down.stop()

    def _state(self) -> PartCopied:
        return PartCopied(
            host=self._host,
            files=len(self._files),
            total_bytes=sum(file.length_bytes for file in self._files),
            sent_bytes=self._sent_bytes,
            there_bytes=self._there_bytes,
            seconds=self._clock() - self._started,
            memory_bytes=self._files[-1].length_bytes,
        )

    def _send(self, job: Job) -> None:
        file, piece = job
        with self._buffers.lent() as whole:
            buffer = whole[: piece.length_bytes]
            file.read(buffer, piece.offset_bytes)
            digest = xxh3_128_digest(buffer)
            known = self._there.get(piece.path) == piece.length_bytes
            if known and self._is_there(piece, buffer, digest):
                self._count(there_bytes=piece.length_bytes)
                return
            if known:
                file.read(buffer, piece.offset_bytes)
            self._up.take(piece.length_bytes)
            self._objects.put(piece.path, buffer)
            if not self._is_there(piece, buffer, digest):
                raise StorageError(
                    f"{self._objects.url.of(piece.path)} is not what was sent; something there "
                    "loses or changes data: repeat the copy, or choose another place"
                )
            self._count(sent_bytes=piece.length_bytes)

    def _is_there(self, piece: Piece, buffer: memoryview, digest: bytes) -> bool:
        """Whether the object is what it should be, as it is read now; `buffer` is overwritten."""
        self._down.take(piece.length_bytes)
        return self._objects.read_into(piece.path, buffer) and xxh3_128_digest(buffer) == digest

    def _count(self, *, sent_bytes: int = 0, there_bytes: int = 0) -> None:
        with self._lock:
            self._sent_bytes += sent_bytes
            self._there_bytes += there_bytes


def publish(
    store: CheckpointStore,
    manifest: Manifest,
    url: CopyUrl,
    memory_bytes: Mapping[str, int],
    now: datetime,
    piece_bytes: int = PIECE_BYTES,
) -> None:
    """Make the copy exist, once `send_part` has ended for every host; repeatable.

    Every object has to be there as seen from here: hosts to which the URL means different places
    have made no copy. `memory_bytes` is what `send_part` has told of each host. Raises NotFound if
    the checkpoint was deleted meanwhile, StorageError.
    """
    whole = {} if manifest.chain else memory_bytes
    objects, lengths = Objects(url), Lengths(piece_bytes, whole)
    with store.pin(manifest.checkpoint):
        store.get(manifest.checkpoint)
        missing = copy_layout.missing_pieces(objects, manifest, lengths)
        if missing:
            raise StorageError(
                f"{len(missing)} objects of {manifest.checkpoint} are not at {url.shown} as the "
                f"host with the manifest sees it, {missing[0]} for one, so the copy is not "
                "published; if that is a folder of each host's own, give one that all hosts share; "
                "else repeat the copy"
            )
        _put_last(objects, manifest, lengths)
        with suppress(StoreReadOnly):  # it is a copy all the same, and its URL finds it
            copy_records.write(store, manifest, url, now)


def _put_last(objects: Objects, manifest: Manifest, lengths: Lengths) -> None:
    folder = copy_layout.folder_of(manifest.checkpoint)
    for path, data in (
        (f"{folder}/{copy_layout.COPY}", lengths.dumps()),
        copy_layout.published(manifest),
    ):
        buffer = memoryview(bytearray(len(data)))
        objects.put(path, data)
        if not (objects.read_into(path, buffer) and buffer == data):
            raise StorageError(
                f"{objects.url.of(path)} is not what was sent; repeat the copy, or choose another "
                "place"
            )
