"""What all tests share: their order, the cluster, and the guard that nothing is left running."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import pytest
from hypothesis import settings

from dcres.linux.process import ProcessId, find_marked
from tests.support import prefork
from tests.support.cluster import cluster, unique
from tests.support.speed import SLOWNESS, patience

# How long one example takes says nothing on a machine that others use as well.
settings.register_profile("dcres", deadline=None)
settings.load_profile("dcres")

__all__ = ["cluster", "unique"]

ORDER = ("unit", "contracts", "simulation", "linux", "cluster", "vm", "crash")
MARK = "DCRES_TESTS"


# For pytest-timeout, which reads it before our own hooks run; a test may ask for longer.
os.environ.setdefault("PYTEST_TIMEOUT", f"{patience(300):.0f}")


def pytest_report_header() -> str:
    return f"limits against hanging are multiplied by {SLOWNESS:.1f}"


def pytest_configure(config: pytest.Config) -> None:
    # Whatever these tests start inherits the mark, and nothing else on the machine has it.
    os.environ[MARK] = secrets.token_hex(8)


def _place(item: pytest.Item) -> int:
    folder = item.path.relative_to(Path(__file__).parent).parts[0]
    return ORDER.index(folder) if folder in ORDER else len(ORDER)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Cheap tests first: from pure functions to whole VMs under random kills.

    Where several processes share the work it is the other way round: a long file that is begun
    last would have everybody wait for it.
    """
    items.sort(key=_place, reverse="PYTEST_XDIST_WORKER" in os.environ)


def _describe(process: ProcessId) -> str:
    return f"{process.pid} {' '.join(process.argv)[:120]}"


def pytest_sessionfinish(session: pytest.Session) -> None:
    """The run fails if a process that it started still runs."""
    prefork.close()
    left = [process for process in find_marked(MARK, os.environ[MARK]) if process.alive]
    if not left:
        return
    print("\nleft running by the tests, ended now:")
    for process in left:
        print("   ", _describe(process))
        process.kill()
    session.exitstatus = pytest.ExitCode.TESTS_FAILED
