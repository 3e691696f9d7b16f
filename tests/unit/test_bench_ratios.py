"""What figures 9 and 10 measure, and against what."""

from __future__ import annotations

from pathlib import Path

import pytest

from dcres import bench
from dcres.bench import ratios
from dcres.bench.result import Row, Setup, ratio_spreads

NAMES = {f"ratio_{main}_{8 - main}" for main in range(1, 8)}


@pytest.mark.parametrize("name", ["figure9", "figure10"])
def test_every_ratio_is_there_against_the_even_split(name: str) -> None:
    found = bench._BENCHES[name].ratios
    assert set(found) == NAMES
    assert {ratio.under for ratio in found.values()} == {found["ratio_4_4"].over}
    rows = [Row(each.over, 0, float(place), "s") for place, each in enumerate(found.values(), 1)]
    assert ratio_spreads(rows, found)["ratio_4_4"].median == 1


@pytest.mark.parametrize("parts", ratios.MAIN_PARTS)
@pytest.mark.parametrize("memory", [ratios.MEMORY_MIB, ratios.QUICK_MEMORY_MIB])
def test_shares_add_up_to_the_memory(parts: int, memory: int) -> None:
    layout = ratios.layout_at(parts, memory)
    assert sum(layout.shares) == memory << 20
    assert layout.main * 8 == parts * sum(layout.shares)


@pytest.mark.parametrize(
    ("quick", "parts"), [(False, (7, 6, 5, 4, 3, 2, 1)), (True, (7, 4, 1))], ids=["full", "quick"]
)
def test_rounds_go_down_and_up_again(quick: bool, parts: tuple[int, ...]) -> None:
    setup = Setup(quick, Path(), print)
    assert [ratios.order(setup, at) for at in range(3)] == [parts, parts[::-1], parts]


def test_quick_is_smaller() -> None:
    sizes = [ratios.memory_mib(Setup(quick, Path(), print)) for quick in (True, False)]
    assert sizes == [512, 1024]


def test_a_curve_has_a_label_for_each_point() -> None:
    figure = ratios.figure("it", "restore", "tab:blue")
    assert figure.labels[0] == "1:7"
    assert figure.whats[0] == "restore_1_7"
    assert len(figure.labels) == len(figure.whats) == 7
