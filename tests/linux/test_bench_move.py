"""The benchmark of moving memory: it measures what it says, and leaves no network behind."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest

from dcres.bench import move
from dcres.bench.result import Setup, ratio_spreads

pytestmark = pytest.mark.linux

if shutil.which("tc") is None:
    pytest.skip("needs iproute2", allow_module_level=True)

NAMED = Path("/run/netns")


def namespaces() -> set[str]:
    return {path.name for path in NAMED.glob("dcres-*")}


def test_one_round(tmp_path: Path) -> None:
    rows = {row.what: row for row in move.measure(Setup(True, tmp_path, print), 1)}
    assert all(0 < row.value < 130 for what, row in rows.items() if what.endswith("_1gbit"))
    assert rows["move_loopback"].value > 0
    assert set(ratio_spreads(list(rows.values()), move.RATIOS)) == set(move.RATIOS)


def test_the_two_hosts_see_each_other_and_nobody_else_does() -> None:
    with move.one_gbit() as (left, right):
        with left.run(lambda: socket.create_server((left.address, 0))) as listener:
            port = listener.getsockname()[1]
            with right.run(lambda: socket.create_connection((left.address, port), 5)) as one:
                assert one.getpeername()[0] == left.address
            with pytest.raises(OSError, match="Cannot assign"):
                socket.create_server((left.address, 0))
        made = {str(left.namespace), str(right.namespace)}
        assert made <= namespaces()
    assert not made & namespaces()


def test_they_are_gone_after_an_error() -> None:
    with pytest.raises(KeyboardInterrupt), move.one_gbit() as (left, right):
        raise KeyboardInterrupt
    assert not {left.namespace, right.namespace} & namespaces()
