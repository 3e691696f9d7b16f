"""What a host has merged: all of its part of a checkpoint as one segment, beside that part's files.

No manifest names it when it is made, so that checkpoint stays as it is. Increments that come later
may have it in place of all segments up to that checkpoint's. A small file that is written last says
that it is whole, and what each of its files must be.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dcres.linux.removal import CheckpointFolder
from dcres.storage import layout
from dcres.storage.atomic import sync_folder, write_durably
from dcres.storage.digest import FileSum
from dcres.storage.format.manifest import MergedSet, Segment
from dcres.storage.format.versions import framed


@dataclass(frozen=True, slots=True)
class Merged:
    """A merged `segment` in a host's `folder`, and the small files that belong to it."""

    folder: Path
    segment: Segment
    files: tuple[FileSum, ...]

    def confirm(self) -> None:
        """Say that it is whole: all its files are durable. Raises StoreFull."""
        said = MergedSet(segment=self.segment, files=self.files)
        text = framed(said.model_dump(mode="json"))
        write_durably(_path(self.folder, self.segment.checkpoint), text.encode("ascii"))


def find_merged(folder: Path, checkpoint: str) -> Merged | None:
    """What is merged in `folder`, a host's part of `checkpoint`.

    None unless all of it was written; whether its files are still as they were, `link_base` sees.
    """
    try:
        said = _said(_path(folder, checkpoint).read_text("ascii"))
    except (OSError, ValueError):  # nothing is there, or what a disk has made of it
        return None
    if not said.segment.merged or said.segment.checkpoint != checkpoint:
        return None
    return Merged(folder, said.segment, said.files)


def _said(text: str) -> MergedSet:
    """What the small file says. Raises ValueError for any text but what `confirm` writes."""
    values = json.loads(text)
    if not isinstance(values, dict):
        raise ValueError("it is not a JSON object")
    values.pop("checksum", None)
    said = MergedSet.model_validate(values)
    if framed(said.model_dump(mode="json")) != text:
        raise ValueError("it was altered: its checksum differs")
    return said


def newest_merged(folder_of: Callable[[str], Path], segments: Sequence[Segment]) -> Merged | None:
    """The one in the newest checkpoint that has one, and so takes most of `segments`' place."""
    for segment in reversed(segments):
        if segment.merged:
            break
        if (found := find_merged(folder_of(segment.checkpoint), segment.checkpoint)) is not None:
            return found
    return None


def after(segments: Sequence[Segment], merged: Merged | None) -> tuple[Segment, ...]:
    """Those of `segments` that are newer than what is merged."""
    if merged is None:
        return tuple(segments)
    at = [segment.checkpoint for segment in segments].index(merged.segment.checkpoint)
    return tuple(segments[at + 1 :])


def is_to_be_merged(pages: int, segments: Sequence[Segment], merged: Merged | None) -> bool:
    """Whether a part with so many `pages` has too many segments, or few of their pages are its own.

    What is `merged` already counts in their place.
    """
    first = () if merged is None else (merged.segment,)
    left = (*first, *after(segments, merged))
    places = sum(segment.places for segment in left)
    return len(left) >= layout.MERGE_SEGMENTS or (len(left) > 1 and 2 * pages < places)


def remove_merged(folder: Path, checkpoint: str) -> None:
    """Remove what is merged in `folder`, whole or not, as far as it is there. Raises OSError.

    What other checkpoints have of it by their links stays theirs.
    """
    begin = layout.by_origin(checkpoint, layout.MERGED) + "."
    ours = CheckpointFolder(folder.parent)
    ours.remove_file(_path(folder, checkpoint))  # first: then nobody believes in the rest
    for path in sorted(folder.glob(f"{begin}*")) + sorted(folder.glob(f".{begin}*.tmp")):
        ours.remove_file(path)
    if folder.is_dir():
        sync_folder(folder)


def _path(folder: Path, checkpoint: str) -> Path:
    return folder / layout.by_origin(checkpoint, f"{layout.MERGED}.{layout.MERGED_SET}")
