"""Swapping on purpose, for benchmarks: it happens, and nothing of it is left."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dcres.bench.squeeze import memory_cgroup, swap_file
from dcres.errors import UnsupportedHost

pytestmark = pytest.mark.linux

MIB = 1 << 20
HOLD = "import sys; held = b'x' * (96 << 20); print('ready', flush=True); sys.stdin.read()"


@pytest.fixture(autouse=True)
def able(tmp_path: Path) -> None:
    """Containers may have neither."""
    try:
        with memory_cgroup(), swap_file(tmp_path / "try", MIB) as swap:
            swap.on()
    except UnsupportedHost as error:
        pytest.skip(str(error))


def swapping(path: Path) -> bool:
    return str(path) in Path("/proc/swaps").read_text()


def test_a_process_is_squeezed_and_nothing_is_left(tmp_path: Path) -> None:
    file = tmp_path / "swap"
    groups = set(Path("/sys/fs/cgroup").rglob("dcres-*"))
    with swap_file(file, 128 * MIB) as swap, memory_cgroup() as cgroup:
        argv = [sys.executable, "-c", f"input(); {HOLD}"]
        with subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            cgroup.add(process.pid)
            process.stdin.write("go\n")
            process.stdin.flush()
            assert process.stdout.readline() == "ready\n"
            assert cgroup.private_bytes > 96 * MIB
            swap.on()
            cgroup.limit(48 * MIB)
            assert cgroup.used_bytes <= 48 * MIB
            assert swapping(file)
            cgroup.limit(None)
            swap.off()
            assert cgroup.private_bytes > 96 * MIB
            swap.on()
            process.kill()
    assert not swapping(file)
    assert not file.exists()
    assert set(Path("/sys/fs/cgroup").rglob("dcres-*")) <= groups


def test_a_failure_leaves_nothing_either(tmp_path: Path) -> None:

    def fail() -> None:
        with swap_file(tmp_path / "swap", 16 * MIB) as swap:
            swap.on()
            raise LookupError

    with pytest.raises(LookupError):
        fail()
    assert not swapping(tmp_path / "swap")
