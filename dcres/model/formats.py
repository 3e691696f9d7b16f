"""The formats of memory files, and which one is taken unless another is asked for."""

from __future__ import annotations

from enum import StrEnum


class MemoryFormat(StrEnum):
    """How a host's pages lie in its memory file; `storage.engine.page_places` writes them."""

    SPARSE = "sparse"
    PACKED = "packed"


DEFAULT_FORMAT = MemoryFormat.PACKED
