"""What the tests against the kernel share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.paging import build_writer


@pytest.fixture(scope="session")
def writer_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_writer(tmp_path_factory.mktemp("writer"))
