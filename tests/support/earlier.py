"""The checkpoints that earlier versions of dcres took: see `tests/fixtures/README.md`."""

from __future__ import annotations

import tarfile
from pathlib import Path

from dcres.storage.format.manifest import Manifest
from dcres.storage.store.store import Store

FIXTURES = Path(__file__).parents[1] / "fixtures"
VERSIONS = (1, 2)
PAGES = (253, 120, 0)  # of each host


def unpacked(store: Store, version: int) -> Manifest:
    """Put the checkpoint of that format into `store`, which has no other of its VM."""
    store.root.mkdir(exist_ok=True)
    with tarfile.open(FIXTURES / f"format{version}.tar.xz") as archive:
        if hasattr(tarfile, "data_filter"):  # Debian 12's Python is older than that
            archive.extraction_filter = tarfile.data_filter
        archive.extractall(store.root)
    (listed,) = store.list("kept")
    assert listed.manifest is not None, listed.error
    return listed.manifest
