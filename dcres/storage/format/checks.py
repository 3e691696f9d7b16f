"""Verifying a checkpoint: every byte of every file, and that the hosts' parts fit together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np

from dcres.errors import CheckpointCorrupt, FileMissing
from dcres.model.formats import MemoryFormat
from dcres.model.pages import Mask
from dcres.storage import layout
from dcres.storage.digest import FileSum, Sums, check_file
from dcres.storage.engine import memory_file
from dcres.storage.engine.expected import MemoryFile
from dcres.storage.engine.transfer import Progress
from dcres.storage.format import host_part, tables
from dcres.storage.format.manifest import HostPart, Manifest, Role, listed

T = TypeVar("T")


class FileState(StrEnum):
    """What a file of a checkpoint was found to be."""

    WHOLE = "whole"
    MISSING = "missing"
    CORRUPT = "corrupt"

    @classmethod
    def of(cls, error: CheckpointCorrupt) -> FileState:
        """That of a file of which this was raised."""
        return cls.MISSING if isinstance(error, FileMissing) else cls.CORRUPT


@dataclass(frozen=True, slots=True)
class FileResult:
    """One file, and what is wrong with it, if anything is.

    `also_in` are other checkpoints that a damaged file belongs to: it is the same file there.
    """

    host: str
    name: str
    problem: str | None = None
    state: FileState = FileState.WHOLE
    also_in: tuple[str, ...] = ()

    @classmethod
    def damaged(cls, host: str, name: str, error: CheckpointCorrupt) -> Self:
        """One of which `error` was raised."""
        return cls(host, name, str(error), FileState.of(error))

    @property
    def ok(self) -> bool:
        """Whether the file is as it was written."""
        return self.problem is None

    def to_dict(self) -> dict[str, Any]:
        """As ``dcres verify --json`` prints it."""
        return {**asdict(self), "ok": self.ok}


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """The result for every file, in the manifest's order; `pages` were read and compared."""

    checkpoint: str
    pages: int
    files: tuple[FileResult, ...]

    @property
    def ok(self) -> bool:
        """Whether the whole checkpoint can be trusted."""
        return all(file.ok for file in self.files)

    def naming(self, others: Callable[[FileResult], tuple[str, ...]]) -> Self:
        """The same with what `others` says of each damaged file: who else has it."""
        files = (
            file if file.ok or file.also_in else replace(file, also_in=others(file))
            for file in self.files
        )
        return replace(self, files=tuple(files))


@dataclass(frozen=True, slots=True)
class VerifiedPart:
    """What was found in one host's files; another host may be told, to see that all fit together.

    `bits` are the pages that it saved, one bit each; None where that is unknown.
    """

    host: str
    report: VerifyReport
    bits: bytes | None

    @classmethod
    def of(cls, host: str, report: VerifyReport, mask: Mask | None) -> Self:
        """The same with a mask."""
        return cls(host, report, None if mask is None else np.packbits(mask).tobytes())

    def mask(self, page_count: int) -> Mask | None:
        """The pages that the host saved, or None."""
        if self.bits is None:
            return None
        bits = np.frombuffer(self.bits, dtype=np.uint8)
        return np.unpackbits(bits, count=page_count).view(np.bool_)


