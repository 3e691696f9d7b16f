"""What benchmarks make of their rows, and the page that is written of them."""

from __future__ import annotations

import io
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from dcres import bench
from dcres.bench import __main__ as script
from dcres.bench import page, paging
from dcres.bench.command import bench_command, view
from dcres.bench.machine import machine, versions
from dcres.bench.result import (
    Aim,
    Bench,
    Direction,
    Ratio,
    Result,
    Row,
    Spread,
    missed_aims,
    ratio_spreads,
    spreads,
)
from dcres.errors import ConfigError, NotFound, UnsupportedHost

ROWS = (
    Row("paged", 0, 10.0, "MB/s", {"pages": 7}),
    Row("local", 0, 100.0, "MB/s"),
    Row("paged", 1, 30.0, "MB/s"),
    Row("local", 1, 60.0, "MB/s"),
    Row("paged", 2, 20.0, "MB/s"),
)


def test_spread_over_the_rounds() -> None:
    assert spreads(ROWS) == {"paged": Spread(20, 10, 30), "local": Spread(80, 60, 100)}


def test_ratios_are_made_within_a_round() -> None:
    found = ratio_spreads(ROWS, {"paged_over_local": Ratio("paged", "local")})
    assert found == {"paged_over_local": Spread(0.3, 0.1, 0.5)}


def test_a_ratio_of_what_was_not_measured_side_by_side_is_an_error() -> None:
    with pytest.raises(NotFound, match="needs paged and nothing"):
        ratio_spreads(ROWS, {"it": Ratio("paged", "nothing")})


@pytest.mark.parametrize(
    ("direction", "value", "missed"),
    [
        (Direction.AT_MOST, 20, []),
        (Direction.AT_MOST, 19, ["paged is 20 MB/s; the aim is at most 19 MB/s"]),
        (Direction.AT_LEAST, 20, []),
        (Direction.AT_LEAST, 21, ["paged is 20 MB/s; the aim is at least 21 MB/s"]),
    ],
)
def test_aims(direction: Direction, value: float, missed: list[str]) -> None:
    aim = Aim("paged", direction, value, "MB/s")
    assert missed_aims(spreads(ROWS), [aim]) == missed


def test_an_aim_that_nothing_was_measured_for_is_not_reached() -> None:
    assert missed_aims({}, [Aim("it", Direction.AT_MOST, 1)]) == ["it was not measured"]


def result(name: str = "paging") -> Result:
    rows = tuple(
        Row(what, at, 300.0 + at, panel.unit, {"missed": 3})
        for panel in bench.figures(name)
        for what in panel.whats
        for at in range(2)
    )
    ratios = {"page_in_over_link": Spread(0.25, 0.2, 0.3)}
    not_reached = tuple(missed_aims({**spreads(rows), **ratios}, bench.aims(name)))
    here = machine(Path("/tmp"))
    return Result(name, here, versions(), (f"x {name}",), rows, ratios, not_reached)


def test_json_has_the_documented_keys_and_comes_back() -> None:
    one = result()
    values = json.loads(json.dumps(one.to_dict()))
    assert list(values) == [
        "bench",
        "machine",
        "versions",
        "commands",
        "rows",
        "ratios",
        "not_reached",
    ]
    assert values["ratios"]["page_in_over_link"] == {"median": 0.25, "min": 0.2, "max": 0.3}
    assert values["rows"][0]["missed"] == 3
    assert Result.from_dict(values) == one


def test_the_page_tells_what_was_reached_and_what_was_not(tmp_path: Path) -> None:
    figures = tmp_path / "figures"
    page.save(result(), figures)
    (figures / "paging.png").touch()
    page.write(tmp_path / "measurements.md", figures)
    text = (tmp_path / "measurements.md").read_text()
    assert "## paging: " in text
    assert "| `page_in` | 300 | 300 | 301 | MB/s |" in text
    assert "- **not reached**: page_in_single_median is 300.5 µs; the aim is at most 200 µs" in text
    assert "![paging](figures/paging.png)" in text
    assert "## checkpoint" not in text, "nothing was measured for it"


def test_a_result_is_shown_with_its_units_and_missed_aims() -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(view(result()))
    text = console.export_text()
    assert "page_in_over_link" in text
    assert "MB/s" in text
    assert "not reached: page_in_single_median is 300.5 µs" in text


def test_plots_are_drawn(tmp_path: Path) -> None:
    for name in bench.NAMES:
        assert page.plot(result(name), bench.figures(name), tmp_path)
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_every_aim_ratio_and_figure_has_a_unit_or_is_measured() -> None:
    for name in bench.NAMES:
        assert bench.about(name)
        assert len({panel.title for panel in bench.figures(name)}) == len(bench.figures(name))


