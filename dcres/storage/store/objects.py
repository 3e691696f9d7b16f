"""Objects below a URL, through `pyarrow.fs`: what copies of checkpoints consist of.

An object is put in one call, from bytes that are there as a whole. pyarrow publishes what was
written so far when an exception leaves a ``with`` block, or when a stream is dropped; a stream
that was given everything in one go has nothing else to publish.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from dcres.errors import ConfigError, NotFound, StorageError
from dcres.storage.atomic import make_private_dirs, write_durably
from dcres.storage.store.copy_url import CopyUrl

# One request for an object of up to 10 MB, where a multipart upload takes three.
_ONE_REQUEST = "allow_delayed_open=true"


class Objects:
    """The objects below `url`; paths are relative to it.

    Every method raises StorageError, which names the object and says what the store said.
    """

    def __init__(self, url: CopyUrl) -> None:
        """Raises ConfigError for a URL that pyarrow does not understand; asks nobody."""
        self.url = url
        try:
            self._fs, root = fs.FileSystem.from_uri(_with_one_request(url))
        except (pa.ArrowException, OSError, ValueError) as error:
            why = url.scrubbed(str(error))
            raise ConfigError(f"{url.shown} cannot be the place of copies: {why}") from None
        self._root = root.rstrip("/")
        self._is_local = isinstance(self._fs, fs.LocalFileSystem)

    def require_place(self) -> None:
        """Raises ConfigError unless the bucket, or the folder, is there: copies make neither."""
        place = self._root if self._is_local else self._root.partition("/")[0]
        with self._told("", "cannot be looked at"):
            found = self._fs.get_file_info(place or "/")
        if found.type is not fs.FileType.Directory:
            what = "folder" if self._is_local else "bucket"
            raise ConfigError(f"there is no {what} {self.url.shown}; make it, or correct the URL")

    def put(self, path: str, data: bytes | memoryview) -> None:
        """Make an object, or replace it: all of it or none, durable on return. Raises StoreFull."""
        full = self._full(path)
        with self._told(path, "could not be written"):
            if self._is_local:  # pyarrow neither syncs a file nor renames it into its place
                make_private_dirs(Path(full).parent)
                write_durably(Path(full), data)
                return
            stream = self._fs.open_output_stream(full)
            stream.write(data)
            stream.close()

    def read_into(self, path: str, buffer: memoryview) -> bool:
        """Fill `buffer` from an object; whether that is there, and just as long."""
        try:
            with (
                self._told(path, "cannot be read"),
                self._fs.open_input_file(self._full(path)) as stream,
            ):
                return bool(stream.size() == len(buffer)) and _filled(stream, buffer)
        except NotFound:
            return False

    def read(self, path: str, most_bytes: int) -> bytes:
        """The content of a small object. Raises NotFound; StorageError beyond `most_bytes`."""
        with (
            self._told(path, "cannot be read"),
            self._fs.open_input_file(self._full(path)) as stream,
        ):
            length_bytes = stream.size()
            if length_bytes <= most_bytes:
                return bytes(stream.read(length_bytes))
        raise StorageError(
            f"{self.url.of(path)} has {length_bytes} bytes, so it is none of dcres's"
        )

    def lengths(self, path: str) -> dict[str, int]:
        """What is listed below `path`: the lengths of objects, by their paths.

        Some object stores list late what was put or removed.
        """
        return {
            info.path.removeprefix(f"{self._root}/"): info.size
            for info in self._listed(path, recursive=True)
            if info.type is fs.FileType.File
        }

    def length(self, path: str) -> int | None:
        """The length of one object, without a listing; None if it is not there."""
        with self._told(path, "cannot be looked at"):
            info = self._fs.get_file_info(self._full(path))
        return info.size if info.type is fs.FileType.File else None

    def folders(self, path: str = "") -> list[str]:
        """The names below `path` that have something below them, sorted."""
        found = self._listed(path, recursive=False)
        return sorted(info.base_name for info in found if info.type is fs.FileType.Directory)

    def _listed(self, path: str, *, recursive: bool) -> list[fs.FileInfo]:
        selector = fs.FileSelector(self._full(path), allow_not_found=True, recursive=recursive)
        with self._told(path, "cannot be listed"):
            found: list[fs.FileInfo] = self._fs.get_file_info(selector)
        return found

    def _full(self, path: str) -> str:
        return f"{self._root}/{path}" if path else self._root

    @contextmanager
    def _told(self, path: str, what: str) -> Iterator[None]:
        where = self.url.of(path) if path else self.url.shown
        try:
            yield
        except FileNotFoundError:
            raise NotFound(f"{where} is not there") from None
        except (pa.ArrowException, OSError) as error:
            why = self.url.scrubbed(str(error)).rstrip(".")
            raise StorageError(
                f"{where} {what}: {why}; look at that place and at the credentials for it, then "
                "repeat the command, which goes on where it was"
            ) from None


def _with_one_request(url: CopyUrl) -> str:
    if not url.whole.startswith("s3:") or _ONE_REQUEST.partition("=")[0] in url.whole:
        return url.whole
    return f"{url.whole}{'&' if '?' in url.whole else '?'}{_ONE_REQUEST}"


def _filled(stream: pa.NativeFile, buffer: memoryview) -> bool:
    done = 0
    while done < len(buffer):
        count = stream.readinto(buffer[done:])
        if not count:
            return False
        done += count
    return True
