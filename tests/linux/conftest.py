"""What the tests against the kernel share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paging import build_writer


@pytest.fixture(scope="session")
def writer_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_writer(tmp_path_factory.mktemp("writer"))


@pytest.fixture
def ram_path() -> Iterator[Path]:
    """Where a test may have a RAM file; it is gone afterwards."""
    path = Path(f"/dev/shm/dcres-test-{os.getpid()}.ram")
    yield path
    path.unlink(missing_ok=True)
