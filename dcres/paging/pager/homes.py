"""Where pages go: each region of memory has a sub host of its own, as long as there is room."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dcres.model.pages import Mask, Pages
from dcres.paging.pager.share import STEP_PAGES
from dcres.paging.transport.link import Link

REGION_PAGES = 512
_GOLDEN = 0.6180339887498949


def homes_of(page_count: int, capacities: Sequence[int]) -> npt.NDArray[np.int64]:
    """The index of each region's sub host, in proportion to the capacities.

    Multiples of the golden ratio fall evenly into the unit interval, so that any stretch of
    memory is spread over the sub hosts as well as the whole of it is.
    """
    regions = np.arange(-(-page_count // REGION_PAGES))
    bounds = np.cumsum(capacities) / max(sum(capacities), 1)
    return np.searchsorted(bounds[:-1], regions * _GOLDEN % 1.0, side="right")


class Homes:
    """The sub hosts that pages may go to."""

    def __init__(self, page_count: int, links: Sequence[Link]) -> None:
        self._links = links
        self._homes = homes_of(page_count, [link.sub.capacity_pages for link in links])

    @property
    def wanted(self) -> bool:
        """Whether any sub host is to take pages."""
        return any(link.sub.capacity_pages for link in self._links)

    @property
    def any(self) -> bool:
        """Whether there is any sub host."""
        return bool(self._links)

    def roomiest(self) -> Link | None:
        """The sub host with the most room; None when none has any."""
        # Each RELEASE costs both sides 0.2 ms, and one is sent ahead of the batch in any case.
        if all(link.room_pages < STEP_PAGES for link in self._links):
            for link in self._links:
                link.flush_releases()
        roomy = [link for link in self._links if link.room_pages > 0]
        return max(roomy, key=lambda link: link.room_pages, default=None)

    def destination(self, pages: Pages, roomiest: Link) -> tuple[Link, Mask]:
        """Where the first of `pages` goes, and which of them go with it.

        Neighbours stay together, which makes fault-around find them and files long stretches.
        """
        homes = self._homes[pages // REGION_PAGES]
        link = self._links[int(homes[0])]
        together: Mask = homes == homes[0]
        if link.room_pages < pages.size:
            link.flush_releases()
        if link.room_pages < pages.size:
            link, together = roomiest, np.ones(pages.size, dtype=np.bool_)
        together[link.room_pages :] = False
        return link, together
