"""What a copy of a checkpoint looks like below a URL; docs/format.md ("Copies") has every name.

A file is cut into *pieces*, each an object of its own that is put in one call: so none is ever half
there, little memory is needed, and what was interrupted goes on at the next piece.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dcres.errors import CheckpointCorrupt, NotFound
from dcres.model.pages import PAGE_SIZE
from dcres.storage import layout
from dcres.storage.format.manifest import HostPart, Manifest, dumps, loads
from dcres.storage.format.versions import canonical
from dcres.storage.store.objects import Objects

PIECE_BYTES = 8 << 20
COPY = "copy.json"
SHARED = "shared"  # no checkpoint is called so
_VERSION = 1
_MOST_MANIFEST_BYTES = 64 << 20
_REMEDY = "repeat the copy, or use another one"


@dataclass(frozen=True, slots=True)
class Piece:
    """One object: the bytes of a file from an offset on."""

    path: str
    offset_bytes: int
    length_bytes: int


@dataclass(frozen=True, slots=True)
class Lengths:
    """How a copy was cut: the length of pieces, and by host that of what its memory file holds.

    Of segmented checkpoints the manifest says the latter.
    """

    piece_bytes: int
    memory_bytes: Mapping[str, int]

    def of_part(self, part: HostPart) -> dict[str, int]:
        """The length of every file of a part, the memory file included."""
        lengths = {file.name: file.length_bytes for file in part.files}
        if part.segments is None:
            return {**lengths, part.memory_file: self.memory_bytes[part.host]}
        return {**lengths, **{each.pack: each.places * PAGE_SIZE for each in part.segments}}

    def dumps(self) -> bytes:
        """As it is stored."""
        values = {
            "format_version": _VERSION,
            "memory_bytes": dict(self.memory_bytes),
            "piece_bytes": self.piece_bytes,
        }
        whole = {**values, "checksum": _checksum(values)}
        return json.dumps(whole, sort_keys=True, indent=2).encode() + b"\n"


def folder_of(checkpoint: str) -> str:
    """Where the objects of a checkpoint are."""
    return f"{layout.vm_of(checkpoint)}/{checkpoint}"


def place_of(manifest: Manifest, host: str, name: str) -> str:
    """Where the objects of one file of a host's part are.

    Files that are called by their checkpoint are those of later ones as well, and are there once.
    """
    shared = layout.has_origin(name)
    folder = f"{manifest.vm}/{SHARED}" if shared else folder_of(manifest.checkpoint)
    return f"{folder}/{layout.checked_host(host)}/{name}"


def pieces_of(place: str, length_bytes: int, piece_bytes: int) -> Iterator[Piece]:
    """The objects of a file, in order; none for an empty one."""
    for number, offset in enumerate(range(0, length_bytes, piece_bytes)):
        length = min(piece_bytes, length_bytes - offset)
        yield Piece(f"{place}/{number:06d}", offset, length)


def all_pieces(manifest: Manifest, lengths: Lengths) -> Iterator[Piece]:
    """Every object of a copy, but for the two that are put last."""
    for part in manifest.hosts:
        for name, length_bytes in lengths.of_part(part).items():
            place = place_of(manifest, part.host, name)
            yield from pieces_of(place, length_bytes, lengths.piece_bytes)


def lengths_there(objects: Objects, manifest: Manifest) -> dict[str, int]:
    """The lengths of all objects, by their paths, that may be a copy's; a listing may be behind."""
    folders = [folder_of(manifest.checkpoint)]
    if manifest.chain:
        folders.append(f"{manifest.vm}/{SHARED}")
    return {path: n for folder in folders for path, n in objects.lengths(folder).items()}


