"""The parts of the benchmarks figure8 and peers that measure nothing themselves."""

from __future__ import annotations

import itertools
import os
import platform
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dcres import bench
from dcres.bench import backport, figure8, fio, plain
from dcres.bench.backport import QemuProgram
from dcres.bench.peers import balanced_orders
from dcres.bench.result import Bench, Ratio, Row
from dcres.errors import StorageError, UnsupportedHost
from dcres.linux.files import data_extents, opened
from dcres.model.pages import PAGE_SIZE, extents_of_mask
from tests.support.stored import memory

REPORT = """fio: this is a warning
{"jobs": [{"write": {"io_bytes": 3000, "runtime": 2}, "read": {"io_bytes": 0, "runtime": 0}}]}
"""


def test_fios_rate_is_bytes_per_second() -> None:
    assert fio.rate_of(REPORT, "write") == 1_500_000


def test_without_fio_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UnsupportedHost, match="apt install fio"):
        fio.require()


@pytest.mark.parametrize("name", figure8.PLACEMENTS)
def test_a_plain_file_holds_the_pages_and_gives_them_back(tmp_path: Path, name: str) -> None:
    count = 12_000
    mask = figure8.half_of(name, count)
    assert mask.sum() == count // 2
    source = memory(tmp_path / "ram", mask)
    pages = np.flatnonzero(mask)
    with opened(source, os.O_RDONLY) as fd:
        plain.save(tmp_path / "plain", fd, pages)
    content = np.frombuffer(source.read_bytes(), np.uint8).reshape(count, -1)
    assert (tmp_path / "plain").read_bytes() == content[mask].tobytes()
    with opened(tmp_path / "back", os.O_RDWR | os.O_CREAT) as fd:
        os.ftruncate(fd, count * PAGE_SIZE)
        plain.load(tmp_path / "plain", fd, pages)
        assert np.array_equal(data_extents(fd, count), extents_of_mask(mask))
    assert (tmp_path / "back").read_bytes() == source.read_bytes()


def test_a_plain_file_that_is_too_short_is_no_measurement(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(bytes(PAGE_SIZE))
    with (
        opened(tmp_path / "back", os.O_RDWR | os.O_CREAT) as fd,
        pytest.raises(StorageError, match="bytes were moved"),
    ):
        plain.load(tmp_path / "plain", fd, np.arange(2))


def test_pages_that_are_far_apart_are_gathered_one_by_one(tmp_path: Path) -> None:
    mask = np.zeros(50_000, dtype=np.bool_)
    mask[::5000] = True
    source = memory(tmp_path / "ram", mask)
    with opened(source, os.O_RDONLY) as fd:
        plain.save(tmp_path / "plain", fd, np.flatnonzero(mask))
        expected = b"".join(
            os.pread(fd, PAGE_SIZE, at * PAGE_SIZE) for at in range(0, 50_000, 5000)
        )
    assert (tmp_path / "plain").read_bytes() == expected


def test_alternating_pages_have_no_neighbours() -> None:
    assert not (np.diff(np.flatnonzero(figure8.half_of("alternating", 100))) == 1).any()


def answering(path: Path, text: str) -> QemuProgram:
    path.write_text(f"#!/bin/sh\ncat >/dev/null\necho '{text}'\n")
    path.chmod(0o700)
    return QemuProgram(str(path))


def test_a_qemu_is_asked_what_it_knows(tmp_path: Path) -> None:
    new = answering(tmp_path / "new", '{"return": [{"state": false, "capability": "mapped-ram"}]}')
    old = answering(tmp_path / "old", '{"return": [{"state": false, "capability": "multifd"}]}')
    assert new.knows("mapped-ram")
    assert not old.knows("mapped-ram")


def test_without_a_qemu_of_today_the_remedy_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backport, "QEMU", "no-such-qemu")
    other = {"ID": "debian", "VERSION_CODENAME": "buster"}
    monkeypatch.setattr(platform, "freedesktop_os_release", lambda: other)
    with pytest.raises(UnsupportedHost, match=r"install QEMU 9\.1 or newer"):
        backport.with_mapped_ram(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_fetch_that_fails_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backport, "QEMU", "no-such-qemu")
    debian = {"ID": "debian", "VERSION_CODENAME": "bookworm"}
    monkeypatch.setattr(platform, "freedesktop_os_release", lambda: debian)

    def fail(argv: list[str], **_: object) -> None:
        raise subprocess.CalledProcessError(100, argv, stderr="E: no network\n")

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(UnsupportedHost, match="apt-get -qq update failed: E: no network"):
        backport.with_mapped_ram(tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_a_peer_needs_may_be_missing_in_a_full_run(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Row("ours", 0, 2.0, "MB/s"), Row("theirs", 0, 1.0, "MB/s")]
    ratios = {"it": Ratio("ours", "theirs"), "more": Ratio("ours", "absent")}
    made = Bench("made", "made up", lambda _: rows, ratios, (), (), frozenset({"more"}))
    monkeypatch.setitem(bench._BENCHES, "made", made)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert list(bench.run("made").ratios) == ["it"]


def test_the_ratios_that_scripts_read_are_there() -> None:
    names = set(bench._BENCHES["figure8"].ratios)
    assert names >= {
        f"{what}_{form}_over_plain_{placement}"
        for what in ("checkpoint", "restore")
        for form in ("sparse", "packed")
        for placement in ("contiguous", "random", "alternating")
    }
    assert set(bench._BENCHES["peers"].ratios) >= {
        "save_packed_over_fio",
        "save_sparse_over_fio",
        "save_over_mapped_ram",
        "restore_over_mapped_ram",
        "save_over_qemu_stream",
        "restore_over_qemu_stream",
    }


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6])
def test_every_contender_takes_every_place_and_follows_every_other(count: int) -> None:
    orders = balanced_orders(count)
    places = Counter((place, each) for order in orders for place, each in enumerate(order))
    pairs = Counter(pair for order in orders for pair in itertools.pairwise(order))
    assert len(places) == count * count
    assert len(pairs) == count * (count - 1)
    assert len(set(places.values())) == len(set(pairs.values())) == 1
