"""The formats of memory files, and which one is taken unless another is asked for."""

from __future__ import annotations

from enum import StrEnum


class MemoryFormat(StrEnum):
    """How a host's pages lie in its memory files; `storage.engine.page_places` writes them."""

    SPARSE = "sparse"
    PACKED = "packed"
    SEGMENTED = "segmented"  # packed, and only what the checkpoint before has not


WHOLE_FORMATS = (MemoryFormat.SPARSE, MemoryFormat.PACKED)  # of checkpoints that know no other
DEFAULT_FORMAT = MemoryFormat.SEGMENTED