def test_a_benchmark_that_is_not_known() -> None:
    with pytest.raises(ConfigError, match="figure99; there are figure7, figure8"):
        bench.run("figure99")


def test_the_ratios_of_paging_that_scripts_read_are_there() -> None:
    assert {
        "page_in_over_c_handler",
        "page_in_over_link",
        "half_remote_over_local",
        "half_remote_over_cgroup_swap",
    } <= paging.BENCH.ratios.keys()


def test_a_quick_run_has_the_ratios_of_what_it_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    ratios = {"it": Ratio("paged", "local"), "more": Ratio("paged", "large")}
    aims = (Aim("more", Direction.AT_MOST, 1),)
    made = Bench("made", "made up", lambda setup: list(ROWS), ratios, aims, ())
    monkeypatch.setitem(bench._BENCHES, "made", made)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    found = bench.run("made", quick=True)
    assert list(found.ratios) == ["it"]
    assert found.not_reached == ("more was not measured",)
    with pytest.raises(NotFound, match="more needs paged and large"):
        bench.run("made")


def test_a_plot_leaves_out_what_a_quick_run_did_not_measure(tmp_path: Path) -> None:
    few = result("restore")
    few = replace(few, rows=few.rows[:4])
    assert page.plot(few, bench.figures("restore"), tmp_path)


def test_a_panel_with_nothing_in_it_is_left_out(tmp_path: Path) -> None:
    few = result("figure7")
    few = replace(few, rows=tuple(row for row in few.rows if "_at_" not in row.what))
    assert page.plot(few, bench.figures("figure7"), tmp_path)
    with_all = tmp_path / "all"
    with_all.mkdir()
    assert page.plot(result("figure7"), bench.figures("figure7"), with_all)
    widths = [png_width(folder / "figure7.png") for folder in (tmp_path, with_all)]
    assert widths[0] * 3 == widths[1] * 2, "two panels of three"


def png_width(path: Path) -> int:
    return int.from_bytes(path.read_bytes()[16:20], "big")


def test_the_machine_is_described() -> None:
    described = machine(Path("/tmp"))
    assert described["cpus"] >= 1
    assert described["memory_bytes"] > 1 << 28
    assert described["file_system"]
    assert versions()["linux"]


def test_all_of_them_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, bool]] = []
    one = result()

    def run(name: str, *, quick: bool, **_: object) -> Result:
        ran.append((name, quick))
        if name == "live":
            raise UnsupportedHost("no QEMU here")
        return replace(one, bench=name)

    monkeypatch.setattr(bench, "run", run)
    values, told, status = bench_command("all", quick=True)
    assert ran == [(name, True) for name in bench.NAMES]
    assert values["failed"] == {"live": "no QEMU here"}
    assert [each["bench"] for each in values["results"]] == [n for n in bench.NAMES if n != "live"]
    assert status == 1
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(told)
    assert "live failed: no QEMU here" in console.export_text()


class TestScript:
    """`python -m dcres.bench`, which scripts/bench runs: as `dcres bench`, and it keeps results."""

    @pytest.fixture(autouse=True)
    def fake(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def run(name: str, **_: object) -> Result:
            if name == "live":
                raise UnsupportedHost("no QEMU here")
            return replace(result(), bench=name)

        monkeypatch.setattr(bench, "run", run)
        monkeypatch.setattr(page, "plot", lambda *_: True)
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        monkeypatch.chdir(tmp_path)

    def test_goes_on_after_one_that_fails(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert script.main(["--docs", str(tmp_path), "live", "paging"]) == 1
        assert [each.bench for each in page.load(tmp_path / "figures")] == ["paging"]
        assert "error: live failed: no QEMU here" in capsys.readouterr().err

    def test_a_wrong_name_is_found_before_anything_runs(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert script.main(["paging", "nix"]) == 2
        assert "no benchmark is called nix" in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []

    def test_a_short_run_leaves_the_page_alone(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert script.main(["--quick", "paging"]) == 0
        (folder,) = tmp_path.iterdir()
        assert folder.name.startswith("dcres-bench-quick-")
        assert f"the page is {folder}/measurements.md" in capsys.readouterr().err
        assert script.main(["paging"]) == 0
        assert (tmp_path / "docs" / "measurements.md").exists()
        assert script.main(["--quick", "--docs", "named", "paging"]) == 0
        assert (tmp_path / "named" / "measurements.md").exists()
