"""What is asked on a link."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np

from dcres.model.pages import Extents, Pages, pages_of_extents
from dcres.model.wire import Kind

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
