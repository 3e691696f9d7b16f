"""Page numbers and extents: all page arithmetic of dcres.

A *page number* is the page's place in QEMU's RAM block, which is also its place in the RAM
file and in every memory file: byte offset = page number × `PAGE_SIZE`.

*Extents* are an ``int64`` array of shape ``(n, 2)``: rows ``[first, stop)`` in pages,
ascending, neither empty nor touching. They are what files, sockets and system calls want;
a boolean *mask* of one byte per page is what decisions want. Both convert to the other.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from dcres.errors import HostError

PAGE_SIZE = 4096
PAGES_PER_MIB = (1 << 20) // PAGE_SIZE

Mask = npt.NDArray[np.bool_]
Pages = npt.NDArray[np.int64]
Extents = npt.NDArray[np.int64]

EMPTY: Extents = np.empty((0, 2), dtype=np.int64)


def pages_of(length_bytes: int) -> int:
    """The number of pages in `length_bytes`; ValueError unless it is whole pages."""
    count, rest = divmod(length_bytes, PAGE_SIZE)
    if rest:
        raise ValueError(f"{length_bytes} bytes is not a multiple of {PAGE_SIZE}")
    return count


def mib_of(page_count: int) -> int:
    """How many MiB hold `page_count` pages: rounded up, as Ray counts and people read them."""
    return -(-page_count // PAGES_PER_MIB)


def extents_of_mask(mask: Mask) -> Extents:
    """The extents where `mask` is true. Takes one byte per page, besides what it returns."""
    if mask.size == 0:
        return EMPTY
    changes = np.empty(mask.size + 1, dtype=np.bool_)
    changes[0], changes[-1] = mask[0], mask[-1]
    np.not_equal(mask[1:], mask[:-1], out=changes[1:-1])
    return np.flatnonzero(changes).reshape(-1, 2).astype(np.int64, copy=False)


def extents_of_pages(pages: Pages) -> Extents:
    """The extents that cover ascending, distinct page numbers."""
    if pages.size == 0:
        return EMPTY
    breaks = np.flatnonzero(np.diff(pages) != 1)
    first = pages[np.concatenate(([0], breaks + 1))]
    last = pages[np.concatenate((breaks, [pages.size - 1]))]
    return np.stack((first, last + 1), axis=1)


def join(ranges: Extents) -> Extents:
    """Extents of the pages in `ranges`: non-empty ones that may touch or overlap, in any order."""
    if len(ranges) < 2:
        return ranges
    ranges = ranges[np.argsort(ranges[:, 0], kind="stable")]
    reached = np.maximum.accumulate(ranges[:, 1])
    apart = ranges[1:, 0] > reached[:-1]
    first = ranges[np.concatenate(([True], apart)), 0]
    stop = reached[np.concatenate((apart, [True]))]
    return np.stack((first, stop), axis=1)


def are_sound(extents: Extents, page_count: int) -> bool:
    """Whether no row is empty, overlaps, goes back, or leaves a memory of `page_count` pages.

    Rows may touch. Compared and not subtracted: what a peer sends could overflow.
    """
    if len(extents) == 0:
        return True
    first, stop = extents[:, 0], extents[:, 1]
    inside = first[0] >= 0 and stop[-1] <= page_count
    return bool(inside and (first < stop).all() and (stop[:-1] <= first[1:]).all())


def mask_of_extents(extents: Extents, page_count: int) -> Mask:
    """A mask of `page_count` pages that is true inside `extents`.

    Raises HostError unless they `are_sound`. They tell what this host has, and whoever reads a
    mask saves, loads or forgets pages by it: pages of a mask that is wrong would be lost.
    """
    if not are_sound(extents, page_count):
        raise HostError(
            f"{len(extents)} ranges of pages are not ascending within the {page_count} pages of "
            "a memory; another program changed a file of dcres, or the kernel's answer is wrong"
        )
    steps = np.zeros(page_count + 1, dtype=np.int8)
    steps[extents[:, 0]] += 1
    steps[extents[:, 1]] -= 1
    return np.cumsum(steps[:-1], dtype=np.int8).astype(np.bool_)


def pages_of_extents(extents: Extents) -> Pages:
    """Every page number in `extents`, ascending."""
    if extents.size == 0:
        return np.empty(0, dtype=np.int64)
    lengths = extents[:, 1] - extents[:, 0]
    starts = np.repeat(extents[:, 0] - np.concatenate(([0], np.cumsum(lengths)[:-1])), lengths)
    return starts + np.arange(lengths.sum(), dtype=np.int64)


def extents_within(extents: Extents, mask: Mask) -> Extents:
    """What of `extents` lies where `mask` is true; `extents` themselves if that is all."""
    pages = pages_of_extents(extents)
    here = mask[pages]
    return extents if here.all() else extents_of_pages(pages[here])


def count_pages(extents: Extents) -> int:
    """How many pages lie in `extents`."""
    if len(extents) == 1:  # the page-in path: numpy's sum takes longer than the copying
        return int(extents[0, 1]) - int(extents[0, 0])
    return int((extents[:, 1] - extents[:, 0]).sum())


def split_pages(extents: Extents, count: int) -> tuple[Extents, Extents]:
    """The first `count` pages of `extents`, and the others."""
    if count <= 0:
        return EMPTY, extents
    if count >= count_pages(extents):
        return extents, EMPTY
    pages = pages_of_extents(extents)
    return extents_of_pages(pages[:count]), extents_of_pages(pages[count:])


def split(extents: Extents, longest: int) -> Iterator[tuple[int, int]]:
    """`extents` in pieces ``(first, stop)`` of at most `longest` pages, in order."""
    for first, stop in extents.tolist():
        for start in range(first, stop, longest):
            yield start, min(start + longest, stop)
