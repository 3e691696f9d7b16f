"""What is done to every page: read from its place, summed, written to its place.

`bulk.c` does it for a whole batch in one call and without the interpreter's lock, where that
module was built; the functions named ``*_plain`` are the same in Python, and
docs/decisions/memory-format.md has what the difference is.
"""

from __future__ import annotations

import os
from itertools import pairwise
from types import ModuleType

import numpy as np
from xxhash import xxh3_64_intdigest

from dcres.model.pages import PAGE_SIZE, Extents, Pages, count_pages
from dcres.storage.digest import Sums

try:
    from dcres.storage.engine import _bulk
except ImportError:  # no compiler when dcres was installed
    NATIVE: ModuleType | None = None
else:
    NATIVE = _bulk

Runs = list[tuple[int, int]]

WIDEST_GAP = 16
_MOST_PIECES = os.sysconf("SC_IOV_MAX")


class EndOfFile(Exception):
    """A read met the end of the file."""


def read_fully(fd: int, buffer: memoryview, offset_bytes: int) -> None:
    """Fill `buffer` from `offset_bytes` on. Raises EndOfFile and OSError."""
    done = 0
    while done < len(buffer):
        count = os.preadv(fd, [buffer[done:]], offset_bytes + done)
        if count == 0:
            raise EndOfFile(offset_bytes + done)
        done += count


def write_fully(fd: int, data: memoryview, offset_bytes: int) -> None:
    """Write all of `data` at `offset_bytes`. Raises OSError."""
    done = os.pwrite(fd, data, offset_bytes)
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset_bytes + done)


def page_sums(data: memoryview, slots: Pages) -> Sums:
    """XXH3 of the pages of `data` at `slots` (page numbers within `data`), same shape."""
    if NATIVE is None:
        return page_sums_plain(data, slots)
    found: Sums = np.empty(len(slots), dtype=np.uint64)
    NATIVE.sums(data, np.ascontiguousarray(slots, dtype=np.int64), found)
    return found


def page_sums_plain(data: memoryview, slots: Pages) -> Sums:
    """See `page_sums`."""
    digests = [
        xxh3_64_intdigest(data[start : start + PAGE_SIZE]) for start in (slots * PAGE_SIZE).tolist()
    ]
    return np.array(digests, dtype=np.uint64)


def read_gathered(fd: int, buffer: memoryview, extents: Extents) -> tuple[Pages, Sums]:
    """Read the pages of a batch to the start of `buffer`, one after the other: slots and sums.

    preadv(2) puts every run where it belongs and a small gap between two into one small place, at
    the end of `buffer`, so nothing is copied afterwards and little is read for nothing: of pages
    that alternate with others, half the processor time of reading all and picking. A wide gap is
    another call. For tmpfs: a request to a disk would be cut at every piece. Raises EndOfFile and
    OSError.
    """
    slots = np.arange(count_pages(extents))
    if NATIVE is not None:
        sums: Sums = np.empty(len(slots), dtype=np.uint64)
        if NATIVE.gather(fd, buffer, np.ascontiguousarray(extents, dtype=np.int64), sums):
            return slots, sums
    elif gather_plain(fd, buffer, extents):
        return slots, page_sums(buffer, slots)
    _read_apart(fd, buffer, extents)
    return slots, page_sums(buffer, slots)


def gather_plain(fd: int, buffer: memoryview, extents: Extents) -> bool:
    """Whether all could be read; not when a signal came or the file ends. Raises OSError."""
    far = np.flatnonzero(extents[1:, 0] - extents[:-1, 1] > WIDEST_GAP) + 1
    done = 0
    for near in np.split(extents, far):
        if not _gather_near(fd, buffer[done * PAGE_SIZE :], near):
            return False
        done += count_pages(near)
    return True


def _gather_near(fd: int, buffer: memoryview, extents: Extents) -> bool:
    pieces = _pieces(buffer, extents)
    offset_bytes = int(extents[0, 0]) * PAGE_SIZE
    for at in range(0, len(pieces), _MOST_PIECES):
        some = pieces[at : at + _MOST_PIECES]
        length_bytes = sum(map(len, some))
        if os.preadv(fd, some, offset_bytes) != length_bytes:
            return False
        offset_bytes += length_bytes
    return True


def _pieces(buffer: memoryview, extents: Extents) -> list[memoryview]:
    """Where the extents of a batch go, and the gaps between them."""
    gap = buffer[-WIDEST_GAP * PAGE_SIZE :]
    pieces, done = [], 0
    position = int(extents[0, 0])
    for first, stop in extents.tolist():
        if first != position:
            pieces.append(gap[: (first - position) * PAGE_SIZE])
        end = done + (stop - first) * PAGE_SIZE
        pieces.append(buffer[done:end])
        position, done = stop, end
    return pieces


def _read_apart(fd: int, buffer: memoryview, extents: Extents) -> None:
    done = 0
    for first, stop in extents.tolist():
        end = done + (stop - first) * PAGE_SIZE
        read_fully(fd, buffer[done:end], first * PAGE_SIZE)
        done = end


def write_scattered(fd: int, data: memoryview, pages: Pages, slots: Pages) -> None:
    """Write page ``slots[i]`` of `data` to place ``pages[i]`` of the file, for every i.

    Neighbours in both are one call. Raises OSError; what was written until then is not known.
    """
    if NATIVE is None:
        scatter_plain(fd, data, pages, slots)
    else:
        both = (np.ascontiguousarray(each, dtype=np.int64) for each in (pages, slots))
        NATIVE.scatter(fd, data, *both)


def scatter_plain(fd: int, data: memoryview, pages: Pages, slots: Pages) -> None:
    """See `write_scattered`."""
    at = stretches(pages, slots)
    lows = [low for low, _ in at]
    firsts, places = slots[lows].tolist(), pages[lows].tolist()
    pwrite = os.pwrite
    # Most runs may be single pages, and then the calls cost as much as the copying.
    for (low, high), first, place in zip(at, firsts, places, strict=True):
        run = data[first * PAGE_SIZE : (first + high - low) * PAGE_SIZE]
        if pwrite(fd, run, place * PAGE_SIZE) != len(run):
            write_fully(fd, run, place * PAGE_SIZE)


def stretches(*columns: Pages) -> Runs:
    """Longest index ranges ``[low, high)`` in which every column goes up by one each time."""
    count = len(columns[0])
    if count == 0:
        return []
    cut = np.zeros(count - 1, dtype=np.bool_)
    for column in columns:
        cut |= np.diff(column) != 1
    starts = [0, *(np.flatnonzero(cut) + 1).tolist(), count]
    return list(pairwise(starts))
