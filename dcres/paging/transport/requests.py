"""What is asked on a link, and who is told what comes of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias

import numpy as np

from dcres.errors import PagingError
from dcres.model.pages import Extents, Mask, Pages, pages_of_extents
from dcres.model.wire import Kind

if TYPE_CHECKING:
    from dcres.paging.transport.link import Link

Runs: TypeAlias = list[tuple[int, int]]


class Request(NamedTuple):
    """A request that waits for its answer."""

    number: int
    kind: Kind
    extents: Extents | Runs  # runs for a page-in, which is in a hurry

    @property
    def pages(self) -> Pages:
        """Every page of it."""
        return pages_of_extents(np.asarray(self.extents, dtype=np.int64).reshape(-1, 2))


class LinkUser(Protocol):
    """Who is told what happens on a link."""

    def expected(self, link: Link, first: int, count: int) -> Mask:
        """Which pages the network page table places on this link's host."""

    def link_ready(self, link: Link) -> None:
        """Requests may be sent from now on."""

    def link_down(self, link: Link, unanswered: list[Request]) -> None:
        """The connection ended; these requests were not answered and will not be."""

    def pages_arrived(self, link: Link, runs: Runs, address: int) -> None:
        """The data of `runs`, which were asked for, one after the other in memory at `address`."""

    def pages_put(self, link: Link, first: int, stop: int, at_ns: int) -> None:
        """The same, of one run that is in place and in the table since `at_ns`."""

    def pages_stored(self, link: Link, extents: Extents) -> None:
        """The server holds these pages."""

    def pages_fetched(self, link: Link, asked: Extents, stored: Extents) -> None:
        """Of `asked`, the server has fetched `stored` from another one and holds them."""

    def memory_lost(self, why: PagingError) -> None:
        """Pages are gone: the VM cannot go on."""
