"""Scrubbing: everything in a store is read, each file once, what was not read for longest first.

The small files of every part are checked first, and that they fit together; then memory files are
read, each against its own table. A checkpoint is pinned while it is read, and no longer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
from xxhash import xxh3_64_hexdigest

from dcres.errors import CheckpointCorrupt, Conflict, NotFound
from dcres.linux.files import forget_cached
from dcres.model.formats import MemoryFormat
from dcres.model.pages import PAGE_SIZE, Mask
from dcres.storage.damage import unreadable
from dcres.storage.digest import FileSum, check_file
from dcres.storage.engine import memory_file
from dcres.storage.format import host_part
from dcres.storage.format.checks import FileState, Verifier, VerifyReport
from dcres.storage.format.manifest import Manifest
from dcres.storage.store.pieces import Pace
from dcres.storage.store.protocols import CheckpointStore
from dcres.storage.store.scrub_files import File, Inode, Part, files_of, inode_of, parts_in
from dcres.storage.store.scrub_record import Known, ScrubRecord, Times
from dcres.storage.store.scrubbed import Damage, PartSeen, Scrubbed, VmScrubbed

_TELL_EVERY_S = 0.25
_REMEMBER_EVERY_S = 30.0
_NEVER = datetime.min.replace(tzinfo=UTC)


def scrub(
    store: CheckpointStore,
    manifests: Sequence[Manifest],
    bytes_per_s: float | None,
    older_s: float | None,
    clock: Callable[[], float] = time.monotonic,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> Generator[Scrubbed, None, None]:
    """Read what `store` has of these checkpoints; yields a few times a second how far it is.

    What was read in the last `older_s` seconds is left out, but for small files that say how the
    others fit together. When it is closed before its end, what was read until then is remembered.
    """
    pace, started = Pace(bytes_per_s, clock), clock()
    work = _Scrub(store, pace, _Readings(store, manifests, older_s, now), clock)
    with ThreadPoolExecutor(1, "scrub") as pool:
        try:
            done = pool.submit(work.run)
            while wait([done], _TELL_EVERY_S).not_done:
                yield replace(work.progress(), seconds=clock() - started)
        finally:
            pace.stop()
        done.result()
    yield replace(work.result(), seconds=clock() - started)


class _Readings:
    """The files of a store, and when each was last read whole, as far as that is known."""

    def __init__(
        self,
        store: CheckpointStore,
        manifests: Sequence[Manifest],
        older_s: float | None,
        now: Callable[[], datetime],
    ) -> None:
        self.parts = parts_in(store, manifests)
        self.files = files_of(self.parts)
        self._now = now
        self.records = {
            part.manifest.vm: ScrubRecord(part.folder.parents[2], part.manifest.vm)
            for part in self.parts
        }
        self._before: dict[str, Times] = {vm: each.read() for vm, each in self.records.items()}
        self._times: dict[str, Times] = {vm: dict(each) for vm, each in self._before.items()}
        self.due = {inode for inode, file in self.files.items() if self._is_due(file, older_s)}

    def last(self, inode: Inode | None) -> datetime:
        """When a file was last read; long ago if it never was, or is damaged."""
        file = None if inode is None else self.files.get(inode)
        return _NEVER if file is None else self._times[file.vm].get(file.known, _NEVER)

    def oldest_in(self, part: Part) -> datetime:
        """When that of its small files was read that was not read for longest."""
        small = (inode_of(part.folder / name) for name in part.small_names)
        return min(map(self.last, small), default=_NEVER)

    def oldest_of(self, vm: str) -> datetime | None:
        """The same of all files of a VM; None if one never was."""
        mine = (inode for inode, file in self.files.items() if file.vm == vm)
        oldest = min(map(self.last, mine), default=_NEVER)
        return None if oldest == _NEVER else oldest

    def note(self, file: File, *, whole: bool) -> None:
        """It was read now. A damaged one is forgotten: it is to be found the next time, too."""
        if whole:
            self._times[file.vm][file.known] = self._now()
        else:
            self._times[file.vm].pop(file.known, None)

    def remember(self) -> None:
        """Put on record what has changed; what is in no checkpoint any more is dropped."""
        for vm, record in self.records.items():
            there = {file.known for file in self.files.values() if file.vm == vm}
            times, before = self._times[vm], self._before[vm]
            fresh = {k: at for k, at in times.items() if k in there and before.get(k) != at}
            gone: set[Known] = {known for known in before if known not in there & times.keys()}
            if fresh or gone:
                record.write(fresh, gone)

    def _is_due(self, file: File, older_s: float | None) -> bool:
        at = self._times[file.vm].get(file.known)
        if older_s is None or at is None:
            return True
        return not 0 <= (self._now() - at).total_seconds() < older_s


class _Scrub:
    """One scrubbing of one store."""

    def __init__(
        self,
        store: CheckpointStore,
        pace: Pace,
        readings: _Readings,
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._pace = pace
        self._clock = clock
        self._readings = readings
        self._files = readings.files
        self._read: dict[Inode, CheckpointCorrupt | None] = {}
        self._damages: dict[Inode | Path, Damage] = {}
        self._changed: dict[str, None] = {}
        self._seen: list[PartSeen] = []
        self._done_bytes = 0
        self._remembered = clock()

    def run(self) -> None:
        """All of it. Raises Stopped once the pace is."""
        readings = self._readings
        try:
            for part in sorted(readings.parts, key=readings.oldest_in):
                self._small_files(part)
                self._remember_now_and_then()
            of_pages = [
                inode
                for inode, file in self._files.items()
                if file.has_pages and inode in readings.due
            ]
            for inode in sorted(of_pages, key=readings.last):
                self._memory_file(inode, self._files[inode])
                self._remember_now_and_then()
        finally:
            readings.remember()

    def progress(self) -> Scrubbed:
        """How far it is."""
        total_bytes = sum(self._files[inode].length_bytes for inode in self._readings.due)
        return Scrubbed(max(total_bytes, self._done_bytes), self._done_bytes)

    def result(self) -> Scrubbed:
        """What came of it, once it is over."""
        return replace(
            self.progress(),
            vms=tuple(self._of_vm(vm) for vm in sorted(self._readings.records)),
            damaged=tuple(self._damages.values()),
            changed=tuple(self._changed),
            parts=tuple(self._seen),
        )

    def _of_vm(self, vm: str) -> VmScrubbed:
        mine = {inode: file for inode, file in self._files.items() if file.vm == vm}
        read = [file.length_bytes for inode, file in mine.items() if inode in self._read]
        return VmScrubbed(
            vm=vm,
            files=len(read),
            read_bytes=sum(read),
            skipped=len(mine.keys() - self._readings.due - self._read.keys()),
            damaged=sum(each.vm == vm for each in self._damages.values()),
            oldest=self._readings.oldest_of(vm),
            trouble=self._readings.records[vm].trouble,
        )

    def _remember_now_and_then(self) -> None:
        self._pace.take(0)
        if self._clock() - self._remembered > _REMEMBER_EVERY_S:
            self._readings.remember()
            self._remembered = self._clock()

    @contextmanager
    def _pinned(self, part: Part) -> Iterator[bool]:
        """Whether the checkpoint is there; then it stays until the end of the block."""
        checkpoint = part.manifest.checkpoint
        with ExitStack() as held:
            try:
                held.enter_context(self._store.pin(checkpoint))
                there = not part.published or self._store.is_published(checkpoint)
            except (NotFound, Conflict):
                there = False
            if not there:
                self._changed[checkpoint] = None
            yield there

    # Small files

    def _small_files(self, part: Part) -> None:
        """Tables, history and VM core, and that they fit together; and which files are missing."""
        with self._pinned(part) as there:
            if not there:
                return
            report, mask = self._verified(part, self._check_due)
            if not report.ok:  # what was left out may be the cause
                report, mask = self._verified(part, self._check_once)
            for file in report.files:
                if file.problem is not None:
                    self._damaged(part, file.name, file.state, file.problem)
            for name in part.memory_names:
                if inode_of(part.folder / name) is None:
                    self._missing(part, name)
            self._seen.append(_seen(part, mask))

    def _verified(
        self, part: Part, check: Callable[[Path, FileSum], None]
    ) -> tuple[VerifyReport, Mask | None]:
        verifier = Verifier(part.manifest, pages_too=False, check_file=check)
        if part.manifest.memory_format is MemoryFormat.SEGMENTED:
            return verifier.report_of(part.folder, part.host)
        for name in part.small_names:  # of earlier formats, which are parsed as they are read
            self._begin_reading(part.folder / name)
        report, mask = verifier.report_of(part.folder, part.host)
        damaged = {file.name for file in report.files if not file.ok}
        for name in part.small_names:
            inode = inode_of(part.folder / name)
            if inode in self._files and inode not in self._read:
                self._finish(inode, None, whole=name not in damaged)
        return report, mask

    def _check_due(self, path: Path, expected: FileSum) -> None:
        inode = inode_of(path)
        if inode in self._readings.due or inode not in self._files:
            self._check_once(path, expected)

    def _check_once(self, path: Path, expected: FileSum) -> None:
        """Check a file, or repeat what came of it under another name. Raises CheckpointCorrupt."""
        inode = inode_of(path)
        if inode in self._read:
            if (known := self._read[inode]) is not None:
                raise known
            return
        self._begin_reading(path)
        check = partial(check_file, path, expected)
        if inode not in self._files:
            check()
        else:
            error = _error_of(check)
            self._finish(inode, error, whole=error is None)
            if error is not None:
                raise error

    def _begin_reading(self, path: Path) -> None:
        with suppress(OSError):
            self._pace.take(path.stat().st_size)
            forget_cached(path)

    def _finish(self, inode: Inode, error: CheckpointCorrupt | None, *, whole: bool) -> None:
        self._done_bytes += self._files[inode].length_bytes
        self._read[inode] = error
        self._readings.note(self._files[inode], whole=whole)

    # Files of pages

    def _memory_file(self, inode: Inode, file: File) -> None:
        """Read it by the first of its names that is there still."""
        for part in file.of:
            path = part.folder / file.name
            with self._pinned(part) as there:
                if there and inode_of(path) == inode:
                    self._pages(inode, file, part)
                    return
                if there and inode_of(path) is None:
                    self._missing(part, file.name)

    def _pages(self, inode: Inode, file: File, part: Part) -> None:
        try:
            memory = part.memory(file.name)
        except CheckpointCorrupt:
            self._readings.note(file, whole=False)  # its table was told already
            return
        before = self._done_bytes

        def go_on(pages: int) -> None:  # what is a hole takes no reading
            rest_bytes = before + file.length_bytes - self._done_bytes
            length_bytes = min(pages * PAGE_SIZE, rest_bytes)
            self._done_bytes += length_bytes
            self._pace.take(length_bytes)

        error = _error_of(partial(memory_file.verify, memory, go_on))
        self._done_bytes = before
        self._finish(inode, error, whole=error is None)
        if error is not None:
            self._damaged(part, file.name, FileState.of(error), str(error))

    # Damage

    def _missing(self, part: Part, name: str) -> None:
        error = unreadable(part.folder / name, FileNotFoundError())
        self._damaged(part, name, FileState.MISSING, str(error))

    def _damaged(self, part: Part, name: str, state: FileState, problem: str) -> None:
        path = part.folder / name
        inode = inode_of(path)
        ids: tuple[str, ...] = (part.manifest.checkpoint,)
        if inode is not None and inode in self._files:
            file = self._files[inode]
            ids = tuple(each.manifest.checkpoint for each in file.of)
        damage = Damage(part.manifest.vm, part.host, name, state, problem, ids)
        self._damages.setdefault(inode or path, damage)


def _error_of(check: Callable[[], object]) -> CheckpointCorrupt | None:
    try:
        check()
    except CheckpointCorrupt as error:
        return error
    return None


def _seen(part: Part, mask: Mask | None) -> PartSeen:
    manifest, placed = part.manifest, list[tuple[str, str]]()
    if part.host == manifest.main.host:
        with suppress(CheckpointCorrupt):
            placement = host_part.read_placement(part.folder, manifest)
            for index, each in enumerate(manifest.hosts):
                placed.append((each.host, _digest(placement == index)))
    pages = None if mask is None else _digest(mask)
    return PartSeen(manifest.checkpoint, part.host, pages, tuple(placed))


def _digest(mask: Mask) -> str:
    return xxh3_64_hexdigest(np.packbits(mask).tobytes())