def known_names(objects: Objects, manifest: Manifest, host: str) -> frozenset[str]:
    """Files of a host's part that are there, since a copy of an earlier checkpoint has them.

    What that says of them is what `manifest` says, or they do not count.
    """
    for checkpoint in reversed(manifest.chain[:-1]):
        with suppress(NotFound, CheckpointCorrupt):
            earlier = read_manifest(objects, checkpoint)
            there = {part.host: part for part in earlier.hosts}.get(host)
            mine = {part.host: part for part in manifest.hosts}[host]
            if there is None:
                return frozenset()
            files = {file.name for file in {*there.files} & {*mine.files}}
            packs = {each.pack for each in {*(there.segments or ())} & {*(mine.segments or ())}}
            return frozenset(name for name in files | packs if layout.has_origin(name))
    return frozenset()


def missing_pieces(objects: Objects, manifest: Manifest, lengths: Lengths) -> list[str]:
    """The paths of objects that are not there as long as they must be."""
    listed = lengths_there(objects, manifest)
    late = (p for p in all_pieces(manifest, lengths) if listed.get(p.path) != p.length_bytes)
    # A listing may be behind, and the object itself is not.
    return [piece.path for piece in late if objects.length(piece.path) != piece.length_bytes]


def read_manifest(objects: Objects, checkpoint: str) -> Manifest:
    """The manifest of a copy. Raises NotFound if there is no copy, CheckpointCorrupt."""
    path = f"{folder_of(checkpoint)}/{layout.MANIFEST}"
    where = objects.url.of(path)
    try:
        text = objects.read(path, _MOST_MANIFEST_BYTES).decode("ascii")
    except NotFound:
        raise NotFound(
            f"there is no copy of checkpoint {checkpoint} at {objects.url.shown}; "
            "`dcres checkpoints --from URL` lists those that there are"
        ) from None
    except UnicodeDecodeError:
        raise damaged(objects, path, "it is not ASCII") from None
    manifest = loads(text, Path(where))
    if manifest.checkpoint != checkpoint:
        raise damaged(objects, path, f"it is of checkpoint {manifest.checkpoint}")
    return manifest


def read_lengths(objects: Objects, manifest: Manifest) -> Lengths:
    """How the copy of a checkpoint was cut. Raises CheckpointCorrupt."""
    path = f"{folder_of(manifest.checkpoint)}/{COPY}"
    try:
        values = json.loads(objects.read(path, _MOST_MANIFEST_BYTES))
        claimed = values.pop("checksum")
        if claimed != _checksum(values):
            raise ValueError("its checksum differs")
        if values["format_version"] != _VERSION:
            raise ValueError("a later dcres made it; use that one")
        lengths = Lengths(values["piece_bytes"], values["memory_bytes"])
        _require_plausible(lengths, manifest)
    except NotFound:
        raise damaged(objects, path, "it is missing") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise damaged(objects, path, f"it says nothing of a copy ({error})") from None
    return lengths


def _require_plausible(lengths: Lengths, manifest: Manifest) -> None:
    numbers = [lengths.piece_bytes, *lengths.memory_bytes.values()]
    if not all(type(each) is int and each >= 0 and each % PAGE_SIZE == 0 for each in numbers):
        raise ValueError("a length is not a number of pages")
    if not lengths.piece_bytes:
        raise ValueError("its pieces are empty")
    most = {part.host: part.pages * PAGE_SIZE for part in manifest.hosts if not part.segments}
    if lengths.memory_bytes.keys() != most.keys():
        raise ValueError("its hosts are not the manifest's")
    if any(length > most[host] for host, length in lengths.memory_bytes.items()):
        raise ValueError("a memory file has more pages than were saved")


def published(manifest: Manifest) -> tuple[str, bytes]:
    """Path and content of the object that makes a copy exist."""
    path = f"{folder_of(manifest.checkpoint)}/{layout.MANIFEST}"
    return path, dumps(manifest).encode("ascii")


def damaged(objects: Objects, path: str, what: str) -> CheckpointCorrupt:
    """The error for an object; `what` says in a clause what is wrong with it."""
    return CheckpointCorrupt(f"{objects.url.of(path)}: {what}; {_REMEDY}")


def _checksum(values: object) -> str:
    return hashlib.sha256(canonical(values)).hexdigest()
