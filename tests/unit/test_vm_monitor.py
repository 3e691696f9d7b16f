"""What is decided from QEMU's own description of itself."""

from __future__ import annotations

from typing import Any

import pytest

from dcres.vm.monitor import RunState, _knows_file_uri

OTHER: list[dict[str, Any]] = [
    {"name": "0", "meta-type": "object", "members": []},
    {"name": "1", "meta-type": "enum", "values": ["file", "block"]},
]


@pytest.mark.parametrize(
    ("transports", "known"),
    [
        ([], False),  # 7.2 describes no transports
        (["socket", "exec", "rdma"], False),  # 8.2 development
        (["socket", "exec", "rdma", "file"], True),
    ],
)
def test_file_transport(transports: list[str], known: bool) -> None:
    schema = [*OTHER, {"name": "2", "meta-type": "enum", "values": transports}]
    assert _knows_file_uri(schema) is known


def test_every_run_state_is_spelled_as_qemu_does() -> None:
    assert all(state.value == state.name.lower().replace("_", "-") for state in RunState)