@dataclass(slots=True)
class Verifier:
    """Checks parts of one checkpoint and collects results; raises the first problem if strict."""

    manifest: Manifest
    progress: Progress | None = None
    strict: bool = False
    pages_too: bool = True  # else the small files alone
    check_file: Callable[[Path, FileSum], None] = check_file
    _pages: int = 0
    _found: dict[tuple[str, str], FileResult] = field(default_factory=dict)

    def part(self, folder: Path, host: str) -> Mask | None:
        """Check all files of `host`; the mask of its pages, or None where that is unknown."""
        part = host_part.find_part(self.manifest, host)
        if self.manifest.memory_format is MemoryFormat.SEGMENTED:
            return self._segments(folder, part)
        sums = self._try(host, layout.SUMS, partial(self._read_sums, folder, part))
        mask = sums[0] if sums is not None else None
        self._try(host, layout.PAGES, partial(self._check_here, folder, part, mask))
        for file in part.files:
            if file.name not in (layout.SUMS, layout.PAGES):
                self._try(host, file.name, partial(self._check_other, folder / file.name, file))
        if part.role is Role.MAIN:  # a restore would miss it, and only then
            self._try(host, layout.HISTORY, partial(listed, self.manifest, part, layout.HISTORY))
        if sums is not None and self.pages_too and self._is_whole(host, layout.INDEX):
            self._try(host, part.memory_file, partial(self._check_memory, folder, part))
        return mask

    def report_of(self, folder: Path, host: str) -> tuple[VerifyReport, Mask | None]:
        """As `part`, and what was found."""
        mask = self.part(folder, host)
        return self.report(), mask

    def _segments(self, folder: Path, part: HostPart) -> Mask | None:
        """The same for a part that has segments."""
        for file in part.files:
            self._try(part.host, file.name, partial(self.check_file, folder / file.name, file))
        if part.role is Role.MAIN:
            for name, read in (
                (layout.PAGES, host_part.read_placement),
                (layout.HISTORY, host_part.read_history),
            ):
                self._try_last(part, name, partial(read, folder, self.manifest))
        read_memory = partial(self._read_memory, folder, part)
        memory = self._try_last(part, layout.SEGMENT, read_memory)
        if memory is None:
            return None
        for file_ in memory.each() if self.pages_too else ():
            self._try(part.host, file_.path.name, partial(self._verify, file_))
        return memory.mask

    def include(self, part: VerifiedPart) -> None:
        """What another verifier found in a part."""
        self._pages += part.report.pages
        for file in part.report.files:
            self._found[file.host, file.name] = file

    def agreement(self, folder: Path, masks: dict[str, Mask]) -> None:
        """Check each host's pages against the placement file in the main host's `folder`.

        With a mask for every host this means: each page that is anywhere is in exactly the
        memory file that the placement names.
        """
        check = partial(self._check_agreement, folder, masks)
        if self.manifest.memory_format is MemoryFormat.SEGMENTED:
            self._try_last(self.manifest.main, layout.PAGES, check)
        else:
            self._try(self.manifest.main.host, layout.PAGES, check)

    def report(self) -> VerifyReport:
        """What was found so far."""
        return VerifyReport(self.manifest.checkpoint, self._pages, tuple(self._found.values()))

    def _try(self, host: str, name: str, check: Callable[[], T]) -> T | None:
        key = (host, name)
        self._found.setdefault(key, FileResult(host, name))
        try:
            return check()
        except CheckpointCorrupt as error:
            if self.strict:
                raise
            if self._found[key].ok:
                self._found[key] = FileResult.damaged(host, name, error)
            return None

    def _is_whole(self, host: str, name: str) -> bool:
        """Whether nothing was found wrong with a file until now."""
        return (host, name) not in self._found or self._found[host, name].ok

    def _try_last(self, part: HostPart, name: str, check: Callable[[], T]) -> T | None:
        """Check the files of one kind of all segments together, under the last one's name.

        None where one of them has been found wrong already.
        """
        names = [segment.file(name) for segment in part.segments or ()]
        if not all(self._is_whole(part.host, each) for each in names):
            return None
        return self._try(part.host, names[-1], check)

    def _read_sums(self, folder: Path, part: HostPart) -> tuple[Mask, Sums]:
        return host_part.memory_part(folder, self.manifest, part).read_sums()

    def _check_here(self, folder: Path, part: HostPart, mask: Mask | None) -> None:
        here = host_part.read_here(folder, self.manifest, part)
        if mask is not None:
            host_part.require_same(folder / layout.PAGES, here, mask, part.host)

    def _check_other(self, path: Path, expected: FileSum) -> None:
        match path.name:
            case layout.HISTORY:
                tables.read_history(path, self.manifest.page_count, expected)
            case layout.INDEX:
                tables.read_index(path, self.manifest.page_count, expected)
            case _:
                self.check_file(path, expected)

    def _read_memory(self, folder: Path, part: HostPart) -> MemoryFile:
        return host_part.memory_part(folder, self.manifest, part).read()

    def _check_memory(self, folder: Path, part: HostPart) -> None:
        self._verify(self._read_memory(folder, part))

    def _verify(self, memory: MemoryFile) -> None:
        self._pages += memory_file.verify(memory, self.progress)

    def _check_agreement(self, folder: Path, masks: dict[str, Mask]) -> None:
        placement = host_part.read_placement(folder, self.manifest)
        for index, part in enumerate(self.manifest.hosts):
            if part.host in masks:
                path = folder / host_part.placement_file(self.manifest)
                host_part.require_same(path, placement == index, masks[part.host], part.host)
